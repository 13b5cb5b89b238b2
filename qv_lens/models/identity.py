"""Cache keys: checksums of the weights, and all that an intervention says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.neurons import NeuronSet


def checksum(weight: Tensor) -> bytes:
    """Bytes that change with any change of the tensor's content, whatever its strides."""
    data = weight.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(data.data, digest_size=8).digest()


def digest(said: object, parts: Iterable[bytes]) -> str:
    """16 hex digits of what is said and of the parts, in order."""
    found = hashlib.blake2b(repr(said).encode(), digest_size=8)
    for part in parts:
        found.update(part)
    return found.hexdigest()


def content(intervention: object) -> tuple[object, ...]:
    """All that an intervention says; for a set of neurons, which neurons they are."""
    said = []
    for name in (
        [f.name for f in fields(intervention)]
        if is_dataclass(intervention)
        else sorted(vars(intervention))
    ):
        value = getattr(intervention, name)
        said.append((name, _plain(value)))
    return type(intervention).__name__, *said


def _plain(value: object) -> object:
    """A value whose repr says all of it: that of a large tensor, or of a set, does not."""
    if isinstance(value, NeuronSet):
        return value.unit, value.units
    if isinstance(value, Tensor):
        return checksum(value)
    if isinstance(value, Mapping):
        return [(key, _plain(inner)) for key, inner in value.items()]
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def weighted_sum(w_out: Float[Tensor, "d_mlp d_model"]) -> Tensor:
    """The sum of a matrix's rows, each times a weight of its own: nearly any write to the matrix
    changes this sum, at the price of one pass over the matrix."""
    rows = torch.linspace(1, 2, len(w_out), dtype=torch.float64, device=w_out.device)
    return rows @ w_out.sum(1, dtype=torch.float64)


def bit_sum(weight: Tensor) -> Tensor:
    """The sum of a tensor's bits, eight bytes at a time: any write to one place changes this sum,
    on every device, at the price of one pass over the tensor."""
    # in the order in which it lies in memory: a transposed view is not copied
    order = sorted(range(weight.ndim), key=weight.stride, reverse=True)
    data = weight.detach().permute(order).contiguous().flatten().view(torch.uint8)
    if data.storage_offset() % 8:  # a part of a larger tensor
        data = data.clone()
    whole = len(data) - len(data) % 8
    return data[:whole].view(torch.int64).sum() + data[whole:].sum()
