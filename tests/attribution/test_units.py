"""Attention units, other targets and positions, layer sums: against brute force by hand, on every
kind of model."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import qv_lens as qv
from qv_lens.attribution import log_sums as sums
from qv_lens.attribution import moments
from qv_lens.attribution.layers import HOWS, by_token
from qv_lens.attribution.setting import setting
from tests.attribution.test_value import FACTS, final_sigma, log_prob
from tests.models import KINDS, tiny_lens

TWO_TOKENS = qv.Fact("{} works for", "Olga Pelodan", "Nortek Dalrin")


def attention_parts(hf, ids, layer):
    """Per head: attention weights of the last token, and value vectors of the head it reads, by
    hand from the weights."""
    ids = torch.tensor([ids])
    out = hf(ids, output_hidden_states=True)
    h = out.hidden_states[layer][0]
    if hasattr(hf, "transformer"):
        block, heads = hf.transformer.h[layer], hf.config.n_head
        n, kv, v_proj, o = block.ln_1(h), heads, block.attn.v_proj, block.attn.out_proj.weight
    else:
        block, heads = hf.model.layers[layer], hf.config.num_attention_heads
        n, kv, v_proj, o = (
            block.input_layernorm(h), hf.config.num_key_value_heads, block.self_attn.v_proj, block.self_attn.o_proj.weight
        )  # fmt: skip
    values = v_proj(n).view(len(h), kv, -1)
    return values, kv, heads, o, h[-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("norm", "base"), [("frozen", "mid"), ("full", "mid"), ("frozen", "loo_final")]
)
def test_attention_units_equal_brute_force(kind, norm, base, true_float64):
    """Every (head, channel, position), channel, head and (head, position) by adding its vector to
    the stream before attention, or taking it from the final one, and reading out by hand."""
    lens = tiny_lens(kind, n_layers=2)
    trace = lens.trace(FACTS, attention=True)
    units = ("attn_neuron", "attn_channel", "head", "head_position")
    got = {
        u: qv.value_neurons(lens, trace, None, unit=u, norm=norm, base=base).frame for u in units
    }
    for prompt, fact in enumerate(FACTS):
        token, final = lens.answer_ids(fact)[0], trace.final[prompt]
        sigma = final_sigma(lens.hf, final) if norm == "frozen" else None
        ids = trace.prompts[prompt].ids
        for layer in range(2):
            values, kv, heads, o, x = attention_parts(lens.hf, ids, layer)
            sign = 1.0
            if base == "loo_final":
                x, sign = final, -1.0
            start = log_prob(lens.hf, x, token, sigma)
            channels = values.shape[2]

            def increase(v, x=x, sign=sign, start=start, token=token, sigma=sigma):
                return sign * (log_prob(lens.hf, x + sign * v, token, sigma) - start)

            for head in range(heads):
                weights = trace.pattern[layer, prompt, head, : len(ids)]
                head_vectors = torch.zeros(len(ids), len(x), dtype=x.dtype)
                channel_vectors = torch.zeros(channels, len(x), dtype=x.dtype)
                for key in range(len(ids)):
                    for c in range(channels):
                        v = (
                            weights[key]
                            * values[key, head // (heads // kv), c]
                            * o[:, head * channels + c]
                        )
                        head_vectors[key] += v
                        channel_vectors[c] += v
                        if c == 3:
                            row = {"layer": layer, "neuron": head * channels + c, "position": key}
                            check(got["attn_neuron"], prompt, row, increase(v))
                    row = {"layer": layer, "neuron": head, "position": key}
                    check(got["head_position"], prompt, row, increase(head_vectors[key]))
                row = {"layer": layer, "neuron": head}
                check(got["head"], prompt, row, increase(head_vectors.sum(0)))
                for c in range(channels):
                    row = {"layer": layer, "neuron": head * channels + c}
                    check(got["attn_channel"], prompt, row, increase(channel_vectors[c]))


def check(frame, prompt, row, expected):
    rows = frame[(frame["prompt"] == prompt) & (frame[list(row)] == list(row.values())).all(axis=1)]
    assert len(rows) == 1
    assert abs(rows["score"].item() - expected.item()) <= 1e-10 * max(1, abs(expected.item()))


@pytest.mark.parametrize("kind", KINDS)
def test_unit_labels_name_what_they_mean(kind):
    lens = tiny_lens(kind)
    frame = qv.value_neurons(lens, FACTS, None, unit="attn_neuron").frame
    for prompt, fact in enumerate(FACTS):
        tokens = lens.str_tokens(fact)
        rows = frame[frame["prompt"] == prompt]
        assert sorted(rows["position"].unique()) == list(range(len(tokens)))  # padding never shows
        assert (rows["token"] == rows["position"].map(dict(enumerate(tokens)))).all()
    assert qv.value_neurons(lens, FACTS, 5, unit="attn_neuron", method="topk").frame[
        "score"
    ].tolist() == pytest.approx(
        qv.value_neurons(lens, FACTS, 5, unit="attn_neuron").frame["score"].tolist(), abs=1e-9
    )


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_a_whole_answer_is_the_sum_over_its_tokens(kind, true_float64):
    """Teacher forced by hand: the prompt with the answer's first tokens behind it, attributed to
    the next one."""
    lens = tiny_lens(kind)
    answer = lens.answer_ids(TWO_TOKENS)
    assert len(answer) > 1
    whole = qv.value_neurons(lens, TWO_TOKENS, None, target="sequence").frame.set_index(
        ["layer", "neuron"]
    )["score"]
    ids, total = list(lens.tokenize(TWO_TOKENS)[0].ids), 0
    for n, token in enumerate(answer):
        text = lens.tokenizer.decode(ids + list(answer[:n]))
        assert tuple(lens.tokenize(text)[0].ids) == tuple(ids + list(answer[:n]))
        total += (
            qv.value_neurons(lens, text, None, target=token)
            .frame.set_index(["layer", "neuron"])["score"]
            .sort_index()
        )
    assert (whole.sort_index() - total).abs().max() < 1e-9
    top = qv.value_neurons(lens, [TWO_TOKENS, FACTS[0]], 9, target="sequence", method="topk").frame
    full = qv.value_neurons(lens, [TWO_TOKENS, FACTS[0]], 9, target="sequence").frame
    assert (top["score"] - full["score"]).abs().max() < 1e-9
    assert set(full["prompt"]) == {0, 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["frozen", "full", "none"])
def test_a_contrast_is_the_difference_of_two_scores(kind, norm, true_float64):
    """log p(a) - log p(b): each by brute-force-checked `exact`, whose log-sums cancel. In frozen
    mode parts add up exactly."""
    lens = tiny_lens(kind)
    keys = ["prompt", "layer", "neuron"]
    first, second = (
        qv.value_neurons(lens, FACTS, None, norm=norm, target=t).frame.set_index(keys)["score"]
        for t in (3, 7)
    )
    contrast = qv.value_neurons(lens, FACTS, None, norm=norm, target=(3, 7)).frame.set_index(keys)[
        "score"
    ]
    assert (contrast - (first - second)).abs().max() < 1e-10
    named = qv.value_neurons(lens, FACTS[0], 3, target=("answer", "Dalrin")).settings
    assert len(named["against"]) == 1
    if norm != "full":
        for part in ("ffn", "attn"):
            sums = qv.layer_scores(lens, FACTS, part, norm=norm, target=(3, 7))
            assert sums["gap"].abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_parts_and_gap_add_up_to_the_whole(kind, true_float64):
    lens = tiny_lens(kind)
    frame = qv.layer_scores(lens, FACTS)
    whole = qv.layer_scores(lens, FACTS, how="layer_vector")
    assert (frame["score"] + frame["bias"] + frame["gap"] - whole["score"]).abs().max() < 1e-12
    assert (frame["bias"].abs().max() > 0) == (kind == "gptj")
    heads = (
        qv.layer_scores(lens, FACTS, "head", "layer_vector")
        .groupby(["prompt", "layer"])["score"]
        .sum()
    )
    summed = qv.layer_scores(lens, FACTS, "attn", "head_sum").set_index(["prompt", "layer"])[
        "score"
    ]
    assert (heads - summed).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_every_token_equals_the_prompt_cut_there(kind, true_float64):
    """Position i of the whole pass is the last position of the prompt's first i + 1 tokens
    (causal)."""
    lens = tiny_lens(kind)
    token = lens.answer_ids(FACTS[0])[0]
    frame = qv.layer_scores(lens, FACTS[0], "ffn", "layer_vector", positions="all", norm="full")
    ids = lens.tokenize(FACTS[0])[0].ids
    assert frame["token"].tolist()[:: lens.n_layers] == lens.str_tokens(FACTS[0])
    for position in (1, len(ids) - 1):
        text = lens.tokenizer.decode(ids[: position + 1])
        alone = qv.layer_scores(lens, text, "ffn", "layer_vector", target=token, norm="full")[
            "score"
        ]
        assert (
            abs(frame[frame["position"] == position]["score"].to_numpy() - alone.to_numpy()).max()
            < 1e-9
        )
    index = qv.layer_scores(lens, FACTS[0], "ffn", "layer_vector", positions=1, norm="full")[
        "score"
    ].to_numpy()
    assert abs(index - frame[frame["position"] == 1]["score"].to_numpy()).max() < 1e-12


def test_token_heatmap_shows_every_token():
    lens = tiny_lens("gptj")
    parts = [
        qv.layer_scores(lens, FACTS[0], kind, "layer_vector", positions="all")
        for kind in ("ffn", "attn")
    ]
    figure = qv.plots.token_heatmap(pd.concat(parts, ignore_index=True))
    assert len(figure.data[0].y) == len(lens.str_tokens(FACTS[0]))
    assert len(figure.data[0].x) == 2 * lens.n_layers


def test_sums_by_category_and_over_the_set():
    lens = tiny_lens("gptj")
    facts = [
        qv.Fact(f.prompt, f.subject, f.answer, category=c)
        for f, c in zip(FACTS, ("NN", "LG"), strict=True)
    ]
    each = qv.layer_scores(lens, facts)
    split = qv.layer_scores(lens, facts, over="category")
    assert split["category"].unique().tolist() == ["NN", "LG"]
    assert abs(split["score"].to_numpy() - each["score"].to_numpy()).max() < 1e-12
    assert (split["prompt"] == -1).all()
    both = qv.layer_scores(lens, facts, over="set")
    assert (
        both.set_index("layer")["score"] - each.groupby("layer")["score"].sum()
    ).abs().max() < 1e-12
    ranked = qv.value_neurons(lens, facts, 4, over="category", method="topk").frame
    assert ranked.groupby("category", sort=False).size().tolist() == [4, 4]


def test_layer_sums_refuse_what_does_not_score_every_neuron():
    lens = tiny_lens("gptj")
    for method in ("topk", "first_order"):
        with pytest.raises(qv.QVLensError, match="Layer sums need the score of every neuron"):
            qv.layer_scores(lens, FACTS, method=method)


@pytest.mark.parametrize("kind", KINDS)
def test_moments_keep_their_tolerance(kind, true_float64):
    """Against exact, in float64, where the tolerance is all that may differ; large coefficients
    must fall back."""
    lens = tiny_lens(kind)
    exact = qv.value_neurons(lens, FACTS, None).frame.sort_values(["prompt", "layer", "neuron"])
    quick = qv.value_neurons(lens, FACTS, None, method="moments")
    close = quick.frame.sort_values(["prompt", "layer", "neuron"])
    assert abs(exact["score"].to_numpy() - close["score"].to_numpy()).max() < 1e-6
    assert 0 < quick.settings["fallback"] < 1
    assert quick.settings["tolerance"] == 1e-6
    sums = (
        qv.layer_scores(lens, FACTS, method="moments")["score"]
        - qv.layer_scores(lens, FACTS)["score"]
    )
    assert sums.abs().max() < 1e-6 * lens.d_mlp


def random_problem(dtype=torch.float32, spread=1.0):
    g = torch.Generator().manual_seed(0)
    V, U = torch.randn(150, 48, generator=g), torch.randn(48, 333, generator=g)
    log_p = (torch.randn(3, 333, generator=g) * 3).log_softmax(1)
    alpha, beta = torch.randn(5, 150, generator=g) * spread, torch.randn(5, 150, generator=g) * 0.1
    of, b = torch.tensor([0, 1, 1, 2, 0]), torch.randn(3, 333, generator=g)
    return V.to(dtype), sums.Problems(
        U.to(dtype), log_p.to(dtype), of, alpha.to(dtype), beta.to(dtype), b.to(dtype)
    )


def by_definition(V, task):
    V, U = V.double(), task.U.double()
    delta = task.alpha.double()[:, :, None] * (V @ U)[None]
    if task.beta is not None:
        delta = delta + task.beta.double()[:, :, None] * task.b.double()[task.of][:, None]
    return (delta + task.log_p.double()[task.of][:, None]).logsumexp(2)


@pytest.mark.parametrize("spread", [0.01, 0.1, 30.0])
@pytest.mark.parametrize("budget", [None, 2 * 333 * 4, 2 * 333 * 4 * 7])
def test_log_sums_of_any_size_and_tile(spread, budget):
    """spread 30 would overflow exp in float32: such tiles must take the shifted form."""
    V, task = random_problem(spread=spread)
    expected = by_definition(V, task)
    error = (sums.log_sums(V, task, budget) - expected).abs() / expected.abs().clamp_min(1)
    assert error.max() < 1e-5
    wanted = torch.rand(task.alpha.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    some = sums.log_sums(V, task, budget, wanted)
    assert ((some - expected).abs() / expected.abs().clamp_min(1))[wanted].max() < 1e-5


@pytest.mark.parametrize("budget", [None, 2 * 333 * 4 * 7])
def test_small_log_sums_have_no_common_error(budget):
    """Those of a layer add up: what every neuron had too much would count as often as there are
    neurons."""
    V, task = random_problem(spread=1e-5)
    task = replace(task, beta=None)
    mass = task.log_p.double().exp().sum(1).log()[task.of][:, None]
    error = sums.log_sums(V, task, budget) - (by_definition(V, task) - mass)
    assert error.abs().max() < 1e-7
    assert error.mean(1).abs().max() < 5e-9


def test_log_sums_far_below_zero():
    """Every token loses eight nats: one plus the sum of e^delta - 1 has no digits left in float32."""
    V, task = random_problem(spread=0.01)
    task = replace(task, beta=torch.ones_like(task.alpha), b=task.b * 0.1 - 8)
    expected = by_definition(V, task)
    assert (expected < -7).all()
    assert (sums.log_sums(V, task) - expected).abs().max() < 1e-5
    wanted = torch.rand(task.alpha.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    some = sums.log_sums(V, task, None, wanted)
    assert (some - expected)[wanted].abs().max() < 1e-5
    assert (some[~wanted] == 0).all()


def test_memory_budget_sizes_the_tiles():
    U = torch.zeros(8, 1000)
    assert sums.tile_rows(U, 2 * 1000 * 4 * 10) == 10
    assert sums.tile_rows(U, 2 * 1000 * 4) == 1
    assert sums.tile_rows(U) == sums.CPU_TILE // 1000
    with pytest.raises(qv.QVLensError, match="memory_budget"):
        sums.tile_rows(U, 100)


def test_parts_of_the_log_sums():
    """delta at a token, its spread's bound and Jensen's, of made-up problems, by forming every
    delta."""
    V, task = random_problem(torch.float64)
    task.U[:, 7] *= 5  # one token that a vector moves further than all others
    V[0] = task.U[:, 7]
    G, base = V @ task.U, task.of
    for whole in (task, replace(task, beta=None), replace(task, b=None)):
        delta = task.alpha[:, :, None] * G
        if whole is task:
            delta = delta + task.beta[:, :, None] * task.b[base][:, None]
        token = torch.tensor([5, 0, 332])
        at = token[base][:, None, None].expand(-1, 150, 1)
        torch.testing.assert_close(whole.delta(V, token), delta.gather(2, at)[:, :, 0])
        mean = (task.log_p.exp()[base][:, None] * delta).sum(2)
        torch.testing.assert_close(sums.bounds(V, whole), mean)
        assert (sums.bounds(V, whole) <= sums.log_sums(V, whole) + 1e-12).all()
        spread = torch.maximum(delta.abs().amax(2), delta.amax(2) - delta.amin(2))
        assert (whole.reach(V) >= spread).all()
        assert (whole.reach(V) < 50 * spread).all()
        some = torch.tensor([3, 140])
        torch.testing.assert_close(
            whole.of_neurons(some).delta(V[some], token), whole.delta(V, token)[:, some]
        )


@pytest.mark.parametrize("many", [False, True])
def test_moments_are_exact_where_their_bound_says_no(many, monkeypatch):
    """Of made-up problems with small and large coefficients: within the tolerance, and exact beyond
    the bound's reach; with the tail as a matrix, and as products of G."""
    monkeypatch.setattr(sums, "CPU_TOKENS", 100)  # several blocks, the last one smaller
    monkeypatch.setattr(moments, "CPU_TOKENS", 100)
    V, task = random_problem(torch.float64)
    task = replace(
        task,
        log_p=task.log_p.log_softmax(1),
        beta=None,
        b=None,
        alpha=task.alpha * torch.logspace(-5, 0, 150, dtype=torch.float64),
    )
    exact = by_definition(V, task)
    split = moments.HeadAndTail.of(task.U, task.log_p, 10**9 if not many else 1)
    assert (split.S is None) == many
    shares = []
    for tolerance in (1e-4, 1e-6, 1e-9):
        got = moments.log_sums_by_moments(V, task, split, tolerance=tolerance)
        error = (got.value - exact).abs()
        assert error.max() < tolerance
        assert error[got.fallback].max() < 1e-12
        assert (error[~got.fallback] > 1e-15).any()
        shares.append(got.fallback.double().mean().item())
    assert 0 < shares[0] < shares[1] < shares[2] < 1
    tiles = moments.log_sums_by_moments(V, task, split, 2 * 333 * 8 * 7)
    whole = moments.log_sums_by_moments(V, task, split)
    assert torch.equal(tiles.fallback, whole.fallback)
    torch.testing.assert_close(tiles.value, whole.value, atol=1e-12, rtol=0)
    with pytest.raises(qv.QVLensError, match="frozen"):
        moments.log_sums_by_moments(*random_problem())


