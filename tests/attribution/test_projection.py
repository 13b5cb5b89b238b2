"""What neurons promote, from Hugging Face's own modules; the forms of an answer, from the
vocabulary."""

from __future__ import annotations

import pytest
import torch

import qv_lens as qv
from qv_lens.attribution.projection import logit_lens, projected, surface_forms
from tests.models import tiny_lens


def raw_logits(lens, vector, bias):
    """U^T (gain * centre(v)), with the unembedding's bias or without, for the rows that tokens
    use."""
    hf = lens.hf
    gptj = hasattr(hf, "transformer")
    gain = (hf.transformer.ln_f if gptj else hf.model.norm).weight
    centred = vector - vector.mean() if gptj else vector
    logits = hf.lm_head.weight @ (centred * gain)
    if bias and hf.lm_head.bias is not None:
        logits = logits + hf.lm_head.bias
    return logits[: len(lens.tokenizer)]


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize("unit", ["ffn", "attn_channel"])
@pytest.mark.parametrize("bias", [False, True])
def test_promoted_and_suppressed_tokens_by_hand(kind, unit, bias):
    """More neurons than are projected at a time, of all layers in mixed order; small, vanishing and
    negative coefficients."""
    lens = tiny_lens(kind)
    width = lens.d_mlp if unit == "ffn" else lens.backend_adapter.w_o(0).shape[0]
    neurons = qv.NeuronSet.of(
        [((3 * i) % lens.n_layers if i < 5 else i % lens.n_layers, i % width) for i in range(70)],
        unit,
    )
    coefficients = [(0.5, 0.0, -0.001, 2.0)[i % 4] for i in range(70)]
    neurons = qv.NeuronSet(neurons.frame.assign(coefficient=coefficients))
    table = qv.vocabulary(lens, neurons, 3, bias=bias)
    blocks = lens.hf.transformer.h if kind == "gptj" else lens.hf.model.layers
    for row in table.itertuples():
        block = blocks[row.layer]
        if unit == "ffn":
            module = block.mlp.fc_out if kind == "gptj" else block.mlp.down_proj
        else:
            module = block.attn.out_proj if kind == "gptj" else block.self_attn.o_proj
        logits = raw_logits(lens, module.weight[:, row.neuron], bias) * (
            -1 if row.coefficient < 0 else 1
        )
        order = logits.argsort(descending=True).tolist()
        assert row.promoted == [lens.token_label(i) for i in order[:3]]
        assert row.suppressed == [lens.token_label(i) for i in order[::-1][:3]]
    assert len(table) == 70
    one = qv.NeuronSet(neurons.frame.head(1))
    assert len(qv.vocabulary(lens, one, 10**6)["promoted"][0]) == len(lens.tokenizer)
    ids = projected(lens, torch.empty(0, lens.d_model), 3, bias, torch.empty(0, 1))
    assert [part.shape for part in ids] == [(0, 3), (0, 3)]
    none = qv.vocabulary(lens, neurons.top(0), 3)
    assert len(none) == 0
    assert list(none.columns) == list(table.columns)


