"""W + D without writing W: hooks that add (what the weight reads) @ D to what it gives.

    W_out  reads m                      adds at the FFN's output        b_out  adds there
    W_in, W_gate  read the normed stream, add at the pre-activations    b_in   adds there
    W_O    reads z                      adds at attention's output
    W_Q, W_K, W_V  read the normed stream, add at queries, keys, values (in front of Qwen3's q/k norm)

D may require gradients, and may be any function of such tensors: integrated gradients and the
gradient editors train through these hooks with every parameter of the model frozen. Names and
shapes are those of `Lens.parameter`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from qv_lens.errors import ConfigError
from qv_lens.models.hooks import Hook
from qv_lens.models.interventions import check_not_suppressed
from qv_lens.models.lens import Lens

#: D, or a function from what the weight reads to what is to be added (for factors or some of the
#: rows)
Added = Tensor | Callable[[Tensor], Tensor]
#: in the order of the pass: what one weight adds must be there before another reads the same point
ORDER = {
    name: i
    for i, name in enumerate(
        ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "b_in", "W_out", "b_out")
    )
}


#: what a Suppress reads of an FFN
OF_FFN = ("W_in", "W_gate", "b_in", "W_out")


def delta_hooks(lens: Lens, deltas: Mapping[tuple[int, str], Added]) -> list[Hook]:
    """Hooks for one forward pass in which the named weights are W + D. Raises `ConfigError` for an
    unknown weight, and for those of FFNs under a `Suppress`, which computes with W itself."""
    if any(name in OF_FFN for _, name in deltas):
        check_not_suppressed(lens, "Training FFN weights, and gradients of them,")
    hooks: list[Hook] = []
    for (layer, name), delta in sorted(
        deltas.items(), key=lambda item: (item[0][0], ORDER.get(item[0][1], 0))
    ):
        lens.parameter(layer, name)
        hooks += _hooks(lens, layer, name, delta)
    return hooks


def _hooks(lens: Lens, layer: int, name: str, delta: Added) -> list[Hook]:
    backend, seen = lens.backend_adapter, {}

    def keep(x: Tensor) -> None:
        seen["x"] = x.flatten(2)

    def keep_more(x: Tensor) -> None:
        seen["x"] = seen["x"] + x

    def add(y: Tensor) -> Tensor:
        moved = _apply(delta, seen["x"], y)
        return y + moved.reshape(y.shape)

    def add_normed(y: Tensor) -> Tensor:
        normed = backend.norm(
            layer, "attn" if name.startswith("W_") and name[2] in "QKV" else "ffn"
        )(seen["x"])
        return y + _apply(delta, normed, y).reshape(y.shape)

    def add_bias(y: Tensor) -> Tensor:
        return y + (delta(y) if callable(delta) else delta).to(y.dtype)

    gated = backend.gated
    pre = backend.pre_linear(layer) if gated else backend.pre(layer)
    if name == "W_out":
        return [(backend.coefficient(layer), keep), (backend.written_at(layer), add)]
    if name == "W_O":
        return [(backend.z(layer), keep), (backend.written_at(layer, "attn"), add)]
    if name in ("b_out", "b_in"):
        return [(backend.written_at(layer) if name == "b_out" else pre, add_bias)]
    if name in ("W_in", "W_gate"):
        read = [(backend.resid_pre(layer), keep)]
        if not backend.parallel:
            read.append((backend.attn_out(layer), keep_more))
        return [*read, (backend.pre(layer) if name == "W_gate" else pre, add_normed)]
    if name in ("W_Q", "W_K", "W_V"):
        return [(backend.resid_pre(layer), keep), (backend.qkv(layer, name[2]), add_normed)]
    raise ConfigError(f"No way is known to add to {name!r} in passing.")


def _apply(delta: Added, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(delta, Tensor):
        return (x.to(delta.dtype) @ delta).to(y.dtype)
    return delta(x).to(y.dtype)


def zeros_like_parameters(
    lens: Lens, names: list[tuple[int, str]]
) -> dict[tuple[int, str], Tensor]:
    """A D of zeros that asks for its gradient, in float32 or better, for each named weight."""
    weights = {name: lens.parameter(*name) for name in names}
    return {name: zero_leaf(weight, *weight.shape) for name, weight in weights.items()}


def zero_leaf(weight: Tensor, *shape: int) -> Tensor:
    """Zeros beside a weight that ask for their gradient, in float32 or better."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(shape, dtype=wide, device=weight.device, requires_grad=True)


class Tap:
    """A D that adds zeros and keeps what its weight reads; the gradient of the zeros is that of
    what the weight gives."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.read: Tensor | None = None
        self.given: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        self.read = x.detach()
        self.given = zero_leaf(x, *x.shape[:-1], self.columns)
        return self.given


def taps(lens: Lens, names: Iterable[tuple[int, str]]) -> dict[tuple[int, str], Tap]:
    """A tap for each named weight. Raises `ConfigError` for an unknown weight or a bias, which
    reads nothing."""
    made = {}
    for layer, name in names:
        weight = lens.parameter(layer, name)
        if weight.ndim != 2:
            raise ConfigError(f"{name}[{layer}] is no weight that reads something.")
        made[layer, name] = Tap(weight.shape[1])
    return made
