"""Cache keys: checksums of the weights, and all that an intervention says."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import fields, is_dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from qv_lens.neurons import NeuronSet

#: of the table in which a weight's words are added up: prime, so that the rows of a weight lie
#: askew in it
COLUMNS = 1021


def checksum(weight: Tensor) -> bytes:
    """Bytes that change with any change of the tensor's content, whatever its strides."""
    data = weight.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(data.data, digest_size=8).digest()


def digest(description: object, parts: Iterable[bytes]) -> str:
    """16 hex digits of the description and of the parts, in order."""
    hashed = hashlib.blake2b(repr(description).encode(), digest_size=8)
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()


def content(intervention: object) -> tuple[object, ...]:
    """All that an intervention says; for a set of neurons, which neurons they are. Of one that is
    not this package's nobody knows what it computes: it is never the same twice."""
    kind = type(intervention)
    if kind.__module__.split(".")[0] != "qv_lens" or not is_dataclass(intervention):
        return kind.__name__, os.urandom(8)
    pairs = ((field.name, getattr(intervention, field.name)) for field in fields(intervention))
    return kind.__name__, *((name, _plain(value)) for name, value in pairs)


def _plain(value: object) -> object:
    """A value whose repr says all of it: that of a set does not."""
    return (value.unit, value.units) if isinstance(value, NeuronSet) else value


def bit_sum(weight: Tensor) -> Tensor:
    """A weighted sum of a tensor's bits, eight bytes at a time: a write to one place changes it, and
    so do two places that change theirs. The same on every device, at the price of two passes over
    the tensor."""
    # in the order in which it lies in memory: a transposed view is not copied
    order = sorted(range(weight.ndim), key=weight.stride, reverse=True)
    data = weight.detach().permute(order).contiguous().flatten().view(torch.uint8)
    if data.storage_offset() % 8:  # a part of a larger tensor
        data = data.clone()
    words = data[: len(data) - len(data) % 8].view(torch.int64)
    # two words in the same row and column of the table are the same word
    table = words[: len(words) - len(words) % COLUMNS].view(-1, COLUMNS)
    rest = torch.cat([words[table.numel() :], data[8 * len(words) :].long()])
    parts = torch.cat([table.sum(0), table.sum(1), rest])
    return (parts * _odd_numbers(len(parts), parts.device)).sum()


def _odd_numbers(count: int, device: torch.device) -> Int[Tensor, " count"]:
    """Odd numbers that follow no line: by them a sum of integers modulo 2^64 knows its terms'
    places."""
    x = torch.arange(1, count + 1, device=device) * -7046029254386353131
    return ((x ^ (x >> 29)) * -4658895280553007687) | 1
