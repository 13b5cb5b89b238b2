"""Gradient attribution against Hugging Face's own autograd, completeness, and enumeration."""

from __future__ import annotations

import itertools
from contextlib import contextmanager, nullcontext
from fractions import Fraction

import pandas as pd
import pytest
import torch

import qv_lens as qv
from qv_lens.attribution.ensembles import _at_least_threshold, weight_attributions
from qv_lens.attribution.paths import _best_paths, answer_gradients
from qv_lens.models.deltas import delta_hooks
from tests.attribution.test_value import FACTS
from tests.models import BACKENDS, KINDS, tiny_lens

LONG = qv.Fact("{} works for", "Olga Pelodan", "Nortek Dalrin")


def hf_name(kind, layer, name):
    """The stored parameter behind one of ours, and whether it is transposed (always)."""
    if kind == "gptj":
        names = {
            "W_out": "mlp.fc_out",
            "W_in": "mlp.fc_in",
            "W_Q": "attn.q_proj",
            "W_O": "attn.out_proj",
            "W_V": "attn.v_proj",
        }
        return f"transformer.h.{layer}.{names[name]}.weight"
    names = {"W_out": "mlp.down_proj", "W_in": "mlp.up_proj", "W_gate": "mlp.gate_proj", "W_Q": "self_attn.q_proj",
             "W_O": "self_attn.o_proj", "W_V": "self_attn.v_proj"}  # fmt: skip
    return f"model.layers.{layer}.{names[name]}.weight"


@contextmanager
def zeroed(lens, fact, active):
    """Neuron 3 of Hugging Face's first layer held at 0 at the prompt's last token."""
    block = lens.hf.transformer.h[0] if hasattr(lens.hf, "transformer") else lens.hf.model.layers[0]
    last = lens.tokenize(fact)[0].last

    def hook(_, inputs):
        m = inputs[0].clone()
        m[:, last, 3] = 0.0
        return (m,)

    module = block.mlp.fc_out if hasattr(lens.hf, "transformer") else block.mlp.down_proj
    handle = module.register_forward_pre_hook(hook)
    if not active:
        handle.remove()
    yield
    handle.remove()


