"""Removal curves against neurons zeroed by the public intervention, one set at a time."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pandas as pd
import pytest

import qv_lens as qv
from qv_lens.evaluation import faithfulness as module
from qv_lens.evaluation.faithfulness import lost_at
from qv_lens.models.units import random_neurons
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from tests.models import BACKENDS, tiny_lens

FACTS = [
    qv.Fact("{} works for", "Olga Pelodan", "Nortek"),
    qv.Fact("The capital of {} is the city of", "Norway", "Oslo"),
]
SIZES = (1, 4, 20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [2, 64])
def test_every_row_is_a_real_ablation(backend, rows, monkeypatch):
    monkeypatch.setattr(module, "ROWS", rows)
    lens = tiny_lens("qwen3-gqa", backend)
    each, of_set = qv.value_neurons(lens, FACTS, 20), qv.neuron_effects(lens, FACTS, 20, over="set")
    frame = qv.faithfulness(lens, FACTS, {"Eq. 9": each, "gradient": of_set}, SIZES, seeds=2)
    assert len(frame) == len(FACTS) * (2 + 2) * len(SIZES)
    for row in frame[frame["ranking"] != "random"].itertuples():
        fact = FACTS[row.prompt]
        chosen = (
            of_set.top(row.k)
            if row.ranking == "gradient"
            else each.where(lambda f, i=row.prompt: f.prompt == i).top(row.k)
        )
        chosen = qv.NeuronSet.of(chosen.units)
        with lens.intervene(qv.Zero(chosen, positions="last")):
            assert row.logprob == pytest.approx(lens.logprob(fact), abs=1e-6)
            said = int(lens.next_token_logits(fact)[0].argmax())
        assert row.said == lens.token_label(said)
        assert row.right == (said == lens.answer_ids(fact)[0])
        assert row.clean == pytest.approx(lens.logprob(fact), abs=1e-6)


def test_random_orders_are_nested_differ_by_seed_and_repeat():
    lens = tiny_lens("gptj")
    frames = [qv.faithfulness(lens, FACTS, {}, SIZES, seeds=3, seed=seed) for seed in (0, 0, 1)]
    assert frames[0].equals(frames[1])
    assert not frames[0]["logprob"].equals(frames[2]["logprob"])
    assert frames[0].groupby(["prompt", "k"])["logprob"].nunique().min() > 1
    sets = [
        removal.units for removal in module._selections(lens, {}, SIZES, 1, 0, FACTS[0], 0, "ffn")
    ]
    assert sets[1][:1] == sets[0]
    assert sets[2][:4] == sets[1]


@pytest.mark.parametrize("sizes", [np.array([1, 3]), (k for k in (3, 1)), range(1, 4, 2)])
def test_sizes_are_any_numbers_in_a_row(sizes):
    lens, fact = tiny_lens("gptj"), FACTS[0]
    frame = qv.faithfulness(lens, fact, {}, sizes, seeds=1)
    assert frame["k"].tolist() == [1, 3]


def test_one_ranking_serves_other_facts_and_sizes_beyond_it_are_left_out():
    lens = tiny_lens("gptj")
    best = qv.neuron_effects(lens, FACTS[0], 5).union()
    frame = qv.faithfulness(lens, FACTS, {"of the first": best}, (1, 5, 6), seeds=0)
    assert frame[["prompt", "k"]].values.tolist() == [[0, 1], [0, 5], [1, 1], [1, 5]]


def test_each_fact_loses_the_best_of_its_own_category():
    lens = tiny_lens("gptj")
    facts = [
        dataclasses.replace(fact, category=name) for fact, name in zip(FACTS, "ab", strict=True)
    ]
    ranking = qv.value_neurons(lens, facts, 20, over="category")
    frame = qv.faithfulness(lens, facts, {"of its kind": ranking}, (5,), seeds=0)
    units = []
    for prompt, fact in enumerate(facts):
        rows = ranking.frame[ranking.frame["category"] == fact.category].head(5)
        units.append(list(zip(rows["layer"], rows["neuron"], strict=True)))
        with lens.intervene(qv.Zero(qv.NeuronSet.of(units[-1]), "last")):
            assert frame["logprob"][prompt] == pytest.approx(lens.logprob(fact), abs=1e-5)
    assert units[0] != units[1]
    other = dataclasses.replace(FACTS[0], category="z")
    with pytest.raises(qv.QVLensError, match="no neurons for fact 1"):
        qv.faithfulness(lens, [facts[0], other], {"of its kind": ranking}, (5,), seeds=0)


def test_a_ranking_of_other_facts_or_of_another_token_is_refused():
    lens = tiny_lens("gptj")
    elsewhere = qv.neuron_effects(lens, FACTS, 5, positions="subject_last")
    with pytest.raises(
        qv.QVLensError, match=r"at tokens \[5, 3\], and they are taken out at \[7, 7\]"
    ):
        qv.faithfulness(lens, FACTS, {"subject": elsewhere}, (1,), seeds=0)
    assert len(qv.faithfulness(lens, FACTS, {"subject": elsewhere.union()}, (1,), seeds=0)) == 2
    with pytest.raises(qv.QVLensError, match="was computed for"):
        qv.faithfulness(
            lens, FACTS[::-1], {"mine": qv.value_neurons(lens, FACTS, 5)}, (1,), seeds=0
        )


def test_the_picture_has_a_panel_and_a_clean_line_for_each_prompt():
    lens = tiny_lens("gptj")
    frame = qv.faithfulness(
        lens, FACTS, {"gradient": qv.neuron_effects(lens, FACTS, 5)}, (1, 3), seeds=2
    )
    figure = qv.plots.removal_curve(frame)
    assert sorted(shape.y0 for shape in figure.layout.shapes) == pytest.approx(
        sorted(frame["clean"].unique())
    )
    drawn = [trace for trace in figure.data if trace.name == "gradient"]
    rows = frame[frame["ranking"] == "gradient"]
    assert [list(trace.y) for trace in drawn] == [
        list(part["logprob"]) for _, part in rows.groupby("prompt")
    ]


def test_interventions_in_force_stay_in_force():
    lens = tiny_lens("gptj")
    best = qv.neuron_effects(lens, FACTS[0], 4)
    other = qv.NeuronSet.of([(2, 7)])
    with lens.intervene(qv.Zero(other, positions="last")):
        frame = qv.faithfulness(lens, FACTS[0], {"gradient": best}, (4,), seeds=0)
    both = qv.NeuronSet.of([*best.units, (2, 7)])
    with lens.intervene(qv.Zero(both, positions="last")):
        assert frame["logprob"].item() == pytest.approx(lens.logprob(FACTS[0]), abs=1e-9)


def test_an_answer_that_comes_back_was_lost_where_it_first_went():
    rows = {"ranking": "a", "seed": 0, "prompt": 0, "known": True, "k": [1, 3, 10, 30]}
    assert lost_at(pd.DataFrame(rows).assign(right=[True, False, True, False]))["k"].item() == 3


def test_where_the_answer_is_lost():
    lens = qv.load("toy-gptj")
    fact = world_cases.facts(generator.build(0), "P641")[0]
    frame = qv.faithfulness(
        lens, fact, {"gradient": qv.neuron_effects(lens, fact, 100)}, (1, 10, 100), seeds=1
    )
    table = lost_at(frame).set_index("ranking")["k"]
    for name, rows in frame.groupby("ranking"):
        lost = [k for k, right in zip(rows["k"], rows["right"], strict=True) if not right]
        assert table[name] == min(lost) if lost else table.isna()[name]
    assert frame["known"].all()
    without_any = qv.faithfulness(lens, fact, {}, (1,), positions="all", seeds=1)
    assert without_any["known"].all()  # also where the model without any neuron would say another
    assert (without_any["emptied"] < -2).all()
    other = dataclasses.replace(fact, answer="golf" if fact.answer != "golf" else "chess")
    unknown = qv.faithfulness(lens, other, {}, (1, 10), seeds=2)
    assert not unknown["known"].any()
    assert lost_at(unknown)["k"].isna().all()  # what it never said is not lost


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["just a text"], {}), "pass qv.Fact"),
        ((FACTS, {}, (0,)), "at least 1"),
        ((FACTS, {"random": qv.NeuronSet.of([(0, 1)])}), "random orders"),
        ((FACTS, {"mine": qv.NeuronSet.of([(99, 1)])}), "Layer 99"),
        ((FACTS, {"mine": qv.NeuronSet.of([(0, 99)], "head")}), "heads 0 to 3"),
        ((FACTS, {"mine": qv.NeuronSet.of([(0, 1)], "w_out_column")}), "acts on FFN neurons"),
        (
            (FACTS, {"a": qv.NeuronSet.of([(0, 1)], "head"), "b": qv.NeuronSet.of([(0, 1)])}),
            "several kinds",
        ),
    ],
)
def test_bad_requests_are_refused(arguments, words):
    with pytest.raises(qv.QVLensError, match=words):
        qv.faithfulness(tiny_lens("gptj"), *arguments)


def test_a_ranking_of_one_fact_is_refused_for_another():
    lens = tiny_lens("gptj")
    with pytest.raises(qv.QVLensError, match="no neurons for fact 1"):
        qv.faithfulness(lens, FACTS, {"mine": qv.neuron_effects(lens, FACTS[0], 3)})


def test_rankings_in_rounds_keep_their_order():
    """A later round may score higher; what is taken out first is still the first round's."""
    lens = qv.load("toy-gptj")
    fact = world_cases.facts(generator.build(0), "P641")[0]
    ranking = qv.neuron_effects(lens, fact, 6, rounds=6)
    scores = ranking.frame["score"]
    assert not scores.is_monotonic_decreasing  # so that the two orders differ
    frame = qv.faithfulness(lens, fact, {"rounds": ranking}, sizes=(1, 2, 6), seeds=0)
    for k, row in frame.set_index("k").iterrows():
        with lens.intervene(qv.Zero(qv.NeuronSet.of(ranking.units[:k]), "last")):
            assert row["logprob"] == pytest.approx(lens.logprob(fact), abs=1e-5)


