"""Value importance (ACE, Eq. 9): which neurons, channels and heads raise the log-probability of the
answer.

1. A unit writes v_k = m_k * row_k into the stream (`units`).
2. I(v_k) for all of them in closed form (`setting`, `log_sums`); attention's base is the stream
   before it.
3. `topk` finds the same k best units from few exact scores (`scores`).
4. The best of each prompt, set or category are ranked into a NeuronSet (`ranking`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.attribution.grouping import Over, check_over
from qv_lens.attribution.moments import TOLERANCE
from qv_lens.attribution.projection import NormMode
from qv_lens.attribution.ranking import check_top, grouped, ranked
from qv_lens.attribution.scores import certified_top, scored
from qv_lens.attribution.setting import (
    METHODS,
    Base,
    Method,
    Setting,
    check_moments,
    setting,
)
from qv_lens.attribution.units import AT_POSITIONS, UNITS, Unit, every_unit
from qv_lens.attribution.wanted import Target
from qv_lens.errors import ConfigError, unknown
from qv_lens.facts.spans import Positions
from qv_lens.models.lens import Facts, Lens, check_lens
from qv_lens.neurons import NeuronSet
from qv_lens.trace import Trace


@torch.no_grad()
def value_neurons(
    lens: Lens,
    facts: Facts | Trace,
    top: int | None = 300,
    *,
    unit: Unit = "ffn",
    over: Over = "prompt",
    norm: NormMode = "frozen",
    base: Base = "mid",
    method: Method | None = None,
    target: Target = "answer",
    positions: Positions = "last",
    memory_budget: int | None = None,
) -> NeuronSet:
    """The `top` units by I (Eq. 9), of each prompt or summed `over` a set or its categories;
    `top=None` keeps all.

    `unit`: 'ffn', 'attn_channel' (a row of W_O), 'attn_neuron' (channel and position), 'head',
    'head_position'.
    `norm`: the final norm's divisor as it was in the pass ('frozen', as released), recomputed for
    every vector ('full'), or none. `base`: the stream to which a unit is added, after attention
    ('mid') or before it ('pre'); 'loo_final' takes it out of the last stream instead.
    `method`: 'exact' scores every unit; 'topk' only as many as its certificate needs (the same
    result, `settings` say how many); 'moments' scores every FFN neuron or channel to 1e-6 beside
    float32's rounding (`settings` give the share that had to be done exactly);
    'first_order' gives the upper bound J instead of I: a ranking, not the score. None: 'topk' for
    the best k where its bound holds, else 'exact'.
    `target`: 'answer', 'predicted', 'sequence', a token id, or a pair for a contrast (see
    `wanted`).
    `positions`: where to look; with 'all', every position is ranked apart; with
    `over='positions'` their sum is ranked.
    `memory_budget`: bytes for the largest intermediate (default: half of what is free). Scores are
    in nats. `coefficient` is m_k, z_k or a_hp (its mean where rows are added up; none for whole
    heads).
    Raises `FactError` for prompts or answers that do not tokenise, `ConfigError` for options that
    do not exist or do not go together, and for units by position of heads that are intervened on.

    >>> import qv_lens as qv
    >>> lens = qv.load("toy-gptj")
    >>> fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    >>> qv.value_neurons(lens, fact, 3).units  # (layer, neuron), best first
    [(2, 297), (2, 91), (2, 159)]
    """
    check_lens(lens)
    _check(unit, over, method, top, target, base, norm)
    task = setting(
        lens,
        facts,
        norm=norm,
        base=base,
        target=target,
        positions=positions,
        attention=unit in AT_POSITIONS,
        memory_budget=memory_budget,
    )
    return best_units(task, top, unit, over, method)


def best_units(
    task: Setting,
    top: int | None,
    unit: Unit = "ffn",
    over: Over = "prompt",
    method: Method | None = None,
) -> NeuronSet:
    """`value_neurons` for a `Setting`. Raises `ConfigError` for attention's units at several
    positions."""
    if method is None:
        method = "topk" if top is not None and _bounded(task, unit) else "exact"
    if unit in AT_POSITIONS and (
        over != "prompt" or len(task.trace.prompt) != len(task.trace.prompts)
    ):
        raise ConfigError(
            f"unit={unit!r} ranks the positions that one token of one prompt reads: use "
            "over='prompt', one position and a target of one token."
        )
    settings: dict[str, Any] = {"method": method}
    if method == "topk" and top is not None:
        scores, settings["scored"] = certified_top(task, unit, top, over)
    else:
        scores, settings = every_score(task, unit, over, method)
    return best_of(task, scores, top, unit, over, settings)


def every_score(
    task: Setting, unit: Unit = "ffn", over: Over = "prompt", method: Method | None = None
) -> tuple[Float[Tensor, "layer group unit"], dict[str, Any]]:
    """I of every unit, summed by group, and how it came about. `method=None`: the fastest that
    holds here."""
    method = for_every_unit(task, unit) if method is None else method
    groups = task.grouping.groups(over)
    layers = list(scored(task, unit, method))
    scores = torch.stack([grouped(layer.score, groups) for layer in layers])
    settings: dict[str, Any] = {"method": method}
    if method == "moments":
        share = sum(layer.fallback for layer in layers) / sum(
            layer.score.numel() for layer in layers
        )
        settings |= {"tolerance": TOLERANCE, "fallback": share}
    return scores, settings


def best_of(
    task: Setting,
    scores: Float[Tensor, "layer group unit"],
    top: int | None,
    unit: Unit,
    over: Over,
    settings: dict[str, Any],
) -> NeuronSet:
    """The best units of each group by these scores."""
    groups = task.grouping.groups(over)
    m = torch.stack(
        [grouped(units.coefficients, groups) for units in every_unit(task.lens, task.trace, unit)]
    )
    last = task.trace.positions.tolist() if unit in AT_POSITIONS else None
    return ranked(
        task.grouping,
        unit,
        scores,
        m / torch.bincount(groups)[:, None].to(m),
        top,
        {**task.attrs, "unit": unit, "over": over, **settings},
        over,
        last,
    )


def _bounded(task: Setting, unit: Unit) -> bool:
    """Whether I <= J holds of the unit, so that few exact scores certify the best."""
    heads = unit in ("head", "head_position")
    other = task.base == "loo_final" or task.against is not None
    return not (heads or other or task.readout.cap is not None)


def for_every_unit(task: Setting, unit: Unit = "ffn") -> Method:
    """The fastest method that scores every unit: 'moments' where it holds."""
    return "moments" if _bounded(task, unit) and task.readout.mode != "full" else "exact"


def for_every_neuron(lens: Lens) -> Method:
    """The fastest method that scores every FFN neuron of a model by Eq. 9: 'moments', or 'exact'
    where logits are soft-capped."""
    return "moments" if lens.backend_adapter.logit_cap is None else "exact"


def _check(
    unit: str, over: str, method: str | None, top: int | None, target: Target, base: str, norm: str
) -> None:
    if unit not in UNITS:
        raise unknown("Unit", unit, UNITS)
    check_over(over)
    check_top(top)
    if method is None:
        return
    if method not in METHODS:
        raise unknown("Value method", method, METHODS)
    if method == "topk" and top is None:
        raise ConfigError(
            "method='topk' finds the best k: give top=, or use method='exact' for all neurons."
        )
    if method != "exact" and base == "loo_final":
        raise ConfigError(
            f"method={method!r} holds for base 'mid' and 'pre'; base 'loo_final' needs "
            "method='exact'."
        )
    if method != "exact" and (unit in ("head", "head_position") or isinstance(target, tuple)):
        raise ConfigError(
            "Heads and contrasts of two tokens are few or closed form: use method='exact'."
        )
    check_moments(method, norm)