def ours(lens, active):
    """The same as an intervention."""
    zero = qv.Zero(qv.NeuronSet.of([(0, 3)]), positions="last")
    return lens.intervene(zero) if active else nullcontext()


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
        # the bridge's Qwen3 norm is Hugging Face's float32 one
        torch.testing.assert_close(added, written, atol=5e-6, rtol=0)
        assert (written - clean).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize(
    "names",
    [
        ((1, "W_out"),),
        ((1, "W_in"),),
        ((1, "W_V"),),
        ((1, "W_O"),),
        ((1, "W_Q"),),
        ((2, "W_in"), (1, "W_out")),
    ],
)
@pytest.mark.parametrize(("rows", "intervened"), [(64, False), (4, True)])
def test_weight_attributions_equal_hugging_faces_autograd(
    kind, names, rows, intervened, true_float64, monkeypatch
):
    """Eq. 5 on the stored matrices: scale them together, differentiate, multiply; two facts, an
    answer of several tokens; however many scales go into one pass, also with an intervention at the
    prompts' last token."""
    monkeypatch.setattr("qv_lens.attribution.ensembles.ROWS", rows)
    lens, steps = tiny_lens(kind), 3
    facts = [FACTS[0], LONG]
    with ours(lens, intervened):
        got = weight_attributions(lens, facts, list(names), steps)
    keys = [hf_name(kind, *name) for name in names]
    weights = {key: dict(lens.hf.named_parameters())[key].detach() for key in keys}
    total = {key: torch.zeros_like(weight) for key, weight in weights.items()}
    for i in range(1, steps + 1):
        leaves = {key: (weight * i / steps).requires_grad_(True) for key, weight in weights.items()}
        p = 0.0
        for fact in facts:
            with zeroed(lens, fact, intervened):
                p = p + sum(hf_probabilities(lens.hf, lens, fact, leaves)) / len(facts)
        for key, gradient in zip(keys, torch.autograd.grad(p, list(leaves.values())), strict=True):
            total[key] += gradient
    assert list(got) == list(names)
    for name, key in zip(names, keys, strict=True):
        torch.testing.assert_close(
            got[name], (weights[key] * total[key] / steps).T, atol=1e-10, rtol=1e-6
        )


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("axis", "parameters", "reduce"),
    [
        ("column", ("W_out", "W_V"), "sum"),
        ("column", ("W_in",), "norm"),
        ("row", ("W_out",), "sum"),
        ("row", ("W_out",), "norm"),
    ],
)
def test_neurons_of_an_ensemble_are_sums_of_their_entries(kind, together, axis, parameters, reduce):
    """Neuron by neuron from the entries (compared with Hugging Face's above), and the quantile by
    sorting."""
    lens = tiny_lens(kind)
    facts = [FACTS[0], LONG]
    names = [(layer, name) for name in parameters for layer in range(lens.n_layers)]
    entries = weight_attributions(lens, facts, names, 3) if together else {}
    for name in names:
        entries[name] = entries.get(name, weight_attributions(lens, facts, [name], 3)[name])
    expected = {}
    for (layer, name), matrix in entries.items():
        for i, neuron in enumerate(matrix if axis == "row" else matrix.T):
            unit = "ffn" if axis == "row" else f"{name.lower()}_column"
            expected[unit, layer, i] = (
                neuron.sum().item() if reduce == "sum" else neuron.square().sum().sqrt().item()
            )
    options = {
        "axis": axis,
        "parameters": parameters,
        "reduce": reduce,
        "together": together,
        "steps": 3,
    }
    found = qv.neuron_ensemble(lens, facts, 0.1, **options)
    got = {(row.unit, row.layer, row.neuron): row.score for row in found.frame.itertuples()}
    ordered = sorted(expected.values(), reverse=True)
    at = 0.1 * (len(ordered) - 1)  # between the two that lie about the quantile
    threshold = ordered[int(at)] + (at - int(at)) * (ordered[int(at) + 1] - ordered[int(at)])
    assert found.settings["threshold"] == pytest.approx(threshold, rel=1e-6)
    assert got.keys() == {unit for unit, score in expected.items() if score >= threshold}
    for unit, score in got.items():
        assert score == pytest.approx(expected[unit], rel=1e-6, abs=1e-12)
    assert found.frame["score"].is_monotonic_decreasing
    assert (found.frame["prompt"] == -1).all()
    assert found.frame["coefficient"].isna().all()
    assert {
        **options,
        "parameters": list(parameters),
        "share": 0.1,
    }.items() <= found.settings.items()


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_weight_attributions_are_complete(kind):
    """Summed over a matrix they are P(with it) - P(without it), up to the sum's step."""
    lens = tiny_lens(kind)
    total = weight_attributions(lens, [FACTS[0]], [(2, "W_out")], 400)[2, "W_out"].sum()
    key = hf_name(kind, 2, "W_out")
    weight = dict(lens.hf.named_parameters())[key].detach()
    whole, none = (
        hf_probabilities(lens.hf, lens, FACTS[0], {key: w})[0]
        for w in (weight, torch.zeros_like(weight))
    )
    assert total.item() == pytest.approx(
        (whole - none).item(), abs=5e-3 * abs(whole - none).item() + 1e-6
    )


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_the_ensemble_is_what_lies_above_one_quantile(kind):
    lens = tiny_lens(kind)
    found = qv.neuron_ensemble(lens, [f.to("Dalrin") for f in FACTS], 0.05, steps=4)
    every = qv.neuron_ensemble(lens, [f.to("Dalrin") for f in FACTS], 1.0, steps=4)
    assert len(every) == lens.n_layers * lens.d_model  # KNE's neurons of W_out are columns
    assert found.unit == "w_out_column"
    assert len(found) == round(0.05 * len(every))
    assert (
        found.frame["score"].min()
        >= found.settings["threshold"]
        > (every - found).frame["score"].max()
    )
    with pytest.raises(qv.QVLensError), lens.intervene(qv.Zero(found)):
        pass
    rows = qv.neuron_ensemble(lens, FACTS, 1.0, axis="row", steps=2, together=True, reduce="norm")
    assert rows.unit == "ffn"
    assert len(rows) == lens.n_layers * lens.d_mlp
    gates = qv.neuron_ensemble(lens, FACTS, 0.1, parameters=("W_in", "W_V"), steps=2)
    assert set(gates.frame["unit"]) == {"w_in_column", "w_v_column"}


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
        sums = torch.tensor(
            found[found["layer"] == layer].groupby("prompt")["score"].sum().to_numpy()
        )
        torch.testing.assert_close(sums, (clean - zeroed).double(), atol=2e-4, rtol=2e-2)


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize(("rows", "intervened"), [(64, False), (5, True)])
def test_integrated_gradients_equal_hugging_faces_autograd(
    kind, rows, intervened, true_float64, monkeypatch
):
    """The input of the stored output matrix scaled at one position, step by step; every answer
    token by itself, added up; however many steps go into one pass. `coefficient` is the mean of m
    over the answer's tokens."""
    monkeypatch.setattr("qv_lens.attribution.knowledge_neurons.ROWS", rows)
    lens, steps = tiny_lens(kind), 4
    facts = [FACTS[0], LONG]
    with ours(lens, intervened):
        found = qv.integrated_gradients(lens, facts, None, steps=steps)
        best = qv.integrated_gradients(lens, facts, 5, steps=steps)
    blocks = lens.hf.transformer.h if kind == "gptj" else lens.hf.model.layers
    for p, fact in enumerate(facts):
        prompt = lens.tokenize(fact)[0]
        for layer, block in enumerate(blocks):
            module = block.mlp.fc_out if kind == "gptj" else block.mlp.down_proj
            score, mean = 0.0, 0.0
            for j, token in enumerate(prompt.answer):
                ids = torch.tensor([[*prompt.ids, *prompt.answer[:j]]])
                kept = []
                with (
                    zeroed(lens, fact, intervened),
                    module.register_forward_pre_hook(
                        lambda _, inputs, kept=kept: kept.append(inputs[0][0, -1])
                    ),
                ):
                    lens.hf(ids)
                m = kept[0]
                mean = mean + m / len(prompt.answer)
                for i in range(1, steps + 1):
                    leaf = (m * i / steps).requires_grad_(True)

                    def replaced(_, inputs, leaf=leaf):
                        return torch.cat([inputs[0][:, :-1], leaf[None, None]], dim=1)

                    with zeroed(lens, fact, intervened), module.register_forward_pre_hook(replaced):
                        probability = lens.hf(ids).logits[0, -1].softmax(-1)[token]
                    score = score + m * torch.autograd.grad(probability, leaf)[0] / steps
            rows_here = found.frame[
                (found.frame["prompt"] == p) & (found.frame["layer"] == layer)
            ].sort_values("neuron")
            got, m = (
                torch.tensor(rows_here[name].to_numpy(copy=True))
                for name in ("score", "coefficient")
            )
            torch.testing.assert_close(got, score, atol=1e-12, rtol=1e-9)
            torch.testing.assert_close(m, mean, atol=1e-12, rtol=1e-9)
    assert len(lens.tokenize(facts[1])[0].answer) > 1
    assert best.frame.equals(found.frame.groupby("prompt").head(5).reset_index(drop=True))
    assert best.settings["steps"] == steps