@pytest.mark.parametrize("unit", ["ffn", "attn_channel", "head"])
@pytest.mark.parametrize("positions", ["last", "all"])
def test_what_is_kept_and_what_is_taken_out_against_the_intervention(unit, positions):
    lens = tiny_lens("qwen3-gqa")
    ranking = qv.neuron_effects(lens, FACTS, 6, unit=unit)
    width = ranking_width(lens, unit)
    every = [(layer, neuron) for layer in range(lens.n_layers) for neuron in range(width)]
    for keep in (False, True):
        frame = qv.faithfulness(
            lens, FACTS, {"gradient": ranking}, (1, 5), keep=keep, positions=positions, seeds=1
        )
        assert (frame["kept"] == keep).all()
        for row in frame[frame["ranking"] == "gradient"].itertuples():
            best = ranking.where(lambda f, i=row.prompt: f.prompt == i).top(row.k).units
            out = [pair for pair in every if pair not in best] if keep else best
            assert row.logprob == pytest.approx(
                without(lens, FACTS[row.prompt], out, unit, positions), abs=1e-9
            )
            assert row.emptied == pytest.approx(
                without(lens, FACTS[row.prompt], every, unit, positions), abs=1e-9
            )


@pytest.mark.parametrize("positions", ["subject_last", "subject_first", 1])
def test_sets_are_taken_out_at_the_token_that_they_were_ranked_at(positions):
    lens = tiny_lens("qwen3-gqa")
    ranking = qv.neuron_effects(lens, FACTS, 6, positions=positions)
    frame = qv.faithfulness(lens, FACTS, {"here": ranking}, (1, 5), positions=positions, seeds=1)
    at = lens.rows(FACTS, positions).positions.tolist()
    for row in frame[frame["ranking"] == "here"].itertuples():
        best = ranking.where(lambda f, i=row.prompt: f.prompt == i).top(row.k).units
        wanted = without(lens, FACTS[row.prompt], best, "ffn", at[row.prompt])
        assert row.logprob == pytest.approx(wanted, abs=1e-9)
    with pytest.raises(qv.QVLensError, match="give both the same positions="):
        qv.faithfulness(lens, FACTS, {"here": ranking}, (1,))


