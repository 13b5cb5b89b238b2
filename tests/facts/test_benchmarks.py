"""Readers: every record of the real samples reads or is refused with its field; formats without a
sample by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

import qv_lens as qv
from qv_lens.facts.benchmarks import by_split, named, parse, plain_facts, read, uncontaminated
from qv_lens.facts.categories import labelled, of_relation
from qv_lens.facts.corpora import corpus
from qv_lens.facts.mquake import leading_to
from qv_lens.facts.records import UNKNOWN, Fact, Hop, Probe
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from qv_lens.world.words import RELATIONS
from tests.facts.samples import sample

SAMPLES = {  # file: format, records read, records refused
    "mquake/MQuAKE-CF-3k.subset354.json": ("mquake", 354, 0),
    "counterfact/counterfact-edit-1k.json": ("flat", 1000, 0),
    "zsre/zsre_mend_train-1k.json": ("zsre", 998, 2),
    "ace/sample_data.json": ("mquake", 12, 0),
    "rome/known_1000.json": ("known", 1209, 0),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_record_of_the_samples_reads_or_is_refused(name):
    path, (format, good, bad) = sample(name), SAMPLES[name]
    got = read(path, skip=True)
    assert (got.format, len(got.cases) + len(got.facts), len(got.refused)) == (format, good, bad)
    assert good + bad == len(json.loads(path.read_text()))
    if bad:
        assert got.refused[["record", "field"]].values.tolist() == [[534, "alt"], [723, "alt"]]
        with pytest.raises(qv.QVLensError, match=r"record 534 .*field 'alt'.*2 are refused"):
            read(path)


def test_mquake_says_which_hop_is_edited_and_keeps_what_it_does_not_read():
    """Against the raw records: an edited hop's answer is the new object, every other hop of the
    chain is kept."""
    for name in ("mquake/MQuAKE-CF-3k.subset354.json", "ace/sample_data.json"):
        records = json.loads(sample(name).read_text())
        for record, case in zip(records, parse(records).cases, strict=True):
            assert [case.new_hops[i].answer for i in case.edited] == [
                r["target_new"]["str"] for r in record["requested_rewrite"]
            ]
            assert [r.fact.text for r in case.edits] == [
                r["prompt"].format(r["subject"]) for r in record["requested_rewrite"]
            ]
            assert dict(case.extra)["orig"] == record["orig"]
    # ACE's ten highest layers stay with the record
    got = dict(parse(records).cases[0].new_hops[0].__dict__)
    assert got["answer"] == "United Kingdom"
    assert "question_ffn" in dict(parse(records).cases[0].extra)["new_single_hops"][0]


def test_known_1000_prompts_are_those_of_the_file():
    records = json.loads(sample("rome/known_1000.json").read_text())
    assert [fact.text for fact in parse(records).facts] == [record["prompt"] for record in records]


# not checked against the real files: written by hand after the formats' descriptions
COUNTERFACT = {
    "case_id": 5, "pararel_idx": 1,
    "requested_rewrite": {"prompt": "{} plays", "relation_id": "P641", "subject": "Tim Duncan", "target_new": {"str": "football"}, "target_true": {"str": "basketball"}},
    "paraphrase_prompts": ["X. Tim Duncan plays"], "neighborhood_prompts": ["Larry Bird plays"], "attribute_prompts": ["Pele plays"],
    "generation_prompts": ["Tim Duncan is"],
}  # fmt: skip
KNOWEDIT = {
    "subject": "Tim Duncan", "prompt": "Tim Duncan plays", "target_new": "football", "ground_truth": [["basketball", "hoops"]],
    "portability": {"Reasoning": [{"prompt": "Tim Duncan's ball is", "ground_truth": [["round"], ["big"]]}], "Subject_Aliasing": []},
    "locality": {"Relation_Specificity": [{"prompt": "Tim Duncan was born in", "ground_truth": [["1976"]]}]},
}  # fmt: skip


PLAIN = {"prompt": "{} plays", "subject": "Pele", "answer": "football"}


def test_formats_without_a_sample_here():
    case = parse([COUNTERFACT]).cases[0]
    assert (case.case_id, case.request.new, case.request.fact.relation) == (5, "football", "P641")
    assert case.neighbours == (Probe("Larry Bird plays", "basketball"),)
    assert dict(case.extra) == {"pararel_idx": 1, "attribute_prompts": ["Pele plays"]}
    case = parse([KNOWEDIT]).cases[0]
    assert (case.request.fact.prompt, case.request.fact.answer, case.request.fact.aliases) == (
        "{} plays",
        "basketball",
        ("hoops",),
    )
    assert case.portability == (
        ("Reasoning", (Probe("Tim Duncan's ball is", "round", ("big",)),)),
    )  # the empty list is left out
    recent = {k: v for k, v in KNOWEDIT.items() if k != "ground_truth"}
    assert parse([recent]).cases[0].request.fact.answer == UNKNOWN
    old = {
        "text": "Tim Duncan plays",
        "concept": "Tim Duncan",
        "labels": "football",
        "portability": None,
        "locality": None,
    }
    assert parse([old]).cases[0].request.new == "football"


# MQuAKE-T has the keys of CF, and edits that are real changes; not checked against the real file
MQUAKE_T = {
    "case_id": 3, "questions": ["Who heads the country of X?"], "answer": "A", "answer_alias": [], "new_answer": "B", "new_answer_alias": ["Bee"],
    "requested_rewrite": [{"prompt": "The head of {} is", "relation_id": "P35", "subject": "Landia", "question": "Who heads Landia?", "target_true": {"str": "A"}, "target_new": {"str": "B"}}],
    "single_hops": [{"question": "Where is X?", "cloze": "X is in", "answer": "Landia", "answer_alias": []}, {"question": "Who heads Landia?", "cloze": "The head of Landia is", "answer": "A", "answer_alias": []}],
    "new_single_hops": [{"question": "Where is X?", "cloze": "X is in", "answer": "Landia", "answer_alias": []}, {"question": "Who heads Landia?", "cloze": "The head of Landia is", "answer": "B", "answer_alias": ["Bee"]}],
    "orig": {"triples": [["Q1", "P17", "Q2"], ["Q2", "P35", "Q3"]], "triples_labeled": [["X", "country", "Landia"], ["Landia", "head of state", "A"]],
             "new_triples": [["Q1", "P17", "Q2"], ["Q2", "P35", "Q4"]], "edit_triples": [["Q2", "P35", "Q4"]]},
}  # fmt: skip
FLAT = {
    "case_id": 1, "prompt": "Tim Duncan plays", "subject": "Tim Duncan", "ground_truth": "basketball", "target_new": "football",
    "rephrase_prompt": "X. Tim Duncan plays", "locality_prompt": "Pele plays", "locality_ground_truth": "football",
}  # fmt: skip
REWRITE = MQUAKE_T["requested_rewrite"][0]


def test_a_chain_knows_its_hops():
    case = parse([MQUAKE_T]).cases[0]
    assert case.edited == (1,)
    assert [(hop.subject, hop.relation) for hop in case.hops] == [("X", "P17"), ("Landia", "P35")]
    assert case.new_hops[1].relation == "P35"
    assert case.new_hops[1].subject is None  # its triples have no names here
    assert case.new_hops[1].aliases == case.new_aliases == ("Bee",)


@pytest.mark.parametrize(("record", "field"), [
    ({**COUNTERFACT, "neighborhood_prompts": "one text"}, "neighborhood_prompts"),
    ({k: v for k, v in COUNTERFACT.items() if k != "paraphrase_prompts"}, "paraphrase_prompts"),
    ({**COUNTERFACT, "requested_rewrite": {**COUNTERFACT["requested_rewrite"], "prompt": "Tim Duncan plays"}}, "prompt"),
    ({**COUNTERFACT, "requested_rewrite": {**COUNTERFACT["requested_rewrite"], "target_new": None}}, "target_new"),
    ({**COUNTERFACT, "case_id": None}, "case_id"),
    ({**KNOWEDIT, "prompt": "Somebody else plays"}, "prompt"),
    ({**KNOWEDIT, "target_new": []}, "target_new"),
    ({**MQUAKE_T, "questions": []}, "questions"),
    ({**MQUAKE_T, "requested_rewrite": []}, "requested_rewrite"),
    ({**MQUAKE_T, "requested_rewrite": [{**REWRITE, "target_new": {}}]}, "target_new"),
    ({**MQUAKE_T, "new_answer_alias": "Bee"}, "new_answer_alias"),
    ({**MQUAKE_T, "single_hops": [{**MQUAKE_T["single_hops"][0], "answer_alias": [None]}]}, "answer_alias"),
    ({**MQUAKE_T, "single_hops": []}, "single_hops"),
    ({**MQUAKE_T, "new_single_hops": ["Where is X?"]}, "new_single_hops"),
    ({**MQUAKE_T, "orig": {**MQUAKE_T["orig"], "edit_triples_idx": [-1]}}, "edit_triples_idx"),
    ({**MQUAKE_T, "orig": {**MQUAKE_T["orig"], "edit_triples_idx": [9]}}, "edit_triples_idx"),
    ({**MQUAKE_T, "orig": {**MQUAKE_T["orig"], "edit_triples_idx": "0"}}, "edit_triples_idx"),
    ({**MQUAKE_T, "requested_rewrite": ["The head of {} is"]}, "requested_rewrite"),
    ({**KNOWEDIT, "target_new": {"str": "football"}}, "target_new"),
    ({**KNOWEDIT, "portability": ["Tim Duncan plays"]}, "portability"),
    ({**KNOWEDIT, "locality": {"Relation_Specificity": [{"prompt": "Pele plays", "ground_truth": 5}]}}, "locality"),
    ({**FLAT, "rephrase_prompt": None}, "rephrase_prompt"),
    ({**FLAT, "locality_ground_truth": " "}, "locality_ground_truth"),
    ({"prompt": "{} plays", "subject": "Pele", "answer": None}, "answer"),
])  # fmt: skip
def test_a_bad_record_is_refused_by_its_field(record, field, tmp_path):
    good = next(
        one for one in (COUNTERFACT, MQUAKE_T, FLAT, KNOWEDIT, PLAIN) if set(record) <= set(one)
    )
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(record) + "\n")
    with pytest.raises(qv.QVLensError, match=f"line 3, record 1 .*{field}"):
        read(path)
    got = read(path, skip=True)
    assert (len(got.cases) + len(got.facts), *got.refused.loc[0, ["field", "record", "line"]]) == (
        1,
        field,
        1,
        3,
    )


def test_lines_of_a_json_list(tmp_path):
    """Also behind a byte order mark, over several lines, and several on one."""
    path, bad = tmp_path / "list.json", {**PLAIN, "answer": ""}
    path.write_text(
        "\n ["
        + json.dumps(bad)
        + ", "
        + json.dumps(PLAIN, indent=2)
        + ",\n\n"
        + json.dumps(bad)
        + "]",
        encoding="utf-8-sig",
    )
    assert read(path, skip=True).refused["line"].tolist() == [
        2,
        2 + json.dumps(PLAIN, indent=2).count("\n") + 2,
    ]


def test_a_line_that_is_no_json_costs_that_record_alone(tmp_path):
    path = tmp_path / "torn.jsonl"
    path.write_text('{"prompt": "{} pl\n' + json.dumps(PLAIN) + "\n")
    with pytest.raises(qv.QVLensError, match=r"line 1, record 0 .*no JSON"):
        read(path)
    got = read(path, skip=True)
    assert (got.format, len(got.facts), got.refused.loc[0, "line"]) == ("plain", 1, 1)


def test_probes_are_texts():
    for bad in (None, "", 3):
        with pytest.raises(qv.QVLensError, match=r"Probe\.answer"):
            Probe("text", bad)  # pyright: ignore[reportArgumentType]


def test_datasets_by_name(monkeypatch):
    """`datasets` stands in: what it gives is read, and what it raises is told, also in the middle
    of a stream."""

    def texts(rows):
        yield from rows
        raise ConnectionError("the line went dead")

    answers = {
        "good": [COUNTERFACT], "gone": ConnectionError("no network"), "torn": texts([{"text": "one"}]),
        "other": [{"content": "no text here"}], "texts": [{"text": "one"}, {"text": " "}, {"text": "two"}],
    }  # fmt: skip

    asked = []

    def load_dataset(name, config, split, streaming=False):
        asked.append((name, config, split))
        if isinstance(answers[name], Exception):
            raise answers[name]
        return answers[name]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for source in ("good", "good:plain", "good::CF3k", "good:plain:CF3k"):
        assert read(source).cases[0].case_id == 5
    assert asked == [
        ("good", None, "train"), ("good", "plain", "train"),
        ("good", None, "CF3k"), ("good", "plain", "CF3k"),
    ]  # fmt: skip
    assert list(corpus("texts")) == ["one", "two"]
    for name, words in (("gone", "no network"), ("torn", "went dead")):
        with pytest.raises(
            qv.QVLensError, match=f"dataset '{name}' cannot be read: ConnectionError: .*{words}"
        ):
            read(name)
    for name, words in (
        ("gone", "no network"),
        ("torn", "went dead"),
        ("other", "expected in 'text'"),
    ):
        answers["torn"] = texts([{"text": "one"}])
        with pytest.raises(qv.QVLensError, match=words):
            list(corpus(name))


def test_what_is_no_file_of_records_is_told(tmp_path):
    for name, text in (
        ("a.json", "{}"),
        ("b.json", "[]"),
        ("c.json", "not json"),
        ("d.json", '[{"x": 1}]'),
        ("e.json", "[3]"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(qv.QVLensError, match=name):
            read(tmp_path / name)
    with pytest.raises(qv.QVLensError, match=r"no file; for a dataset|cannot be read"):
        read("no-such/dataset")
    (tmp_path / "f.json").write_text(json.dumps([COUNTERFACT]))
    (fact,) = plain_facts(tmp_path / "f.json")  # what the edit is about
    assert (fact,) == read(tmp_path / "f.json").edited
    assert repr(read(tmp_path / "f.json")) == "ReadResult(counterfact: 1 cases, 0 refused)"
    recent = {"prompt": "Ann works for", "subject": "Ann", "target_new": "Acme"}  # no old answer
    older = recent | {"ground_truth": ["Apex"]}
    (tmp_path / "k.json").write_text(json.dumps([recent, older]))
    assert [fact.answer for fact in read(tmp_path / "k.json").edited] == ["Apex"]
    with pytest.warns(UserWarning, match="1 of 2 edits are left out"):
        assert [fact.answer for fact in plain_facts(tmp_path / "k.json")] == ["Apex"]
    (tmp_path / "m.json").write_text(json.dumps([remastered()]))
    with pytest.raises(qv.QVLensError, match="holds chains"):
        plain_facts(tmp_path / "m.json")


def test_the_worlds_own_files_read_back():
    world = generator.build(0)
    chains = parse(world_cases.mquake(world, 9)).cases
    assert sorted({len(case.edits) for case in chains}) == [1, 2, 3, 4]
    for case in chains:
        asked = {
            *case.clozes,
            *case.questions,
            *(hop.cloze for hop in (*case.hops, *case.new_hops)),
        }
        assert not asked & {text for request in case.edits for text in request.via}
    assert any(request.via for case in chains for request in case.edits)
    assert (
        len(parse(world_cases.counterfact(world, 5)).cases)
        == len(parse(world_cases.knowedit(world, 5)).cases)
        == 5
    )
    by = named(chains, of_relation)
    assert set(by) <= {
        "nationality",
        "continent",
        "language",
        "capital",
        "leadership",
        "author",
        "sport",
        "founder",
        "unknown",
    }
    assert sum(map(len, by.values())) == len(chains)


def test_the_labeller_is_only_what_is_passed():
    asked = []
    assert labelled(["Who?"], lambda prompt: asked.append(prompt) or "Sports | Team ") == [
        ("Sports", "Team")
    ]
    assert "Question: Who?" in asked[0]
    with pytest.raises(qv.QVLensError, match=r"Main\|Sub"):
        labelled(["Who?"], lambda prompt: "Sports")


def test_what_leads_to_a_fact_ends_at_it():
    """In the world with the edit made, each multi-hop prompt of a request is a two-hop chain
    answered by the new object, and none is asked of the case."""
    world, found, relations = generator.build(0), 0, {r.id: r for r in RELATIONS}
    for case in world_cases.edit_cases(world, 60, 3):
        fact, new = case.request.fact, case.request.new
        edited, told = {**world.triples, (fact.subject, fact.relation): new}, {}
        for (s, first), o in edited.items():
            for second in (r for r in RELATIONS if (o, r.id) in edited):
                text = second.cloze[0].format(relations[first].noun[0].format(s))
                told[text[0].upper() + text[1:]] = edited[o, second.id]
        for text in case.request.via:
            assert told[text] == new, text
            found += 1
        assert not {probe.text for pair in case.onward for probe in pair} & set(case.request.via)
    assert found > 20


def test_a_files_chains_lead_to_their_edits():
    """The hop before in the subject's place; a first hop, or a question that is no noun phrase, has
    none."""
    hop = Hop("Who founded Intel?", "Intel was founded by", "x")
    fact = Fact("{} is a citizen of", "Robert Noyce", "USA")
    assert leading_to(fact, (hop, hop), 1) == ("The one who founded Intel is a citizen of",)
    assert leading_to(fact, (hop, hop), 0) == ()
    capital = Fact("The capital of {} is", "Ghana", "Accra")
    head = Fact("The head of the {} government is", "Ghana", "Ann")
    assert leading_to(head, (Hop("What is the home of Ama?", "Ama lives in", "x"), hop), 1) == (
        "The head of the home of Ama government is",
    )
    country = Hop(
        "What is the country of citizenship of Ama Ata Aidoo?", "Ama Ata Aidoo is a citizen of", "x"
    )
    assert leading_to(capital, (country, hop), 1) == (
        "The capital of the country of citizenship of Ama Ata Aidoo is",
    )
    assert leading_to(capital, (Hop("Q?", "The home of Ama is", "x"), hop), 1) == (
        "The capital of the home of Ama is",
    )
    assert (
        leading_to(
            capital,
            (Hop("Which country was cricket created in?", "Cricket was created in", "x"), hop),
            1,
        )
        == ()
    )


def remastered(**changes):
    """A record of MQuAKE-Remastered as its loader reads it, by hand."""
    hop = {"question": "Of which country is Ada Lovelace a citizen?", "cloze": "Ada Lovelace is a citizen of",
           "answer": "England", "answer_alias": []}  # fmt: skip
    capital = {"question": "What is the capital of England?", "cloze": "The capital of England is",
               "answer": "London", "answer_alias": []}  # fmt: skip
    new = {**hop, "answer": "Norway"}
    oslo = {
        **capital,
        "question": "What is the capital of Norway?",
        "cloze": "The capital of Norway is",
        "answer": "Oslo",
    }
    rewrite = {"prompt": "{} is a citizen of", "subject": "Ada Lovelace", "relation_id": "P27",
               "target_new_str": "Norway", "target_true_str": "England", "question": hop["question"]}  # fmt: skip
    return {
        "case_id": 7, "requested_rewrite": [rewrite], "questions": ["What is the capital of Ada Lovelace's country?"],
        "answer": "London", "new_answer": "Oslo", "answer_alias": ["Greater London"], "new_answer_alias": ["Christiania"],
        "single_hops": [hop, capital], "new_single_hops": [new, oslo],
        "orig_triples": [["Q1", "P27", "Q2"], ["Q2", "P36", "Q3"]],
        "orig_triples_labeled": [["Ada Lovelace", "citizen", "England"], ["England", "capital", "London"]],
        "new_triples": [["Q1", "P27", "Q4"], ["Q4", "P36", "Q5"]],
        "new_triples_labeled": [["Ada Lovelace", "citizen", "Norway"], ["Norway", "capital", "Oslo"]],
        "split": {"1": ["edited"]}, **changes,
    }  # fmt: skip


def test_the_groups_of_mquake_remastered_for_a_number_of_edits():
    """Of CF-3k edited or not; of CF-6334 three groups, a case of both halves among the first's."""
    halves = (["train_edited", "test_edited"], ["test_edited"], ["test_unedited"], ["train_unedited"], [])  # fmt: skip
    records = [
        remastered(case_id=i, split={"1": ["edited"] if i else None, "100": labels})
        for i, labels in enumerate(halves)
    ]
    cases = parse(records).cases
    numbers = [
        {name: [case.case_id for case in some] for name, some in by_split(cases, edits).items()}
        for edits in (1, 100)
    ]
    assert numbers[0] == {"edited": [1, 2, 3, 4], "unedited": [0]}
    assert numbers[1] == {"train_edited": [0], "test_edited": [1], "unedited": [2]}
    with pytest.raises(
        qv.QVLensError, match=r"Case 0 has no split for 1000 edits \(it has: 1, 100\)"
    ):
        by_split(cases, 1000)
    with pytest.raises(qv.QVLensError, match=r"no split for 1 edits \(it has: none\)"):
        by_split([replace(cases[0], extra=())], 1)


