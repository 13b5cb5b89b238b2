"""Scores while an intervention is in force, against a second lens whose weights hold the same
change; and refusals where the change has no place in the formula."""

from __future__ import annotations

import numpy as np
import pytest

import qv_lens as qv
from qv_lens.models.deltas import delta_hooks

FACT = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
HEADS = [(6, 1), (3, 0), (9, 2)]


@pytest.fixture
def lens() -> qv.Lens:
    return qv.load("toy-gptj", device="cpu")


@pytest.fixture
def without_heads() -> qv.Lens:
    """The model whose rows of W_O are zero for these heads."""
    twin = qv.load("toy-gptj", device="cpu")
    for layer, head in HEADS:
        W_O = twin.parameter(layer, "W_O")
        width = W_O.shape[0] // twin.model.cfg.n_heads
        W_O[head * width : (head + 1) * width] = 0
    return twin


def scores(lens: qv.Lens, unit: str) -> np.ndarray:
    return qv.value_neurons(lens, FACT, None, unit=unit).frame["score"].sort_values().to_numpy()


@pytest.mark.parametrize("unit", ["ffn", "head", "attn_channel"])
def test_scores_without_some_heads(lens, without_heads, unit):
    with lens.intervene(qv.Zero(qv.NeuronSet.of(HEADS, "head"))):
        assert lens.logprob(FACT) == pytest.approx(without_heads.logprob(FACT), abs=1e-6)
        np.testing.assert_allclose(scores(lens, unit), scores(without_heads, unit), atol=2e-6)


@pytest.mark.parametrize("unit", ["head_position", "attn_neuron"])
@pytest.mark.parametrize("kind", ["zero", "scale", "replace"])
def test_patterns_and_values_do_not_know_of_changed_heads(lens, unit, kind):
    heads = qv.NeuronSet.of(HEADS, "head")
    change = {
        "zero": qv.Zero(heads),
        "scale": qv.Scale(heads, 2.0),
        "replace": qv.Replace(heads, 0),
    }
    with lens.intervene(change[kind]), pytest.raises(qv.QVLensError, match="by position would be"):
        qv.value_neurons(lens, FACT, 5, unit=unit)


def test_query_scores_of_value_neurons_that_are_scaled(lens):
    """Through attention the gradient is that of the pass; in the stream m_j stands for itself."""
    value = qv.value_neurons(lens, FACT, 30)
    some = value.where(lambda frame: frame["layer"] > 1).top(3)
    query = qv.query_neurons(lens, FACT, some, 5)
    graph = qv.qv_graph(lens, FACT, some, query)
    twin = qv.load("toy-gptj", device="cpu")
    for layer, neuron in some.units:
        twin.w_out(layer)[neuron] *= 2

    def targets(of: qv.Lens) -> qv.NeuronSet:
        every = qv.value_neurons(of, FACT, None)
        index = every.frame.set_index(["layer", "neuron"]).index
        return every.where(index.isin(some.units))

    truth = qv.query_neurons(twin, FACT, targets(twin), 5, through="attention")
    with lens.intervene(qv.Scale(some, 2.0)):
        attended = qv.query_neurons(lens, FACT, targets(lens), 5, through="attention")
        np.testing.assert_allclose(attended.frame["score"], truth.frame["score"], rtol=1e-4)
        with pytest.raises(qv.QVLensError, match=r"Scale is in force on the value neuron \(\d+, "):
            qv.query_neurons(lens, FACT, some, 5)
        with pytest.raises(qv.QVLensError, match="Tests of edges would be wrong while a Scale"):
            qv.edge_effects(lens, FACT, graph)
    with lens.intervene(qv.Replace(some, 1.5)), pytest.raises(qv.QVLensError, match="Replace is"):
        qv.qv_graph(lens, FACT, some, query)
    with lens.intervene(qv.Scale(query, 2.0)):  # query neurons are heard as they then write
        qv.query_neurons(lens, FACT, some, 5)


@pytest.mark.parametrize("name", ["W_in", "W_out", "b_in"])
def test_ffn_weights_are_not_trained_under_a_suppress(lens, name):
    """Its targets' m is made of the weights themselves, so a change in passing would not be heard."""
    value = qv.value_neurons(lens, FACT, 300).where(lambda frame: frame["layer"] > 1)
    cut = qv.Suppress(qv.query_neurons(lens, FACT, value, 10), value)
    with lens.intervene(cut), pytest.raises(qv.QVLensError, match="under a Suppress in force"):
        delta_hooks(lens, {(5, name): lens.parameter(5, name) * 0})
    with lens.intervene(cut):
        delta_hooks(lens, {(5, "W_O"): lens.parameter(5, "W_O") * 0})


def test_what_reads_out_by_weights_refuses_a_hook_there(lens):
    """Halved final vectors: log p hears them, and nothing else gives the unhooked model's
    numbers."""
    effects, clean = qv.neuron_effects(lens, FACT, 5), lens.logprob(FACT)
    lens.model.add_hook("ln_final.hook_normalized", lambda x, hook: 0.5 * x)
    assert lens.logprob(FACT) < clean
    for verb in (
        lambda: qv.faithfulness(lens, FACT, {"effects": effects}, (1,), seeds=0),
        lambda: qv.neuron_effects(lens, FACT, 5),
        lambda: qv.neuron_effects(lens, FACT, 1, candidates=3),
        lambda: qv.neuron_effects(lens, FACT, 5, method="relp"),
        lambda: qv.integrated_gradients(lens, FACT),
        lambda: qv.value_neurons(lens, FACT, 5),
        lambda: qv.layer_scores(lens, FACT),
        lambda: qv.edit(lens, FACT.to("golf"), qv.ROME(layer=3, mom2_adjustment=False)),
    ):
        with pytest.raises(qv.QVLensError, match="acts on the final norm"):
            verb()
    lens.model.reset_hooks()
    assert qv.faithfulness(lens, FACT, {"effects": effects}, (1,), seeds=0)["clean"].iloc[
        0
    ] == pytest.approx(clean, abs=1e-6)
