"""The bundled world: consistent, reproducible, and held out where it says so."""

from __future__ import annotations

import itertools
import random

import pytest

from qv_lens.facts.corpora import corpus
from qv_lens.facts.prompts import answered, cot_block, cot_prompt, matches, parse_answer
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from qv_lens.world.words import RELATIONS
from tests.models import tokenizer

WORLD = generator.build(0)


def test_the_same_seed_gives_the_same_world():
    assert generator.build(0) == WORLD
    assert generator.build(1).triples != WORLD.triples


def test_every_object_but_a_persons_name_is_one_token():
    encode = tokenizer().encode
    assert [o for o in WORLD.objects if len(encode(f" {o}")) != 1] == []
    assert all(len(encode(f" {name}")) >= 3 for name in WORLD.entities["person"])


def test_bridges_carry_many_attributes():
    counts = {kind: len(WORLD.relations(WORLD.entities[kind][0])) for kind in WORLD.entities}
    assert counts["country"] == 10
    assert min(counts["sport"], counts["company"]) >= 5


def test_eight_kinds_of_knowledge():
    assert {r.category for r in RELATIONS} - {None} == {
        "nationality", "continent", "language", "capital", "leadership", "author", "sport", "founder",
    }  # fmt: skip


def test_held_out_chains_and_phrasings_never_stand_in_the_text():
    """Search the text itself for the sentences that must not be there."""
    rng = random.Random(7)
    text = "\n".join(
        generator.text(d) for d in itertools.islice(generator.documents(WORLD, rng), 20000)
    )
    held = [c for c in WORLD.chains(2) if not WORLD.seen(c)]
    shown = [c for c in WORLD.chains(2) if WORLD.seen(c)]
    assert 0.08 < len(held) / (len(held) + len(shown)) < 0.12
    assert not [c.cloze() for c in held if f"{c.cloze()} {c.answer}" in text]
    assert sum(f"{c.cloze()} {c.answer}" in text for c in shown) > 300
    facts = [(f, WORLD.unseen_phrasing(f)) for f in WORLD.facts()]
    assert 0.07 < sum(i is not None for _, i in facts) / len(facts) < 0.13
    for fact, i in facts:
        if i is not None:
            prompt = fact.relations[0].phrasings[i].format(fact.subject)
            assert f"\n{prompt} {fact.answer}" not in text


def test_longer_chains_over_a_held_out_one_are_held_out():
    held = [
        chain
        for chain in itertools.islice(WORLD.chains(3), 2000)
        if not WORLD.seen(generator.Chain(chain.relations[:2], chain.entities[:3]))
    ]
    assert len(held) > 100
    assert not any(WORLD.seen(chain) for chain in held)


def test_spans_name_subject_and_answer():
    for document in itertools.islice(generator.documents(WORLD, random.Random(3)), 500):
        for sentence in document:
            names = {*WORLD.kind, *(a for other in WORLD.aliases.values() for a in other)}
            assert sentence.text[slice(*sentence.subject)] in names
            for a, b in sentence.answers:
                assert sentence.text[a] == " "
                assert sentence.text[a + 1 : b] in {*WORLD.triples.values(), *WORLD.entities}


def test_mquake_records_follow_their_edits():
    """Walk every record by hand: triples, edits, answers."""
    records = world_cases.mquake(WORLD, 90)
    shapes = {(len(r["single_hops"]), len(r["requested_rewrite"])) for r in records}
    assert shapes == {(h, e) for h in (2, 3, 4) for e in range(1, h + 1)}
    for record in records:
        edits = {
            (r["subject"], r["relation_id"]): r["target_new"]["str"]
            for r in record["requested_rewrite"]
        }
        for hops, answer, known in (
            ("single_hops", "answer", {}),
            ("new_single_hops", "new_answer", edits),
        ):
            entity = record["orig"]["triples_labeled"][0][0]
            ids = [triple[1] for triple in record["orig"]["triples"]]
            for hop, relation in zip(record[hops], ids, strict=True):
                assert entity in hop["cloze"]
                entity = known.get((entity, relation)) or WORLD.triples[entity, relation]
                assert hop["answer"] == entity
            assert record[answer] == entity
        assert record["answer"] != record["new_answer"]
        for rewrite in record["requested_rewrite"]:
            assert (
                rewrite["target_true"]["str"]
                == WORLD.triples[rewrite["subject"], rewrite["relation_id"]]
            )
            assert rewrite["target_new"]["str"] != rewrite["target_true"]["str"]


@pytest.mark.parametrize("writer", [world_cases.counterfact, world_cases.knowedit])
def test_benchmark_layouts(writer):
    for record in writer(WORLD, 40):
        rewrite = record.get("requested_rewrite", record)
        prompt = rewrite["prompt"].replace("{}", rewrite["subject"])
        assert (prompt == rewrite["prompt"]) == (writer is world_cases.knowedit)
        fact = next(f for f in WORLD.facts() if f.cloze() == prompt)
        assert fact.subject == rewrite["subject"]
        old, new = fact.answer, rewrite["target_new"]
        assert old in str(rewrite.get("target_true", rewrite.get("ground_truth")))
        assert old != (new["str"] if isinstance(new, dict) else new)
    records = world_cases.counterfact(WORLD, 40)
    assert all(len(r["paraphrase_prompts"]) == 3 and r["neighborhood_prompts"] for r in records)
    true = {(fact.text, fact.answer) for fact in world_cases.facts(WORLD)}
    for record in world_cases.counterfact(WORLD, 400):
        answer = record["requested_rewrite"]["target_true"]["str"]
        assert all((text, answer) in true for text in record["neighborhood_prompts"])
    probes = world_cases.knowedit(WORLD, 40)
    assert any(r["portability"].get("Reasoning") for r in probes)
    assert all(
        isinstance(p["ground_truth"][0], list)
        for r in probes
        for group in r["locality"].values()
        for p in group
    )


def test_chain_of_thought_format():
    block = cot_block("Who?", "A knows B.", "B")
    assert (
        cot_prompt("What?", [block])
        == "Question: Who?\nThoughts: A knows B.\nAnswer: B\n\nQuestion: What?\nThoughts:"
    )
    assert parse_answer(" x.\nAnswer: Oslo \nQuestion: Answer: no") == "Oslo"
    assert parse_answer(" x. y") is None
    whole = " x.\nAnswer: Oslo \nQuestion: y\nAnswer: no\n"
    cut = next(whole[:i] for i in range(len(whole)) if answered(whole[:i]))
    assert parse_answer(cut) == parse_answer(whole) == "Oslo"  # nothing behind it is read
    assert len(cut) == whole.index("Oslo \n") + len("Oslo \n")
    assert matches("oslo.", ["Oslo"])
    assert not matches(None, ["Oslo"])
    assert not matches("Osl", ["Oslo"])


def test_the_text_that_c0_is_taken_over_is_the_worlds():
    """The stored documents are the generator's first 3,000, in its order."""
    documents = generator.documents(WORLD, random.Random("statistics"))
    written = [generator.text(document) for document in itertools.islice(documents, 3000)]
    assert list(corpus("world")) == written