def test_mquake_remastered_and_what_contaminates_a_case():
    (case,) = parse([remastered()]).cases
    assert (case.edits[0].new, case.edits[0].fact.answer) == ("Norway", "England")
    assert case.edited == (0,)
    assert [(hop.subject, hop.relation) for hop in case.new_hops] == [
        ("Ada Lovelace", "P27"),
        ("Norway", "P36"),
    ]
    assert case.new_aliases == ("Christiania",)
    norway = qv.Fact("The capital of {} is", "Norway", "Oslo", relation="P36")
    edits = [
        case.edits[0],
        norway.to("Bergen"),  # another object on a step of the right path
        norway.to("Oslo"),
        qv.Fact("The capital of {} is", "Sweden", "Stockholm", relation="P36").to("Lund"),
        qv.Fact("{} is on the continent of", "Norway", "Europe", relation="P30").to("Asia"),
    ]
    kept = uncontaminated(case, edits)
    assert kept == [edits[0], *edits[2:]]
    named = replace(case.new_hops[-1], aliases=("Christiania",))
    other_name = norway.to("Christiania")
    step = replace(case, new_hops=(*case.new_hops[:-1], named))
    assert (named.subject, named.relation) == ("Norway", "P36")
    assert uncontaminated(step, [other_name]) == [other_name]
    # two relations that nobody named are not the same one
    loved = qv.Fact("{} is loved by", "Norway", "Spain").to("Chad")
    bare = replace(case, new_hops=tuple(replace(hop, relation=None) for hop in case.new_hops))
    assert uncontaminated(bare, [loved, edits[1]]) == [loved, edits[1]]


