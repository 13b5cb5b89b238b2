"""Which facts a model knows: asked once of the same weights, and again of any others."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import qv_lens as qv
from qv_lens.evaluation import kept_answers, known_cases
from qv_lens.evaluation.known_cases import knows
from qv_lens.world import cases as world_cases
from qv_lens.world import generator

FACTS = world_cases.facts(generator.build(0))[:90]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The numbers of facts that were really asked, call by call."""
    monkeypatch.setenv("QV_LENS_CACHE", str(tmp_path))
    counts, ask = [], known_cases._asked
    monkeypatch.setattr(
        known_cases, "_asked", lambda lens, facts: counts.append(len(facts)) or ask(lens, facts)
    )
    return counts


@pytest.fixture
def lens():
    return qv.load("toy-gptj")


def test_facts_are_asked_once_of_the_same_weights(lens, asked, tmp_path):
    first = knows(lens, FACTS[:80])
    assert first == qv.known(lens, FACTS[:80])[1]["right"].tolist()
    assert knows(lens, FACTS) == [*first, *qv.known(lens, FACTS[80:])[1]["right"]]
    assert knows(qv.load("toy-gptj"), FACTS[::-1])[::-1] == knows(lens, FACTS)
    assert asked == [80, 10]
    other = [qv.Fact(f.prompt, f.subject, "nobody") for f in FACTS]
    assert not any(knows(lens, other))
    assert asked == [80, 10, 90]
    (file,) = (tmp_path / "known").iterdir()
    file.write_text('{"cut')
    assert knows(lens, FACTS[:80]) == first
    assert asked[3:] == [80]


def test_other_versions_and_other_accepted_answers_are_asked_again(lens, asked, monkeypatch):
    knows(lens, FACTS)
    monkeypatch.setattr(kept_answers, "versions", lambda: {"torch": "0"})
    knows(lens, FACTS)
    knows(lens, [replace(fact, aliases=("nobody",)) for fact in FACTS])
    knows(lens, [replace(fact, space=not fact.space) for fact in FACTS])
    monkeypatch.setattr(kept_answers, "RULE", 0)
    knows(lens, FACTS)
    assert asked == [90] * 5


def test_what_another_process_writes_meanwhile_stays(lens, asked, tmp_path, monkeypatch):
    knows(lens, FACTS[:70])
    (file,) = (tmp_path / "known").iterdir()
    ask = known_cases._asked

    def slow(lens, facts):
        file.write_text(json.dumps({**json.loads(file.read_text()), "theirs": True}))
        return ask(lens, facts)

    monkeypatch.setattr(known_cases, "_asked", slow)
    knows(lens, FACTS)
    assert len(json.loads(file.read_text())) == 91


def test_other_weights_are_asked_again(lens, asked, tmp_path):
    before = knows(lens, FACTS)
    for layer in range(2, lens.n_layers):
        lens.w_out(layer).zero_()
    after = knows(lens, FACTS)
    assert before != after
    assert asked == [90, 90]
    zero = qv.Zero(qv.NeuronSet.of([(9, n) for n in range(lens.d_mlp)]))
    with lens.intervene(zero):
        knows(lens, FACTS)
        knows(lens, FACTS)
    assert asked == [90] * 4
    assert len(list((tmp_path / "known").iterdir())) == 2


def test_where_nothing_can_be_kept_facts_are_asked_all_the_same(lens, asked, monkeypatch, tmp_path):
    (tmp_path / "known").write_text("a file in the folder's place")
    assert knows(lens, FACTS) == knows(lens, FACTS)
    monkeypatch.setenv("QV_LENS_CACHE", "")
    knows(lens, FACTS)
    knows(lens, FACTS[:5])
    assert asked == [90, 90, 90, 5]


def test_a_fact_gets_the_accepted_answer_that_the_model_says(monkeypatch):
    """Of three names the one that is said comes first, and every name stays accepted; a fact that is
    not known, or has one name, or is said with an article first, stays as it is."""
    lens = qv.load("toy-gptj")
    says = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    named = replace(says, answer="swordplay", aliases=("fencing", "escrime"))
    unknown = replace(says, answer="golf", aliases=("tennis",))
    got = known_cases.as_said(lens, [named, says, unknown])
    assert got == [replace(says, aliases=("swordplay", "escrime")), says, unknown]
    says_the = replace(named, aliases=("the fencing", "escrime"))
    monkeypatch.setattr(lens, "generate", lambda facts, *a: ["the fencing club" for _ in facts])
    assert known_cases.as_said(lens, [says_the]) == [says_the]
    monkeypatch.undo()
    assert known_cases.knowledge(lens, [named])["prompts_known"] == 0
    assert known_cases.knowledge(lens, got[:1])["prompts_known"] == 1


def test_what_follows_an_edit_is_asked_where_it_was_known_before(lens):
    """The prompts left, against argmaxes of Hugging Face's model; what follows from the others is
    no portability either."""
    world = generator.build(0)
    cases = [case for case in world_cases.edit_cases(world, 40) if case.onward][:8]
    kept = dropped = 0
    for case in cases:
        wrong = replace(case.onward[0][0], answer="nobody")  # not known, whatever the model is
        case = replace(case, onward=((wrong, case.onward[0][1]), *case.onward[1:]))
        got = known_cases.answered_onward(lens, case)
        right = []
        for before, _ in case.onward:
            start = lens.tokenizer(before.text)["input_ids"]
            answer = lens.tokenizer(f" {before.answer}")["input_ids"]
            said = lens.hf(torch.tensor([start + answer])).logits[0].argmax(-1)
            right.append(said[len(start) - 1 : -1].tolist() == answer)
        assert list(got.onward) == [
            pair for pair, hit in zip(case.onward, right, strict=True) if hit
        ]
        asked = [after.text for (_, after), hit in zip(case.onward, right, strict=True) if hit]
        assert [probe.text for probe in dict(got.portability).get("Reasoning", ())] == asked
        aliases = dict(case.portability).get("Subject_Aliasing")
        assert dict(got.portability).get("Subject_Aliasing") == aliases
        assert (got.neighbours, got.locality) == (case.neighbours, case.locality)
        kept, dropped = kept + sum(right), dropped + len(right) - sum(right)
    assert kept
    assert dropped
