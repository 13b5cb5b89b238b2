"""The atlas: complete, one answer per question, in agreement with others' data, and edits that
never ask for the truth."""

from __future__ import annotations

import csv
import json
from collections import Counter

import pytest

import qv_lens as qv
from qv_lens.errors import FactError
from qv_lens.evaluation.known_cases import knows
from qv_lens.facts.atlas import TABLES, Chain, bare, chains, edit_case, false_answers, question
from qv_lens.facts.categories import CATEGORIES, of_relation
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from tests.facts.samples import sample

FACTS = qv.atlas()
CHAINS = chains()
#: wordings of CounterFact that ask for a relation of the atlas and for nothing else
WORDINGS = {
    "P17": ["{} is located in the country of"],
    "P27": ["{} is a citizen of", "{} has a citizenship from", "{}, who has a citizenship from", "{}, a citizen of"],
    "P30": ["{} belongs to the continent of", "{} is a part of the continent of", "{} is located in the continent"],
    "P36": ["The capital of {} is", "The capital city of {} is", "{}'s capital city,", "{}, which has the capital city"],
    "P37": [
        "The official language of {} is", "In {}, an official language is", "In {}, the language spoken is",
        "In {}, they understand", "The law in {} declares the language",
    ],
    "P176": ["{}, created by", "{} is created by", "{}, produced by", "{} was developed by", "{}, a product developed by"],
    "P641": ["{} professionally plays the sport", "{} is a professional", "{} plays"],
}  # fmt: skip
#: where CounterFact says something else, all of them languages of a minority or of a region
#: (Wikidata counts these as well)
EXPLAINED = {
    (
        "P37",
        "Sweden",
        "Finnish",
    ): "a protected minority language; the main language by law is Swedish",
    ("P37", "Turkmenistan", "Russian"): "widely spoken, without official status",
    ("P37", "Russia", "Mari"): "official in the republic of Mari El",
    ("P37", "Malaysia", "English"): "the law of 1967 leaves Malay alone",
    ("P37", "Spain", "Catalan"): "official beside Spanish in three regions",
}


def rows(table):
    with (TABLES / f"{table}.tsv").open(encoding="utf-8") as file:
        return list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def accepted(fact):
    return {bare(name).casefold() for name in (fact.answer, *fact.aliases)}


def test_every_category_has_its_facts():
    counts = Counter(fact.category for fact in FACTS)
    assert set(counts) == {*CATEGORIES.values(), None}
    assert min(counts.values()) >= 60
    assert sum(counts.values()) == len(FACTS) > 1300
    for category in set(CATEGORIES.values()):
        assert len(qv.atlas(category)) == counts[category]
    assert all(fact.category == of_relation(fact) for fact in FACTS)
    with pytest.raises(
        FactError, match=r"Category 'cooking' not found\. Available: author, capital"
    ):
        qv.atlas("cooking")


def test_tables_are_whole():
    for path in TABLES.glob("*.tsv"):
        header, *lines = rows(path.stem)
        assert {len(line) for line in lines} == {len(header)}, path
        assert len({line[0] for line in lines}) == len(lines), path
        for field in (field for line in lines for field in line):
            assert field == field.strip(), (path, field)
            assert all(part and part == part.strip() for part in field.split(";")) or not field, (
                path,
                field,
            )
        if "as_of" in header:
            years = {line[header.index("as_of")] for line in lines}
            assert years <= {"2014", "2015", "2016"}


def test_facts_as_a_reader_of_the_tables_sees_them():
    """By hand, against the code's own columns."""
    told = {(fact.relation, fact.subject): fact for fact in FACTS}
    assert told["P36", "the Netherlands"].answer == "Amsterdam"
    assert told["P36", "the Netherlands"].subject_aliases == ("Netherlands", "Holland")
    assert told["P27", "Tim Duncan"].answer == "United States"
    assert {"the United States", "USA"} <= set(told["P27", "Tim Duncan"].aliases)
    assert told["P641", "Tim Duncan"].text == "As an athlete, Tim Duncan competed in the sport of"
    assert told["P17", "The Louvre"].subject_aliases == ("Louvre",)
    assert told["P50", "The Republic"].subject_aliases == ()
    assert told["P35", "Saudi Arabia"].paraphrases[0] == "The king of {} in 2016 was"
    assert question(told["P35", "Saudi Arabia"]) == "Who was the king of Saudi Arabia in 2016?"
    assert question(told["P131", "The Louvre"]) == "In which city is the Louvre located?"
    assert ("P37", "Switzerland") not in told


