"""Value importance (ACE, Eq. 9): which neurons, channels and heads raise the log-probability of the
answer.

1. A unit writes v_k = m_k * row_k into the stream: FFN neuron k (row k of W_out), attention channel
   k (row k of W_O, z_k as coefficient), attention neuron (the channel's share from one position,
   a_hp val_hpc), or a head's vector (summed over positions, or from one).
2. I(v_k) for all of them in closed form (`setting`, `engine`); attention's base is the stream
   before it.
3. `topk` finds the same k best units from few exact scores: I <= J (Jensen), so units are scored
   exactly in decreasing order of J until no J left reaches the k-th best score. Sums of I are
   bounded by sums of J, so this holds for a set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat as repeat_forever
from typing import Any, Literal

import pandas as pd
import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qv_lens.attribution.moments import TOLERANCE
from qv_lens.attribution.projection import NormMode
from qv_lens.attribution.setting import (
    METHODS,
    Base,
    Bases,
    Grouping,
    Kind,
    Method,
    Over,
    Setting,
    Target,
    check_moments,
    check_over,
    setting,
)
from qv_lens.errors import ConfigError, check_count, unknown
from qv_lens.facts.spans import Positions
from qv_lens.models.interventions import check_attention_as_made
from qv_lens.models.lens import Facts, Lens
from qv_lens.models.norms import at_least_float32
from qv_lens.models.units import units_in_layer, values_in_layer
from qv_lens.neurons import NeuronSet
from qv_lens.progress import progress_bar
from qv_lens.trace import Trace

Unit = Literal["ffn", "attn_channel", "attn_neuron", "head", "head_position"]
UNITS: tuple[Unit, ...] = ("ffn", "attn_channel", "attn_neuron", "head", "head_position")
AT_POSITIONS = ("attn_neuron", "head_position")
#: by how much a bound must fall short before it ends the search: covers rounding in float32
SLACK = 1e-5


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
    `setting`).
    `positions`: where to look; with 'all', every position is ranked apart.
    `memory_budget`: bytes for the largest intermediate (default: half of what is free). Scores are
    in nats. `coefficient` is m_k, z_k or a_hp (its mean where rows are added up; none for whole
    heads).
    Raises `FactError` for prompts or answers that do not tokenise, `ConfigError` for options that
    do not exist or do not go together.

    >>> import qv_lens as qv
    >>> lens = qv.load("toy-gptj")
    >>> fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    >>> qv.value_neurons(lens, fact, 3).units  # (layer, neuron), best first
    [(2, 297), (2, 91), (2, 159)]
    """
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


