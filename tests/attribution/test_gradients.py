"""Gradient attribution against Hugging Face's own autograd, completeness, and enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch

import qv_lens as qv
from qv_lens.attribution.gradients import _best_paths, weight_attributions
from qv_lens.models.deltas import delta_hooks
from tests.attribution.test_value import FACTS
from tests.models import BACKENDS, KINDS, tiny_lens

LONG = qv.Fact("{} works for", "Olga Pelodan", "Nortek Dalrin")


def hf_name(kind, layer, name):
    """The stored parameter behind one of ours, and whether it is transposed (always)."""
    if kind == "gptj":
        names = {"W_out": "mlp.fc_out", "W_in": "mlp.fc_in", "W_Q": "attn.q_proj", "W_O": "attn.out_proj", "W_V": "attn.v_proj"}
        return f"transformer.h.{layer}.{names[name]}.weight"
    names = {"W_out": "mlp.down_proj", "W_in": "mlp.up_proj", "W_gate": "mlp.gate_proj", "W_Q": "self_attn.q_proj",
             "W_O": "self_attn.o_proj", "W_V": "self_attn.v_proj"}  # fmt: skip
    return f"model.layers.{layer}.{names[name]}.weight"


def hf_probabilities(hf, lens, fact, weights):
    """P(answer token j | prompt, answer tokens before j), with some weights replaced."""
    prompt = lens.tokenize(fact)[0]
    ids = torch.tensor([[*prompt.ids, *prompt.answer]])
    logits = torch.func.functional_call(hf, weights, (ids,)).logits[0]
    return [logits[prompt.last + j].softmax(-1)[token] for j, token in enumerate(prompt.answer)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_adding_in_passing_equals_writing(kind, backend):
    lens, rows = tiny_lens(kind, backend), [[5, 6, 7, 8, 9], [3, 4, 5]]
    extra = ("b_in", "b_out") if kind == "gptj" else ("W_gate",)
    for name in ("W_out", "W_in", "W_O", "W_Q", "W_K", "W_V", *extra):
        weight = lens.parameter(1, name)
        before, delta = weight.clone(), torch.randn(weight.shape, dtype=weight.dtype) * 0.1
        added = lens.logits(rows, delta_hooks(lens, {(1, name): delta}))
        clean = lens.logits(rows)
        weight.add_(delta)
        written = lens.logits(rows)
        weight.copy_(before)
        torch.testing.assert_close(added, written, atol=5e-6, rtol=0)  # the bridge's Qwen3 norm is Hugging Face's float32 one
        assert (written - clean).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize("name", ["W_out", "W_in", "W_V", "W_O", "W_Q"])
def test_weight_attributions_equal_hugging_faces_autograd(kind, name, true_float64):
    """Eq. 5 on the stored matrix: scale it, differentiate, multiply; one layer, two facts, an answer of several tokens."""
    lens, steps = tiny_lens(kind), 3
    facts = [FACTS[0], LONG]
    got = weight_attributions(lens, facts, [(1, name)], steps)[1, name]
    key = hf_name(kind, 1, name)
    weight = dict(lens.hf.named_parameters())[key].detach()
    total = torch.zeros_like(weight)
    for i in range(1, steps + 1):
        leaf = (weight * i / steps).requires_grad_(True)
        p = sum(sum(hf_probabilities(lens.hf, lens, fact, {key: leaf})) for fact in facts) / len(facts)
        total += torch.autograd.grad(p, leaf)[0]
    torch.testing.assert_close(got, (weight * total / steps).T, atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_weight_attributions_are_complete(kind):
    """Summed over a matrix they are P(with it) - P(without it), up to the sum's step."""
    lens = tiny_lens(kind)
    total = weight_attributions(lens, [FACTS[0]], [(2, "W_out")], 400)[2, "W_out"].sum()
    key = hf_name(kind, 2, "W_out")
    weight = dict(lens.hf.named_parameters())[key].detach()
    whole, none = (hf_probabilities(lens.hf, lens, FACTS[0], {key: w})[0] for w in (weight, torch.zeros_like(weight)))
    assert total.item() == pytest.approx((whole - none).item(), abs=5e-3 * abs(whole - none).item() + 1e-6)


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_the_ensemble_is_what_lies_above_one_quantile(kind):
    lens = tiny_lens(kind)
    found = qv.neuron_ensemble(lens, [f.to("Dalrin") for f in FACTS], 0.05, steps=4)
    every = qv.neuron_ensemble(lens, [f.to("Dalrin") for f in FACTS], 1.0, steps=4)
    assert len(every) == lens.n_layers * lens.d_model  # KNE's neurons of W_out are columns
    assert found.unit == "w_out_column"
    assert len(found) == round(0.05 * len(every))
    assert found.frame["score"].min() >= found.settings["threshold"] > (every - found).frame["score"].max()
    with pytest.raises(qv.QVLensError), lens.intervene(qv.Zero(found)):
        pass
    rows = qv.neuron_ensemble(lens, FACTS, 1.0, axis="row", steps=2, together=True, reduce="norm")
    assert rows.unit == "ffn"
    assert len(rows) == lens.n_layers * lens.d_mlp
    gates = qv.neuron_ensemble(lens, FACTS, 0.1, parameters=("W_in", "W_V"), steps=2)
    assert set(gates.frame["unit"]) <= {"w_in_column", "w_v_column"}


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_integrated_gradients_are_complete(kind):
    """Summed over a layer's neurons: P - P with the layer's neurons zeroed at the last token."""
    lens = tiny_lens(kind)
    found = qv.integrated_gradients(lens, FACTS, None, steps=300).frame
    for layer in range(lens.n_layers):
        every = qv.NeuronSet.of([(layer, n) for n in range(lens.d_mlp)])
        clean = torch.tensor(lens.logprob(FACTS)).exp()
        with lens.intervene(qv.Zero(every, positions="last")):
            zeroed = torch.tensor(lens.logprob(FACTS)).exp()
        sums = torch.tensor(found[found["layer"] == layer].groupby("prompt")["score"].sum().to_numpy())
        torch.testing.assert_close(sums, (clean - zeroed).double(), atol=2e-4, rtol=2e-2)