def test_rows_without_a_token_are_never_promoted():
    lens = tiny_lens("gptj")
    used = len(lens.tokenizer) - 8
    labels = {lens.token_label(i) for i in range(used)}

    class Shorter:
        """The tokenizer without its last rows."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __len__(self):
            return used

    tokenizer, lens.tokenizer = lens.tokenizer, Shorter()
    assert lens.token_label(used) == f"<unused {used}>"
    promoted = qv.vocabulary(lens, qv.NeuronSet.of([(0, 1)]), 10**6)["promoted"][0]
    assert len(promoted) == used
    assert set(promoted) == labels


def test_units_that_write_no_single_vector_are_refused():
    lens = tiny_lens("gptj")
    for unit in ("head", "w_out_column"):
        with pytest.raises(qv.QVLensError, match="units that write one vector"):
            qv.vocabulary(lens, qv.NeuronSet.of([(0, 1)], unit))
    last = lens.d_mlp - 1
    assert len(qv.vocabulary(lens, qv.NeuronSet.of([(0, 0), (2, last)]), 3)) == 2
    for low, high in ((5, lens.d_mlp), (-1, 5)):
        with pytest.raises(
            qv.QVLensError, match=f"Layer 2 has units 0 to {last}; the set names {low} to {high}"
        ):
            qv.vocabulary(lens, qv.NeuronSet.of([(2, low), (2, high)]))


def test_forms_of_an_answer_are_the_tokens_that_spell_it():
    lens = tiny_lens("gptj")
    texts = [lens.token_label(i) for i in range(len(lens.tokenizer))]

    def rows(*words):
        spaced = {*words, *(f" {word}" for word in words)}
        return {i for i, text in enumerate(texts) if text in spaced}

    assert surface_forms(lens, "a") == rows("a", "A")
    assert surface_forms(lens, "a", plural=True) == rows("a", "A", "as", "As")
    assert rows("as", "As") > rows("As")
    assert surface_forms(lens, "Play") == rows("play", "Play", "PLAY") | {
        lens.answer_ids("The", "Play")[0]
    }
    assert rows("plays") <= surface_forms(lens, "play", plural=True)
    assert not rows("plays") & surface_forms(lens, "play")
    several = lens.answer_ids("The", "Nortek Dalrin")
    assert len(several) > 1
    assert surface_forms(lens, "Nortek Dalrin") == {several[0]}


def test_interpretable_looks_for_any_form_among_the_top():
    """Row i of W_out promotes one token alone: ' play', ' plays', another; the second of two when
    `top` allows."""
    lens = tiny_lens("qwen3-gqa")
    lens.w_out(0)[:4] = 0.0
    unembedding = torch.eye(lens.d_model, lens.d_vocab, dtype=torch.float64)
    ids = [
        lens.tokenizer(text, add_special_tokens=False)["input_ids"][0]
        for text in (" play", " plays", " judo")
    ]
    weight = lens.backend_adapter.unembed()[0]
    weight.zero_()
    for axis, token in enumerate(ids):
        weight[:, token] = unembedding[:, axis]
        lens.w_out(0)[axis, axis] = 1.0
    lens.w_out(0)[3, 2] = 2.0  # ' judo' first, then ' play'
    lens.w_out(0)[3, 0] = 1.0
    neurons = qv.NeuronSet.of([(0, 0), (0, 1), (0, 2), (0, 3)])
    assert qv.interpretable(lens, neurons, "play", 1).tolist() == [True, False, False, False]
    assert qv.interpretable(lens, neurons, "play", 1, plural=True).tolist() == [
        True,
        True,
        False,
        False,
    ]
    assert qv.interpretable(lens, neurons, "play", 2).tolist()[3]
    shown = qv.NeuronSet(neurons.frame.set_axis([9, 7, 5, 3]))
    assert qv.interpretable(lens, shown, "play", 1).index.tolist() == [9, 7, 5, 3]


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
def test_the_logit_lens_reads_every_layer_by_its_own_scale(kind, true_float64):
    lens = tiny_lens(kind)
    fact = qv.Fact("The capital of {} is the city of", "Norway", "Oslo")
    frame = logit_lens(lens, fact, 3)
    hf, ids = lens.hf, torch.tensor([lens.tokenize(fact)[0].ids])
    streams = hf(ids, output_hidden_states=True).hidden_states
    norm = hf.transformer.ln_f if kind == "gptj" else hf.model.norm
    for layer in range(lens.n_layers - 1):  # the last of them is normed already
        p = hf.lm_head(norm(streams[layer + 1][0])).softmax(-1)
        rows = frame[frame["layer"] == layer].sort_values("position")
        assert rows["probability"].tolist() == pytest.approx(p.amax(-1).tolist(), rel=1e-6)
        answer = p[:, lens.answer_ids(fact)[0]].tolist()
        assert rows["answer"].tolist() == pytest.approx(answer, rel=1e-6)


def test_interpretable_counts_the_unembeddings_bias():
    """Of vectors that are short beside it the bias alone chooses the tokens."""
    lens = tiny_lens("gptj")
    lens.w_out(1).mul_(1e-6)
    lens.hf.lm_head.bias.data[:] = torch.linspace(0, 1, len(lens.hf.lm_head.bias)).to(
        lens.hf.lm_head.bias
    )
    neurons = qv.NeuronSet.of([(1, 3), (1, 8)])
    likeliest = qv.vocabulary(lens, neurons, 1, bias=True)["promoted"].iloc[0][0]
    told = [
        qv.interpretable(lens, neurons, likeliest, 1, bias=bias).tolist() for bias in (True, False)
    ]
    assert told == [[True, True], [False, False]]
