"""Query scores against finite differences and real removals."""

from __future__ import annotations

import dataclasses

import networkx
import pandas as pd
import pytest
import torch

import qv_lens as qv
from qv_lens.attribution.readers import QueryOptions, targets_of
from qv_lens.facts.benchmarks import parse
from qv_lens.models.interventions import ffn_coefficients
from qv_lens.world.cases import mquake
from qv_lens.world.generator import build
from tests.attribution.test_value import FACTS
from tests.models import KINDS, tiny_lens


@pytest.mark.parametrize("kind", KINDS)
def test_grad_equals_finite_differences(kind, true_float64):
    """d/dt of sum_j (I_j / m_j) m_j(h + t v_q), by central differences of the norm-and-FFN formula
    in float64."""
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
                up, down = (
                    ffn_coefficients(lens, row.layer, h + s * eps * v, j).item() for s in (1, -1)
                )
                expected += row.score / row.coefficient * (up - down) / (2 * eps)
            got = query[
                (query["prompt"] == prompt)
                & (query["layer"] == layer)
                & (query["neuron"] == neuron)
            ]["score"].item()
            assert got == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["grad", "share", "inner_product"])
def test_neurons_and_bias_add_up_to_their_layer(kind, method, true_float64):
    """The functional is linear: a layer's FFN output scores what its neurons and b_out score
    together."""
    lens = tiny_lens(kind)
    trace = lens.trace(FACTS)
    value = qv.value_neurons(lens, trace, top=20)
    summed = (
        qv.query_neurons(lens, trace, value, top=None, method=method)
        .frame.groupby(["prompt", "layer"])["score"]
        .sum()
    )
    layers = qv.query_layers(lens, trace, value, method=method)
    whole = layers[layers["kind"] == "ffn"].set_index(["prompt", "layer"])["score"]
    if kind != "gptj":
        assert (summed - whole).abs().max() < 1e-9
    else:
        for layer in range(lens.n_layers):
            lens.backend_adapter.b_out(layer).zero_()
        trace = lens.trace(FACTS)
        value = qv.value_neurons(lens, trace, top=20)
        summed = (
            qv.query_neurons(lens, trace, value, top=None, method=method)
            .frame.groupby(["prompt", "layer"])["score"]
            .sum()
        )
        layers = qv.query_layers(lens, trace, value, method=method)
        whole = layers[layers["kind"] == "ffn"].set_index(["prompt", "layer"])["score"]
        assert (summed - whole).abs().max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_shares_of_all_components_add_up_to_the_importance(kind, true_float64):
    """With LayerNorm's mean left in (as REF does) embedding, attention and FFN shares of one target
    add up to I_j, whether it reads the stream in an FFN or through a head."""
    lens = tiny_lens(kind)
    for unit in ("ffn", "attn_neuron"):
        every = qv.value_neurons(lens, FACTS[0], unit=unit, norm="full")
        value = every.where(lambda frame: frame["layer"] > 0).top(1)
        layers = qv.query_layers(lens, FACTS[0], value, method="share")
        assert layers["score"].sum() == pytest.approx(value.frame["score"].item(), rel=1e-9)
        assert (layers[layers["kind"] == "embed"]["score"] != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_suppress_equals_removing_the_query_by_hand(kind, true_float64):
    """m of the targets recomputed from a stream without v_q; nothing else in their layer moves."""
    lens = tiny_lens(kind)
    query, targets = (
        qv.NeuronSet.of([(0, 1), (0, 2), (1, 5)]),
        qv.NeuronSet.of([(1, 3), (2, 7), (2, 9)]),
    )
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


def suppressed_by_hand(lens, fact, query, targets, zero=()):
    """log p of the answer where every target below reads a stream without what the queries below it
    then write; `zero`: neurons that write nothing."""
    backend, written, read, hooks = lens.backend_adapter, {}, {}, []

    def at(layer):
        def pre(x):
            read[layer] = x

        def attention(a):
            read[layer] = read[layer] + a

        def m(values):
            values = values.clone()
            below = [what for lower, what in written.items() if lower < layer]
            j = torch.tensor([n for at, n in targets if at == layer], dtype=torch.long)
            if below and len(j):
                values[..., j] = ffn_coefficients(lens, layer, read[layer] - sum(below), j)
            for n in (n for at, n in zero if at == layer):
                values[..., n] = 0
            q = [n for at, n in query if at == layer]
            written[layer] = values[..., q] @ lens.w_out(layer)[q]
            return values

        hooks.append((backend.resid_pre(layer), pre))
        if not backend.parallel:
            hooks.append((backend.attn_out(layer), attention))
        hooks.append((backend.coefficient(layer), m))

    for layer in range(lens.n_layers):
        at(layer)
    with torch.no_grad():
        logits = lens.logits([lens.tokenize(fact)[0].ids], hooks)[0, -1]
    return logits.log_softmax(-1)[lens.answer_ids(fact)[0]].item()


BELOW = [(layer, n) for layer in (0, 1) for n in range(12)]
ABOVE = [(layer, n) for layer in (1, 2, 3) for n in range(0, 48, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_neuron_that_is_query_and_target_writes_what_it_then_reads(kind, true_float64):
    """Layer 1 holds queries that are targets too: layers 2 and 3 lose what they write now, not what
    they wrote."""
    lens, fact = tiny_lens(kind, n_layers=4), FACTS[0]
    assert set(BELOW) & set(ABOVE)
    with lens.intervene(qv.Suppress(qv.NeuronSet.of(BELOW), qv.NeuronSet.of(ABOVE))):
        got = lens.logprob(fact)
    assert got == pytest.approx(suppressed_by_hand(lens, fact, BELOW, ABOVE), abs=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_suppress_nests_in_any_order(kind, true_float64):
    """What is zero writes nothing that could be taken out, wherever Suppress stands; the same holds
    for a curve and for gradients under it."""
    lens, fact = tiny_lens(kind, n_layers=4), FACTS[0]
    low, up = qv.NeuronSet.of(BELOW), qv.NeuronSet.of(ABOVE)
    gone = [*BELOW[:20], *ABOVE[-3:]]  # queries and targets
    wanted = suppressed_by_hand(lens, fact, BELOW, ABOVE, gone)
    out, cut = qv.Zero(qv.NeuronSet.of(gone)), qv.Suppress(low, up)
    for one, other in ((out, cut), (cut, out)):
        with lens.intervene(one), lens.intervene(other):
            assert lens.logprob(fact) == pytest.approx(wanted, abs=1e-11)
    with lens.intervene(cut):
        clean, eps = lens.logprob(fact), 1e-6
        effects = qv.neuron_effects(lens, fact, None).frame.set_index(["layer", "neuron"])["score"]
        curve = qv.faithfulness(lens, fact, {"low": low}, (len(low),), seeds=0)["logprob"].item()
    with lens.intervene(qv.Zero(low, "last"), cut):
        assert curve == pytest.approx(lens.logprob(fact), abs=1e-11)
    for unit in BELOW[::5]:
        with lens.intervene(qv.Scale(qv.NeuronSet.of([unit]), 1 - eps, "last"), cut):
            slope = (clean - lens.logprob(fact)) / eps
        assert effects.loc[unit] == pytest.approx(slope, abs=1e-5)


def test_scores_that_would_be_wrong_under_suppress_are_refused():
    lens, value = tiny_lens("gptj"), qv.value_neurons(tiny_lens("gptj"), FACTS[0], 20)
    graph = qv.qv_graph(lens, FACTS[0], value, qv.query_neurons(lens, FACTS[0], value, 20))
    cut = qv.Suppress(qv.NeuronSet.of([(0, 1)]), qv.NeuronSet.of([(2, 3)]))
    for ask in (
        lambda: qv.query_neurons(lens, FACTS[0], value),
        lambda: qv.query_neurons(lens, FACTS[0], value, through="attention"),
        lambda: qv.neuron_effects(lens, FACTS[0], method="relp"),
        lambda: qv.edge_effects(lens, FACTS[0], graph),
    ):
        with lens.intervene(cut), pytest.raises(qv.QVLensError, match="under a Suppress in force"):
            ask()
        ask()


def test_two_suppress_of_one_target_are_refused():
    lens, low, up = tiny_lens("gptj"), qv.NeuronSet.of([(0, 1)]), qv.NeuronSet.of([(2, 3)])
    apart = qv.NeuronSet.of([(1, 1), (2, 5)])  # of the first of these nothing is taken out
    with lens.intervene(qv.Suppress(low, up), qv.Suppress(qv.NeuronSet.of([(1, 1)]), apart)):
        pass
    with (
        pytest.raises(qv.QVLensError, match="targets of a Suppress in force"),
        lens.intervene(qv.Suppress(low, up), qv.Suppress(qv.NeuronSet.of([(1, 1)]), up)),
    ):
        pass
    assert lens.interventions == ()


@pytest.mark.parametrize("kind", KINDS)
def test_each_prompt_divides_by_its_own_coefficient(kind, true_float64):
    """A union of sets holds one prompt's m; attention's path asks with each prompt's own, as the
    stream does."""
    lens = tiny_lens(kind)
    trace = lens.trace(FACTS)
    union = qv.value_neurons(lens, FACTS, 30).union()
    rows = []
    for prompt in range(len(FACTS)):
        own = union.top(20).frame.assign(prompt=prompt)
        m = [trace.m[row.layer, prompt, row.neuron].item() for row in own.itertuples()]
        rows.append(own.assign(coefficient=m))
    own = dataclasses.replace(union, frame=pd.concat(rows, ignore_index=True))
    for through in ("stream", "attention"):
        got, wanted = (
            qv.query_neurons(lens, FACTS, value, None, through=through, targets=20).frame
            for value in (union, own)
        )
        keys = ["prompt", "layer", "neuron", *(["position"] if "position" in got else [])]
        pd.testing.assert_series_equal(
            got.set_index(keys)["score"].sort_index(), wanted.set_index(keys)["score"].sort_index()
        )


def test_the_best_targets_of_a_set_in_rounds_are_those_of_its_first_rounds():
    lens = tiny_lens("gptj")
    effects = qv.neuron_effects(lens, FACTS[0], 12, rounds=6)
    assert not effects.frame["score"].is_monotonic_decreasing  # so that the two orders differ
    reader = targets_of(lens, FACTS[0], effects, QueryOptions(targets=4))
    assert set(zip(reader.table["layer"], reader.table["neuron"], strict=True)) == set(
        effects.units[:4]
    )


def test_suppress_refuses_queries_that_cannot_reach():
    lens = tiny_lens("gptj")
    with (
        pytest.raises(qv.QVLensError, match="cannot reach"),
        lens.intervene(qv.Suppress(qv.NeuronSet.of([(2, 1)]), qv.NeuronSet.of([(1, 1)]))),
    ):
        pass  # fmt: skip


def test_locate_over_questions_or_over_their_hops():
    lens = tiny_lens("gptj", dtype=torch.float32)
    case = parse(mquake(build(0), 2, 0)).cases
    asked = {
        "multi_hop": [qv.Fact("{}", one.questions[0], one.answer) for one in case],
        "single_hop": [qv.Fact("{}", hop.question, hop.answer) for one in case for hop in one.hops],
    }
    found = {prompts: qv.locate(lens, case, prompts=prompts).frame for prompts in asked}
    for prompts, facts in asked.items():
        assert found[prompts].equals(qv.locate(lens, facts).frame)
        assert found[prompts].attrs["prompts"] == len(facts)
    assert not found["multi_hop"].equals(found["single_hop"])
    with pytest.raises(qv.QVLensError, match="single_hop"):
        qv.locate(lens, case, prompts="hops")


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_channels_add_up_to_their_layer(kind, true_float64):
    lens = tiny_lens(kind)
    trace = lens.trace(FACTS, attention=True)
    value = qv.value_neurons(lens, trace, top=20)
    layers = qv.query_layers(lens, trace, value)
    whole = layers[layers["kind"] == "attn"].set_index(["prompt", "layer"])["score"]
    for unit in ("head", "attn_channel", "head_position", "attn_neuron"):
        frame = qv.query_neurons(lens, trace, value, None, unit=unit).frame
        assert (frame.groupby(["prompt", "layer"])["score"].sum() - whole).abs().max() < 1e-9
        assert ("position" in frame) == (unit in ("head_position", "attn_neuron"))


@pytest.mark.parametrize("kind", KINDS)
def test_queries_of_attention_neurons_equal_finite_differences(kind, true_float64):
    """What v_q at position p does to the value that a head reads there, attention held; channel and
    head by hand."""
    lens = tiny_lens(kind)
    trace = lens.trace(FACTS, attention=True)
    value = qv.value_neurons(lens, trace, 12, unit="attn_neuron")
    query = qv.query_neurons(lens, trace, value, None, targets=12).frame
    everywhere, eps = lens.trace(FACTS, "all"), 1e-6
    blocks = lens.hf.transformer.h if kind == "gptj" else lens.hf.model.layers
    heads, kv = KINDS[kind]
    for prompt in range(2):
        targets = value.frame[(value.frame["prompt"] == prompt) & (value.frame["layer"] > 0)]
        assert len(targets) > 1
        for position in sorted(targets["position"].unique())[:3]:
            row = (
                ((everywhere.prompt == prompt) & (everywhere.positions == position))
                .nonzero()
                .item()
            )
            v, expected = everywhere.m[0, row, 5] * lens.w_out(0)[5], 0.0
            for j in targets[targets["position"] == position].itertuples():
                block, h = blocks[j.layer], everywhere.resid[j.layer, row]
                norm, v_proj = (
                    (block.ln_1, block.attn.v_proj)
                    if kind == "gptj"
                    else (block.input_layernorm, block.self_attn.v_proj)
                )
                channels = v_proj.weight.shape[0] // kv
                read = j.neuron // channels // (heads // kv) * channels + j.neuron % channels
                up, down, here = (v_proj(norm(h + s * eps * v))[read].item() for s in (1, -1, 0))
                assert j.coefficient == pytest.approx(
                    here * trace.pattern[j.layer, prompt, j.head, position].item(), rel=1e-6
                )
                expected += j.score / here * (up - down) / (2 * eps)
            got = query[
                (query["prompt"] == prompt)
                & (query["layer"] == 0)
                & (query["neuron"] == 5)
                & (query["position"] == position)
            ]
            assert got["score"].item() == pytest.approx(expected, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize("method", ["grad", "share", "inner_product"])
def test_edges_of_the_graph_add_up_to_query_scores(kind, method, true_float64):
    lens = tiny_lens(kind)
    trace = lens.trace(FACTS)
    value = qv.value_neurons(lens, trace, 20)
    query = qv.query_neurons(lens, trace, value, 15, method=method, targets=20)
    graph = qv.qv_graph(lens, trace, value, query, method=method, targets=20)
    sums = graph.edges.groupby(["prompt", "source"])["weight"].sum()
    for row in query.frame.itertuples():
        assert sums.get((row.prompt, f"f{row.layer}-{row.neuron}"), 0.0) == pytest.approx(
            row.score, abs=1e-9
        )
    assert (graph.edges["source_layer"] < graph.edges["target_layer"]).all()
    network = networkx.from_pandas_edgelist(
        graph.edges[graph.edges["prompt"] == 0],
        "source",
        "target",
        "weight",
        create_using=networkx.DiGraph,
    )
    assert len(network) > 10
    assert set(network) <= set(graph.nodes[graph.nodes["prompt"] == 0]["id"])
    assert (
        len(
            qv.plots.pathway(
                graph.nodes[graph.nodes["prompt"] == 0], graph.edges[graph.edges["prompt"] == 0]
            ).data
        )
        > 3
    )


def test_value_neurons_go_with_their_own_prompts():
    """Those of one of several facts, and a set over all of them for any other fact, give what they
    give alone."""
    lens = tiny_lens("gptj", dtype=torch.float32)
    first, second = FACTS[0], FACTS[1]
    both, alone = qv.value_neurons(lens, [first, second]), qv.value_neurons(lens, first)
    part = qv.query_neurons(lens, first, both.where(lambda frame: frame["prompt"] == 0))
    torch.testing.assert_close(
        torch.tensor(part.frame["score"].to_numpy()),
        torch.tensor(qv.query_neurons(lens, first, alone).frame["score"].to_numpy()),
    )
    with pytest.raises(qv.QVLensError, match="value neurons of prompt 0 were computed for"):
        qv.query_neurons(lens, [second, first], both)
    assert len(qv.query_neurons(lens, [second, first], both.union(), 5)) == 10
    assert "works for" not in repr(both)


def test_values_from_elsewhere_in_the_prompt_are_refused():
    lens = tiny_lens("gptj")
    value = qv.value_neurons(lens, FACTS, 20, positions="subject_last")
    with pytest.raises(qv.QVLensError, match="computed at positions"):
        qv.query_neurons(lens, FACTS, value)
    assert len(qv.query_neurons(lens, FACTS, value, 5, positions="subject_last")) == 10


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_the_released_notebooks(kind, true_float64):
    """`ace_official`: shares add up to what they share out, whatever key was taken; heads from
    out_proj cut the wrong way."""
    lens = tiny_lens(kind)
    out = qv.ace_official(lens, FACTS)
    trace = lens.trace(FACTS)
    assert out.value_layers.attrs["preset"] == "ace_official, as released"
    assert (
        out.counts.groupby("prompt")["score"].sum().tolist()
        == [min(300, lens.n_layers * lens.d_mlp)] * 2
    )
    assert (out.query_neurons is None) == (kind != "gptj")
    if kind != "gptj":
        shares = out.query_layers.groupby("prompt")["score"].sum()
        assert shares.to_numpy() == pytest.approx(
            out.value_neurons.top(30).frame.groupby("prompt")["score"].sum().to_numpy(), rel=1e-9
        )
        return
    hf, final = lens.hf, trace.final[0]
    c = final - final.mean()
    sigma = (c.square().mean() + hf.transformer.ln_f.eps).sqrt()

    def log_prob(y):  # ln_f.bias left out
        return hf.lm_head((y - y.mean()) / sigma * hf.transformer.ln_f.weight).log_softmax(-1)[
            trace.logits[0].argmax()
        ]

    # (head, channel) of the OUTPUT axis
    w = hf.transformer.h[1].attn.out_proj.weight.view(4, 8, 32)
    z, x = trace.z[1, 0].view(4, 8), trace.resid[1, 0]
    expected = log_prob(x + z[2] @ w[2]) - log_prob(x)
    row = out.heads[
        (out.heads["prompt"] == 0) & (out.heads["layer"] == 1) & (out.heads["head"] == 2)
    ]
    assert row["score"].item() == pytest.approx(expected.item(), rel=1e-8, abs=1e-10)
    assert "position" in out.query_neurons.frame


def test_interpretable_neurons_promote_the_answer():
    """A neuron whose vector is the answer's unembedding row; its opposite with a negative
    coefficient; and a third."""
    lens = tiny_lens("qwen3-gqa")
    token = lens.answer_ids(FACTS[1])[0]
    row = lens.backend_adapter.unembed()[0][:, token] / lens.backend_adapter.norm(None).gain
    lens.w_out(0)[3], lens.w_out(0)[4], lens.w_out(0)[5] = row, -row, -row
    neurons = qv.NeuronSet.of([(0, 3), (0, 4), (0, 5)])
    neurons = qv.NeuronSet(neurons.frame.assign(coefficient=[1.0, -1.0, 1.0]))
    assert qv.interpretable(lens, neurons, FACTS[1].answer, 1).tolist() == [True, True, False]
    table = qv.vocabulary(lens, neurons, 4)
    assert table["promoted"][0] == table["promoted"][1] == table["suppressed"][2]
    assert table["promoted"][0][0] == lens.token_label(token)


def blocks_of(lens):
    """Hugging Face's blocks; of each, what the FFN reads through: norm, up, gate (None in
    GPT-J)."""
    if hasattr(lens.hf, "transformer"):
        return [(block.ln_1, block.mlp.fc_in, None) for block in lens.hf.transformer.h]
    return [
        (block.post_attention_layernorm, block.mlp.up_proj, block.mlp.gate_proj)
        for block in lens.hf.model.layers
    ]


@pytest.mark.parametrize("method", ["share", "inner_product"])
@pytest.mark.parametrize(
    ("kind", "subkey"),
    [
        ("gptj", None),
        ("qwen3-gqa", None),
        ("qwen3-gqa", "gate"),
        ("qwen3-gqa", "up"),
        ("qwen3-gqa", "linear"),
    ],
)
def test_shares_and_inner_products_by_hand(kind, method, subkey, true_float64):
    lens = tiny_lens(kind)
    trace = lens.trace(FACTS)
    value = qv.value_neurons(lens, trace, 20, norm="full")
    query = qv.query_neurons(
        lens, trace, value, None, method=method, targets=15, subkey=subkey
    ).frame
    asked = subkey or ("gate" if method == "inner_product" else "linear")
    for prompt in range(2):
        targets = value.frame[value.frame["prompt"] == prompt].head(15)
        for layer, neuron in ((0, 1), (0, 17), (1, 5), (2, 5)):
            v = trace.m[layer, prompt, neuron] * lens.w_out(layer)[neuron]
            expected = 0.0
            for row in targets[targets["layer"] > layer].itertuples():
                norm, up, gate = blocks_of(lens)[row.layer]
                h = (trace.resid if kind == "gptj" else trace.mid)[row.layer, prompt]
                n = norm(h).requires_grad_(True)
                key = up.weight[row.neuron]
                if gate is not None and asked == "gate":
                    key = gate.weight[row.neuron]
                if gate is not None and asked == "linear":
                    m = torch.nn.functional.silu(n @ gate.weight[row.neuron]) * (
                        n @ up.weight[row.neuron]
                    )
                    (key,) = torch.autograd.grad(m, n)
                if method == "inner_product":
                    expected += (v @ key).item()
                else:
                    expected += (
                        row.score
                        * (v @ (norm.weight * key)).item()
                        / (h @ (norm.weight * key)).item()
                    )
            rows = query[
                (query["prompt"] == prompt)
                & (query["layer"] == layer)
                & (query["neuron"] == neuron)
            ]
            assert rows["score"].item() == pytest.approx(expected, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_outputs_equal_finite_differences(kind, true_float64):
    """The embedding, A^l and F^l as directions, into the streams that the targets really read."""
    lens = tiny_lens(kind)
    trace = lens.trace(FACTS)
    value = qv.value_neurons(lens, trace, 20)
    layers = qv.query_layers(lens, trace, value, targets=20).set_index(["prompt", "kind", "layer"])[
        "score"
    ]
    eps = 1e-6
    for prompt in range(2):
        directions = {("embed", -1): trace.resid[0, prompt]}
        for layer in range(lens.n_layers):
            directions["attn", layer] = trace.attn[layer, prompt]
            directions["ffn", layer] = trace.ffn[layer, prompt]
        for (sort, layer), v in directions.items():
            same_layer = sort == "attn" and not lens.backend_adapter.parallel
            expected = 0.0
            for row in value.frame[value.frame["prompt"] == prompt].itertuples():
                if row.layer > layer or (same_layer and row.layer == layer):
                    h = (trace.resid if lens.backend_adapter.parallel else trace.mid)[
                        row.layer, prompt
                    ]
                    j = torch.tensor([row.neuron])
                    up, down = (
                        ffn_coefficients(lens, row.layer, h + s * eps * v, j).item()
                        for s in (1, -1)
                    )
                    expected += row.score / row.coefficient * (up - down) / (2 * eps)
            assert layers[prompt, sort, layer] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert len(layers) == 2 * (2 * lens.n_layers + 1)


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_queries_over_a_set_are_sums_of_each_prompts(kind):
    lens = tiny_lens(kind)
    facts = [FACTS[0], FACTS[1], qv.Fact("{} works for", "Tim Duncan", "Oslo")]
    facts = [
        dataclasses.replace(fact, category=name) for fact, name in zip(facts, "ABA", strict=True)
    ]
    value = qv.value_neurons(lens, facts, 20)
    keys = ["layer", "neuron"]
    for unit in ("ffn", "attn_channel", "head"):
        each = qv.query_neurons(lens, facts, value, None, unit=unit).frame
        assert each.groupby("prompt").ngroups == 3
        both = qv.query_neurons(lens, facts, value, None, unit=unit, over="set").frame.set_index(
            keys
        )
        parts = [each[each["prompt"] == prompt].set_index(keys) for prompt in range(3)]
        expected = sum(part["score"].reindex(both.index) for part in parts)
        assert (both["score"] - expected).abs().max() < 1e-12
        assert (both["prompt"] == -1).all()
        first = qv.query_neurons(lens, facts, value, None, unit=unit, over="category").frame
        first = first[first["category"] == "A"].set_index(keys)
        assert (
            first["score"] - (parts[0]["score"] + parts[2]["score"]).reindex(first.index)
        ).abs().max() < 1e-12
        mean = (parts[0]["coefficient"] + parts[2]["coefficient"]).reindex(first.index) / 2
        if unit == "head":
            assert first["coefficient"].isna().all()
        else:
            assert (first["coefficient"] - mean).abs().max() < 1e-12


@pytest.mark.parametrize("method", ["grad", "share"])
def test_a_target_that_nothing_moves_weighs_nothing(method):
    """A value neuron with coefficient 0 and a key of zeros: I / 0 must not reach the others'
    scores."""
    lens = tiny_lens("gptj")
    lens.backend_adapter.w_in(2)[:, 7] = 0.0
    lens.backend_adapter.b_in(2)[7] = 0.0
    value = qv.value_neurons(lens, FACTS[0], 5)
    alone = qv.NeuronSet(
        value.frame.head(1).assign(layer=2, neuron=7, score=1.0, coefficient=0.0), value.settings
    )
    assert (qv.query_neurons(lens, FACTS[0], alone, None, method=method).frame["score"] == 0).all()
    both = qv.query_neurons(lens, FACTS[0], value | alone, None, method=method)
    assert both.frame.equals(qv.query_neurons(lens, FACTS[0], value, None, method=method).frame)


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_nodes_of_the_graph_are_the_two_sets(kind):
    """Role, both scores and coefficient of every node, prompt by prompt; the best targets alone
    have edges."""
    lens = tiny_lens(kind)
    trace = lens.trace(FACTS)
    value = qv.value_neurons(lens, trace, 40)
    query = qv.query_neurons(lens, trace, value, 60)
    graph = qv.qv_graph(lens, trace, value, query, targets=25)
    for prompt in range(2):
        scores = {}
        for name, found, count in (("value", value, 25), ("query", query, 60)):
            rows = found.frame[found.frame["prompt"] == prompt].head(count)
            scores[name] = {(row.layer, row.neuron): row.score for row in rows.itertuples()}
        nodes = graph.nodes[graph.nodes["prompt"] == prompt]
        assert {(row.layer, row.neuron) for row in nodes.itertuples()} == scores[
            "value"
        ].keys() | scores["query"].keys()
        assert len(nodes) == len(nodes["id"].unique())
        for row in nodes.itertuples():
            unit = (row.layer, row.neuron)
            held = [name for name in ("value", "query") if unit in scores[name]]
            assert row.role == (held[0] if len(held) == 1 else "shared")
            assert row.id == f"f{row.layer}-{row.neuron}"
            for name, score in (("value", row.value_score), ("query", row.query_score)):
                assert score == scores[name].get(unit, score) or unit not in scores[name]
                # NaN where the unit is not in the set
                assert (score != score) == (unit not in scores[name])
            assert row.coefficient == trace.m[row.layer, prompt, row.neuron].item()
        edges = graph.edges[graph.edges["prompt"] == prompt]
        pairs = {(s, t) for s in scores["query"] for t in scores["value"] if s[0] < t[0]}
        assert set(zip(edges["source"], edges["target"], strict=True)) == {
            (f"f{s[0]}-{s[1]}", f"f{t[0]}-{t[1]}") for s, t in pairs
        }
        assert (
            edges["source"]
            == [
                f"f{layer}-{name.split('-')[1]}"
                for layer, name in zip(edges["source_layer"], edges["source"], strict=True)
            ]
        ).all()
        assert (
            edges["target"]
            == [
                f"f{layer}-{name.split('-')[1]}"
                for layer, name in zip(edges["target_layer"], edges["target"], strict=True)
            ]
        ).all()
    assert "shared" in set(graph.nodes["role"])
    with pytest.raises(qv.QVLensError, match="one position of each prompt"):
        everywhere = qv.value_neurons(lens, FACTS, 5, positions="all")
        qv.qv_graph(lens, FACTS, everywhere, query, positions="all")


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_attention_targets_add_up_over_the_positions_they_read(kind):
    """Layers: what all FFN queries and b_out score, over positions; and `targets` keeps the best of
    a prompt, wherever."""
    lens = tiny_lens(kind)
    for layer in range(lens.n_layers):
        lens.backend_adapter.b_out(layer).zero_()
    value = qv.value_neurons(lens, FACTS, 12, unit="attn_neuron")
    for targets in (3, 12):
        query = qv.query_neurons(lens, FACTS, value, None, targets=targets).frame
        layers = qv.query_layers(lens, FACTS, value, targets=targets)
        whole = layers[layers["kind"] == "ffn"].set_index(["prompt", "layer"])["score"]
        assert (query.groupby(["prompt", "layer"])["score"].sum() - whole).abs().max() < 1e-9
        same = qv.query_neurons(lens, FACTS, value.top(targets), None).frame
        assert same.equals(query)
        with pytest.raises(qv.QVLensError, match="over='prompt'"):
            qv.query_neurons(lens, FACTS, value, over="set")


def test_suppress_needs_queries_below_its_targets():
    lens = tiny_lens("gptj")
    with (
        pytest.raises(qv.QVLensError, match="cannot reach them"),
        lens.intervene(qv.Suppress(qv.NeuronSet.of([(1, 0)]), qv.NeuronSet.of([(1, 3)]))),
    ):
        lens.logprob(qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing"))


def test_a_neuron_past_the_last_is_refused():
    lens = tiny_lens("gptj")
    width = lens.d_mlp
    with (
        pytest.raises(qv.QVLensError, match="names 128 to 128"),
        lens.intervene(qv.Zero(qv.NeuronSet.of([(1, width)]))),
    ):
        lens.next_token_logits("The capital of Norway is")
