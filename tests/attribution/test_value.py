"""Every score against a re-evaluation that shares no code with it: add the vector, read the logits
out by hand."""

from __future__ import annotations

import pytest
import torch

import qv_lens as qv
from qv_lens.attribution.setting import setting
from tests.models import KINDS, tiny_lens, tiny_of, tokenizer

FACTS = [
    qv.Fact("{} works for", "Olga Pelodan", "Nortek"),
    qv.Fact("The capital of {} is the city of", "Norway", "Oslo"),
]


def log_prob(hf, y, token, sigma=None, raw=False):
    """log p(token | y) from Hugging Face's own modules; `sigma` freezes the final norm's
    divisor."""
    if raw:
        return torch.log_softmax(hf.lm_head(y), -1)[token]
    gptj = hasattr(hf, "transformer")
    norm = hf.transformer.ln_f if gptj else hf.model.norm
    centred = y - y.mean() if gptj else y
    own = torch.sqrt((centred**2).mean() + (norm.eps if gptj else norm.variance_epsilon))
    normed = centred / (own if sigma is None else sigma) * norm.weight + (norm.bias if gptj else 0)
    return torch.log_softmax(hf.lm_head(normed), -1)[token]


def final_sigma(hf, y):
    gptj = hasattr(hf, "transformer")
    centred = y - y.mean() if gptj else y
    return torch.sqrt(
        (centred**2).mean() + (hf.transformer.ln_f.eps if gptj else hf.model.norm.variance_epsilon)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["frozen", "full", "none"])
@pytest.mark.parametrize("base", ["mid", "pre", "loo_final"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_ffn_neuron_equals_brute_force(
    kind, norm, base, dtype, tolerance, true_float64, monkeypatch
):
    monkeypatch.setattr("qv_lens.attribution.setting.CHUNK", 50)  # several to a layer
    lens = tiny_lens(kind, dtype=dtype, n_layers=2)
    trace = lens.trace(FACTS)
    got = qv.value_neurons(lens, trace, top=None, norm=norm, base=base).frame
    reference = lens.hf.double()  # the same weights, read out in float64
    for prompt, fact in enumerate(FACTS):
        token = lens.answer_ids(fact)[0]
        final = trace.final[prompt].double()
        options = (
            {"raw": True}
            if norm == "none"
            else {"sigma": final_sigma(reference, final) if norm == "frozen" else None}
        )
        for layer in range(lens.n_layers):
            x = trace.resid[layer, prompt].double()
            if base == "mid":
                x = x + trace.attn[layer, prompt].double()
            rows = got[(got["prompt"] == prompt) & (got["layer"] == layer)].sort_values("neuron")
            block = (
                reference.transformer.h
                if hasattr(reference, "transformer")
                else reference.model.layers
            )[layer]
            columns = (
                block.mlp.fc_out if hasattr(reference, "transformer") else block.mlp.down_proj
            ).weight.double()
            for neuron in range(lens.d_mlp):
                v = trace.m[layer, prompt, neuron].double() * columns[:, neuron]
                low, high = (final - v, final) if base == "loo_final" else (x, x + v)
                expected = (
                    log_prob(reference, high, token, **options)
                    - log_prob(reference, low, token, **options)
                ).item()
                assert abs(rows["score"].iloc[neuron] - expected) <= tolerance * max(
                    1, abs(expected)
                )


def test_exact_scores_of_float32_add_up_as_those_of_float64():
    """A layer's sum: an error that its neurons share, too small for one of them, must not show."""
    fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    single, double = (
        qv.value_neurons(qv.load("toy-gptj", dtype=dtype), fact, None, method="exact").frame
        for dtype in ("float32", "float64")
    )
    gap = (single.groupby("layer")["score"].sum() - double.groupby("layer")["score"].sum()).abs()
    assert gap.max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["frozen", "full", "none"])
def test_layer_vectors_telescope(kind, norm, true_float64):
    lens = tiny_lens(kind)
    parts = [
        qv.layer_scores(lens, FACTS, sort, "layer_vector", norm=norm) for sort in ("ffn", "attn")
    ]
    task = setting(lens, FACTS, norm=norm)
    ends = task.gain(task.trace.final) - task.gain(task.trace.resid[0])
    total = sum(frame.groupby("prompt")["score"].sum().to_numpy() for frame in parts)
    assert abs(total - ends.numpy()).max() < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_heads_add_up_to_attention(kind, true_float64):
    """With the log-sum taken away (a contrast of two tokens) scores are linear, so heads must add
    up exactly."""
    lens = tiny_lens(kind)
    trace = lens.trace(FACTS)
    for target in (3, 7):
        frame = qv.layer_scores(lens, trace, "head", "layer_vector", target=target)
        assert len(frame) == 2 * lens.n_layers * 4
    difference = [
        qv.layer_scores(lens, trace, sort, "layer_vector", target=3)
        .groupby(["prompt", "layer"])["score"]
        .sum()
        - qv.layer_scores(lens, trace, sort, "layer_vector", target=7)
        .groupby(["prompt", "layer"])["score"]
        .sum()
        for sort in ("head", "attn")
    ]
    assert (difference[0] - difference[1]).abs().max() < 1e-9


def test_sums_over_the_set_and_counts():
    lens = tiny_lens("gptj")
    each = qv.value_neurons(lens, FACTS, top=None).frame
    both = qv.value_neurons(lens, FACTS, top=None, over="set").frame.set_index(["layer", "neuron"])[
        "score"
    ]
    summed = each.groupby(["layer", "neuron"])["score"].sum()
    assert (both - summed).abs().max() < 1e-12
    for method, tolerance in (("exact", 1e-10), (None, 1e-6 * lens.d_mlp)):
        by_layer = qv.layer_scores(lens, FACTS, method=method).groupby("layer")["score"].sum()
        assert (by_layer - summed.groupby("layer").sum()).abs().max() < tolerance
    counts = qv.layer_scores(lens, FACTS, how="count", count_top=40)
    assert counts.groupby("prompt")["score"].sum().tolist() == [40, 40]
    best = (
        qv.value_neurons(lens, FACTS, 40)
        .frame.groupby(["prompt", "layer"])["score"]
        .agg(["sum", "size"])
    )
    top = qv.layer_scores(lens, FACTS, how="neuron_sum_top", count_top=40, method="exact")
    top = top.set_index(["prompt", "layer"])["score"]
    assert (top - best["sum"].reindex(top.index, fill_value=0)).abs().max() < 1e-12
    counted = counts.set_index(["prompt", "layer"])["score"]
    assert counted.tolist() == best["size"].reindex(counted.index, fill_value=0).tolist()


@pytest.mark.parametrize(
    "option", [{"norm": "x"}, {"base": "x"}, {"target": "x"}, {"over": "x"}, {"target": 10**9}]
)
def test_unknown_options_are_refused(option):
    with pytest.raises(qv.QVLensError):
        qv.value_neurons(tiny_lens("gptj"), FACTS, **option)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["frozen", "full", "none"])
