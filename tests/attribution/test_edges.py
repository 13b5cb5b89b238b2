"""Cases that a review found: what used to be silently wrong is right, or refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import qv_lens as qv
from qv_lens.attribution.setting import setting
from qv_lens.attribution.value import best_units
from qv_lens.models.deltas import delta_hooks
from tests.attribution.test_value import FACTS, final_sigma, log_prob
from tests.models import BACKENDS, tiny_lens

UNEQUAL = ["The capital of Norway is", "Tim Duncan, a player of great fame, plays the sport of"]
LONG = qv.Fact("{} works for", "Olga Pelodan", "Nortek Dalrin")


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize("top", [300, 5000])
def test_topk_of_attention_neurons_in_prompts_of_unequal_length(kind, top):
    lens = tiny_lens(kind)
    both = [
        qv.value_neurons(lens, UNEQUAL, top, unit="attn_neuron", method=m, target=3)
        for m in ("exact", "topk")
    ]
    assert (
        both[0].frame.groupby("prompt").size().tolist()
        == both[1].frame.groupby("prompt").size().tolist()
    )
    assert abs(both[0].frame["score"].to_numpy() - both[1].frame["score"].to_numpy()).max() < 1e-9


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_queries_at_every_position_equal_those_of_the_prompt_cut_there(kind, true_float64):
    lens = tiny_lens(kind)
    trace, token = lens.trace(FACTS[0], "all"), lens.answer_ids(FACTS[0])[0]
    query = qv.query_neurons(
        lens, trace, qv.value_neurons(lens, trace, 20, norm="full"), None
    ).frame
    ids = lens.tokenize(FACTS[0])[0].ids
    for position in (1, len(ids) - 1):
        cut = lens.trace(lens.tokenizer.decode(ids[: position + 1]))
        alone = qv.query_neurons(
            lens, cut, qv.value_neurons(lens, cut, 20, norm="full", target=token), None
        ).frame
        keys = ["layer", "neuron"]
        here = query[query["position"] == position].set_index(keys)["score"].sort_index()
        assert (here - alone.set_index(keys)["score"].sort_index()).abs().max() < 1e-9


def test_any_integer_is_a_token_and_nothing_else_is():
    lens = tiny_lens("gptj")
    expected = qv.value_neurons(lens, FACTS, 5, target=7).frame
    for target in (np.int64(7), torch.tensor(7)):
        assert qv.value_neurons(lens, FACTS, 5, target=target).frame.equals(expected)
    for target in (["Oslo", "Paris"], 7.5, None):
        with pytest.raises(qv.QVLensError, match="Target"):
            qv.value_neurons(lens, FACTS, 5, target=target)


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_deltas_of_one_layer_do_not_depend_on_their_order(kind):
    lens, rows = tiny_lens(kind), [[5, 6, 7, 8, 9]]
    names = ["W_in", "W_O", "W_out", "W_V"]
    deltas = {
        (1, n): torch.randn(lens.parameter(1, n).shape, dtype=torch.float64) * 0.1 for n in names
    }
    added = lens.logits(rows, delta_hooks(lens, deltas))
    for (layer, name), delta in deltas.items():
        lens.parameter(layer, name).add_(delta)
    torch.testing.assert_close(added, lens.logits(rows), atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5])
def test_a_neuron_that_cancels_the_stream_is_still_scored(kind, scale, noise, true_float64):
    """norm='full' in float32, v = -x but for some noise: sigma nearly vanishes, and the closed form
    alone would lose it."""
    lens = tiny_lens(kind, dtype=torch.float32)
    trace = lens.trace(FACTS)
    x = trace.resid[1, 1] * scale
    resid = trace.resid.clone()
    resid[1, 1] = x
    generator = torch.Generator().manual_seed(0)
    rows = -x + noise * x.norm() / x.numel() ** 0.5 * torch.randn(
        lens.d_mlp, x.numel(), generator=generator
    )
    lens.w_out(1).copy_(rows)
    m = trace.m.clone()
    m[1] = 1.0
    task = setting(
        lens, dataclasses.replace(trace, resid=resid, m=m, setup=None), norm="full", base="pre"
    )
    frame = best_units(task, None).layer(1).frame
    got = frame[frame["prompt"] == 1].sort_values("neuron")["score"].to_numpy()
    hf = lens.hf.double()
    token = int(task.token[1])
    start = log_prob(hf, x.double(), token)
    expected = [(log_prob(hf, (x + row).double(), token) - start).item() for row in rows]
    assert final_sigma(hf, x.double()) > 0
    assert abs(got - np.array(expected)).max() < 1e-3 * max(1, *map(abs, expected))
    top = best_units(task, 5, method="topk").frame["score"].to_numpy()
    best = best_units(task, 5).frame["score"].to_numpy()
    assert abs(np.sort(top) - np.sort(best)).max() < 1e-4


def test_improbable_answers_do_not_spoil_transmission_paths():
    lens = tiny_lens("gptj", dtype=torch.float32)
    lens.backend_adapter.unembed()[0].mul_(60)
    assert qv.transmission_paths(lens, FACTS, 3)["score"].notna().all()


def test_categories_stay_apart():
    lens = tiny_lens("gptj")
    facts = [dataclasses.replace(f, category=c) for f, c in zip([*FACTS, LONG], "ABA", strict=True)]
    value = qv.value_neurons(lens, facts, 20, over="category")
    assert value.top(5).frame.groupby("category").size().to_dict() == {"A": 5, "B": 5}
    query = qv.query_neurons(lens, facts, value, 30, over="category")
    graph = qv.qv_graph(lens, facts, value, query)
    assert not graph.edges.duplicated(["prompt", "source", "target"]).any()
    assert not graph.nodes.duplicated(["prompt", "id"]).any()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda lens: qv.layer_scores(lens, FACTS, over="sets"), "over"),
        (lambda lens: qv.value_neurons(lens, lens.trace(FACTS), 5, positions="all"), "trace with positions"),
        (lambda lens: qv.value_neurons(lens, FACTS, -5), "at least 1"),
        (lambda lens: qv.value_neurons(lens, FACTS, 0, method="topk"), "at least 1"),
        (lambda lens: qv.neuron_ensemble(lens, FACTS, steps=0), "steps"),
        (lambda lens: qv.neuron_ensemble(lens, FACTS, parameters=("b_out",)), "not a weight matrix"),
        (lambda lens: qv.query_neurons(lens, FACTS, qv.NeuronSet.of([(2, 3)]), 5), "without a score"),
        (lambda lens: qv.query_neurons(lens, FACTS, qv.value_neurons(lens, FACTS, 5), subkey="gate"), "subkey"),
        (lambda lens: qv.value_neurons(lens, FACTS, positions="answer"), "sequence"),
        (lambda lens: qv.value_neurons(lens, lens.trace(LONG, "answer")), "sequence"),
        (lambda lens: qv.query_layers(lens, LONG, qv.value_neurons(lens, LONG, target="sequence"), positions="answer"), "belong to none"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(call, says):
    with pytest.raises(qv.QVLensError, match=says):
        call(tiny_lens("qwen3-gqa"))


def test_attention_queries_from_a_trace_of_the_answer():
    lens = tiny_lens("gptj")
    value = qv.value_neurons(lens, LONG, 5, unit="attn_neuron")
    assert len(qv.query_neurons(lens, lens.trace(LONG, "answer"), value, 5)) == 5


def test_a_model_without_biases_has_none_to_write():
    for backend in BACKENDS:
        with pytest.raises(qv.QVLensError, match="no parameter 'b_out'"):
            tiny_lens("qwen3-gqa", backend).parameter(0, "b_out")