def test_a_ranking_of_units_at_every_token_is_not_taken_out_at_one():
    lens = tiny_lens("qwen3-gqa")
    everywhere = qv.neuron_effects(lens, FACTS, 6, positions="all")
    for positions in ("last", "subject_last"):
        with pytest.raises(qv.QVLensError, match=r"at tokens \[0, 1, .*same positions="):
            qv.faithfulness(lens, FACTS, {"x": everywhere}, (1,), positions=positions)
    last = lens.rows(FACTS).positions.tolist()
    own = everywhere.where(lambda f: f["position"] == f["prompt"].map(dict(enumerate(last))))
    assert len(qv.faithfulness(lens, FACTS, {"x": own}, (1,), seeds=0)) == len(FACTS)
    qv.faithfulness(lens, FACTS, {"x": everywhere}, (1,), positions="all", seeds=0)
    with pytest.raises(qv.QVLensError, match="in front of the answer"):
        qv.faithfulness(lens, FACTS, {}, (1,), positions="answer", seeds=1)


def ranking_width(lens, unit):
    return {"ffn": lens.d_mlp, "attn_channel": len(lens.parameter(0, "W_O")), "head": 4}[unit]


def without(lens, fact, units, unit, positions):
    with lens.intervene(qv.Zero(qv.NeuronSet.of(units, unit), positions)):
        return lens.logprob(fact)


