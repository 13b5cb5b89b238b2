"""Trace: what one forward pass of a batch of prompts computed at chosen positions, as plain
tensors."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from qv_lens.errors import ConfigError
from qv_lens.facts.records import Fact
from qv_lens.facts.spans import Prompt


@dataclass(frozen=True)
class Setup:
    """What a trace was taken on: the model's fingerprint, the patches applied, a number for each
    weight, the interventions, the user's hooks."""

    fingerprint: str
    """The model's fingerprint."""
    patches: tuple[object, ...]
    """The patches applied."""
    bits: tuple[int, ...]
    """A sum of each weight's bits (`identity.bit_sum`)."""
    interventions: tuple[object, ...]
    """The interventions in force."""
    hooks: tuple[object, ...] = ()
    """The user's own hooks."""

    def weighs_as(self, other: Setup) -> bool:
        """Whether the weights are the same, as far as is known here."""
        same = len(self.patches) == len(other.patches) and all(
            a is b for a, b in zip(self.patches, other.patches, strict=True)
        )
        return self.fingerprint == other.fingerprint and same and self.bits == other.bits

    def check(self, now: Setup, name: str) -> None:
        """Raise `ConfigError` where the model of this name now has other weights, interventions or
        hooks."""
        if not self.weighs_as(now):
            raise ConfigError(
                f"This trace was taken on other weights than {name} has now (another model, patches "
                "applied or taken back since, W_out written to): take it again with lens.trace."
            )
        if self.hooks != now.hooks:
            raise ConfigError(
                "This trace was taken with other hooks on the model than are there now "
                f"({len(self.hooks)} then, {len(now.hooks)} now): take it again with lens.trace."
            )
        if self.interventions != now.interventions:
            raise ConfigError(
                f"This trace was taken under {_in_words(self.interventions)}; in force now: "
                f"{_in_words(now.interventions)}. Take it again with lens.trace."
            )


def _in_words(interventions: tuple[object, ...]) -> str:
    return ", ".join(f"{each!r:.100}" for each in interventions) or "no intervention"


@dataclass(frozen=True)
class Rows:
    """Positions of prompts. A row is one position of one prompt: `prompt[row]` says which prompt,
    `positions[row]` which position. With one position per prompt (the usual case) rows and prompts
    are the same."""

    facts: tuple[Fact | str, ...]
    """What was asked."""
    prompts: tuple[Prompt, ...]
    """As tokens."""
    prompt: Int[Tensor, " row"]
    """Of which prompt a row is."""
    positions: Int[Tensor, " row"]
    """At which token of it."""

    def rows_of(self, prompt: int) -> dict[int, int]:
        """The rows of one prompt, by position."""
        rows = (self.prompt == prompt).nonzero()[:, 0].tolist()
        return {int(self.positions[row]): row for row in rows}


@dataclass(frozen=True, repr=False)
class Trace(Rows):
    """One captured forward pass, at its rows.

    `resid` holds the stream before each layer and, last, the stream the final norm reads; for layer
    l: resid[l + 1] = resid[l] + attn[l] + ffn[l], ffn[l] = m[l] @ W_out[l] + b_out[l], and attn[l]
    = z[l] @ W_O[l] + b_O[l]. Where a norm follows the sublayers, `attn` and `ffn` are what it
    leaves of them: those sums times gain * `scale` (1 / sigma of the norm, attention's and the
    FFN's). `pattern` and `v` (attention weights of each row, value vectors of each prompt and key
    position) are there only if asked for: z[l, row, head] = v[l, prompt, head // group's channels]
    @ pattern[l, row, head]."""

    m: Float[Tensor, "layer row d_mlp"]
    """Coefficients of the FFN neurons."""
    z: Float[Tensor, "layer row head_channel"]
    """Attention's channels, before W_O."""
    attn: Float[Tensor, "layer row d_model"]
    """What attention adds to the stream."""
    ffn: Float[Tensor, "layer row d_model"]
    """What the FFN adds to the stream."""
    resid: Float[Tensor, "layer_and_final row d_model"]
    """The stream before each layer and, last, before the final norm."""
    logits: Float[Tensor, "row d_vocab"]
    """The next token, before softmax."""
    pattern: Float[Tensor, "layer row head key"] | None = None
    """Attention weights (only if asked for)."""
    v: Float[Tensor, "layer prompt kv_head_channel key"] | None = None
    """Value vectors (only if asked for)."""
    setup: Setup | None = None
    """What it was taken on."""
    scale: tuple[Float[Tensor, "layer row 1"], Float[Tensor, "layer row 1"]] | None = None
    """1 / sigma of the norms that follow attention and FFN (only where there are such)."""

    def __repr__(self) -> str:
        layers, rows, neurons = self.m.shape
        prompts = len(self.prompts)
        return (
            f"Trace({prompts} prompt{'s' * (prompts != 1)}, {rows} row{'s' * (rows != 1)}, {layers} "
            f"layers of {neurons} neurons: m, z, attn, ffn, resid, logits)"
        )

    def scale_of(self, sublayer: str, layer: int) -> Float[Tensor, "row 1"] | None:
        """1 / sigma of the norm after a sublayer at each row; None where none follows."""
        return None if self.scale is None else self.scale[sublayer == "ffn"][layer]

    @property
    def mid(self) -> Float[Tensor, "layer row d_model"]:
        """h + A: the stream after attention (what a sequential FFN reads; defined in GPT-J too,
        where it does not)."""
        return self.resid[:-1] + self.attn

    @property
    def final(self) -> Float[Tensor, "row d_model"]:
        """h^L: what the final norm reads."""
        return self.resid[-1]