RIPPLE = {
    "example_type": "popular",
    "edit": {
        "prompt": "The name of the mother of Princess Maria is Anna Borg.", "subject_id": "Q1", "relation": "MOTHER", "target_id": "Q2",
        "original_fact": {"prompt": "The name of the mother of Princess Maria is Queen Sofia.", "subject_id": "Q1", "relation": "MOTHER", "target_id": "Q3"},
    },
    "Relation_Specificity": [
        {"test_queries": [{"prompt": "The name of the father of Princess Maria is", "answers": [{"value": "King Leo", "aliases": ["Leo"]}]}]},
        {"test_queries": [{"prompt": "The country of citizenship of Princess Maria is", "answers": []}]},
    ],
    "Logical_Generalization": [
        {"test_queries": [{"prompt": "The name of the child of Anna Borg is", "answers": [{"value": "Princess Maria", "aliases": []}]}]}
    ],
    "Subject_Aliasing": [], "Compositionality_I": [], "Compositionality_II": [], "Forgetfulness": [],
}  # fmt: skip


def test_ripple_edits_by_hand():
    """No sample of it can be had here: its data are kept where only its authors' link leads."""
    (case,) = parse([RIPPLE]).cases
    fact = case.request.fact
    assert (fact.prompt, fact.subject) == ("The name of the mother of {} is", "Princess Maria")
    assert (fact.answer, case.request.new) == ("Queen Sofia", "Anna Borg")
    assert dict(case.portability)["Logical_Generalization"][0].answer == "Princess Maria"
    ((axis, (probe,)),) = case.locality
    assert (axis, probe.answer, probe.aliases) == ("Relation_Specificity", "King Leo", ("Leo",))
    strange = {**RIPPLE, "Relation_Specificity": []}
    with pytest.raises(qv.QVLensError, match=r"'Relation_Specificity': shares no name with"):
        parse([strange])


