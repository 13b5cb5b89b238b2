"""Interventions: frozen data that say what to change in a forward pass, compiled to (hook name,
function) lists.

`Zero`, `Scale` and `Replace` act on a unit (an FFN neuron, a channel of attention, a head) for every
reader. `Suppress` acts on one path only: it takes what query neurons write out of what chosen value
neurons read, and leaves all else alone (the direct effect that Eq. 10 claims).

Nested in any order, a value neuron's m is first made of what `Suppress` lets it read, then changed
by the others, and a query neuron writes what is left of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import isfinite
from numbers import Integral, Real
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.errors import ConfigError, one_or_more
from qv_lens.models.hooks import Early, Hook, Late
from qv_lens.models.lens import Lens
from qv_lens.models.units import (
    UNITS_WITH_VALUES,
    UnitWithValue,
    site,
    units_in_layer,
    values_in_layer,
    values_of,
    warn_of_others,
)
from qv_lens.neurons import NeuronSet, check_set

#: where an intervention acts: at all positions, at each prompt's last one, or at one or several of
#: every prompt, by index
Where = Literal["all", "last"] | int | tuple[int, ...]


@dataclass(frozen=True)
class Scale:
    """Multiply the coefficient m of FFN neurons (z of channels and heads) by `factor`, at all
    positions, each prompt's last one, or some by index."""

    neurons: NeuronSet
    """Which units."""
    factor: float
    """What m is multiplied by."""
    positions: Where = "all"
    """At all positions, each prompt's last one, or those with these indices."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", _numbers(self.factor))
        object.__setattr__(self, "positions", _numbers(self.positions))

    def check(self, lens: Lens) -> None:
        _check_number("Scale's factor", self.factor)
        check_units(lens, self.neurons, self.positions)
        _warn_of_nothing(self.neurons)

    def hooks(self, lens: Lens) -> list[Hook]:
        return _rewrite(lens, self.neurons, self.positions, lambda m, *_: m * self.factor)


@dataclass(frozen=True)
class Zero:
    """Remove FFN neurons, channels or heads for every reader (m or z := 0); at all positions it
    equals zeroing their rows of W_out or W_O."""

    neurons: NeuronSet
    """Which units."""
    positions: Where = "all"
    """At all positions, each prompt's last one, or those with these indices."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", _numbers(self.positions))

    def check(self, lens: Lens) -> None:
        check_units(lens, self.neurons, self.positions)
        _warn_of_nothing(self.neurons)

    def hooks(self, lens: Lens) -> list[Hook]:
        return _rewrite(lens, self.neurons, self.positions, lambda m, *_: torch.zeros_like(m))