@pytest.mark.parametrize("many", [False, True])
def test_the_bound_of_what_moments_leave_out(many):
    """Written out token by token: the head's sum, the tail's moments, and what is left out."""
    V, task = random_problem(torch.float64)
    task = replace(
        task, log_p=task.log_p.log_softmax(1), beta=None, b=None, alpha=task.alpha * 0.05
    )
    split = moments.HeadAndTail.of(task.U, task.log_p, 10**9 if not many else 1)
    p = task.log_p.exp()
    for base in range(3):
        head = set(split.head[base].tolist())
        tail = torch.tensor([j not in head for j in range(333)])
        even = task.U / task.U.square().mean(1, keepdim=True).sqrt()
        assert set(even.norm(dim=0).topk(len(split.longest)).indices.tolist()) <= head
        assert torch.equal(split.p_tail[base] > 0, tail)
        if not many:
            S = (task.U * torch.where(tail, p[base], 0.0)) @ task.U.T
            torch.testing.assert_close(split.S[base], S)
    order = 4 if many else 2
    parts = moments._by_products if many else moments._by_matrix
    series, error = parts(V, task, split, *([sums.tile_shape(task.U)] if many else []))
    G = V @ task.U
    for q, base in enumerate(task.of.tolist()):
        delta = task.alpha[q, :, None] * G
        weight = split.p_tail[base]
        terms = sum(delta**r / math.factorial(r) for r in range(1, order + 1))
        torch.testing.assert_close(series[q], terms @ weight)
        left = ((delta.exp() - 1 - terms) @ weight).abs()
        assert (left <= error[q] + 1e-15).all()
        assert (error[q] < 1e6 * left + 1e-9).all()  # a bound, and not anything


