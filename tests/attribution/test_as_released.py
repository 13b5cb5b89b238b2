"""The released notebooks' readings, slips included, from Hugging Face's weights by hand."""

from __future__ import annotations

import pytest
import torch

import qv_lens as qv
from tests.attribution.test_value import FACTS
from tests.models import tiny_lens


def gptj_log_prob(hf, final, token):
    """y -> log p(token) of many streams at once: sigma of the final vector, ln_f.bias left out."""
    centred = final - final.mean()
    sigma = (centred.square().mean() + hf.transformer.ln_f.eps).sqrt()

    def read(y):
        hidden = (y - y.mean(-1, keepdim=True)) / sigma * hf.transformer.ln_f.weight
        return hf.lm_head(hidden).log_softmax(-1)[..., token]

    return read


def test_gptj_as_released(true_float64):
    """Layers, heads and attention neurons cut from out_proj untransposed; FFN queries by columns of
    k_proj."""
    lens = tiny_lens("gptj")
    hf = lens.hf
    out = qv.ace_official(lens, FACTS)
    trace = lens.trace(FACTS, attention=True)
    everywhere = lens.trace(FACTS, "all")
    channels = 8
    for prompt in range(2):
        token = trace.logits[prompt].argmax().item()
        read = gptj_log_prob(hf, trace.final[prompt], token)
        length = len(trace.prompts[prompt].ids)
        found = []
        for layer, block in enumerate(hf.transformer.h):
            x = trace.resid[layer, prompt]
            mid = x + trace.attn[layer, prompt]
            rows = out.value_layers[
                (out.value_layers["prompt"] == prompt) & (out.value_layers["layer"] == layer)
            ]
            by_kind = rows.set_index("kind")["score"]
            assert by_kind["ffn"] == pytest.approx(
                (read(mid + trace.ffn[layer, prompt]) - read(mid)).item(), rel=1e-8
            )
            assert by_kind["attn"] == pytest.approx((read(mid) - read(x)).item(), rel=1e-8)
            weight = block.attn.out_proj.weight
            a = trace.pattern[layer, prompt, :, :length]
            z = a[:, None] * trace.v[layer, prompt].view(4, channels, -1)[..., :length]
            for head in range(4):
                v = z[head].sum(1) @ weight[head * channels : (head + 1) * channels]
                row = out.heads[
                    (out.heads["prompt"] == prompt)
                    & (out.heads["layer"] == layer)
                    & (out.heads["head"] == head)
                ]
                assert row["score"].item() == pytest.approx(
                    (read(x + v) - read(x)).item(), rel=1e-8, abs=1e-11
                )
                assert row["kind"].item() == "head"
            # [position, channel]
            increase = read(x + z.flatten(0, 1).T[:, :, None] * weight) - read(x)
            found += [
                (s, layer, j, p)
                for p, scores in enumerate(increase.tolist())
                for j, s in enumerate(scores)
            ]
        best = sorted(found, reverse=True)[:30]
        queries = out.query_neurons.frame[out.query_neurons.frame["prompt"] == prompt]
        assert len(queries) == 300
        assert queries["score"].is_monotonic_decreasing
        scores = {}
        for row in ((everywhere.prompt == prompt).nonzero()[:, 0]).tolist():
            position = everywhere.positions[row].item()
            for layer in range(lens.n_layers):
                key = torch.zeros(lens.d_model, dtype=torch.float64)
                for score, above, j, p in best:
                    if p == position and above > layer:
                        block = hf.transformer.h[above]
                        k = block.ln_1.weight * block.attn.k_proj.weight[:, j]
                        key += score * k / (everywhere.resid[above, row] @ k)
                v = everywhere.m[layer, row][:, None] * hf.transformer.h[layer].mlp.fc_out.weight.T
                scores |= {(layer, n, position): s for n, s in enumerate((v @ key).tolist())}
        for row in queries.itertuples():
            assert row.score == pytest.approx(
                scores[row.layer, row.neuron, row.position], rel=1e-6, abs=1e-10
            )
        assert queries["score"].min() == pytest.approx(
            sorted(scores.values(), reverse=True)[299], rel=1e-6, abs=1e-10
        )
    assert out.query_layers is None
    assert {
        "preset": "ace_official, as released",
        "method": "share",
        "targets": 30,
    }.items() <= out.query_neurons.settings.items()
    texts = [fact.text for fact in FACTS]
    for frame in (out.value_layers, out.counts, out.tokens, out.heads):
        assert frame.attrs["preset"] == "ace_official, as released"
        assert frame.attrs["texts"] == texts


def test_qwen3_as_released(true_float64):
    """Query layers by shares whose key is a column of down_proj times the FFN norm's gain; heads
    are heads."""
    lens = tiny_lens("qwen3-gqa")
    out = qv.ace_official(lens, FACTS)
    trace = lens.trace(FACTS)
    targets = out.value_neurons.frame
    for prompt in range(2):
        best = targets[targets["prompt"] == prompt].head(30)
        rows = out.query_layers[out.query_layers["prompt"] == prompt].set_index(["kind", "layer"])[
            "score"
        ]
        outputs = {("embed", -1): trace.resid[0, prompt]}
        outputs |= {("ffn", layer): trace.ffn[layer, prompt] for layer in range(lens.n_layers)}
        outputs |= {("attn", layer): trace.attn[layer, prompt] for layer in range(lens.n_layers)}
        for (kind, layer), v in outputs.items():
            expected = 0.0
            for row in best.itertuples():
                block = lens.hf.model.layers[row.layer]
                key = (
                    block.post_attention_layernorm.weight
                    * block.mlp.down_proj.weight[:, row.neuron]
                )
                if row.layer > layer or (kind == "attn" and row.layer == layer):
                    expected += (
                        row.score * (v @ key).item() / (trace.mid[row.layer, prompt] @ key).item()
                    )
            assert rows[kind, layer] == pytest.approx(expected, rel=1e-7, abs=1e-10)
    assert out.query_layers.attrs["preset"] == "ace_official, as released"
    whole = qv.layer_scores(lens, FACTS, "head", "layer_vector", target="predicted")
    assert (out.heads["score"] - whole["score"]).abs().max() < 1e-10


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_tokens_as_released(kind):
    """Raw columns with the unembedding's bias, whatever the coefficient's sign; the ten best
    neurons of each prompt."""
    lens = tiny_lens(kind)
    hf = lens.hf
    table = qv.ace_official(lens, FACTS).tokens
    assert table.groupby("prompt").size().tolist() == [10, 10]
    assert (table["coefficient"] < 0).any() == (kind != "gptj")  # GELU hardly goes below 0
    for row in table.itertuples():
        if kind == "gptj":
            v = hf.transformer.h[row.layer].mlp.fc_out.weight[:, row.neuron]
            logits = hf.lm_head((v - v.mean()) * hf.transformer.ln_f.weight)
        else:
            v = hf.model.layers[row.layer].mlp.down_proj.weight[:, row.neuron]
            logits = hf.lm_head(v * hf.model.norm.weight)
        order = logits.argsort(descending=True).tolist()
        assert row.top == [lens.token_label(i) for i in order[:10]]
        assert row.bottom == [lens.token_label(i) for i in order[::-1][:10]]
