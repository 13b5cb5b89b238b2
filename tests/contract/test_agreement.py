"""The hooked model is the checkpoint's model, or it is refused; and so is a user's model that
cannot be read rightly."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import qv_lens as qv
from qv_lens.errors import ModelError
from qv_lens.models import agreement
from qv_lens.models.lens import Lens
from qv_lens.models.wrap import hooked_available
from tests.models import PROMPTS, tiny_hf, tiny_of, tokenizer, vocabulary_size

needs_hooked = pytest.mark.skipif(
    not hooked_available(), reason="TransformerLens 4.x has no HookedTransformer"
)
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
#: settings of a Qwen3 checkpoint that TransformerLens's config reader passes over, and how the
#: warning names them
UNREAD = {
    "yarn": ({"rope_parameters": YARN}, "yarn scaling"),
    "linear": ({"rope_parameters": LINEAR}, "linear scaling"),
    "attention_bias": ({"attention_bias": True}, "attention_bias"),
    "window": (
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        "window of 8",
    ),
}


def tiny_qwen3(**settings) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, tie_word_embeddings=False,
        **{"rope_theta": 10000.0, **settings},
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    return model.eval().requires_grad_(False)


def long_prompt() -> str:
    return "Question: Who founded Intel? Thoughts: " * 12


@pytest.mark.parametrize("case", UNREAD)
def test_what_hooked_transformer_leaves_out_goes_to_the_bridge(case):
    settings, said = UNREAD[case]
    if hooked_available():
        with pytest.warns(UserWarning, match=said):
            lens = Lens.from_hf(tiny_qwen3(**settings), tokenizer())
    else:
        lens = Lens.from_hf(tiny_qwen3(**settings), tokenizer())
    assert lens.backend == "bridge"
    ids = torch.tensor([tokenizer()(long_prompt())["input_ids"]])
    truth = tiny_qwen3(**settings)(ids).logits[0, -1]
    torch.testing.assert_close(lens.next_token_logits(long_prompt())[0], truth, atol=1e-4, rtol=0)


@needs_hooked
@pytest.mark.parametrize("case", UNREAD)
def test_the_hooked_class_alone_refuses_them(case):
    settings, said = UNREAD[case]
    with pytest.raises(ModelError, match=said):
        Lens.from_hf(tiny_qwen3(**settings), tokenizer(), backend="hooked")


@needs_hooked
def test_the_logits_tell_what_the_config_does_not(monkeypatch):
    """With the list of settings taken away the probe alone finds each of them."""
    monkeypatch.setattr(agreement, "unread", lambda config, context, switches: [])
    for settings, _ in UNREAD.values():
        with pytest.raises(ModelError, match="of their spread away"):
            Lens.from_hf(tiny_qwen3(**settings), tokenizer(), backend="hooked")


@needs_hooked
def test_a_model_too_big_for_two_passes_is_judged_by_its_config(monkeypatch):
    monkeypatch.setattr(agreement, "BUDGET", 1.0)
    settings, said = UNREAD["yarn"]
    with pytest.raises(ModelError, match=said):
        Lens.from_hf(tiny_qwen3(**settings), tokenizer(), backend="hooked")
    assert Lens.from_hf(tiny_qwen3(), tokenizer(), backend="hooked").backend == "hooked"


@pytest.mark.parametrize("kind", ["gptj", "qwen3-gqa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_plain_checkpoint_is_wrapped_without_a_word(kind, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Lens.from_hf(tiny_hf(kind, dtype), tokenizer())


@needs_hooked
def test_a_window_that_the_context_never_fills_is_no_window():
    assert (
        agreement.unread(
            tiny_qwen3(use_sliding_window=True, sliding_window=512, max_window_layers=0).config,
            512,
            (),
        )
        == []
    )


# ------------------------------------------------------------------ a user's own hooked model


def users_model(**settings):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(0)
    config = HookedTransformerConfig(
        **{"n_layers": 3, "d_model": 32, "n_ctx": 64, "d_head": 8, "n_heads": 4, "d_mlp": 48, "act_fn": "gelu",
        "d_vocab": vocabulary_size(), "normalization_type": "LN", "positional_embedding_type": "rotary", "rotary_dim": 8,
        "default_prepend_bos": False, **settings}
    )  # fmt: skip
    model = HookedTransformer(config, tokenizer=tokenizer())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    return model


UNREADABLE = {
    "attn_only": ({"attn_only": True}, "no FFN"),
    "post-norms": (
        {"normalization_type": "RMS", "use_normalization_before_and_after": True},
        "a norm follows its FFN",
    ),
    "no norms": ({"normalization_type": None}, "neither LayerNorm nor RMSNorm"),
    "both directions": ({"attention_dir": "bidirectional"}, "looks ahead"),
    "activation": ({"act_fn": "solu_ln"}, "activation"),
    "positions": ({"positional_embedding_type": "shortformer"}, "shortformer"),
    "final RMS": ({"final_rms": True}, "final norm"),
    "gate and b_in": (
        {"normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu"},
        "adds behind the gate",
    ),
    "experts": (
        {"num_experts": 4, "experts_per_token": 2, "gated_mlp": True, "act_fn": "silu"},
        "mixture of experts",
    ),
}


@needs_hooked
@pytest.mark.parametrize("case", UNREADABLE)
def test_a_users_model_that_cannot_be_read_is_refused(case):
    settings, said = UNREADABLE[case]
    with pytest.raises(ModelError, match=said):
        qv.Lens(users_model(**settings))


REFUSED = (
    ("OPT", {"do_layer_norm_before": False}, "do_layer_norm_before = False"),
    ("OPT", {"word_embed_proj_dim": 16}, "a projection stands between the stream and the logits"),
    ("BLOOM", {"apply_residual_connection_post_layernorm": True}, "goes on from behind"),
)


@pytest.mark.parametrize(("name", "settings", "said"), REFUSED)
def test_settings_with_which_no_number_would_be_right_are_refused(name, settings, said):
    hf = tiny_of(name, **settings)
    with pytest.raises(ModelError, match=said):
        qv.Lens.from_hf(hf, tokenizer())


def test_bloom_in_float64_says_the_same_together_as_alone():
    """Hugging Face's has NaN there in a row that is filled up in front."""
    lens = qv.Lens.from_hf(tiny_of("BLOOM", torch.float64), tokenizer())
    prompts = [PROMPTS[0], f"In a long tale of many people, {PROMPTS[0]}"]
    together = lens.generate(prompts, 4)
    assert together == [lens.generate(prompt, 4) for prompt in prompts]
    assert all(together)