def test_one_answer_per_subject_and_relation():
    keys = Counter((fact.relation, bare(fact.subject)) for fact in FACTS)
    assert [key for key, count in keys.items() if count > 1] == []
    assert all(bare(fact.subject) != bare(fact.answer) for fact in FACTS)
    assert all(fact.answer not in fact.aliases for fact in FACTS)


def test_phrasings_have_one_place_and_end_before_the_answer():
    for fact in FACTS:
        prompts = (fact.prompt, *fact.paraphrases)
        assert len(set(prompts)) == 3
        for prompt in prompts:
            assert prompt.count("{}") == 1
            assert not prompt.endswith((" ", "{}", ".", "?"))
            assert "<" not in prompt
            assert prompt[0].isupper() or prompt.startswith("{}")
            text = prompt.replace("{}", fact.subject)
            assert not text.startswith("the "), text
        assert question(fact).endswith("?")
        assert bare(fact.subject) in question(fact)


def test_articles_stand_where_a_sentence_has_them():
    """No "of United States" and no "of The Louvre", in any text of the atlas."""
    texts = [chain.cloze for chain in CHAINS] + [chain.question for chain in CHAINS]
    texts += [
        prompt.replace("{}", f.subject) for f in FACTS for prompt in (f.prompt, *f.paraphrases)
    ]
    named = {bare(fact.subject) for fact in FACTS if fact.subject.startswith("the ")}
    landmarks = {fact.subject for fact in FACTS if fact.relation in ("P17", "P131", "P176")}
    assert "United States" in named
    for text in texts:
        assert not any(f"of {name}" in text or f"In {name}" in text for name in named), text
        assert not any(f" {name} " in text for name in landmarks if name.startswith("The ")), text
        assert "the the" not in text.lower()


def test_chains_compose():
    assert len(CHAINS) >= 300
    assert len({chain.cloze for chain in CHAINS}) == len(CHAINS)
    for chain in CHAINS:
        assert chain.first in FACTS
        assert chain.second in FACTS
        assert bare(chain.first.answer) == bare(chain.second.subject)
        assert bare(chain.first.subject) in chain.cloze
        assert bare(chain.first.subject) in chain.question
        assert chain.cloze[0].isupper()
        assert not chain.cloze.endswith((" ", "."))
        assert chain.question.endswith("?")
        for text in (chain.cloze, chain.question):
            assert "{" not in text
            assert "<" not in text
    said = {chain.cloze: chain for chain in CHAINS}
    tower = said["The capital of the country where the Eiffel Tower is located is"]
    assert tower.question == "What is the capital of the country where the Eiffel Tower is located?"
    assert tower.probe.answer == "Paris"
    assert said["The author of The Great Gatsby is a citizen of"].probe.answer == "United States"
    phone = said["In 2015, the CEO of the company that makes the iPhone was"]
    assert phone.probe.answer == "Tim Cook"
    with pytest.raises(FactError, match="These facts are not a chain"):
        Chain(tower.first, phone.second, tower.cloze, tower.question)


@pytest.mark.parametrize("seed", [0, 1])
def test_edits_never_ask_for_a_true_answer(seed):
    told = {(fact.relation, bare(fact.subject)): fact for fact in FACTS}
    by_text = {fact.text: fact for fact in FACTS}
    said = {chain.cloze: chain for chain in CHAINS}
    two_hop = 0
    for i, fact in enumerate(FACTS):
        case = edit_case(fact, seed)
        new = case.request.new
        assert case.request.fact == fact
        assert case.case_id == i
        assert bare(new).casefold() not in accepted(fact)
        assert new in {other.answer for other in FACTS if other.relation == fact.relation}
        assert [ask.text for ask in case.paraphrases] == [
            prompt.replace("{}", fact.subject) for prompt in fact.paraphrases
        ]
        assert len(set(case.neighbours)) == 5
        for near in case.neighbours:
            assert told[near.relation, bare(near.subject)] == near
            assert near.relation == fact.relation
            assert near.subject != fact.subject
            assert bare(new).casefold() not in accepted(near)
        assert case.generation[0] == fact.text
        assert case.generation[1][0].isupper() or case.generation[1].startswith("eBay"), fact
        groups = {**dict(case.portability), **dict(case.locality)}
        assert groups.get("Reasoning", ()) == tuple(after for _, after in case.onward)
        for probe in groups.get("Relation_Specificity", ()):
            other = by_text[probe.text]
            assert bare(other.subject) == bare(fact.subject)
            assert other.relation != fact.relation
            assert {other.relation, fact.relation} != {"P131", "P17"}  # a city has its country
            assert (probe.answer, probe.aliases) == (other.answer, other.aliases)
        two_hop += len(case.onward)
        for before, after in case.onward:  # by none of its names is the new answer the old one
            assert not {before.answer, *before.aliases} & {after.answer, *after.aliases}
        for before, after in case.onward:
            chain = said[before.text]
            assert before.text == after.text
            assert before.answer == chain.second.answer
            if chain.second == fact:
                assert after.answer == new
            else:
                assert chain.first == fact
                assert after.answer == told[chain.second.relation, bare(new)].answer
            assert bare(after.answer).casefold() not in accepted(chain.second)
    assert two_hop > 1500


