"""Tiny random models of both architectures, for tests that must not depend on trained weights."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, GPTJConfig, GPTJForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qv_lens.models.backend import hooked_available
from qv_lens.models.lens import Lens
from qv_lens.models.zoo import WEIGHTS

#: (heads, key-value heads)
KINDS = {"gptj": (4, 4), "qwen3-mha": (4, 4), "qwen3-gqa": (4, 2), "qwen3-mqa": (4, 1)}
BACKENDS = ("hooked", "bridge") if hooked_available() else ("bridge",)
PROMPTS = ("Olga Pelodan works for", "The capital of Norway is", "Tim Duncan, a player of great fame, plays the sport of")


def tokenizer():
    return AutoTokenizer.from_pretrained(WEIGHTS / "toy-gptj")


def tiny_hf(kind: str, dtype: torch.dtype = torch.float64, n_layers: int = 3, seed: int = 0, exact: bool = True):
    """A random Hugging Face model whose activations are not vanishingly small."""
    torch.manual_seed(seed)
    heads, kv = KINDS[kind]
    size = {"vocab_size": len(tokenizer()), "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    if kind == "gptj":
        config = GPTJConfig(n_positions=128, n_embd=32, n_layer=n_layers, n_head=heads, rotary_dim=4, **size)
        model = GPTJForCausalLM(config)
    else:
        config = Qwen3Config(
            hidden_size=32, intermediate_size=48, num_hidden_layers=n_layers, num_attention_heads=heads,
            num_key_value_heads=kv, head_dim=8, max_position_embeddings=128, rope_theta=10000.0, **size,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.1) + (parameter.ndim == 1))
    model = model.to(dtype).eval().requires_grad_(False)
    if dtype == torch.float64 and exact:
        exact_rotary(model)
    return model


def exact_rotary(model) -> None:
    """Rotary tables in float64: Hugging Face computes them in float32 whatever the model's dtype."""
    if isinstance(model, GPTJForCausalLM):
        d, n = model.config.rotary_dim, model.config.n_positions
        angles = torch.outer(torch.arange(n).double(), 1.0 / 10000 ** (torch.arange(0, d, 2).double() / d))
        for block in model.transformer.h:
            block.attn.embed_positions = torch.cat([angles.sin(), angles.cos()], dim=1)
    else:
        d = model.config.head_dim
        model.model.rotary_emb.inv_freq = 1.0 / 10000.0 ** (torch.arange(0, d, 2).double() / d)


def tiny_lens(kind: str, backend: str = "auto", dtype: torch.dtype = torch.float64, **options) -> Lens:
    hf, tok = tiny_hf(kind, dtype, **options), tokenizer()
    return Lens.from_hf(hf, tok, backend=backend, name=f"tiny-{kind}")