UNUSUAL = {
    "Llama": {"head_dim": 16},
    "GPT-2": {"n_inner": 72},
    "GPT-Neo": {"intermediate_size": 72},
    "OPT": {"enable_bias": False},
}


@needs_hooked
@pytest.mark.parametrize("name", UNUSUAL)
def test_what_hooked_transformer_cannot_hold_is_bridged(name):
    hf = tiny_of(name, **UNUSUAL[name])
    with pytest.warns(
        UserWarning, match="HookedTransformer cannot hold .*TransformerBridge is used"
    ):
        lens = qv.Lens.from_hf(hf, tokenizer())
    prompt = lens.tokenize(PROMPTS[0])[0]
    theirs = hf(torch.tensor([prompt.ids])).logits[0, -1]
    torch.testing.assert_close(lens.next_token_logits(PROMPTS[0])[0], theirs, atol=1e-4, rtol=1e-4)
    with pytest.raises(ModelError, match="HookedTransformer cannot hold this"):
        qv.Lens.from_hf(hf, tokenizer(), backend="hooked")


@needs_hooked
def test_the_rotary_base_of_a_model_too_big_for_a_probe(monkeypatch):
    """HookedTransformer's reader of GPT-NeoX takes 10,000 whatever the config says."""
    monkeypatch.setattr("qv_lens.models.agreement.BUDGET", 0)
    hf = tiny_of("GPT-NeoX", rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5})  # fmt: skip
    with pytest.warns(UserWarning, match="the base 500 of its rotary positions"):
        lens = qv.Lens.from_hf(hf, tokenizer())
    assert lens.backend_adapter.name == "bridge"


