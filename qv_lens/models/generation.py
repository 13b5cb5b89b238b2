"""Continuations of token rows, two ways that agree: with Hugging Face's cache, or plainly on any logits.

Greedy, or sampled from the `top_k` likeliest tokens with a generator of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Draw from the `top_k` likeliest tokens. Every row has a generator of its own, seeded by `seed` and the row: a text's
    draws depend on no other text, and are the same before and after an edit."""

    top_k: int
    seed: int


#: whether a row's new tokens are all that is wanted of it
Enough = Callable[[Sequence[int]], bool]


def cached(
    hf: Any,
    rows: Sequence[Sequence[int]],
    steps: int,
    eos: int | None,
    sampling: Sampling | None = None,
    enough: Enough | None = None,
) -> list[list[int]]:
    """On the Hugging Face model with its key-value cache; rows are padded on the left and masked."""
    longest, fill, device = max(map(len, rows)), eos or 0, next(hf.parameters()).device
    ids = torch.tensor([[fill] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    options: dict[str, Any] = (
        {"do_sample": False} if sampling is None else {"logits_processor": [_drawn(sampling, rows)], "do_sample": False}
    )
    ends = [steps] * len(rows)
    if enough is not None:
        options["stopping_criteria"] = [_stopping(enough, ends, longest)]
    out = hf.generate(ids, attention_mask=mask, max_new_tokens=steps, eos_token_id=eos, pad_token_id=fill, **options)
    return [_until(row.tolist()[:end], eos) for row, end in zip(out[:, longest:], ends, strict=True)]


def plain(
    logits: Callable[..., Tensor],
    rows: Sequence[Sequence[int]],
    steps: int,
    eos: int | None,
    sampling: Sampling | None = None,
    enough: Enough | None = None,
) -> list[list[int]]:
    """One whole pass per token, for a model with interventions; `logits` takes rows of any lengths, and where prompts end."""
    grown, draw = [list(row) for row in rows], None if sampling is None else _drawn(sampling, rows)
    ends = [steps] * len(rows)
    for _ in range(steps):
        scores = logits(grown, last=[len(row) - 1 for row in rows])
        last = torch.stack([scores[i, len(row) - 1] for i, row in enumerate(grown)])
        chosen = (last if draw is None else draw(None, last)).argmax(-1).tolist()
        for row, token in zip(grown, chosen, strict=True):
            row.append(token)
        new = [row[len(start) :] for row, start in zip(grown, rows, strict=True)]
        if enough is not None:
            _mark(enough, new, ends)
        if all(eos in part or end < steps for part, end in zip(new, ends, strict=True)):
            break
    return [_until(row[len(start) :][:end], eos) for row, start, end in zip(grown, rows, ends, strict=True)]


def _mark(enough: Enough, new: Sequence[Sequence[int]], ends: list[int]) -> None:
    """Note where each row first has enough."""
    for i, part in enumerate(new):
        if len(part) < ends[i] and enough(part):
            ends[i] = len(part)


def _stopping(enough: Enough, ends: list[int], longest: int) -> Callable[..., Tensor]:
    steps = ends[0]

    def stop(ids: Tensor, _scores: Any, **_options: Any) -> Tensor:
        _mark(enough, ids[:, longest:].tolist(), ends)
        return torch.tensor([end < steps for end in ends], device=ids.device)

    return stop


def _drawn(
    sampling: Sampling, rows: Sequence[Sequence[int]]
) -> Callable[[Any, Float[Tensor, "row d_vocab"]], Float[Tensor, "row d_vocab"]]:
    """Logits -> logits whose argmax is the token drawn: sampling with generators of its own, inside a greedy loop."""
    each = [torch.Generator().manual_seed(crc32(repr((sampling.seed, *row)).encode())) for row in rows]

    def draw(_ids: Any, logits: Tensor) -> Tensor:
        best = logits.float().cpu().topk(sampling.top_k, dim=-1)
        p = best.values.softmax(-1)
        place = torch.stack([torch.multinomial(row, 1, generator=generator) for row, generator in zip(p, each, strict=True)])
        picked = best.indices.gather(1, place).to(logits.device)
        return torch.full_like(logits, -torch.inf).scatter(1, picked, 0.0)

    return draw


def _until(ids: list[int], eos: int | None) -> list[int]:
    return ids[: ids.index(eos)] if eos in ids else ids