def test_no_false_answer_is_true_by_another_name():
    """Of every fact and every answer of its relation, not only of those that a seed draws."""
    names = {fact.answer for fact in FACTS}
    shared = 0
    for fact in FACTS:
        false = {bare(answer).casefold() for answer in false_answers(fact)}
        assert false
        assert not false & accepted(fact)
        shared += bool(names & {*fact.aliases})
    assert shared  # answers of some facts are other names of others'


def test_edits_follow_the_seed():
    fact = FACTS[0]
    assert edit_case(fact, 3) == edit_case(fact, 3)
    assert len({edit_case(fact, seed).request.new for seed in range(20)}) > 10
    with pytest.raises(FactError, match="The fact 'X works for' is not in the atlas"):
        edit_case(qv.Fact("{} works for", "X", "Y"), 0)


def others():
    """(Relation, subject, answer) of ROME's known facts and of CounterFact, where the atlas has the
    relation."""
    for record in json.loads(sample("rome/known_1000.json").read_text()):
        yield record["relation_id"], record["subject"], record["attribute"]
    relation_of = {
        wording: relation for relation, wordings in WORDINGS.items() for wording in wordings
    }
    for record in json.loads(sample("counterfact/counterfact-edit-10k.json").read_text()):
        wording = record["prompt"].replace(record["subject"], "{}")
        if wording in relation_of:
            yield relation_of[wording], record["subject"], record["ground_truth"]


def test_agreement_with_the_data_of_others():
    told = {}
    for fact in FACTS:
        for name in (fact.subject, *fact.subject_aliases):
            told[fact.relation, bare(name)] = fact
    both = 0
    different = set()
    for relation, subject, answer in others():
        fact = told.get((relation, bare(subject)))
        both += fact is not None
        if fact is not None and bare(answer).casefold() not in accepted(fact):
            different.add((relation, subject, answer))
    assert both > 80
    assert different == set(EXPLAINED)


def test_known_facts_are_those_a_model_says():
    """On a model that knows its world: every fact against its own continuation, read in another
    way."""
    lens = qv.load("toy-gptj")
    world = generator.build(0)
    facts = [
        fact
        for relation in ("P36", "P641", "P112")
        for fact in world_cases.facts(world, relation)[:5]
    ]
    wrong = qv.Fact(facts[0].prompt, facts[0].subject, facts[1].answer)
    other_name = qv.Fact(facts[0].prompt, facts[0].subject, "Nowhere", aliases=(facts[0].answer,))
    beginning = qv.Fact(facts[0].prompt, facts[0].subject, facts[0].answer[:-1])
    facts += [wrong, other_name, beginning]
    kept, told = qv.known(lens, (fact for fact in facts), batch_size=4)
    assert list(told.columns) == ["prompt", "answer", "said", "right", "logprob"]
    assert told["prompt"].tolist() == [fact.text for fact in facts]
    assert told["right"].tolist()[-3:] == [False, True, False]
    expected = []
    for fact, row in zip(facts, told.itertuples(), strict=True):
        text = lens.generate(fact, 12)
        assert text.startswith(row.said)
        words = text.split()
        hit = any(
            " ".join(words[: len(name.split())]).strip(".,") == name
            for name in (fact.answer, *fact.aliases)
        )
        assert row.right == hit, (fact, text)
        assert row.logprob == pytest.approx(lens.logprob(fact), abs=1e-4)
        expected += [fact] if hit else []
    assert kept == expected
    assert len(kept) > 8
    assert knows(lens, facts) == told["right"].tolist()
    assert knows(lens, []) == []


def test_known_of_nothing_and_of_other_things():
    lens = qv.load("toy-gptj")
    kept, told = qv.known(lens, [])
    assert kept == []
    assert list(told.columns) == ["prompt", "answer", "said", "right", "logprob"]
    with pytest.raises(
        FactError, match="asks for several facts, got the single fact 'The capital of France is'"
    ):
        qv.known(lens, FACTS[0])
    with pytest.raises(
        FactError, match=r"asks for facts, got EditCase\. Of cases pass what they edit"
    ):
        qv.known(lens, [edit_case(FACTS[0])])
