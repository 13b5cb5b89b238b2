"""Tiny random models of both architectures, for tests that must not depend on trained weights."""

from __future__ import annotations

import itertools
import random
from functools import cache

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, GPTJConfig, GPTJForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qv_lens.errors import QVLensError
from qv_lens.models.lens import Lens
from qv_lens.models.wrap import hooked_available
from qv_lens.models.zoo import WEIGHTS
from qv_lens.world import generator

#: (heads, key-value heads)
KINDS = {"gptj": (4, 4), "qwen3-mha": (4, 4), "qwen3-gqa": (4, 2), "qwen3-mqa": (4, 1)}
BACKENDS = ("hooked", "bridge") if hooked_available() else ("bridge",)
PROMPTS = (
    "Olga Pelodan works for",
    "The capital of Norway is",
    "Tim Duncan, a player of great fame, plays the sport of",
)


def tokenizer():
    return AutoTokenizer.from_pretrained(WEIGHTS / "toy-gptj")


@cache
def vocabulary_size() -> int:
    return len(tokenizer())


def tiny_hf(
    kind: str,
    dtype: torch.dtype = torch.float64,
    n_layers: int = 3,
    seed: int = 0,
    exact: bool = True,
):
    """A random Hugging Face model whose activations are not vanishingly small."""
    torch.manual_seed(seed)
    heads, kv = KINDS[kind]
    size = {
        "vocab_size": vocabulary_size(),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    if kind == "gptj":
        config = GPTJConfig(
            n_positions=128, n_embd=32, n_layer=n_layers, n_head=heads, rotary_dim=4, **size
        )
        model = GPTJForCausalLM(config)
    else:
        config = Qwen3Config(
            hidden_size=32, intermediate_size=48, num_hidden_layers=n_layers, num_attention_heads=heads,
            num_key_value_heads=kv, head_dim=8, max_position_embeddings=128, rope_theta=10000.0, **size,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1)
                + (parameter.ndim == 1)
            )
    model = model.to(dtype).eval().requires_grad_(False)
    if dtype == torch.float64 and exact:
        exact_rotary(model)
    return model


def exact_rotary(model) -> None:
    """Rotary tables in float64: Hugging Face computes them in float32 whatever the model's
    dtype."""
    if isinstance(model, GPTJForCausalLM):
        d, n = model.config.rotary_dim, model.config.n_positions
        angles = torch.outer(
            torch.arange(n).double(), 1.0 / 10000 ** (torch.arange(0, d, 2).double() / d)
        )
        for block in model.transformer.h:
            block.attn.embed_positions = torch.cat([angles.sin(), angles.cos()], dim=1)
    else:
        d = model.config.head_dim
        model.model.rotary_emb.inv_freq = 1.0 / 10000.0 ** (torch.arange(0, d, 2).double() / d)


def tiny_lens(
    kind: str,
    backend: str = "auto",
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    **options,
) -> Lens:
    hf, tok = tiny_hf(kind, dtype, **options).to(device), tokenizer()
    return Lens.from_hf(hf, tok, backend=backend, name=f"tiny-{kind}")


def lens_and_twin(name: str, backend: str) -> tuple[Lens, nn.Module]:
    """A tiny model of an architecture in float64, wrapped, and the same as Hugging Face has it, with
    attention in the open; skips the test where there is no such wrapper."""
    twin = tiny_of(name, torch.float64)
    twin.config._attn_implementation = "eager"
    try:
        lens = Lens.from_hf(tiny_of(name, torch.float64), tokenizer(), backend=backend)
    except QVLensError:
        pytest.skip(f"no {backend} of {name}")
    return lens, twin


def texts(count: int) -> list[str]:
    """Documents of the bundled world, with more distinct tokens than a tiny model has neurons."""
    documents = generator.documents(generator.build(0), random.Random(0))
    return [generator.text(document) for document in itertools.islice(documents, count)]


