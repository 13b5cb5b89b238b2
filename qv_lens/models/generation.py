"""Greedy continuations of token rows, two ways that agree: with Hugging Face's cache, or plainly on any logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def cached(hf: Any, rows: Sequence[Sequence[int]], steps: int, eos: int | None) -> list[list[int]]:
    """On the Hugging Face model with its key-value cache; rows are padded on the left and masked."""
    longest, fill, device = max(map(len, rows)), eos or 0, next(hf.parameters()).device
    ids = torch.tensor([[fill] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    out = hf.generate(ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, eos_token_id=eos, pad_token_id=fill)
    return [_until(row.tolist(), eos) for row in out[:, longest:]]


def plain(
    logits: Callable[[Sequence[Sequence[int]]], Tensor], rows: Sequence[Sequence[int]], steps: int, eos: int | None
) -> list[list[int]]:
    """One whole pass per token, for a model with interventions; `logits` takes rows of any lengths."""
    grown = [list(row) for row in rows]
    for _ in range(steps):
        scores = logits(grown)
        for i, row in enumerate(grown):
            row.append(int(scores[i, len(row) - 1].argmax()))
        if all(eos in row[len(start) :] for row, start in zip(grown, rows, strict=True)):
            break
    return [_until(row[len(start) :], eos) for row, start in zip(grown, rows, strict=True)]


def _until(ids: list[int], eos: int | None) -> list[int]:
    return ids[: ids.index(eos)] if eos in ids else ids
