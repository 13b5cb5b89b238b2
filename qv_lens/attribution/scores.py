"""Eq. 9 of the units of all layers, or of the k best with a certificate.

1. `scored`: I of every unit, layer by layer.
2. `certified_top`: I <= J (Jensen), so units are scored exactly in decreasing order of J until no J
   left reaches the k-th best score. Sums of I are bounded by sums of J, so this holds for a set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat as repeat_forever

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from qv_lens.attribution.grouping import Over
from qv_lens.attribution.ranking import check_numbers, grouped
from qv_lens.attribution.setting import Bases, Kind, Method, Setting
from qv_lens.attribution.units import AT_POSITIONS, Unit, units_of
from qv_lens.progress import progress_bar

#: by how much a bound must fall short before it ends the search: covers rounding in float32
SLACK = 1e-5


@dataclass(frozen=True)
class LayerScores:
    """I (or J) of every unit of a layer, and how many pairs `moments` did exactly."""

    score: Float[Tensor, "row unit"]
    """I of every unit."""
    fallback: int = 0
    """How many `moments` did exactly."""


def scored(
    task: Setting,
    unit: Unit = "ffn",
    method: Method = "exact",
    wanted: Bool[Tensor, "layer row unit"] | None = None,
) -> Iterator[LayerScores]:
    """The scores of every layer; where `wanted` is given, of these units (all others -inf)."""
    layers = progress_bar(range(task.lens.n_layers), of=f"{unit} scores", unit="layer")
    bases: Iterator[Bases | None] = repeat_forever(None)
    if unit not in ("head", "head_position"):
        kind: Kind = "ffn" if unit == "ffn" else "attn"
        bases = task.bases(kind, mean=method == "first_order")
    for layer, base in zip(layers, bases, strict=False):
        some = None if wanted is None else wanted[layer]
        if some is not None and not some.any():
            yield LayerScores(
                torch.full(
                    some.shape, -torch.inf, dtype=task.readout.U.dtype, device=task.readout.U.device
                )
            )
            continue
        units = units_of(task.lens, task.trace, unit, layer)
        if units.kind == "head":
            score, fallback = task.increase_of_many(layer, "head", units.vectors), 0
        else:
            rows = len(units.m)
            split = {"k": units.keys, "r": rows}
            of = torch.arange(rows, device=units.m.device).repeat_interleave(units.keys)
            m = rearrange(units.m, "r (k u) -> (r k) u", **split)
            mask = None if some is None else rearrange(some, "r (k u) -> (r k) u", **split)
            score, fallback = task.increase_of_units(
                layer, units.kind, m, units.vectors, of, method, mask, base
            )
            score = rearrange(score, "(r k) u -> r (k u)", **split)
        if unit in AT_POSITIONS:
            score = score.masked_fill(
                _padded(task, score.shape[1] // units.keys, units.keys), -torch.inf
            )
        yield LayerScores(score if some is None else score.masked_fill(~some, -torch.inf), fallback)


def _padded(task: Setting, width: int, keys: int) -> Bool[Tensor, "row key_unit"]:
    """Units at positions that a shorter prompt of the batch does not have."""
    key = torch.arange(keys, device=task.trace.positions.device).repeat_interleave(width)
    return key > task.trace.positions[:, None]


def certified_top(
    task: Setting, unit: Unit, k: int, over: Over
) -> tuple[Float[Tensor, "layer group unit"], list[int]]:
    """Exact scores of the k best units of each group, -inf for all others, and how many were
    scored.

    1. J >= I for every unit, summed over the rows of a group.
    2. Units are scored exactly in order of decreasing J, all groups side by side (a vector wanted
       by several is multiplied with the unembedding once), until no J left reaches the k-th best
       exact score of its group.
    """
    groups = task.grouping.groups(over)
    bounds = torch.stack(
        [grouped(layer.score, groups) for layer in scored(task, unit, "first_order")]
    )
    check_numbers(bounds)
    layers, n, _ = bounds.shape
    J, order = rearrange(bounds, "l g u -> g (l u)").sort(dim=1, descending=True)
    best = torch.full_like(J, -torch.inf)  # by unit, not by rank
    scored_count, wave = [0] * n, k + max(8, k // 16)
    while open_groups := [g for g in range(n) if not _certified(J[g], best[g], scored_count[g], k)]:
        wanted = torch.zeros_like(best, dtype=torch.bool)
        for g in open_groups:
            wanted[g, order[g, scored_count[g] : scored_count[g] + wave]] = True
            scored_count[g] = min(scored_count[g] + wave, J.shape[1])
        mask = rearrange(wanted, "g (l u) -> l g u", l=layers)
        exact = [
            grouped(layer.score, groups) for layer in scored(task, unit, "exact", mask[:, groups])
        ]
        best = torch.where(wanted, rearrange(torch.stack(exact), "l g u -> g (l u)"), best)
        wave = max(8, k // 8)
    return rearrange(best, "g (l u) -> l g u", l=layers), scored_count


def _certified(J: Tensor, exact: Tensor, scored_count: int, k: int) -> bool:
    """Whether no unit after the first `scored_count` can be among the k best (-inf: a unit that does not
    exist)."""
    real = int((-torch.inf < J).sum())
    k = min(k, real)
    if scored_count >= real:
        return True
    if scored_count < k:
        return False
    next_best = float(J[scored_count])
    return next_best + SLACK * max(1.0, abs(next_best)) < float(exact.topk(k).values[-1])