#: sizes by the names of the two families of configs
LIKE_LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
LIKE_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
GEMMA = {**LIKE_LLAMA, "head_dim": 8, "tie_word_embeddings": True}
GEMMA_2 = {**GEMMA, "sliding_window": 16, "query_pre_attn_scalar": 8}
NEOX = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
FALCON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": False}
#: every architecture, and the variants in which it differs from itself: name -> (class, settings)
TINY = {
    "GPT-2": ("GPT2LMHeadModel", LIKE_GPT2),
    "GPT-Neo": ("GPTNeoForCausalLM", {
        "hidden_size": 32, "num_layers": 3, "num_heads": 4, "max_position_embeddings": 128, "window_size": 16,
        "attention_types": [[["global", "local", "global"], 1]],
    }),
    "GPT-J": ("GPTJForCausalLM", {**LIKE_GPT2, "rotary_dim": 4, "tie_word_embeddings": False}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {**NEOX, "rotary_pct": 0.5}),
    "GPT-NeoX, one after another": ("GPTNeoXForCausalLM", {**NEOX, "use_parallel_residual": False}),
    "OPT": ("OPTForCausalLM", {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128,
        "word_embed_proj_dim": 32, "pad_token_id": 1,
    }),
    "Llama": ("LlamaForCausalLM", LIKE_LLAMA),
    "Llama, tied": ("LlamaForCausalLM", {**LIKE_LLAMA, "tie_word_embeddings": True}),
    "Llama, biases": (
        "LlamaForCausalLM", {**LIKE_LLAMA, "attention_bias": True, "mlp_bias": True}
    ),
    "Llama 3": ("LlamaForCausalLM", {**LIKE_LLAMA, "rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 10000.0,
    }}),
    "Mistral": ("MistralForCausalLM", {**LIKE_LLAMA, "sliding_window": None}),
    "Qwen2": ("Qwen2ForCausalLM", LIKE_LLAMA),
    "Qwen3": ("Qwen3ForCausalLM", {**LIKE_LLAMA, "head_dim": 8}),
    "Phi": ("PhiForCausalLM", {**LIKE_LLAMA, "partial_rotary_factor": 0.5}),
    "Phi-3": ("Phi3ForCausalLM", LIKE_LLAMA),
    "Gemma": ("GemmaForCausalLM", GEMMA),
    "Gemma 2": ("Gemma2ForCausalLM", {**GEMMA_2, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0}),
    "Gemma 3": ("Gemma3ForCausalLM", GEMMA_2),
    "OLMo": ("OlmoForCausalLM", LIKE_LLAMA),
    "OLMo 2": ("Olmo2ForCausalLM", LIKE_LLAMA),
    "StableLM": ("StableLmForCausalLM", {**LIKE_LLAMA, "partial_rotary_factor": 0.5}),
    "BLOOM": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "Falcon": ("FalconForCausalLM", {**FALCON, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False}),
}  # fmt: skip


def tiny_of(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    """A random Hugging Face model of any known architecture, with changes to its settings."""
    kind, usual = TINY[name]
    settings = {**usual, **changes}
    torch.manual_seed(seed)
    config_name = kind.replace("LMHeadModel", "Config").replace(
        "ForCausalLM", "TextConfig" if "Gemma3" in kind else "Config"
    )
    config = getattr(transformers, config_name)(
        vocab_size=vocabulary_size(), bos_token_id=0, eos_token_id=0, **settings
    )
    model = getattr(transformers, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1)
                + (parameter.ndim == 1)
            )
    model.tie_weights()
    return model.to(dtype).eval().requires_grad_(False)


def hf_logits(hf, text):
    """Of the token after a text, by Hugging Face's own model."""
    return hf(torch.tensor([tokenizer()(text)["input_ids"]])).logits[0, -1]


def relative(a, b) -> float:
    """||a - b|| / ||b||."""
    return float((a.double() - b.double()).norm() / b.double().norm())
