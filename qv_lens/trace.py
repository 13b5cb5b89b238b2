"""Trace: what one forward pass of a batch of prompts computed at one position of each prompt, as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from qv_lens.facts.records import Fact
from qv_lens.facts.spans import Prompt


@dataclass(frozen=True)
class Trace:
    """One captured forward pass. The prompt axis follows `facts`; layers are stacked in front.

    `resid` holds the stream before each layer and, last, the stream the final norm reads; for layer l:
    resid[l + 1] = resid[l] + attn[l] + ffn[l], ffn[l] = m[l] @ W_out[l] + b_out[l], and attn[l] = z[l] @ W_O[l].
    """

    facts: tuple[Fact | str, ...]
    prompts: tuple[Prompt, ...]
    positions: Int[Tensor, " prompt"]
    m: Float[Tensor, "layer prompt d_mlp"]
    z: Float[Tensor, "layer prompt head_channel"]
    attn: Float[Tensor, "layer prompt d_model"]
    ffn: Float[Tensor, "layer prompt d_model"]
    resid: Float[Tensor, "layer_and_final prompt d_model"]
    logits: Float[Tensor, "prompt d_vocab"]

    @property
    def mid(self) -> Float[Tensor, "layer prompt d_model"]:
        """h + A: the stream after attention (what a sequential FFN reads; defined in GPT-J too, where it does not)."""
        return self.resid[:-1] + self.attn

    @property
    def final(self) -> Float[Tensor, "prompt d_model"]:
        """h^L: what the final norm reads."""
        return self.resid[-1]
