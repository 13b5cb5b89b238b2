"""Scores to a NeuronSet: the best units of each group, in order, where they lie."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from qv_lens.attribution.grouping import Grouping, Over
from qv_lens.attribution.units import Unit
from qv_lens.errors import ConfigError, check_count
from qv_lens.models.units import units_in_layer, values_in_layer
from qv_lens.neurons import NeuronSet


def check_numbers(scores: Tensor) -> None:
    """Raise `ConfigError` for scores that are not a number."""
    if scores.isnan().any():
        raise ConfigError(
            "Some scores are not a number: the weights, the coefficients or the value scores are "
            "not finite."
        )


def check_top(top: int | None) -> None:
    """Raise `ConfigError` for a number of units below 1."""
    if top is not None:
        check_count("top (how many units are kept; None: all)", top)


def grouped(
    scores: Float[Tensor, "row unit"], groups: Int[Tensor, " row"]
) -> Float[Tensor, "group unit"]:
    """Rows added up by group."""
    if len(groups) == int(groups.max()) + 1:
        return scores
    out = scores.new_zeros(int(groups.max()) + 1, scores.shape[1])
    return out.index_add_(0, groups.to(scores.device), scores)


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
    check_numbers(scores)
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