@pytest.mark.parametrize("rows", [64, 2])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_transmission_nodes_from_hugging_faces_gradients(
    kind, batch_size, rows, true_float64, monkeypatch
):
    """CTP's scores by hand: backward through the stored matrices of each mini-batch, z-scores by
    loops over rows; the same however many mini-batches go into one pass."""
    monkeypatch.setattr("qv_lens.attribution.paths.TOGETHER", rows)
    lens = tiny_lens(kind)
    requests = [
        fact.to(new)
        for fact, new in zip(
            (*FACTS, *FACTS), ("Dalrin", "Dalrin Dalrin", "golf", "fencing"), strict=False
        )
    ]
    assert len({len(lens.answer_ids(request.target)) for request in requests}) > 1
    frame = qv.transmission_paths(lens, requests, top=3, bottom=2, batch_size=batch_size)
    total = {}
    for i in range(0, len(requests), batch_size):
        keys = [
            hf_name(kind, layer, name)
            for layer in range(lens.n_layers)
            for name in ("W_in", "W_out")
        ]
        leaves = {
            k: dict(lens.hf.named_parameters())[k].detach().clone().requires_grad_(True)
            for k in keys
        }
        p = [
            p
            for request in requests[i : i + batch_size]
            for p in hf_probabilities(lens.hf, lens, request.target, leaves)
        ]
        loss = -torch.stack(p).log().mean()
        for k, g in zip(keys, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            total[k] = total.get(k, 0) + g
    for layer in range(lens.n_layers):
        for node, name in (("key", "W_in"), ("value", "W_out")):
            G = total[hf_name(kind, layer, name)]
            G = G.T if node == "key" else G  # [d_model, d_mlp]
            z = torch.stack([(row - row.mean()) / row.std() for row in G])
            rows = frame[(frame["layer"] == layer) & (frame["kind"] == node)]
            torch.testing.assert_close(
                torch.tensor(rows["score"].to_numpy()), z.abs().mean(0), atol=1e-8, rtol=1e-6
            )
            best = set(z.abs().mean(0).topk(3).indices.tolist())
            assert set(rows[rows["path"] == "T+"]["neuron"]) == best
            assert (rows["path"] == "T-").sum() == 2


@pytest.mark.parametrize("score", ["abs_sum", "sum", "norm", "mean_abs_z"])
@pytest.mark.parametrize("gate", [False, True])
def test_node_scores_and_best_paths_by_enumeration(score, gate, true_float64):
    """Nodes from Hugging Face's gradients, a gated FFN's with its column of W_gate; every path
    through the best candidates."""
    lens = tiny_lens("qwen3-gqa", n_layers=2)
    request = FACTS[0].to("Dalrin")
    frame = qv.transmission_paths(lens, request, 3, 2, score=score, paths="k_best", gate=gate)
    assert {
        "score": score,
        "paths": "k_best",
        "top": 3,
        "bottom": 2,
        "gate": gate,
    }.items() <= frame.attrs.items()
    names = [(layer, name) for layer in range(2) for name in ("W_in", "W_gate", "W_out")]
    leaves = {}
    for name in names:
        stored = dict(lens.hf.named_parameters())[hf_name("qwen3-gqa", *name)]
        leaves[name] = stored.detach().clone().requires_grad_(True)
    weights = {hf_name("qwen3-gqa", *name): leaf for name, leaf in leaves.items()}
    probabilities = hf_probabilities(lens.hf, lens, request.target, weights)
    loss = -torch.stack(probabilities).log().mean()
    gradients = dict(zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    lists = []
    for layer in range(2):
        key = [gradients[layer, "W_in"], *([gradients[layer, "W_gate"]] if gate else [])]
        for kind, G in (
            ("key", torch.cat([part.T for part in key])),
            ("value", gradients[layer, "W_out"]),
        ):
            z = (G - G.mean(1, keepdim=True)) / G.std(1, keepdim=True)
            by_name = {
                "sum": G.sum(0),
                "abs_sum": G.sum(0).abs(),
                "norm": G.square().sum(0).sqrt(),
                "mean_abs_z": z.abs().mean(0),
            }
            rows = frame[(frame["layer"] == layer) & (frame["kind"] == kind)]
            assert rows["neuron"].tolist() == list(range(lens.d_mlp))
            torch.testing.assert_close(
                torch.tensor(rows["score"].tolist()).double(), by_name[score], atol=1e-8, rtol=1e-6
            )
            lists.append(by_name[score])
    marks = [set() for _ in lists], [set() for _ in lists]
    for at, (count, sign) in enumerate(((3, 1.0), (2, -1.0))):
        candidates = [(sign * scores).topk(count).indices.tolist() for scores in lists]
        paths = sorted(
            itertools.product(*candidates),
            key=lambda p: -sum(sign * s[j].item() for s, j in zip(lists, p, strict=True)),
        )
        for path in paths[:count]:
            for held, j in zip(marks[at], path, strict=True):
                held.add(j)
    for i, (layer, kind) in enumerate(itertools.product(range(2), ("key", "value"))):
        rows = frame[(frame["layer"] == layer) & (frame["kind"] == kind)]
        assert set(rows[rows["path"] == "T+"]["neuron"]) == marks[0][i]
        assert set(rows[rows["path"] == "T-"]["neuron"]) == marks[1][i]


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_paths_with_deltas_in_force_are_those_of_the_edited_model(kind):
    lens = tiny_lens(kind)
    delta = (
        torch.randn(
            lens.w_out(1).shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        * 0.1
    )
    requests = [FACTS[0].to("Dalrin"), FACTS[1].to("golf")]
    plain = qv.transmission_paths(lens, requests)
    added = qv.transmission_paths(lens, requests, added={(1, "W_out"): delta})
    lens.w_out(1).add_(delta)
    written = qv.transmission_paths(lens, requests)
    assert (added["score"] - written["score"]).abs().max() < 1e-9
    assert added["path"].equals(written["path"])
    assert (added["score"] - plain["score"]).abs().max() > 1e-3


def test_ranks_mark_the_first_and_the_last():
    lens = tiny_lens("gptj")
    for top, bottom in ((3, 2), (1, 0), (lens.d_mlp - 1, 1), (lens.d_mlp, 0)):
        frame = qv.transmission_paths(lens, FACTS, top, bottom)
        for _, rows in frame.groupby(["layer", "kind"]):
            order = rows.sort_values("score", ascending=False)["path"].tolist()
            assert order == ["T+"] * top + [""] * (lens.d_mlp - top - bottom) + ["T-"] * bottom
    for top, bottom in ((0, 1), (3, -1), (lens.d_mlp, 1), (lens.d_mlp + 1, 0)):
        with pytest.raises(qv.QVLensError, match="must fit into"):
            qv.transmission_paths(lens, FACTS, top, bottom)


def test_a_dimension_without_gradient_counts_as_average():
    """Its z-scores would be 0 / 0: a dimension that the norm switches off leaves the nodes' scores
    finite."""
    lens = tiny_lens("gptj")
    norm = lens.hf.transformer.h[1].ln_1
    with torch.no_grad():
        norm.weight[5] = 0.0
        norm.bias[5] = 0.0
    frame = qv.transmission_paths(lens, FACTS)
    key = frame[(frame["layer"] == 1) & (frame["kind"] == "key")]["score"]
    G = answer_gradients(lens, FACTS, False, 2, {})[1, "W_in"]
    others = [i for i in range(lens.d_model) if i != 5]
    assert (G[5] == 0).all()
    z = (G[others] - G[others].mean(1, keepdim=True)) / G[others].std(1, keepdim=True)
    torch.testing.assert_close(
        torch.tensor(key.tolist()).double(), z.abs().sum(0) / lens.d_model, atol=1e-8, rtol=1e-6
    )


def test_gradients_that_are_not_finite_are_refused():
    lens = tiny_lens("gptj")
    lens.w_out(1)[3, 4] = float("inf")
    with pytest.raises(qv.QVLensError, match="not finite"):
        qv.transmission_paths(lens, FACTS)


def test_best_paths_equal_enumeration():
    g = torch.Generator().manual_seed(0)
    scores = [torch.randn(4, generator=g).tolist() for _ in range(5)]
    every = sorted(
        itertools.product(range(4), repeat=5),
        key=lambda p: -sum(s[j] for s, j in zip(scores, p, strict=True)),
    )
    assert _best_paths(scores, 7) == every[:7]


def test_bad_options_are_refused():
    lens = tiny_lens("gptj")
    for call in (
        lambda: qv.neuron_ensemble(lens, FACTS, 0.0),
        lambda: qv.neuron_ensemble(lens, FACTS, 1.01),
        lambda: qv.neuron_ensemble(lens, FACTS, axis="diagonal"),
        lambda: qv.neuron_ensemble(lens, FACTS, reduce="mean"),
        lambda: qv.integrated_gradients(lens, FACTS, steps=0),
        lambda: qv.integrated_gradients(lens, FACTS, 0),
        lambda: qv.transmission_paths(lens, FACTS, paths="x"),
        lambda: qv.neuron_ensemble(lens, FACTS, axis="row", parameters=("W_in",)),
        lambda: qv.neuron_ensemble(lens, [], 0.1),
        lambda: qv.transmission_paths(lens, FACTS, top=500),
        lambda: qv.transmission_paths(lens, FACTS, gate=True),
        lambda: qv.transmission_paths(lens, FACTS, score="x"),
    ):
        with pytest.raises(qv.QVLensError):
            call()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("count", [2, 11, 100, 1001])
def test_an_ensemble_holds_the_neurons_that_reach_the_threshold(share, count):
    """KNE, Eq. 7: Attr >= t_p; t_p in exact fractions."""
    scores = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
    chosen = _at_least_threshold(pd.DataFrame({"neuron": range(count), "score": scores}), share)
    threshold = (count - 1) * (1 - Fraction(str(share)))  # of the scores 0, 1, 2, ...
    assert set(chosen["score"]) == {score for score in scores if score >= threshold}
    assert chosen["score"].is_monotonic_decreasing