def test_what_is_taken_out_goes_to_the_baseline():
    lens = tiny_lens("gptj")
    mean = lens.trace(FACTS).m.mean(1)
    best = qv.neuron_effects(lens, FACTS, 3, baseline="mean")
    frame = qv.faithfulness(lens, FACTS, {"mean": best}, (1,), baseline="mean", seeds=0)
    for row in frame.itertuples():
        layer, neuron = best.where(lambda f, i=row.prompt: f.prompt == i).units[0]
        value = float(mean[layer, neuron])
        one = qv.Replace(qv.NeuronSet.of([(layer, neuron)]), value, "last")
        with lens.intervene(one):
            assert row.logprob == pytest.approx(lens.logprob(FACTS[row.prompt]), abs=1e-9)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_each_prompt_goes_to_its_own_baseline(positions):
    """Of other prompts as the baseline each prompt has its own."""
    lens = tiny_lens("gptj")
    every = world_cases.facts(generator.build(0), "P641")
    alike = [fact for fact in every if len(lens.tokenize(fact)[0].ids) == 8]
    facts, others = alike[:2], [fact.text for fact in alike[2:4]]
    best = qv.NeuronSet.of([(1, 5)])
    frame = qv.faithfulness(
        lens, facts, {"one": best}, (1,), baseline=others, positions=positions, seeds=0
    )
    there = lens.trace(others, positions)
    for i, fact in enumerate(facts):
        rows = there.m[1, there.prompt == i, 5]
        length = len(lens.tokenize(fact)[0].ids)

        def put(m, rows=rows, length=length):
            m[0, length - len(rows) : length, 5] = rows
            return m

        ids = [list(lens.tokenize(fact)[0].ids)]
        logits = lens.logits(ids, [(lens.backend_adapter.coefficient(1), put)])
        wanted = float(logits[0, -1].log_softmax(-1)[lens.answer_ids(fact)[0]])
        assert frame["logprob"][frame["prompt"] == i].item() == pytest.approx(wanted, abs=1e-9)


def test_a_draw_of_all_units_has_every_unit_once():
    lens = tiny_lens("gptj")
    drawn = random_neurons(lens, lens.n_layers * lens.d_mlp, random.Random(0)).units
    assert sorted(drawn) == [(i, k) for i in range(lens.n_layers) for k in range(lens.d_mlp)]


def test_an_area_is_a_prompts_mean_over_its_draws():
    rows = [
        ("random", seed, prompt, False, k, -1.0 + depth, -1.0, -9.0)
        for (seed, prompt), depth in {(0, 0): -3.0, (1, 0): 0.0, (0, 1): -1.0, (1, 1): -2.0}.items()
        for k in (1, 10)
    ]
    columns = ["ranking", "seed", "prompt", "kept", "k", "logprob", "clean", "emptied"]
    (row,) = module.areas(pd.DataFrame(rows, columns=columns)).itertuples()
    assert (row.prompts, row.area) == (2, -1.5)


def test_areas_by_hand():
    rows = [
        ("mine", 0, 0, False, 1, -2.0, -1.0, -9.0),
        ("mine", 0, 0, False, 100, -6.0, -1.0, -9.0),
        ("kept", 0, 0, True, 10, -5.0, -1.0, -9.0),
        ("kept", 0, 0, True, 50, -1.0, -1.0, -9.0),
    ]
    columns = ["ranking", "seed", "prompt", "kept", "k", "logprob", "clean", "emptied"]
    frame = pd.DataFrame(rows, columns=columns)
    frame.attrs["units"] = 100
    table = module.areas(frame).set_index("ranking")
    assert table.loc["mine", "area"] == pytest.approx((-1 - 5) / 2)
    # f: 0 at 0, 1/2 at a tenth, 1 at a half, 1 at all
    assert table.loc["kept", "cpr"] == pytest.approx(0.1 * 0.25 + 0.4 * 0.75 + 0.5)
    assert table.loc["kept", "cmd"] == pytest.approx(0.1 * 0.75 + 0.4 * 0.25)
