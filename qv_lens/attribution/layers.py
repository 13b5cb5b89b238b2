"""Layers and heads by importance: Eq. 9 summed, or of whole outputs.

neuron_sum            sum of I over a layer's FFN neurons, or over attention's channels (Eq. 9's right half; Table 1)
neuron_sum_positive   its positive terms
neuron_sum_top        its terms that are among the model's best
layer_vector          I of the whole output (Figures 5 and 6); telescopes over the layers with base `mid` for the FFN
                      and `pre` for attention
head_sum              sum of I over the layer's heads
count                 how many of the model's best neurons (FFN) or channels (attention) lie in the layer (Figure 3)

I is not linear: the parts of a layer (its neurons or heads, and b_out) do not add up to I of the
whole. What is missing is reported beside 'neuron_sum' and 'head_sum', as `gap`."""

from __future__ import annotations

from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.attribution.grouping import Over, check_over
from qv_lens.attribution.projection import NormMode, token_labels
from qv_lens.attribution.ranking import check_top, grouped
from qv_lens.attribution.scores import scored
from qv_lens.attribution.setting import Base, Kind, Method, Setting, check_moments, setting
from qv_lens.attribution.units import Unit
from qv_lens.attribution.value import every_score, for_every_unit
from qv_lens.attribution.wanted import Target
from qv_lens.errors import ConfigError, unknown
from qv_lens.facts.records import Fact
from qv_lens.facts.spans import Positions
from qv_lens.models.lens import Facts, Lens, check_lens
from qv_lens.models.norms import at_least_float32
from qv_lens.trace import Trace

How = Literal[
    "neuron_sum", "neuron_sum_positive", "neuron_sum_top", "layer_vector", "head_sum", "count"
]
HOWS: tuple[How, ...] = (
    "neuron_sum",
    "neuron_sum_positive",
    "neuron_sum_top",
    "layer_vector",
    "head_sum",
    "count",
)


@torch.no_grad()
def layer_scores(
    lens: Lens,
    facts: Facts | Trace,
    kind: Kind = "ffn",
    how: How = "neuron_sum",
    *,
    over: Over = "prompt",
    norm: NormMode = "frozen",
    base: Base = "mid",
    method: Method | None = None,
    target: Target = "answer",
    positions: Positions = "last",
    count_top: int = 300,
    memory_budget: int | None = None,
) -> pd.DataFrame:
    """Scores of layers (or heads), in nats: `prompt, kind, layer, score`, one row per prompt and
    layer.

    `how`: see the module. Sums have, beside `score` (the parts), `bias` (I of b_out), `whole` (I of
    the layer's output) and `gap` = whole - score - bias. `kind='head'` gives I of each head's
    vector and a column `head`. `over='set'` or 'category' adds the prompts up (prompt -1).
    `positions='all'` (Table 5) gives a row per token, with `position` and `token`.
    `norm`, `base`, `target`, `memory_budget`: as in `value_neurons`.
    `count_top`: how many are the best ('count', 'neuron_sum_top').
    `method`: 'exact', 'moments' (each neuron to 1e-6), or None for moments where they hold; raises
    `ConfigError` for the others, which do not score every neuron.

    >>> import qv_lens as qv
    >>> lens = qv.load("toy-gptj")
    >>> fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    >>> frame = qv.layer_scores(lens, fact, how="layer_vector")
    >>> int(frame["score"].idxmax())  # the layer whose output raises the answer most
    2
    """
    check_lens(lens)
    if how not in HOWS:
        raise unknown("how", how, HOWS)
    if kind not in ("ffn", "attn", "head"):
        raise unknown("kind", kind, ("ffn", "attn", "head"))
    check_over(over)
    if method not in (None, "exact", "moments"):
        raise ConfigError(
            f"Layer sums need the score of every neuron; method={method!r} gives "
            f"{'the best k alone' if method == 'topk' else 'bounds, not scores'}: use 'exact' or "
            "'moments'."
        )
    if method is not None:
        check_moments(method, norm)
    task = setting(
        lens,
        facts,
        norm=norm,
        base=base,
        target=target,
        positions=positions,
        memory_budget=memory_budget,
    )
    return scores_by_layer(task, kind, how, over, method, count_top)


