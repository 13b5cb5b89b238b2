"""lm-eval on the model as it is, with ten made-up questions, offline."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import processors

import qv_lens as qv
from qv_lens.evaluation.ability import ability
from qv_lens.world import cases as world_cases
from qv_lens.world import generator

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'qv_lens[ability]')")

FACTS = world_cases.facts(generator.build(0), "P641")[:10]
SPORTS = sorted({fact.answer for fact in FACTS})


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Which sport, of those that occur; without lm-eval's list of the machine's packages, which
    takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    file = tmp_path / "questions.jsonl"
    rows = [{"question": fact.text, "gold": SPORTS.index(fact.answer)} for fact in FACTS]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return {
        "task": "sports",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": SPORTS,
        "doc_to_target": "gold",
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


@torch.no_grad()
def whole(lens, text, answer):
    """log p of all of an answer's tokens."""
    ids, more = (lens.tokenizer(part)["input_ids"] for part in (text, f" {answer}"))
    rows = lens.hf(torch.tensor([ids + more])).logits[0].log_softmax(-1)[len(ids) - 1 : -1]
    return sum(float(rows[i, token]) for i, token in enumerate(more))


def best(lens):
    """The share of facts whose own sport is the likeliest of all, by plain passes."""
    right = []
    for fact in FACTS:
        scores = [whole(lens, fact.text, sport) for sport in SPORTS]
        right.append(SPORTS[scores.index(max(scores))] == fact.answer)
    return sum(right) / len(right)


def test_ten_questions_before_with_and_after_a_patch(task):
    lens = qv.load("toy-gptj")
    state = lens.state()
    first = FACTS[0]
    new = next(sport for sport in SPORTS if sport != first.answer)
    patch = qv.edit(lens, first.to(new), "FT")
    plain = ability(lens, [task])
    patched = ability(lens, [task], [patch])
    assert lens.state() == state
    assert plain[["task", "metric", "questions"]].to_numpy().tolist() == [["sports", "acc", 10]]
    assert plain["value"][0] == pytest.approx(best(lens))
    with lens.patched(patch):
        assert patched["value"][0] == pytest.approx(best(lens))
        assert ability(lens, [task])["value"][0] == patched["value"][0]
    assert ability(lens, [task], patch)["value"][0] == patched["value"][0]
    assert (
        patched["value"][0] < plain["value"][0]
    )  # the edited question's gold answer is the old one


def test_what_is_asked_of_lm_eval_and_what_of_its_answer_is_told(monkeypatch):
    """Settings reach it, and of its results the counts, errors and filters are the right ones."""
    asked = {}
    found = {
        "results": {
            "one": {"alias": "one", "acc,none": 0.5, "acc_stderr,none": 0.25, "acc,strict": 0.75,
                    "acc_stderr,strict": "N/A"},
            "two": {"acc,none": 1.0},
        },
        "n-samples": {"one": {"original": 9, "effective": 4}},
    }  # fmt: skip
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda **said: asked.update(said) or found)
    own = {"task": "one", "dataset_path": "json"}
    frame = ability(qv.load("toy-gptj"), [own], limit=4, shots=1, seed=7)
    assert (asked["limit"], asked["num_fewshot"], asked["random_seed"]) == (4, 1, 7)
    assert frame["metric"].tolist() == ["acc", "acc, strict", "acc"]
    assert frame["value"].tolist() == [0.5, 0.75, 1.0]
    assert frame["questions"].tolist()[:2] == [4, 4]
    assert frame["error"][0] == 0.25
    assert frame["error"][1:].isna().all()


def test_questions_that_are_not_there_are_told_of(task):
    task["dataset_kwargs"]["data_files"]["test"] += ".away"
    with pytest.raises(qv.QVLensError, match="cannot read the questions of these tasks"):
        ability(qv.load("toy-gptj"), [task])


def test_what_lm_eval_would_not_see_is_refused(task):
    lens = qv.load("toy-gptj")
    with (
        lens.intervene(qv.Zero(qv.NeuronSet.of([(3, 1)]))),
        pytest.raises(qv.QVLensError, match="does not see"),
    ):
        ability(lens, [task])
    for slip in ({"limit": 0}, {"shots": -1}, {"batch_size": 0}, {"seed": None}):
        with pytest.raises(qv.QVLensError, match=f"{next(iter(slip))}.* must be a whole number"):
            ability(qv.load("toy-gptj"), [task], **slip)
    with pytest.raises(qv.QVLensError, match="takes a list of tasks"):
        ability(lens, "arc_easy")


def test_the_tokenizer_stays_as_it_was_and_a_bos_of_the_lens_alone_is_refused(task):
    lens = qv.load("toy-gptj")
    before = lens.tokenizer.special_tokens_map
    ability(lens, [task])
    assert lens.tokenizer.special_tokens_map == before
    lens.tokenizer.bos_token = "<|endoftext|>"
    lens.prepend_bos = True
    with pytest.raises(qv.QVLensError, match="lm-eval would ask without it"):
        ability(lens, [task])


def test_a_bos_of_the_tokenizers_own_is_asked_with(task):
    lens = qv.load("toy-gptj")
    lens.tokenizer.bos_token = "<|endoftext|>"
    lens.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert lens.tokenizer("Olga")["input_ids"][0] == 0
    plain, asked = qv.load("toy-gptj"), []
    run = lens.hf.forward
    lens.hf.forward = lambda ids, **options: asked.append(ids) or run(ids, **options)
    found = ability(lens, [task])
    assert all((rows[:, 0] == 0).all() for rows in asked)
    assert asked
    assert len(found) == len(ability(plain, [task]))


def test_a_task_that_lm_eval_does_not_have(monkeypatch):
    """Asked before the model is; a list of names in place of lm-eval's, whose files take long to
    read."""
    asked = []

    class Names:
        all_tasks = ("arc_easy", "mmlu")

        def __init__(self, include_defaults):
            asked.append(include_defaults)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Names)
    with pytest.raises(qv.QVLensError, match=r"no task 'arc_eezy'.*Did you mean 'arc_easy'"):
        ability(qv.load("toy-gptj"), ["arc_eezy"])
    assert asked == [True]
