"""What is lost without neurons: shares by hand, and which layers are asked."""

from __future__ import annotations

import pandas as pd
import pytest

import qv_lens as qv
from qv_lens.evaluation import ablation
from qv_lens.evaluation.ablation import Answers, drop, suppress
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from tests.models import tiny_lens


def test_what_is_lost_is_lost_of_what_was_right():
    """One of the two right answers is lost, another prompt becomes right: accuracy stays."""
    clean = Answers([True, True, False, False], [-1.0, -1.0, -3.0, -3.0])
    now = Answers([True, False, True, False], [-1.0, -2.0, -1.0, -3.0])
    assert drop(clean, now) == pytest.approx((0.5, 0.5, 0.0, 0.5, 0.25))


def test_query_layers_are_ranked_by_what_raises_the_value_neurons(monkeypatch):
    """Scores below zero do not count: a layer of 3 and -4 is ahead of one of 1 and 0."""
    lens = tiny_lens("gptj")
    rows = [(0, 0, 3.0), (0, 1, -4.0), (1, 0, 1.0), (1, 1, 0.0), (2, 0, -1.0), (2, 1, -2.0)]
    frame = pd.DataFrame(rows, columns=["layer", "neuron", "score"])
    found = qv.NeuronSet.of([(layer, neuron) for layer, neuron, _ in rows])
    found = qv.NeuronSet(found.frame.assign(score=frame["score"]), found.settings)
    monkeypatch.setattr(ablation, "query_neurons", lambda *words, **options: found)
    best = ablation._best_query_neurons(lens, None, found, 2)
    assert list(best) == [0, 1]
    assert best[0].units == [(0, 0), (0, 1)]


@pytest.mark.parametrize("reached", [40, 300, 2000])
def test_what_reaches_a_threshold_is_found_without_scoring_all(reached):
    """As many as reach it, more than are asked at first too."""
    lens = qv.load("toy-gptj")
    facts = world_cases.facts(generator.build(0), "P641")[:3]
    every = qv.value_neurons(lens, facts, None, method="exact").frame
    least = every.groupby("prompt")["score"].nlargest(reached).groupby("prompt").min().to_numpy()
    wanted = every[every["score"].to_numpy() >= least[every["prompt"].to_numpy()]]
    units = ["prompt", "layer", "neuron"]
    found = ablation._reaching(lens, facts, least)
    assert set(found[units].itertuples(index=False, name=None)) == set(
        wanted[units].itertuples(index=False, name=None)
    )
    assert len(found) == 3 * reached


def test_as_many_query_neurons_are_silenced_as_of_gptjs_layer(monkeypatch):
    """The share of a layer, as if GPT-J's were twice as wide as this one: half of a hundred."""
    lens = qv.load("toy-gptj")
    chains = world_cases.facts(generator.build(0), "P641")[:1]
    monkeypatch.setattr(ablation, "OF", 2 * lens.d_mlp)
    table, _ = suppress(lens, chains, counted=False)
    assert set(table["count"]) == {50}
    with pytest.raises(qv.QVLensError, match="top"):
        suppress(lens, chains, 0)