def scores_by_layer(
    task: Setting,
    kind: Kind,
    how: How = "neuron_sum",
    over: Over = "prompt",
    method: Method | None = None,
    count_top: int = 300,
) -> pd.DataFrame:
    """`layer_scores` for a `Setting`. Raises `ConfigError` for a `kind` and a `how` that do not go
    together."""
    if kind == "head":
        if how != "layer_vector":
            raise ConfigError(
                "Heads are scored as whole vectors: kind='head' needs how='layer_vector', not "
                f"{how!r}."
            )
        heads = torch.stack(
            [grouped(layer.score, task.grouping.groups(over)) for layer in scored(task, "head")]
        )
        return _frame(task, over, kind, how, {"score": heads})
    if how == "layer_vector":
        return _frame(task, over, kind, how, {"score": _wholes(task, kind, over)})
    if how == "head_sum":
        if kind == "ffn":
            raise ConfigError("how='head_sum' adds up attention's heads: use it with kind='attn'.")
        return _sums(task, over, kind, how, "head", method)
    unit: Unit = "ffn" if kind == "ffn" else "attn_channel"
    if how in ("count", "neuron_sum_top"):
        check_top(count_top)
        scores, best = _best(task, unit, count_top, over, method)
        return _frame(
            task, over, kind, how, {"score": (best if how == "count" else scores * best).sum(2)}
        )
    return _sums(task, over, kind, how, unit, method)


def _sums(
    task: Setting, over: Over, kind: Kind, how: How, unit: Unit, method: Method | None
) -> pd.DataFrame:
    groups = task.grouping.groups(over)
    method = for_every_unit(task, unit) if method is None else method
    parts = [layer.score for layer in scored(task, unit, method)]
    if how == "neuron_sum_positive":
        positive = torch.stack(
            [grouped(part.clamp_min(0).sum(1, keepdim=True), groups)[:, 0] for part in parts]
        )
        return _frame(task, over, kind, how, {"score": positive})
    score = torch.stack([grouped(part.sum(1, keepdim=True), groups)[:, 0] for part in parts])
    bias = torch.zeros_like(score)
    if kind == "ffn":
        bias = torch.stack(
            [
                grouped(_bias(task, layer)[:, None], groups)[:, 0]
                for layer in range(task.lens.n_layers)
            ]
        )
    whole = _wholes(task, kind, over)
    return _frame(
        task,
        over,
        kind,
        how,
        {"score": score, "bias": bias, "whole": whole, "gap": whole - score - bias},
    )


def _bias(task: Setting, layer: int) -> Float[Tensor, " row"]:
    b_out = at_least_float32(task.lens.backend_adapter.value_bias(layer)).expand(
        len(task.token), -1
    )
    scale = task.trace.scale_of("ffn", layer)
    return task.increase_of_vectors(layer, "ffn", b_out if scale is None else b_out * scale)


def _wholes(task: Setting, kind: Kind, over: Over) -> Float[Tensor, "layer group"]:
    outputs = task.trace.ffn if kind == "ffn" else task.trace.attn
    scores = [task.increase_of_vectors(layer, kind, v)[:, None] for layer, v in enumerate(outputs)]
    return torch.stack([grouped(score, task.grouping.groups(over))[:, 0] for score in scores])


def _best(
    task: Setting, unit: Unit, top: int, over: Over, method: Method | None
) -> tuple[Tensor, Tensor]:
    """Scores [layer, group, unit], and a mask (0 or 1) of each group's `top` best units of the
    model."""
    scores, _ = every_score(task, unit, over, method)
    layers, groups, width = scores.shape
    flat = scores.transpose(0, 1).reshape(groups, -1)
    mask = torch.zeros_like(flat).scatter_(
        1, flat.topk(min(top, layers * width), dim=1).indices, 1.0
    )
    return scores, mask.reshape(groups, layers, width).transpose(0, 1)


def _frame(
    task: Setting,
    over: Over,
    kind: Kind,
    how: How,
    columns: dict[str, Float[Tensor, "layer group *head"]],
) -> pd.DataFrame:
    """Tidy rows, group by group."""
    score = columns["score"]
    layers, heads = score.shape[0], score.shape[2] if score.ndim == 3 else 1
    rows = [
        {**label, "kind": kind, "layer": layer, **({"head": head} if kind == "head" else {})}
        for label in task.grouping.labels(over)
        for layer in range(layers)
        for head in range(heads)
    ]
    values = {
        name: value.transpose(0, 1).flatten().cpu().numpy() for name, value in columns.items()
    }
    frame = pd.DataFrame(rows).assign(**values)
    frame.attrs.update({**task.attrs, "how": how, "kind": kind, "over": over})
    return frame


def by_token(lens: Lens, fact: Fact) -> pd.DataFrame:
    """`position, token, ffn, attn` (nats: I of the layer whose output adds most there; ACE, Table
    5) and the likeliest next tokens. All layers' numbers, and sums over neurons: `layer_scores(...,
    positions="all")`."""
    rows = pd.concat(
        [
            layer_scores(lens, fact, kind, "layer_vector", positions="all")
            for kind in ("ffn", "attn")
        ]
    )
    frame = rows.pivot_table(
        index=["position", "token"], columns="kind", values="score", aggfunc="max"
    ).reset_index()
    best = lens.trace(fact, "all").logits.topk(8).indices
    return frame[["position", "token", "ffn", "attn"]].assign(promoted=token_labels(lens, best))