def test_how_far_a_vector_moves_a_logit_where_a_gain_is_uneven():
    """The bound holds for every pair, and is a few times too wide at most: also where a few
    coordinates of U are a hundred times the others, and where one is zero."""
    g = torch.Generator().manual_seed(0)
    for loud in (1.0, 100.0):
        U = torch.randn(64, 5000, generator=g).double()
        V = torch.randn(200, 64, generator=g).double()
        U[:4] *= loud
        V[:, :4] /= loud
        U[9] = 0.0
        lengths = sums.Lengths.of(U)
        bound = lengths.vector(V)[:, None] * lengths.token
        assert ((V @ U).abs() <= bound).all()
        largest = (V @ U).abs().amax(1)
        assert (lengths.vector(V) * lengths.token.max() < 5 * largest).all()
    plain = V.norm(dim=1) * U.norm(dim=0).max()
    assert (plain > 20 * largest).all()


def test_the_bound_is_needed_where_every_token_is_as_far():
    """One coordinate: Cauchy-Schwarz is tight, and half of the bound would let errors above the
    tolerance through."""
    U = (torch.arange(400) % 2).double()[None]
    V = torch.logspace(-3, -1, 600, dtype=torch.float64)[:, None]
    log_p = torch.full((1, 400), -math.log(400), dtype=torch.float64)
    task = sums.Problems(U, log_p, torch.tensor([0]), torch.ones(1, 600, dtype=torch.float64))
    split = moments.HeadAndTail.of(U, log_p, 10**9)
    got = moments.log_sums_by_moments(V, task, split)
    exact = (log_p[0] + V @ U).logsumexp(1)
    error = (got.value[0] - exact).abs()
    assert error.max() < moments.TOLERANCE
    assert error[~got.fallback[0]].max() > moments.TOLERANCE * 0.8