@pytest.mark.parametrize("rows", [64, 2])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_transmission_nodes_from_hugging_faces_gradients(kind, batch_size, rows, true_float64, monkeypatch):
    """CTP's scores by hand: backward through the stored matrices of each mini-batch, z-scores by loops over rows; the same
    however many mini-batches go into one pass."""
    monkeypatch.setattr("qv_lens.attribution.gradients.TOGETHER", rows)
    lens = tiny_lens(kind)
    requests = [fact.to(new) for fact, new in zip((*FACTS, *FACTS), ("Dalrin", "Dalrin Dalrin", "golf", "fencing"), strict=False)]
    assert len({len(lens.answer_ids(request.target)) for request in requests}) > 1
    frame = qv.transmission_paths(lens, requests, top=3, bottom=2, batch_size=batch_size)
    total = {}
    for i in range(0, len(requests), batch_size):
        keys = [hf_name(kind, layer, name) for layer in range(lens.n_layers) for name in ("W_in", "W_out")]
        leaves = {k: dict(lens.hf.named_parameters())[k].detach().clone().requires_grad_(True) for k in keys}
        p = [p for request in requests[i : i + batch_size] for p in hf_probabilities(lens.hf, lens, request.target, leaves)]
        loss = -torch.stack(p).log().mean()
        for k, g in zip(keys, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            total[k] = total.get(k, 0) + g
    for layer in range(lens.n_layers):
        for node, name in (("key", "W_in"), ("value", "W_out")):
            G = total[hf_name(kind, layer, name)]
            G = G.T if node == "key" else G  # [d_model, d_mlp]
            z = torch.stack([(row - row.mean()) / row.std() for row in G])
            rows = frame[(frame["layer"] == layer) & (frame["kind"] == node)]
            torch.testing.assert_close(torch.tensor(rows["score"].to_numpy()), z.abs().mean(0), atol=1e-8, rtol=1e-6)
            best = set(z.abs().mean(0).topk(3).indices.tolist())
            assert set(rows[rows["path"] == "T+"]["neuron"]) == best
            assert (rows["path"] == "T-").sum() == 2


def test_best_paths_equal_enumeration():
    g = torch.Generator().manual_seed(0)
    scores = [torch.randn(4, generator=g).tolist() for _ in range(5)]
    every = sorted(itertools.product(range(4), repeat=5), key=lambda p: -sum(s[j] for s, j in zip(scores, p, strict=True)))
    assert _best_paths(scores, 7) == every[:7]


def test_bad_options_are_refused():
    lens = tiny_lens("gptj")
    for call in (
        lambda: qv.neuron_ensemble(lens, FACTS, 0.0),
        lambda: qv.neuron_ensemble(lens, FACTS, axis="row", parameters=("W_in",)),
        lambda: qv.neuron_ensemble(lens, [], 0.1),
        lambda: qv.transmission_paths(lens, FACTS, top=500),
        lambda: qv.transmission_paths(lens, FACTS, gate=True),
        lambda: qv.transmission_paths(lens, FACTS, score="x"),
    ):
        with pytest.raises(qv.QVLensError):
            call()
