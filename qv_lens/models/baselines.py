"""What a unit is set to when it is taken out: zero, its mean over a set of prompts, or what it is on
another prompt.

1. zero: m' = 0.
2. mean: m' is the unit's mean over prompts, at the same position of each (or over all positions).
3. another prompt (patching): m' is what the unit is there, position by position, so that the two
   prompts need as many positions as are asked for (with 'all': equal lengths)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.errors import ConfigError, one_or_more
from qv_lens.facts.records import Fact
from qv_lens.facts.spans import Positions
from qv_lens.models.lens import Facts, Lens, as_list
from qv_lens.models.norms import at_least_float32
from qv_lens.models.units import UnitWithValue, values_in_layer
from qv_lens.trace import Rows, Trace


@dataclass(frozen=True)
class MeanOver:
    """The mean over the prompts of these facts."""

    facts: Facts
    """Facts or texts."""

    def __post_init__(self) -> None:
        # read once: a generator gives them only then
        object.__setattr__(self, "facts", tuple(as_list(self.facts)))


#: 'zero'; 'mean' over the facts asked themselves, or over others; or other prompts, one for each
#: fact
Baseline: TypeAlias = Literal["zero", "mean"] | MeanOver | Facts


def baseline_values(
    lens: Lens, rows: Rows, baseline: Baseline, positions: Positions, unit: UnitWithValue = "ffn"
) -> Float[Tensor, "layer row value"]:
    """m' (or z') of the units' values at every row, `positions` of its prompts.

    Raises `ConfigError` for an unknown baseline, for a mean over the one fact that is asked, and
    for other prompts that do not go with the facts one by one.
    """
    shape = (lens.n_layers, len(rows.prompt), values_in_layer(lens, unit))
    if isinstance(baseline, str) and baseline == "zero":
        wide = torch.promote_types(lens.dtype, torch.float32)
        return torch.zeros(1, dtype=wide, device=lens.device).expand(shape)
    if isinstance(baseline, str) and baseline == "mean":
        if len(rows.facts) < 2:
            raise ConfigError(
                "baseline='mean' is the mean over the facts given, and this is one fact: pass "
                "several, or qv.MeanOver(other_facts)."
            )
        return _mean(lens, rows.facts, positions, unit).expand(shape)
    if isinstance(baseline, MeanOver):
        return _mean(lens, baseline.facts, positions, unit).expand(shape)
    others = one_or_more(baseline)
    if isinstance(baseline, str) or not all(isinstance(each, (Fact, str)) for each in others):
        raise ConfigError(
            f"Baseline {baseline!r:.80} not found. Available: zero, mean, qv.MeanOver(facts), or a "
            "list of other prompts, a fact or text for each fact."
        )
    return _of_other_prompts(lens, rows, others, positions, unit)


def _values(trace: Trace, unit: UnitWithValue) -> Float[Tensor, "layer row value"]:
    return at_least_float32(trace.m if unit == "ffn" else trace.z)


def _mean(
    lens: Lens, facts: Facts, positions: Positions, unit: UnitWithValue
) -> Float[Tensor, "layer 1 value"]:
    return _values(lens.trace(facts, positions), unit).mean(1, keepdim=True)


def baseline_name(baseline: Baseline) -> str:
    """What results call a baseline."""
    if isinstance(baseline, str):
        return baseline
    if isinstance(baseline, MeanOver):
        return f"mean over {len(as_list(baseline.facts))} prompts"
    return "other prompts"


def _of_other_prompts(
    lens: Lens,
    rows: Rows,
    others: Sequence[Fact | str],
    positions: Positions,
    unit: UnitWithValue,
) -> Float[Tensor, "layer row value"]:
    """What each unit is on the prompt that stands beside the fact's."""
    if len(others) != len(rows.facts):
        raise ConfigError(
            f"Patching takes another prompt for each fact; there are {len(rows.facts)} facts and "
            f"{len(others)} other prompts."
        )
    if positions == "answer":  # the same answer follows
        pairs = zip(others, rows.facts, strict=True)
        others = [_with_answer(other, fact) for other, fact in pairs]
    there = lens.trace(others, positions)
    for i, fact in enumerate(rows.facts):
        wanted, given = int((rows.prompt == i).sum()), int((there.prompt == i).sum())
        if wanted != given:
            text = fact if isinstance(fact, str) else fact.text
            raise ConfigError(
                f"The prompt {there.prompts[i].text!r:.200} has {given} positions and {text!r:.200} has "
                f"{wanted}: at positions={positions!r} the two need equally many tokens."
            )
    return _values(there, unit)


def _with_answer(other: Fact | str, fact: Fact | str) -> Fact:
    assert isinstance(fact, Fact)  # a whole answer is asked of facts alone
    if isinstance(other, Fact):
        return replace(other, answer=fact.answer)
    return Fact("{}", other, fact.answer)
