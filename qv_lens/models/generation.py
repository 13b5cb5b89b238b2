"""Continuations of token rows, two ways that agree: with Hugging Face's cache, or plainly on any
logits.

1. Greedy, or sampled from the `top_k` likeliest tokens with a random generator for each row. All
   else that a checkpoint's generation_config asks for (penalties, beams, time limits) is set aside:
   it would change what "greedy" means.
2. A row ends at any of the model's end-of-text tokens (`ends_of_text`: Qwen3 has two).
3. A row also ends where it fills the context (`continued`): one rule on both ways.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Draw from the `top_k` likeliest tokens. Every row has a generator of its own, seeded by
    `seed` and the row: a text's draws depend on no other text, and are the same before and after an
    edit."""

    top_k: int
    """Samples from so many of the likeliest tokens."""
    seed: int
    """Seed of the draws."""


#: whether a row's new tokens are all that is wanted of it
Enough = Callable[[Sequence[int]], bool]
#: rows and a number of tokens -> each row's new tokens
Step = Callable[[list[Sequence[int]], int], list[list[int]]]


def ends_of_text(tokenizer: Any, d_vocab: int, hf: Any = None) -> frozenset[int]:
    """Every token that ends a text: the tokenizer's, and those of the checkpoint's
    generation_config, those outside the vocabulary left out."""
    configured = getattr(getattr(hf, "generation_config", None), "eos_token_id", None)
    several = configured if isinstance(configured, (list, tuple)) else [configured]
    ends = [tokenizer.eos_token_id, *several]
    return frozenset(token for token in ends if isinstance(token, int) and 0 <= token < d_vocab)


def continued(
    step: Step,
    rows: Sequence[Sequence[int]],
    tokens: int,
    context: int,
    batch_size: int,
    of_one_length: bool = False,
) -> list[list[int]]:
    """New tokens of each row, by `step` in batches, where asked of rows `of_one_length`. A row ends
    where it fills the `context`; a warning says so."""
    room = [min(tokens, context - len(row)) for row in rows]
    out: dict[int, list[int]] = {i: [] for i in range(len(rows))}
    together: dict[tuple[int, int], list[int]] = {}
    for i, (row, count) in enumerate(zip(rows, room, strict=True)):
        if count > 0:
            together.setdefault((count, len(row) if of_one_length else 0), []).append(i)
    for (steps, _length), alike in sorted(together.items()):
        for at in range(0, len(alike), batch_size):
            chunk = alike[at : at + batch_size]
            out.update(zip(chunk, step([rows[i] for i in chunk], steps), strict=True))
    cut = sum(len(out[i]) == count < tokens for i, count in enumerate(room))
    if cut:
        warnings.warn(
            f"{cut} of {len(rows)} continuations end where they fill the model's context of "
            f"{context} tokens. Shorten the prompts to read more.",
            stacklevel=3,
        )
    return [out[i] for i in range(len(rows))]


def following(
    decode: Callable[[Sequence[int]], str], row: Sequence[int], new: Sequence[int]
) -> str:
    """The text of new tokens as it follows that of the row: a tokenizer that drops the blank in
    front of a text would drop theirs."""
    before, whole = decode(row), decode([*row, *new])
    return whole[len(before) :] if whole.startswith(before) else decode(new)


def cached(
    hf: Any,
    rows: Sequence[Sequence[int]],
    steps: int,
    eos: frozenset[int],
    sampling: Sampling | None = None,
    enough: Enough | None = None,
) -> list[list[int]]:
    """On a Hugging Face model with its key-value cache; rows are padded on the left and masked."""
    longest = max(map(len, rows))
    fill = min(eos, default=0)
    device = next(hf.parameters()).device
    ids = torch.tensor([[fill] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device
    )
    options: dict[str, Any] = {"eos_token_id": sorted(eos) or None, "pad_token_id": fill}
    ends = [steps] * len(rows)
    if sampling is not None:
        options["logits_processor"] = [_drawn(sampling, rows)]
    if enough is not None:
        options["stopping_criteria"] = [_stopping(enough, ends, longest)]
    with own_settings_aside(hf):
        out = hf.generate(
            ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, **options
        )
    return [
        _until(row.tolist()[:end], eos) for row, end in zip(out[:, longest:], ends, strict=True)
    ]


@contextmanager
def own_settings_aside(hf: Any) -> Iterator[Any]:
    """The model without its own generation_config, which the block receives: `generate` would take
    from it whatever a call does not set."""
    from transformers import GenerationConfig

    own = hf.generation_config
    hf.generation_config = GenerationConfig()
    try:
        yield own
    finally:
        hf.generation_config = own


def plain(
    logits: Callable[..., Tensor],
    rows: Sequence[Sequence[int]],
    steps: int,
    eos: frozenset[int],
    sampling: Sampling | None = None,
    enough: Enough | None = None,
) -> list[list[int]]:
    """One whole pass per token, for a model with interventions; `logits` takes rows of any lengths,
    and where prompts end."""
    grown = [list(row) for row in rows]
    draw = None if sampling is None else _drawn(sampling, rows)
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
        if all(
            not eos.isdisjoint(part) or end < steps for part, end in zip(new, ends, strict=True)
        ):
            break
    return [
        _until(row[len(start) :][:end], eos)
        for row, start, end in zip(grown, rows, ends, strict=True)
    ]


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
    """Logits -> logits whose argmax is the token drawn: sampling with generators of its own, inside
    a greedy loop."""
    each = [
        torch.Generator().manual_seed(crc32(repr((sampling.seed, *row)).encode())) for row in rows
    ]

    def draw(_ids: Any, logits: Tensor) -> Tensor:
        best = logits.float().cpu().topk(sampling.top_k, dim=-1)
        p = best.values.softmax(-1)
        place = torch.stack(
            [
                torch.multinomial(row, 1, generator=generator)
                for row, generator in zip(p, each, strict=True)
            ]
        )
        picked = best.indices.gather(1, place).to(logits.device)
        return torch.full_like(logits, -torch.inf).scatter(1, picked, 0.0)

    return draw


def _until(ids: list[int], eos: frozenset[int]) -> list[int]:
    """The tokens before the first end of text."""
    return next((ids[:i] for i, token in enumerate(ids) if token in eos), ids)