@dataclass(frozen=True)
class Replace:
    """Set the coefficient m of FFN neurons (z of channels and heads) to `value`: to zero, to their
    means over other prompts, to what they are on another prompt (patching)."""

    neurons: NeuronSet
    """Which units."""
    value: Any
    """What m is set to: one number, or one for each of `neurons.units`, in their order (of a head
    also one for each of its channels)."""
    positions: Where = "all"
    """At all positions, each prompt's last one, or those with these indices."""

    def __post_init__(self) -> None:
        """A tensor's numbers, so that two of these can be compared."""
        object.__setattr__(self, "value", _numbers(self.value))
        object.__setattr__(self, "positions", _numbers(self.positions))

    def check(self, lens: Lens) -> None:
        check_units(lens, self.neurons, self.positions)
        self._rows(lens)
        _warn_of_nothing(self.neurons)

    def hooks(self, lens: Lens) -> list[Hook]:
        rows = self._rows(lens)
        places = {unit: place for place, unit in enumerate(self.neurons.units)}

        def change(m: Tensor, layer: int, indices: list[int]) -> Tensor:
            own = [places[layer, index] for index in indices]
            return rows[own].flatten().to(m).expand_as(m)

        return _rewrite(lens, self.neurons, self.positions, change)

    def _rows(self, lens: Lens) -> Float[Tensor, "unit value"]:
        """The values of each unit. Raises `ConfigError` for what is no number, or not as many."""
        units, unit = len(self.neurons.units), cast("UnitWithValue", self.neurons.unit)
        wanted = units, values_in_layer(lens, unit) // units_in_layer(lens, unit)
        try:
            value = torch.as_tensor(self.value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            value = torch.tensor(torch.nan)
        logical = np.asarray(self.value, dtype=object).ravel().tolist()
        shapes = ((), wanted[:1], wanted)
        if (
            value.shape not in shapes
            or not value.isfinite().all()
            or any(isinstance(item, bool) for item in logical)
        ):
            raise ConfigError(
                f"Replace's value must be a finite number, or one for each of the {units} units "
                f"(neurons.units), of heads also one for each channel; got {self.value!r:.80}."
            )
        return (value if value.ndim == 2 else value.reshape(-1, 1)).expand(wanted)


@dataclass(frozen=True)
class Suppress:
    """Take m_q * fc2_q of the query neurons out of what the target neurons read, at the same
    position.

    For each target layer l: x' = x - sum over queries in layers below l of m_q fc2_q, and m_j is
    computed again from x' for the targets j alone. The query neurons keep their effect on every
    other reader."""

    query: NeuronSet
    """Neurons whose output is taken away."""
    targets: NeuronSet
    """Value neurons that no longer read it."""
    positions: Where = "all"
    """At all positions, each prompt's last one, or those with these indices."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", _numbers(self.positions))

    def check(self, lens: Lens) -> None:
        check_ffn(lens, self.query, self.positions)
        check_ffn(lens, self.targets, self.positions)
        _warn_of_nothing(self.query, self.targets)
        if (
            len(self.query)
            and len(self.targets)
            and min(self.query.by_layer()) >= max(self.targets.by_layer())
        ):
            raise ConfigError(
                "Suppress: every query neuron lies in or above the layers of the targets and cannot "
                "reach them. Choose query neurons from lower layers."
            )
        for other in lens.interventions:
            if not isinstance(other, Suppress):
                continue
            if shared := len(other._reached() & self._reached()):
                raise ConfigError(
                    f"Suppress: {shared} of these targets are targets of a Suppress in force. Put "
                    "the query neurons of both into one: qv.Suppress(one | other, targets)."
                )

    def _reached(self) -> set[tuple[int, int]]:
        """The targets that lie above a query neuron: those that read something else."""
        lowest = min(self.query.by_layer(), default=0)
        return {unit for unit in self.targets.units if unit[0] > lowest}

    def hooks(self, lens: Lens) -> list[Hook]:
        return list(self._hooks(lens))

    def _hooks(self, lens: Lens) -> Iterator[Hook]:
        backend = lens.backend_adapter
        written: dict[int, Tensor] = {}
        read: dict[int, Tensor] = {}
        for layer, neurons in self.query.by_layer().items():
            if any(target > layer for target in self.targets.by_layer()):
                site = backend.coefficient(layer)
                yield Late((site, self._record(lens, layer, neurons, written)))
        for layer, neurons in self.targets.by_layer().items():
            if any(query < layer for query in self.query.by_layer()):
                yield from self._remove(lens, layer, neurons, written, read)

    def _record(self, lens: Lens, layer: int, neurons: list[int], written: dict[int, Tensor]):
        backend = lens.backend_adapter
        index = torch.tensor(neurons, device=lens.device)
        vectors = backend.value_vectors(layer)[index]

        def record(m: Float[Tensor, "prompt seq d_mlp"]) -> None:
            scale = backend.scale_after(layer, "ffn", m)
            moved = m[..., index] @ vectors.to(m.dtype)
            written[layer] = moved if scale is None else moved * scale

        return record

    def _remove(
        self,
        lens: Lens,
        layer: int,
        neurons: list[int],
        written: dict[int, Tensor],
        read: dict[int, Tensor],
    ):
        backend = lens.backend_adapter
        index = torch.tensor(neurons, device=lens.device)

        def keep_stream(x: Tensor) -> None:
            read[layer] = x

        def keep_attention(a: Tensor) -> None:
            read[layer] = read[layer] + a

        def recompute(m: Float[Tensor, "prompt seq d_mlp"]) -> Tensor:
            x = read[layer] - sum(v for below, v in written.items() if below < layer)
            new = ffn_coefficients(lens, layer, x, index)
            changed = m.clone()
            changed[..., index] = new.to(m.dtype)
            return _only(lens, self.positions, m, changed)

        yield Late((backend.resid_pre(layer), keep_stream))
        if not backend.parallel:
            yield Late((backend.attn_out(layer), keep_attention))
        yield Early((backend.coefficient(layer), recompute))


def ffn_coefficients(
    lens: Lens,
    layer: int,
    x: Float[Tensor, "*batch d_model"],
    neurons: Tensor | slice = slice(None),
) -> Float[Tensor, "*batch neuron"]:
    """m of chosen neurons when the FFN of `layer` reads the stream `x` (norm applied here): Eq. 3
    of ACE.

    GPT-J: act(x_n W_in + b_in). Qwen3: act(x_n W_gate) * (x_n W_in). Some Llamas have biases in
    both.
    """
    backend = lens.backend_adapter
    normed = backend.norm(layer)(x)
    gate, bias = backend.w_gate(layer), backend.b_in(layer)
    up = normed @ backend.w_in(layer)[:, neurons].to(x.dtype)
    if bias is not None:
        up = up + bias[neurons].to(x.dtype)
    if gate is None:
        return backend.activation(up)
    read, bias = normed @ gate[:, neurons].to(x.dtype), backend.b_gate(layer)
    if bias is not None:
        read = read + bias[neurons].to(x.dtype)
    return backend.activation(read) * up


def check_not_suppressed(lens: Lens, what: str) -> None:
    """Raise `ConfigError` while a `Suppress` is in force: what its targets read is not the stream,
    which the gradients of `what` are taken of."""
    if any(isinstance(intervention, Suppress) for intervention in lens.interventions):
        raise ConfigError(
            f"{what} would be wrong under a Suppress in force, whose targets do not read the stream: "
            "compute them outside of it. neuron_effects with method='gradient' and real removals "
            "hold under it."
        )


def check_targets_as_made(lens: Lens, targets: Iterable[tuple[int, int]], what: str) -> None:
    """Raise `ConfigError` while a `Scale` or `Replace` changes the m of these FFN neurons: `what` is
    a gradient of the m that they make, and the stream gets another. (Zeroed ones have no m.)"""
    wanted = set(targets)
    for intervention in lens.interventions:
        if not isinstance(intervention, Scale | Replace) or intervention.neurons.unit != "ffn":
            continue
        changed = sorted(wanted & set(intervention.neurons.units))
        if changed:
            others = f" and {len(changed) - 1} others" if len(changed) > 1 else ""
            raise ConfigError(
                f"{what} would be wrong while a {type(intervention).__name__} is in force on the value "
                f"neuron {changed[0]} (layer, neuron){others}: what feeds it is not what it writes. "
                "Compute them outside of it, or leave these value neurons out."
            )


def check_attention_as_made(lens: Lens, layers: Iterable[int], what: str) -> None:
    """Raise `ConfigError` while an intervention changes heads or attention channels of these
    layers: `what` is made of patterns and values, which do not know of it."""
    wanted = set(layers)
    for intervention in lens.interventions:
        if not isinstance(intervention, Zero | Scale | Replace):
            continue
        neurons = intervention.neurons
        if neurons.unit != "ffn" and wanted & set(neurons.by_layer()):
            raise ConfigError(
                f"{what} would be wrong while a {type(intervention).__name__} of unit "
                f"{neurons.unit!r} is in force in the same layer: a head's pattern and values are "
                "what they were. Ask for unit='head' or 'attn_channel', which read what attention "
                "really gives, or compute them outside of it."
            )


def check_ffn(lens: Lens, neurons: NeuronSet, positions: Where = "all") -> None:
    """Raise `ConfigError` unless the set holds FFN neurons that exist in this model."""
    check_set(neurons)
    if neurons.unit != "ffn":
        raise ConfigError(
            f"FFN neurons are needed here (unit 'ffn'), got units {neurons.unit!r}: a column of "
            "W_out, a head or an attention channel is not a neuron of the FFN."
        )
    check_units(lens, neurons, positions)


def check_units(lens: Lens, neurons: NeuronSet, positions: Where = "all") -> None:
    """Raise `ConfigError` unless the set holds units with values, of one kind, that exist in this
    model."""
    named = isinstance(positions, str) and positions in ("all", "last")
    if not named and not _indices(positions):
        raise ConfigError(
            "positions must be 'all', 'last', an index or several, got "
            f"{positions!r:.80}. Where a fact's subject ends: lens.rows(fact, "
            "'subject_last').positions."
        )
    check_set(neurons)
    warn_of_others(lens, neurons)
    if neurons.unit not in UNITS_WITH_VALUES:
        raise ConfigError(
            "An intervention acts on FFN neurons, attention channels or heads (units 'ffn', "
            f"'attn_channel', 'head'), got units {neurons.unit!r}."
        )
    width = units_in_layer(lens, neurons.unit)
    for layer, indices in neurons.by_layer().items():
        lens.check_layer(int(layer))
        if not 0 <= min(indices) <= max(indices) < width:
            named = {"ffn": "neurons", "attn_channel": "attention channels", "head": "heads"}
            raise ConfigError(
                f"Layer {layer} has {named[neurons.unit]} 0 to {width - 1}; the set names "
                f"{min(indices)} to {max(indices)}."
            )


def _check_number(what: str, value: object) -> None:
    """Raise `ConfigError` unless the value is one finite number."""
    if not isinstance(value, Real) or not isfinite(value):
        raise ConfigError(f"{what} must be a finite number, got {value!r:.80}.")


def _numbers(value: Any) -> Any:
    """Tensors, arrays and lists as tuples; all else as it is."""
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.tolist()
    return tuple(map(_numbers, value)) if isinstance(value, (list, tuple)) else value


def _warn_of_nothing(*sets: NeuronSet) -> None:
    if not all(len(neurons) for neurons in sets):
        warnings.warn(
            "This set of neurons is empty: the intervention changes nothing.", stacklevel=4
        )


def _rewrite(
    lens: Lens,
    neurons: NeuronSet,
    positions: Where,
    change: Callable[[Tensor, int, list[int]], Tensor],
) -> list[Hook]:
    """Hooks that change the units' values: those of the chosen neurons of a layer."""
    unit: Any = neurons.unit

    def hook_for(layer: int, indices: list[int]):
        index = values_of(lens, unit, indices)

        def hook(values: Float[Tensor, "prompt seq *shape"]) -> Tensor:
            flat = values.flatten(2)  # attention's come as [head, channel]
            changed = flat.clone()
            changed[..., index] = change(flat[..., index], layer, indices)
            return _only(lens, positions, values, changed.unflatten(2, values.shape[2:]))

        return hook

    return [
        (site(lens, unit, layer), hook_for(layer, indices))
        for layer, indices in neurons.by_layer().items()
    ]


def _only(lens: Lens, positions: Where, before: Tensor, after: Tensor) -> Tensor:
    """`after` at the positions asked for, `before` elsewhere."""
    if positions == "all":
        return after
    out, rows = before.clone(), torch.arange(len(before), device=before.device)
    if positions == "last":
        assert lens.last is not None  # hooks act in passes of the Lens
        out[rows, lens.last] = after[rows, lens.last]
    else:
        at = [index for index in _indices(positions) if index < before.shape[1]]
        out[:, at] = after[:, at]
    return out


def _indices(positions: object) -> tuple[int, ...]:
    """The positions by index; none where they are something else."""
    several = one_or_more(positions)
    whole = [
        index for index in several if isinstance(index, Integral) and not isinstance(index, bool)
    ]
    valid = len(whole) == len(several) and min(map(int, whole), default=-1) >= 0
    return tuple(map(int, whole)) if valid else ()
