"""The norms and the soft cap of a decoder as numbers, apart from any module."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """c tanh(logits / c); the logits themselves without a cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def at_least_float32(x: Tensor) -> Tensor:
    """bf16 and fp16 as float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def dtype_name(dtype: torch.dtype) -> str:
    """'float32', as people and options name it."""
    return str(dtype).removeprefix("torch.")


def enlarged(logp: Float[Tensor, "*row"]) -> Float[Tensor, "*row"]:
    """By how much an answer's log p is multiplied before it is differentiated, and the gradient
    divided after: 1 / (1 - p), which is how small its gradient is at the logits, as a power of two
    up to 2^15. On its way down through float16 the gradient of an answer as sure as 1 - 1e-6 would
    be rounded to zero."""
    doubt = -torch.expm1(logp.detach())
    return torch.exp2((1 / doubt.clamp(2.0**-15, 1)).log2().floor())


class Norm:
    """LayerNorm or RMSNorm as numbers: gain, bias, eps; `center` is the identity for RMSNorm.
    `none`: no norm at all. Computed in float32 or better, as in every model: the square of a stream
    above 256 is infinite in float16."""

    def __init__(
        self, gain: Tensor, bias: Tensor | None, eps: float, rms: bool, none: bool = False
    ) -> None:
        self.gain, self.bias, self.eps, self.rms, self.none = gain, bias, eps, rms, none

    def center(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return x if self.rms or self.none else x - x.mean(-1, keepdim=True)

    def scale(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
        """sigma: what the centred vector is divided by."""
        x = at_least_float32(x)
        if self.none:
            return torch.ones_like(x[..., :1])
        return (self.center(x).pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def __call__(
        self, x: Float[Tensor, "*batch d"], scale: Tensor | None = None
    ) -> Float[Tensor, "*batch d"]:
        """The normed vector; `scale` freezes sigma instead of taking the vector's own."""
        y = at_least_float32(x)
        y = self.center(y) / (self.scale(y) if scale is None else scale) * self.gain.to(y.dtype)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).to(x.dtype)

    def gradient(self, h: Float[Tensor, "t d"], key: Float[Tensor, "t d"]) -> Float[Tensor, "t d"]:
        """grad_h of key . norm(h): (gain * key - h_c (h_c . gain * key) / (d sigma^2)) / sigma,
        centred for LayerNorm."""
        if self.none:
            return key
        k, h_c, sigma = self.gain.to(h.dtype) * key, self.center(h), self.scale(h)
        return (
            self.center(k - h_c * (h_c * k).sum(1, keepdim=True) / (h.shape[1] * sigma.square()))
            / sigma
        )