def _check_numbers(scores: Tensor) -> None:
    """Raise `ConfigError` for scores that are not a number."""
    if scores.isnan().any():
        raise ConfigError(
            "Some scores are not a number: the weights, the coefficients or the value scores are "
            "not finite."
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


def check_top(top: int | None) -> None:
    """Raise `ConfigError` for a number of units below 1."""
    if top is not None:
        check_count("top (how many units are kept; None: all)", top)


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


@dataclass(frozen=True)
class Units:
    """The units of one layer: problem q (row, and position where units have one) has coefficient
    m_qk on vector k."""

    kind: Kind
    """Which sublayer writes them."""
    coefficients: Float[Tensor, "row unit"]
    """m, as the model computes it."""
    vectors: Tensor
    """[unit, d_model], shared by all rows; for heads [row, unit, d_model]."""
    keys: int = 1
    """Positions in the unit axis: it is (key, unit)."""
    scale: Float[Tensor, "row 1"] | None = None
    """1 / sigma of the norm that follows the sublayer."""

    @property
    def m(self) -> Float[Tensor, "row unit"]:
        """What multiplies the vectors in the stream."""
        return self.coefficients if self.scale is None else self.coefficients * self.scale


def every_unit(lens: Lens, trace: Trace, unit: Unit) -> Iterator[Units]:
    """The units of each layer."""
    for layer in range(lens.n_layers):
        yield units_of(lens, trace, unit, layer)


def units_of(lens: Lens, trace: Trace, unit: Unit, layer: int) -> Units:
    """The units of one layer: their coefficients at every row, and what they write into the
    stream."""
    backend = lens.backend_adapter
    if unit == "ffn":
        scale = trace.scale_of("ffn", layer)
        return Units(
            "ffn", at_least_float32(trace.m[layer]), backend.value_vectors(layer), scale=scale
        )
    w_o, heads = backend.value_vectors(layer, "attn"), backend.cfg.n_heads
    scale = trace.scale_of("attn", layer)
    if unit == "attn_channel":
        return Units("attn", at_least_float32(trace.z[layer]), w_o, scale=scale)
    by_head = rearrange(at_least_float32(w_o), "(h c) d -> h c d", h=heads)
    factor = 1.0 if scale is None else scale[:, :, None]
    if unit == "head":
        z = rearrange(at_least_float32(trace.z[layer]), "r (h c) -> r h c", h=heads)
        none = torch.full(z.shape[:2], torch.nan, dtype=z.dtype, device=z.device)
        return Units("head", none, factor * einsum(z, by_head, "r h c, h c d -> r h d"))
    a, z = values_by_head(lens, trace, layer)
    keys = a.shape[-1]
    if unit == "attn_neuron":
        return Units("attn", rearrange(z, "r h c k -> r (k h c)"), w_o, keys, scale)
    vectors = einsum(z, by_head, "r h c k, h c d -> r k h d")
    return Units(
        "head",
        rearrange(a, "r h k -> r (k h)"),
        factor * rearrange(vectors, "r k h d -> r (k h) d"),
        keys,
    )


def values_by_head(
    lens: Lens, trace: Trace, layer: int
) -> tuple[Float[Tensor, "row head key"], Float[Tensor, "row head channel key"]]:
    """a_hp and a_hp val_hpc: under grouped-query attention a query head reads the value head h //
    group. Raises `ConfigError` without patterns, and while heads or channels of the layer are
    intervened on."""
    backend = lens.backend_adapter
    check_attention_as_made(lens, [layer], "Scores of attention by position")
    if trace.pattern is None or trace.v is None:
        raise ConfigError(
            "These units need attention patterns: trace the facts with lens.trace(facts, "
            "attention=True)."
        )
    group = backend.cfg.n_heads // backend.n_kv_heads
    val = rearrange(at_least_float32(trace.v[layer]), "p (h c) k -> p h c k", h=backend.n_kv_heads)
    val = repeat(val, "p h c k -> p (h group) c k", group=group)[trace.prompt]
    a = at_least_float32(trace.pattern[layer])
    return a, a[:, :, None] * val


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


def grouped(
    scores: Float[Tensor, "row unit"], groups: Int[Tensor, " row"]
) -> Float[Tensor, "group unit"]:
    """Rows added up by group."""
    if len(groups) == int(groups.max()) + 1:
        return scores
    out = scores.new_zeros(int(groups.max()) + 1, scores.shape[1])
    return out.index_add_(0, groups.to(scores.device), scores)


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
    _check_numbers(bounds)
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


def ranked(
    grouping: Grouping,
    unit: Unit,
    scores: Float[Tensor, "layer group unit"],
    m: Float[Tensor, "layer group unit"],
    top: int | None,
    settings: dict[str, Any],
    over: Over = "prompt",
    last: list[int] | None = None,
) -> NeuronSet:
    """The highest-scored units of each group as a NeuronSet. `last`: each group is a prompt, its
    unit axis runs over positions too, and `last` is the last position that exists."""
    _check_numbers(scores)
    width = _width(grouping, unit)
    if last is not None:  # shorter prompts are padded with positions that do not exist
        key = torch.arange(scores.shape[2], device=scores.device) // width
        ends = torch.tensor(last, device=key.device)[:, None]
        scores = scores.masked_fill(key > ends, -torch.inf)
    labels = grouping.labels(over) if last is None else [{"prompt": i} for i in range(len(last))]
    if "position" in labels[0]:
        settings = {**settings, "ranked": "positions"}
    flat = rearrange(scores, "l g u -> g (l u)")
    coefficients = rearrange(m, "l g u -> g (l u)")
    k = flat.shape[1] if top is None else min(top, flat.shape[1])
    values, order = flat.sort(dim=1, descending=True, stable=True)
    frames = []
    for g, label in enumerate(labels):
        chosen = order[g, :k].cpu()
        columns = {**label, **_places(grouping, unit, chosen, scores.shape[2], g, last is not None)}
        columns["coefficient"] = coefficients[g].cpu()[chosen].numpy()
        columns["score"] = values[g, :k].cpu().numpy()
        frame = pd.DataFrame(columns)
        frames.append(frame[frame["score"] > -torch.inf])
    frame = pd.concat(frames, ignore_index=True)
    first = ["prompt", "unit", "layer", "neuron"]
    others = [column for column in frame.columns if column not in first]
    return NeuronSet(frame[[*first, *others]], settings)


def _width(grouping: Grouping, unit: Unit) -> int:
    """Units of a layer (at one position)."""
    if unit in ("head", "head_position"):
        return units_in_layer(grouping.lens, "head")
    return values_in_layer(grouping.lens, "ffn" if unit == "ffn" else "attn_channel")


def _places(
    grouping: Grouping,
    unit: Unit,
    chosen: Int[Tensor, " k"],
    per_layer: int,
    prompt: int,
    by_key: bool,
) -> dict[str, Any]:
    """Where units lie, by their place on the axis of layers and units: `unit, layer, neuron`, the
    head of attention's, and the position that they read."""
    width = _width(grouping, unit)
    neuron = chosen % per_layer % width
    places: dict[str, Any] = {
        "unit": "head" if unit == "head_position" else unit,
        "layer": (chosen // per_layer).numpy(),
        "neuron": neuron.numpy(),
    }
    if unit in ("head", "head_position"):
        places["head"] = neuron.numpy()
    elif unit != "ffn":
        places["head"] = (neuron // (width // units_in_layer(grouping.lens, "head"))).numpy()
    if by_key:
        key = chosen % per_layer // width
        ids = grouping.rows.prompts[prompt].ids
        places["position"] = key.numpy()
        places["token"] = [grouping.lens.token_label(ids[i]) if i < len(ids) else "" for i in key]
    return places
