"""Query scores against finite differences and real removals."""

from __future__ import annotations

import pytest
import torch

import qv_lens as qv
from qv_lens.interventions import ffn_coefficients
from tests.attribution.test_value import FACTS
from tests.models import KINDS, tiny_lens


@pytest.mark.parametrize("kind", KINDS)
def test_grad_equals_finite_differences(kind, true_float64):
    """d/dt of sum_j (I_j / m_j) m_j(h + t v_q), by central differences of the norm-and-FFN formula in float64."""
    lens = tiny_lens(kind)
    trace = lens.trace(FACTS)
    value = qv.value_neurons(lens, trace, top=20)
    query = qv.query_neurons(lens, trace, value, top=None, targets=20).frame
    eps = 1e-6
    for prompt in range(2):
        targets = value.frame[value.frame["prompt"] == prompt]
        for layer, neuron in ((0, 1), (0, 17), (1, 5)):
            v = trace.m[layer, prompt, neuron] * lens.w_out(layer)[neuron]
            expected = 0.0
            for row in targets[targets["layer"] > layer].itertuples():
                h = (trace.resid if lens.backend_adapter.parallel else trace.mid)[row.layer, prompt]
                j = torch.tensor([row.neuron])
                up, down = (ffn_coefficients(lens, row.layer, h + s * eps * v, j).item() for s in (1, -1))
                expected += row.score / row.coefficient * (up - down) / (2 * eps)
            got = query[(query["prompt"] == prompt) & (query["layer"] == layer) & (query["neuron"] == neuron)]["score"].item()
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["grad", "share", "inner_product"])
def test_neurons_and_bias_add_up_to_their_layer(kind, method, true_float64):
    """The functional is linear: a layer's FFN output scores what its neurons and b_out score together."""
    lens = tiny_lens(kind)
    trace = lens.trace(FACTS)
    value = qv.value_neurons(lens, trace, top=20)
    summed = qv.query_neurons(lens, trace, value, top=None, method=method).frame.groupby(["prompt", "layer"])["score"].sum()
    layers = qv.query_layers(lens, trace, value, method=method)
    whole = layers[layers["kind"] == "ffn"].set_index(["prompt", "layer"])["score"]
    if kind != "gptj":
        assert (summed - whole).abs().max() < 1e-9
    else:
        for layer in range(lens.n_layers):
            lens.backend_adapter.b_out(layer).zero_()
        trace = lens.trace(FACTS)
        value = qv.value_neurons(lens, trace, top=20)
        summed = qv.query_neurons(lens, trace, value, top=None, method=method).frame.groupby(["prompt", "layer"])["score"].sum()
        layers = qv.query_layers(lens, trace, value, method=method)
        whole = layers[layers["kind"] == "ffn"].set_index(["prompt", "layer"])["score"]
        assert (summed - whole).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_all_components_add_up_to_the_importance(kind, true_float64):
    """With LayerNorm's mean left in (as REF does) embedding, attention and FFN shares of one target add up to I_j."""
    lens = tiny_lens(kind)
    trace = lens.trace(FACTS[0])
    value = qv.value_neurons(lens, trace, top=1, norm="full")
    layers = qv.query_layers(lens, trace, value, method="share")
    assert layers["score"].sum() == pytest.approx(value.frame["score"].item(), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_suppress_equals_removing_the_query_by_hand(kind, true_float64):
    """m of the targets recomputed from a stream without v_q; nothing else in their layer moves."""
    lens = tiny_lens(kind)
    query, targets = qv.NeuronSet.of([(0, 1), (0, 2), (1, 5)]), qv.NeuronSet.of([(1, 3), (2, 7), (2, 9)])
    clean = lens.trace(FACTS)
    with lens.intervene(qv.Suppress(query, targets)):
        cut = lens.trace(FACTS)
    x = (clean.resid if lens.backend_adapter.parallel else clean.mid)[1]
    without = x - clean.m[0][:, [1, 2]] @ lens.w_out(0)[[1, 2]]
    expected = ffn_coefficients(lens, 1, without, torch.tensor([3]))
    torch.testing.assert_close(cut.m[1][:, [3]], expected, atol=1e-11, rtol=1e-11)
    others = [n for n in range(lens.d_mlp) if n != 3]
    torch.testing.assert_close(cut.m[1][:, others], clean.m[1][:, others], atol=1e-12, rtol=0)
    assert (cut.m[1][:, 3] - clean.m[1][:, 3]).abs().max() > 1e-4


def test_suppress_refuses_queries_that_cannot_reach():
    lens = tiny_lens("gptj")
    with (
        pytest.raises(qv.QVLensError, match="cannot reach"),
        lens.intervene(qv.Suppress(qv.NeuronSet.of([(2, 1)]), qv.NeuronSet.of([(1, 1)]))),
    ):
        pass  # fmt: skip


def test_locate_ranks_every_layer_once():
    lens = tiny_lens("qwen3-gqa")
    layers = qv.locate(lens, FACTS)
    assert sorted(layers.value) == sorted(layers.query) == [0, 1, 2]
    assert layers.frame["score"].notna().all()
