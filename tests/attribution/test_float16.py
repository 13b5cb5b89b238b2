"""Gradients in float16 of answers that the model is sure of, against float32 on the same weights."""

from __future__ import annotations

import pytest
import torch

import qv_lens as qv
from qv_lens.models.norms import enlarged

SURE = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
UNLIKELY = qv.Fact("{} plays the sport of", "Elena Morefeld", "golf")


@pytest.fixture(scope="module")
def half_and_whole():
    half, whole = qv.load("toy-gptj", dtype="float16"), qv.load("toy-gptj", dtype="float32")
    for rounded, exact in zip(half.model.parameters(), whole.model.parameters(), strict=True):
        exact.data.copy_(rounded.data)
    assert whole.logprob(SURE) > -1e-5
    assert whole.logprob(UNLIKELY) < -5
    return half, whole


def apart(pair, scores) -> float:
    """The relative distance of what float16 gives."""
    half, whole = (scores(lens).sort_index() for lens in pair)
    assert half.index.equals(whole.index)
    return float((half - whole).pow(2).sum() ** 0.5 / whole.pow(2).sum() ** 0.5)


@pytest.mark.parametrize("method", ["gradient", "relp", "integrated"])
def test_effects_on_sure_and_unlikely_answers_of_one_batch(half_and_whole, method):
    for facts, prompt in (([SURE], 0), ([SURE, UNLIKELY], 0), ([SURE, UNLIKELY], 1)):

        def scores(lens, facts=facts, prompt=prompt):
            steps = {"steps": 4} if method == "integrated" else {}
            frame = qv.neuron_effects(lens, facts, None, method=method, **steps).frame
            return frame[frame["prompt"] == prompt].set_index(["layer", "neuron"])["score"]

        assert apart(half_and_whole, scores) < 0.01


@pytest.mark.parametrize("asked", [SURE.to("golf"), UNLIKELY.to("fencing")])
def test_paths_to_an_unlikely_and_to_a_sure_answer(half_and_whole, asked):
    def scores(lens):
        return qv.transmission_paths(lens, [asked]).set_index(["layer", "kind", "neuron"])["score"]

    assert apart(half_and_whole, scores) < 0.01


def test_integrated_gradients_of_a_sure_answer(half_and_whole):
    best = [qv.integrated_gradients(lens, SURE, 300) for lens in half_and_whole]
    half, whole = (set(found.units) for found in best)
    assert len(half & whole) > 290


@torch.no_grad()
def test_the_gradient_is_enlarged_by_a_power_of_two_as_far_as_the_answer_is_sure():
    logp = torch.tensor([-20.0, -0.7, -0.1, -1e-3, -1e-9, 0.0])
    assert enlarged(logp).tolist() == [1, 1, 8, 512, 2**15, 2**15]
