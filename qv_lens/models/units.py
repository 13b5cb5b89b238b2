"""Units of a model: where their values stand, drawn at random, and whether a set was found on it.

A unit is an FFN neuron ('ffn', its value the activation m), a channel of attention
('attn_channel', its value a column of z) or a head ('head', all of its channels)."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from qv_lens.models.lens import Lens
from qv_lens.neurons import NeuronSet

UnitWithValue = Literal["ffn", "attn_channel", "head"]
UNITS_WITH_VALUES: tuple[UnitWithValue, ...] = ("ffn", "attn_channel", "head")


def site(lens: Lens, unit: UnitWithValue, layer: int) -> str:
    """The hook point of the units' values."""
    backend = lens.backend_adapter
    return backend.coefficient(layer) if unit == "ffn" else backend.z(layer)


def values_in_layer(lens: Lens, unit: UnitWithValue) -> int:
    """How many values a layer has at one position."""
    return lens.d_mlp if unit == "ffn" else len(lens.backend_adapter.w_o(0))


def units_in_layer(lens: Lens, unit: UnitWithValue) -> int:
    """How many units a layer has."""
    if unit == "head":
        return lens.backend_adapter.cfg.n_heads
    return values_in_layer(lens, unit)


def values_of(lens: Lens, unit: UnitWithValue, neurons: Sequence[int]) -> Int[Tensor, " value"]:
    """The places of some units' values among those of their layer: a head has as many as
    channels."""
    each = values_in_layer(lens, unit) // units_in_layer(lens, unit)
    first = torch.tensor(list(neurons), device=lens.device) * each
    return (first[:, None] + torch.arange(each, device=lens.device)).flatten()


def random_neurons(
    lens: Lens, count: int, rng: random.Random, unit: UnitWithValue = "ffn"
) -> NeuronSet:
    """`count` of a model's units at random, without scores, in the order in which `rng` draws
    them."""
    width = units_in_layer(lens, unit)
    places = rng.sample(range(lens.n_layers * width), count)
    return NeuronSet.of([divmod(place, width) for place in places], unit)


def warn_of_others(lens: Lens, neurons: NeuronSet) -> None:
    """Warn if a set was found on weights other than those that this lens wraps."""
    found_on = neurons.settings.get("fingerprint", lens.fingerprint)
    if found_on not in (lens.fingerprint, "patched"):  # found under a patch: which one is not known
        warnings.warn(
            f"These neurons were found on {neurons.settings.get('model', 'another model')} "
            f"({found_on}), this is {lens.name} ({lens.fingerprint}).",
            stacklevel=4,
        )