@needs_hooked
def test_soft_caps_are_part_of_log_p():
    """logprob, evaluation and Eq. 9 all read the capped logits, as the model gives them."""
    from qv_lens.evaluation.answers import tell

    model = users_model(output_logits_soft_cap=2.0)
    lens, fact = qv.Lens(model), qv.Fact("{} works for", "Olga Pelodan", "Nortek")
    (prompt,), token = lens.tokenize(fact), lens.answer_ids(fact)[0]
    logits = model(torch.tensor([prompt.ids]))[0, -1]
    assert logits.abs().max() <= 2.0
    wanted = float(logits.log_softmax(-1)[token])
    assert lens.logprob(fact) == pytest.approx(wanted, abs=1e-5)
    assert tell(lens, [fact])[0].logprob == pytest.approx(wanted, abs=1e-5)
    trace = lens.trace(fact)
    best = qv.value_neurons(lens, fact, 5, norm="full").to_frame()
    for row in best.itertuples():
        x = trace.mid[row.layer]
        v = trace.m[row.layer][0, row.neuron] * lens.w_out(row.layer)[row.neuron]
        low, high = (model.unembed(model.ln_final(y[None]))[0, 0] for y in (x, x + v))
        moved = (2 * torch.tanh(high / 2)).log_softmax(-1)[token] - (
            2 * torch.tanh(low / 2)
        ).log_softmax(-1)[token]
        assert row.score == pytest.approx(float(moved), abs=1e-4)


@needs_hooked
def test_a_parallel_block_with_two_norms_reads_its_own():
    """As in GPT-NeoX: Suppress of neurons that are zero changes nothing, and m is what the FFN's
    own norm gives."""
    lens = qv.Lens(users_model(parallel_attn_mlp=True))
    query = qv.NeuronSet.of([(0, n) for n in range(10)])
    targets = qv.NeuronSet.of([(1, 3), (2, 7)])
    with lens.intervene(qv.Zero(query)):
        clean = lens.next_token_logits(PROMPTS)
        with lens.intervene(qv.Suppress(query, targets)):
            suppressed = lens.next_token_logits(PROMPTS)
    torch.testing.assert_close(suppressed, clean, atol=1e-4, rtol=0)
    with lens.intervene(qv.Suppress(query, targets)):
        assert (lens.next_token_logits(PROMPTS) - clean).abs().max() > 1e-2


@needs_hooked
def test_w_in_of_a_parallel_block_with_two_norms_in_passing_equals_written():
    from qv_lens.models.deltas import delta_hooks

    lens = qv.Lens(users_model(parallel_attn_mlp=True))
    delta = torch.randn(32, 48, generator=torch.Generator().manual_seed(1)) * 0.1
    rows = [list(prompt.ids) for prompt in lens.tokenize(PROMPTS[:1])]
    passing = lens.logits(rows, delta_hooks(lens, {(1, "W_in"): delta}))
    lens.parameter(1, "W_in").add_(delta)
    torch.testing.assert_close(passing, lens.logits(rows), atol=1e-4, rtol=0)


def test_a_mixture_of_experts_is_refused_with_its_reason():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=vocabulary_size(), hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    with pytest.raises(ModelError, match="mixture of experts"):
        Lens.from_hf(Qwen3MoeForCausalLM(config), tokenizer())


def test_a_model_is_asked_about_text_that_its_tokenizer_can_read():
    """On tokens that no text brings together, rounding alone moves a bfloat16 model as far as a
    wrong setting would."""
    model, words = tiny_qwen3(), tokenizer()
    text = agreement.row(model, words, 512)[0].tolist()
    assert words.decode(text).startswith('The "assert" statement')

    class OneWord:
        def __call__(self, text, **_):
            return {"input_ids": [1] * len(text.split())}

    spread = agreement.row(model, OneWord(), 512)[0].tolist()
    assert len(set(spread)) > 100
    assert spread[:2] == [7919 % len(words), 2 * 7919 % len(words)]


def test_the_distance_of_logits_is_relative_to_their_spread():
    """(0, 2) spreads by the root of 2, wherever it lies; off by 1 in one token that is 1 / 2^(1/2)."""
    theirs, ours = torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[0.0, 3.0]]])
    for shift in (0.0, 100.0):
        found = agreement.distance(theirs + shift, ours + shift)
        assert found == pytest.approx(0.5**0.5)