def test_importance_by_token_is_the_layers_that_add_most():
    lens = tiny_lens("gptj")
    fact = FACTS[0]
    frame = by_token(lens, fact).set_index("position")
    for kind in ("ffn", "attn"):
        rows = qv.layer_scores(lens, fact, kind, "layer_vector", positions="all")
        most = {at: max(part["score"]) for at, part in rows.groupby("position")}
        assert frame[kind].to_dict() == pytest.approx(most)


def test_the_second_moment_of_any_size():
    g = torch.Generator().manual_seed(0)
    for size in (1, 3, 7, 48):
        U, p = torch.randn(size, 500, generator=g).double(), torch.rand(500, generator=g).double()
        torch.testing.assert_close(moments.second_moment(U, p), (U * p) @ U.T)


def test_what_nobody_wants_is_not_computed():
    V, task = random_problem()
    nothing = torch.zeros(task.alpha.shape, dtype=torch.bool)
    assert (sums.log_sums(V, task, None, nothing) == 0).all()
    one = nothing.clone()
    one[2, 7] = True
    got = sums.log_sums(V, task, None, one)
    assert got[2, 7].item() == pytest.approx(by_definition(V, task)[2, 7].item(), rel=1e-5)
    assert (got[~one] == 0).all()


def test_free_memory_is_what_the_system_says():
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        pytest.skip("only Linux says it there")
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    said = int(lines["MemFree"].split()[0]) * 1024
    assert sums.free_memory(torch.device("cpu")) == pytest.approx(said, rel=0.2, abs=2**29)


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize(
    ("norm", "base"),
    [("full", "mid"), ("frozen", "loo_final"), ("full", "loo_final"), ("none", "pre")],
)
def test_a_contrast_by_brute_force(kind, norm, base, true_float64):
    """log p(3) - log p(7) of the stream with the neuron's vector, less without: the logits'
    difference, read out by hand."""
    lens = tiny_lens(kind)
    trace = lens.trace(FACTS)
    got = qv.value_neurons(lens, trace, None, norm=norm, base=base, target=(3, 7)).frame
    named = qv.value_neurons(
        lens, trace, None, norm=norm, base=base, target=("answer", "predicted")
    ).frame
    for prompt, fact in enumerate(FACTS):
        final = trace.final[prompt]
        options = (
            {"raw": True}
            if norm == "none"
            else {"sigma": final_sigma(lens.hf, final) if norm == "frozen" else None}
        )
        pairs = (
            (got, (3, 7)),
            (named, (lens.answer_ids(fact)[0], trace.logits[prompt].argmax().item())),
        )
        for layer, neuron in ((0, 3), (1, 40), (2, 11)):
            v = trace.m[layer, prompt, neuron] * lens.w_out(layer)[neuron]
            x = trace.resid[layer, prompt] + (trace.attn[layer, prompt] if base == "mid" else 0)
            low, high = (final - v, final) if base == "loo_final" else (x, x + v)
            for frame, (first, second) in pairs:
                values = [
                    log_prob(lens.hf, y, token, **options)
                    for y in (high, low)
                    for token in (first, second)
                ]
                rows = frame[
                    (frame["prompt"] == prompt)
                    & (frame["layer"] == layer)
                    & (frame["neuron"] == neuron)
                ]
                expected = (values[0] - values[1] - values[2] + values[3]).item()
                assert rows["score"].item() == pytest.approx(expected, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize("over", ["prompt", "set", "category"])
def test_every_sum_of_a_layer_from_its_neurons(kind, over, true_float64):
    """Positive terms, counts and best terms from the single scores; whole vectors and b_out from
    the logits, by hand."""
    lens = tiny_lens(kind)
    facts = [
        replace(fact, category=name) for fact, name in zip((*FACTS, TWO_TOKENS), "ABA", strict=True)
    ]
    trace = lens.trace(facts)
    members = {"prompt": [[0], [1], [2]], "set": [[0, 1, 2]], "category": [[0, 2], [1]]}[over]

    def by_hand(v, layer, prompt, kind_of):
        x = trace.resid[layer, prompt] + (trace.attn[layer, prompt] if kind_of == "ffn" else 0)
        sigma = final_sigma(lens.hf, trace.final[prompt])
        token = lens.answer_ids(facts[prompt])[0]
        return (log_prob(lens.hf, x + v, token, sigma) - log_prob(lens.hf, x, token, sigma)).item()

    for part, unit in (("ffn", "ffn"), ("attn", "attn_channel")):
        single = qv.value_neurons(lens, trace, None, unit=unit).frame
        ways = {
            how: qv.layer_scores(lens, trace, part, how, over=over, count_top=9, method="exact")
            for how in HOWS
            if how != "head_sum" or part == "attn"
        }
        for group, prompts in enumerate(members):
            mine = single[single["prompt"].isin(prompts)]
            summed = mine.groupby(["layer", "neuron"])["score"].sum()
            best = summed.nlargest(9)
            for layer in range(lens.n_layers):
                at = group * lens.n_layers + layer
                rows = mine[mine["layer"] == layer]["score"]
                outputs = trace.ffn if part == "ffn" else trace.attn
                whole = sum(by_hand(outputs[layer, p], layer, p, part) for p in prompts)
                bias = 0.0
                if part == "ffn" and kind == "gptj":
                    bias = sum(
                        by_hand(lens.hf.transformer.h[layer].mlp.fc_out.bias, layer, p, part)
                        for p in prompts
                    )
                expected = {
                    "neuron_sum": rows.sum(), "neuron_sum_positive": rows[rows > 0].sum(), "layer_vector": whole,
                    "neuron_sum_top": best[best.index.get_level_values(0) == layer].sum(),
                    "count": (best.index.get_level_values(0) == layer).sum(),
                }  # fmt: skip
                for how, value in expected.items():
                    assert ways[how]["score"][at] == pytest.approx(value, rel=1e-9, abs=1e-10)
                    assert ways[how]["layer"][at] == layer
                sums = ways["neuron_sum"].loc[at]
                assert (sums["bias"], sums["whole"]) == pytest.approx(
                    (bias, whole), rel=1e-9, abs=1e-10
                )
                assert sums["gap"] == pytest.approx(whole - bias - rows.sum(), rel=1e-8, abs=1e-9)
        assert len(ways["count"]) == len(members) * lens.n_layers
    heads = qv.layer_scores(lens, trace, "head", "layer_vector", over=over)
    every = qv.value_neurons(lens, trace, None, unit="head").frame
    for row in heads.itertuples():
        prompts = members[
            0 if over == "set" else row.prompt if over == "prompt" else "AB".index(row.category)
        ]
        rows = every[
            every["prompt"].isin(prompts)
            & (every["layer"] == row.layer)
            & (every["neuron"] == row.head)
        ]
        assert row.score == pytest.approx(rows["score"].sum(), rel=1e-9, abs=1e-12)
    assert len(heads) == len(members) * lens.n_layers * 4
    summed = qv.layer_scores(lens, trace, "attn", "head_sum", over=over)["score"].to_numpy()
    assert abs(summed - heads["score"].to_numpy().reshape(-1, 4).sum(1)).max() < 1e-10


def test_ways_that_do_not_go_together_are_refused():
    lens = tiny_lens("gptj")
    task = setting(lens, FACTS, base="loo_final")
    with pytest.raises(qv.QVLensError, match="The bound J"):
        task.increase_of_units(1, "ffn", task.trace.m[1], lens.w_out(1), method="first_order")
    for options, message in (
        ({"kind": "head"}, "needs how='layer_vector'"),
        ({"kind": "ffn", "how": "head_sum"}, "use it with kind='attn'"),
        ({"kind": "x"}, "kind"),
        ({"how": "count", "count_top": 0}, "at least 1"),
        ({"method": "moments", "norm": "full"}, "frozen"),
    ):
        with pytest.raises(qv.QVLensError, match=message):
            qv.layer_scores(lens, FACTS, **options)


def test_bfloat16_models_are_scored_in_float32():
    lens = tiny_lens("qwen3-gqa", dtype=torch.bfloat16)
    trace = lens.trace(FACTS)
    assert trace.m.dtype == torch.bfloat16
    got = qv.value_neurons(lens, trace, None)
    assert got.settings["dtype"] == "float32"
    task = setting(lens, trace)
    v = (trace.m[1, 0, 5].double() * lens.w_out(1)[5].double())[None]
    x = task.x(1).double()[:1]
    U, s = task.readout.U.double(), task.readout.sigma[:1].double()
    expected = ((x + v) / s @ U).log_softmax(1)[0, task.token[0]] - (x / s @ U).log_softmax(1)[
        0, task.token[0]
    ]
    frame = got.frame
    score = frame[(frame["prompt"] == 0) & (frame["layer"] == 1) & (frame["neuron"] == 5)][
        "score"
    ].item()
    assert score == pytest.approx(expected.item(), abs=1e-5)
