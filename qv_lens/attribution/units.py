"""What the units of a layer write into the stream: v_k = m_k * row_k.

FFN neuron k (row k of W_out), attention channel k (row k of W_O, z_k as coefficient), attention
neuron (the channel's share from one position, a_hp val_hpc), or a head's vector (summed over
positions, or from one)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from qv_lens.attribution.setting import Kind
from qv_lens.errors import ConfigError
from qv_lens.models.interventions import check_attention_as_made
from qv_lens.models.lens import Lens
from qv_lens.models.norms import at_least_float32
from qv_lens.trace import Trace

Unit = Literal["ffn", "attn_channel", "attn_neuron", "head", "head_position"]

UNITS: tuple[Unit, ...] = ("ffn", "attn_channel", "attn_neuron", "head", "head_position")

AT_POSITIONS = ("attn_neuron", "head_position")


@dataclass(frozen=True)
class Units:
    """The units of one layer: problem q (row, and position where units have one) has coefficient
    m_qk on vector k."""

    kind: Kind
    """Which sublayer writes them."""
    coefficients: Float[Tensor, "row unit"]
    """m, as the model computes it."""
    vectors: Tensor
    """[unit, d_model], shared by all rows; for heads [row, unit, d_model]."""
    keys: int = 1
    """Positions in the unit axis: it is (key, unit)."""
    scale: Float[Tensor, "row 1"] | None = None
    """1 / sigma of the norm that follows the sublayer."""

    @property
    def m(self) -> Float[Tensor, "row unit"]:
        """What multiplies the vectors in the stream."""
        return self.coefficients if self.scale is None else self.coefficients * self.scale


def every_unit(lens: Lens, trace: Trace, unit: Unit) -> Iterator[Units]:
    """The units of each layer."""
    for layer in range(lens.n_layers):
        yield units_of(lens, trace, unit, layer)


def units_of(lens: Lens, trace: Trace, unit: Unit, layer: int) -> Units:
    """The units of one layer: their coefficients at every row, and what they write into the
    stream."""
    backend = lens.backend_adapter
    if unit == "ffn":
        scale = trace.scale_of("ffn", layer)
        return Units(
            "ffn", at_least_float32(trace.m[layer]), backend.value_vectors(layer), scale=scale
        )
    w_o, heads = backend.value_vectors(layer, "attn"), backend.cfg.n_heads
    scale = trace.scale_of("attn", layer)
    if unit == "attn_channel":
        return Units("attn", at_least_float32(trace.z[layer]), w_o, scale=scale)
    by_head = rearrange(at_least_float32(w_o), "(h c) d -> h c d", h=heads)
    factor = 1.0 if scale is None else scale[:, :, None]
    if unit == "head":
        z = rearrange(at_least_float32(trace.z[layer]), "r (h c) -> r h c", h=heads)
        none = torch.full(z.shape[:2], torch.nan, dtype=z.dtype, device=z.device)
        return Units("head", none, factor * einsum(z, by_head, "r h c, h c d -> r h d"))
    a, z = values_by_head(lens, trace, layer)
    keys = a.shape[-1]
    if unit == "attn_neuron":
        return Units("attn", rearrange(z, "r h c k -> r (k h c)"), w_o, keys, scale)
    vectors = einsum(z, by_head, "r h c k, h c d -> r k h d")
    return Units(
        "head",
        rearrange(a, "r h k -> r (k h)"),
        factor * rearrange(vectors, "r k h d -> r (k h) d"),
        keys,
    )


def values_by_head(
    lens: Lens, trace: Trace, layer: int
) -> tuple[Float[Tensor, "row head key"], Float[Tensor, "row head channel key"]]:
    """a_hp and a_hp val_hpc: under grouped-query attention a query head reads the value head h //
    group. Raises `ConfigError` without patterns, and while heads or channels of the layer are
    intervened on."""
    backend = lens.backend_adapter
    check_attention_as_made(lens, [layer], "Scores of attention by position")
    if trace.pattern is None or trace.v is None:
        raise ConfigError(
            "These units need attention patterns: trace the facts with lens.trace(facts, "
            "attention=True)."
        )
    group = backend.cfg.n_heads // backend.n_kv_heads
    val = rearrange(at_least_float32(trace.v[layer]), "p (h c) k -> p h c k", h=backend.n_kv_heads)
    val = repeat(val, "p h c k -> p (h group) c k", group=group)[trace.prompt]
    a = at_least_float32(trace.pattern[layer])
    return a, a[:, :, None] * val