@pytest.mark.parametrize(
    ("new", "old", "prompt"),
    [
        ("United Kingdom", "United States of America", "The name of the country of citizenship of {} is"),
        ("New Zealand", "New York", "The place of birth of {} is"),
        ("U.S.", "Jr.", "The name of the country which {} is associated with is"),
        ("Anna", "Anna Borg and Leo", "The names of the siblings of {} are"),
    ],
)  # fmt: skip
def test_ripple_edits_whose_answers_begin_alike(new, old, prompt):
    def told(answer: str) -> dict:
        return {"prompt": f"{prompt.replace('{}', 'Princess Maria')} {answer}."}

    edit = {**RIPPLE["edit"], **told(new), "original_fact": told(old)}
    request = parse([{**RIPPLE, "edit": edit}]).cases[0].request
    assert (request.fact.prompt, request.fact.answer, request.new) == (prompt, old, new)


def test_a_chain_leads_to_an_edit_by_its_new_hops_and_equal_answers_are_told_apart():
    """Of three hops the first and the last are edited, both to Y: the last fact is about the new
    second hop's answer."""

    def hops(*told):
        return [{"question": q, "cloze": q, "answer": a, "answer_alias": []} for q, a in told]

    def rewrite(subject, old):
        named = {"target_true": {"str": old}, "target_new": {"str": "Y"}}
        return {
            "prompt": "The friend of {} is",
            "relation_id": "P1",
            "subject": subject,
            "question": "?",
            **named,
        }

    last = ["Q5", "P1", "Q6"]
    record = {
        **MQUAKE_T,
        "requested_rewrite": [rewrite("A", "B"), rewrite("Z", "D")],
        "single_hops": hops(("Who is A's friend?", "B"), ("What is the town of B?", "C"), ("Who is C's friend?", "D")),
        "new_single_hops": hops(("Who is A's friend?", "Y"), ("What is the town of Y?", "Z"), ("Who is Z's friend?", "Y")),
        "orig": {"new_triples": [["Q1", "P1", "Q6"], ["Q6", "P2", "Q5"], last], "triples": [["Q1", "P1", "Q2"]],
                 "edit_triples": [["Q1", "P1", "Q6"], last]},
    }  # fmt: skip
    case = parse([record]).cases[0]
    assert case.edited == (0, 2)
    assert [edit.via for edit in case.edits] == [(), ("The friend of the town of Y is",)]
    # triples in another order than the edits
    second = {**rewrite("Z", "D"), "target_new": {"str": "W", "id": "Q7"}}
    other = ["Q5", "P1", "Q7"]
    askew = {
        **record,
        "requested_rewrite": [rewrite("A", "B"), second],
        "new_single_hops": hops(("Who is A's friend?", "Y"), ("What is the town of Y?", "Z"), ("Who is Z's friend?", "W")),
        "orig": {**record["orig"], "new_triples": [["Q1", "P1", "Q6"], ["Q6", "P2", "Q5"], other],
                 "edit_triples": [other, ["Q1", "P1", "Q6"]]},
    }  # fmt: skip
    assert parse([askew]).cases[0].edited == (0, 2)
    # where `orig` does not say: every hop once, and by the subject where the order would mislead
    untold = {**record, "orig": {"triples": [], "new_triples": []}}
    turned = {**untold, "requested_rewrite": [rewrite("Z", "D"), rewrite("A", "B")]}
    last = {**untold, "requested_rewrite": [rewrite("Z", "D")]}
    found = [parse([each]).cases[0].edited for each in (untold, turned, last)]
    assert found == [(0, 2), (2, 0), (2,)]


def test_every_answer_of_zsre_counts():
    record = {"subject": "X", "src": "Who is X?", "rephrase": "X is who?", "answers": ["a", "b", "c"], "alt": "d",
              "loc": "nq question: who", "loc_ans": "e"}  # fmt: skip
    fact = parse([record]).cases[0].request.fact
    assert (fact.answer, fact.aliases) == ("a", ("b", "c"))


def test_a_known_fact_has_its_relation():
    record = {"prompt": "The Louvre is in", "subject": "The Louvre", "attribute": "Paris", "template": "{} is in",
              "relation_id": "P131", "relation": "location"}  # fmt: skip
    fact = parse([record]).facts[0]
    assert (fact.prompt, fact.answer, fact.relation) == ("{} is in", "Paris", "P131")