@pytest.mark.parametrize("base", ["mid", "pre"])
def test_first_order_is_an_upper_bound(kind, norm, base):
    lens = tiny_lens(kind)
    trace, keys = lens.trace(FACTS), ["prompt", "layer", "neuron"]
    options = {"top": None, "norm": norm, "base": base}
    I, J = (
        qv.value_neurons(lens, trace, method=m, **options).frame.set_index(keys)["score"]
        for m in ("exact", "first_order")
    )
    assert (I - J).max() < 1e-10
    assert (J - I).max() > 1e-6


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize("norm", ["frozen", "full"])
@pytest.mark.parametrize("over", ["prompt", "set"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_topk_is_exact_and_certified(kind, norm, over, dtype):
    lens = tiny_lens(kind, dtype=dtype, n_layers=4)
    trace = lens.trace(FACTS)
    full = qv.value_neurons(lens, trace, 20, norm=norm, over=over)
    short = qv.value_neurons(lens, trace, 20, norm=norm, over=over, method="topk")
    assert abs(full.frame["score"].to_numpy() - short.frame["score"].to_numpy()).max() < (
        1e-10 if dtype == torch.float64 else 1e-5
    )
    assert set(full) == set(short)
    assert max(short.settings["scored"]) < lens.n_layers * lens.d_mlp


def test_methods_say_what_they_cannot_do():
    lens = tiny_lens("gptj")
    for options in (
        {"target": "sequence", "positions": "all"}, {"memory_budget": 1000}, {"unit": "attn_neuron", "over": "set"},
        {"over": "category"},
    ):  # fmt: skip
        with pytest.raises(qv.QVLensError):
            qv.value_neurons(lens, FACTS, **options)


def test_refusals_come_before_any_work(monkeypatch):
    """What no pass is needed to see costs none: the model is not run."""
    lens = tiny_lens("gptj")
    value = qv.value_neurons(lens, FACTS, 5)
    monkeypatch.setattr(type(lens), "logits", lambda *_, **__: pytest.fail("the model was run"))
    monkeypatch.setattr(type(lens), "stream", lambda *_, **__: pytest.fail("the model was run"))
    for options in (
        {"method": "moments", "norm": "full"}, {"method": "topk", "top": None}, {"method": "topk", "base": "loo_final"},
        {"method": "topk", "unit": "head"}, {"method": "topk", "target": (1, 2)}, {"method": "moments", "unit": "head_position"},
        {"method": "first_order", "base": "loo_final"}, {"unit": "x"}, {"method": "x"}, {"over": "x"}, {"base": "x"},
        {"top": 0}, {"top": 2.5}, {"target": "x"}, {"target": "sequence", "positions": "last_but_one"},
        {"positions": "answer"},
    ):  # fmt: skip
        with pytest.raises(qv.QVLensError):
            qv.value_neurons(lens, FACTS, **options)
    for options in (
        {"how": "x"}, {"kind": "x"}, {"over": "x"}, {"method": "topk"}, {"method": "moments", "norm": "full"}, {"base": "x"},
    ):  # fmt: skip
        with pytest.raises(qv.QVLensError):
            qv.layer_scores(lens, FACTS, **options)
    for options in ({"over": "x"}, {"top": 0}, {"method": "x"}, {"targets": 0}, {"subkey": "x"}):
        with pytest.raises(qv.QVLensError):
            qv.query_neurons(lens, FACTS, value, **options)
    for options in (
        {"share": 0.0},
        {"steps": 0},
        {"parameters": ("b_in",)},
        {"axis": "x"},
        {"reduce": "x"},
    ):
        with pytest.raises(qv.QVLensError):
            qv.neuron_ensemble(lens, FACTS, **options)
    for options in ({"score": "x"}, {"paths": "x"}, {"top": 0}, {"gate": True}):
        with pytest.raises(qv.QVLensError):
            qv.transmission_paths(lens, FACTS, **options)
    for options in ({"steps": 0}, {"top": 0}):
        with pytest.raises(qv.QVLensError):
            qv.integrated_gradients(lens, FACTS, **options)
    for options in ({"prompts": "x"}, {"cases": []}):
        with pytest.raises(qv.QVLensError):
            qv.locate(lens, **{"cases": FACTS, **options})


@pytest.mark.parametrize("name", ["Gemma 2", "Gemma 3", "OLMo 2"])
def test_heads_behind_a_norm_are_brute_force_on_hugging_faces_modules(name, true_float64):
    """A head adds its channels through W_O, divided as the norm after attention divides the sum of
    all heads. Where the score is linear, those of a head's positions add up to the head's."""
    hf = tiny_of(name, torch.float64)
    lens = qv.Lens.from_hf(tiny_of(name, torch.float64), tokenizer(), backend="bridge")
    fact = FACTS[0]
    ids = torch.tensor([lens.tokenize(fact)[0].ids])
    token, block, seen = lens.answer_ids(fact)[0], hf.model.layers[1], {}
    for key, module in (("o", block.self_attn.o_proj), ("norm", block.post_attention_layernorm)):
        module.register_forward_hook(
            lambda _, inputs, output, key=key: seen.update({key: (inputs[0][0, -1], output[0, -1])})
        )
    block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(
            x=(args[0] if args else kwargs["hidden_states"])[0, -1]
        ),
        with_kwargs=True,
    )
    hf(ids)
    cap = getattr(hf.config, "final_logit_softcapping", None)

    def logp(y):
        logits = hf.lm_head(hf.model.norm(y[None]))[0]
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        return float(logits.log_softmax(-1)[token])

    (z, added), (_, normed) = seen["o"], seen["norm"]
    found = qv.value_neurons(lens, fact, None, unit="head", norm="full", base="pre").to_frame()
    heads = hf.config.num_attention_heads
    width = len(z) // heads
    for head in range(heads):
        channels = slice(head * width, (head + 1) * width)
        v = block.self_attn.o_proj.weight[:, channels] @ z[channels] * normed / added
        row = found[(found["layer"] == 1) & (found["head"] == head)]
        assert row["score"].item() == pytest.approx(logp(seen["x"] + v) - logp(seen["x"]), abs=1e-6)
    if cap is None:
        linear = {"norm": "frozen", "target": ("answer", "Paris"), "base": "pre"}
        whole, apart = (
            qv.value_neurons(lens, fact, None, unit=unit, **linear).to_frame()
            for unit in ("head", "head_position")
        )
        keys = ["layer", "head"]
        assert apart.groupby(keys)["score"].sum().tolist() == pytest.approx(
            whole.set_index(keys)["score"].sort_index().tolist(), abs=1e-9
        )
