"""NeuronSet: which units, of which prompt, with coefficient and score; set algebra, frames, save
and load."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qv_lens.errors import ConfigError, check_count, unknown
from qv_lens.facts.records import Fact
from qv_lens.files import placed

#: FFN neuron, channel of W_O, channel at one position, head, and a column of a weight matrix (KNE's
#: neuron)
UNITS = (
    "ffn", "attn_channel", "attn_neuron", "head",
    *(f"w_{name}_column" for name in ("out", "in", "gate", "o", "q", "k", "v")),
)  # fmt: skip
COLUMNS = ("prompt", "unit", "layer", "neuron", "coefficient", "score")


#: how many rows a set shows of itself, and which of its settings
SHOWN = 5
SHOWN_SETTINGS = ("model", "method", "norm", "base", "target", "over", "by")


@dataclass(frozen=True, eq=False)
class NeuronSet:
    """Units in order of decreasing score within each prompt, as a frame with `COLUMNS`.

    `prompt` is the index into the facts (-1: summed over the set). `settings` say how the scores
    came about. Two sets are combined by their units (layer, neuron): `|`, `&`, `-` keep the rows of
    the left operand (and, for `|`, the right one's rows that the left lacks)."""

    frame: pd.DataFrame
    """Units in order of decreasing score within each prompt."""
    settings: dict[str, Any] = field(default_factory=dict)
    """How the scores came about."""

    def __post_init__(self) -> None:
        missing = [column for column in COLUMNS if column not in self.frame.columns]
        if missing:
            raise ConfigError(
                f"A NeuronSet needs the columns {', '.join(COLUMNS)}; missing: "
                f"{', '.join(missing)}."
            )
        bad = set(self.frame["unit"].unique()) - set(UNITS)
        if bad:
            raise unknown("Unit", sorted(bad)[0], UNITS)
        # pandas makes floats of whole numbers by itself, in a merge or of an empty column
        strange = [name for name in ("layer", "neuron") if self.frame[name].dtype != np.int64]
        if strange:
            whole_numbers = {name: _whole_numbers(self.frame[name]) for name in strange}
            object.__setattr__(self, "frame", self.frame.assign(**whole_numbers))

    @classmethod
    def of(cls, units: Iterable[tuple[int, int]], unit: str = "ffn") -> NeuronSet:
        """A set by hand: (layer, neuron) pairs of one `unit` ('ffn', 'attn_channel',
        'attn_neuron' or 'head'), without scores. Raises `ConfigError` for what is no pair of whole
        numbers."""
        pairs = list(units)
        try:
            layers, neurons = [layer for layer, _ in pairs], [neuron for _, neuron in pairs]
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"A set by hand is made of (layer, neuron) pairs, got {pairs!r:.60}."
            ) from error
        frame = {
            "prompt": -1,
            "unit": unit,
            "layer": layers,
            "neuron": neurons,
            "coefficient": np.nan,
            "score": np.nan,
        }
        return cls(pd.DataFrame(frame), {"by": "hand"})

    def __len__(self) -> int:
        return len(self.frame)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, NeuronSet)
            and self.frame.equals(other.frame)
            and self.settings == other.settings
        )

    def __hash__(self) -> int:
        return hash(tuple(self.units))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """The distinct (layer, neuron) pairs."""
        return iter(self.units)

    def __repr__(self) -> str:
        """A small table: the best rows, and what they are of."""
        count = (
            f"NeuronSet of {len(self)} rows, {len(self.units)} distinct units, "
            f"{self.frame['prompt'].nunique()} prompts"
        )
        named = ", ".join(
            f"{key}={self.settings[key]}" for key in SHOWN_SETTINGS if key in self.settings
        )
        first = self.frame[["prompt", "unit", "layer", "neuron", "coefficient", "score"]].head(
            SHOWN
        )
        more = f"\n... {len(self) - SHOWN} more" if len(self) > SHOWN else ""
        table = (
            f"\n{first.to_string(index=False, float_format='{:.4f}'.format)}" if len(self) else ""
        )
        return f"{count} ({named}){table}{more}"

    def _repr_html_(self) -> str:
        return self.frame.head(20).to_html(index=False)

    @property
    def units(self) -> list[tuple[int, int]]:
        """The distinct (layer, neuron) pairs, in order of first appearance."""
        return list(
            dict.fromkeys(
                zip(self.frame["layer"].tolist(), self.frame["neuron"].tolist(), strict=True)
            )
        )

    @property
    def unit(self) -> str:
        """The one kind of unit in the set. Raises `ConfigError` for a mixture."""
        kinds = self.frame["unit"].unique()
        if len(kinds) > 1:
            raise ConfigError(
                f"This set mixes units ({', '.join(kinds)}): filter it to one kind first."
            )
        return kinds[0] if len(kinds) else "ffn"

    def by_layer(self) -> dict[int, list[int]]:
        """Layer -> its distinct neurons, layers ascending."""
        table: dict[int, list[int]] = {}
        for layer, neuron in self.units:
            table.setdefault(layer, []).append(neuron)
        return dict(sorted(table.items()))

    def top(self, k: int) -> NeuronSet:
        """The k highest-scored units of each prompt (of each category, or of each position that was
        ranked apart). Raises `ConfigError` for anything but a whole number of at least 0."""
        check_count("k of top(k)", k, 0)
        apart = ["category"] if "category" in self.frame else []
        if (
            "position" in self.frame
            and self.frame["unit"].eq("ffn").all()
            and self.settings.get("ranked") == "positions"
        ):
            apart.append("position")
        kept = self.best_first().groupby(["prompt", *apart], sort=False, dropna=False).head(k)
        best = replace(self, frame=kept.sort_index(kind="stable")).best_first()
        ordered = best.sort_values("prompt", kind="stable")
        return replace(self, frame=ordered.reset_index(drop=True))

    def best_first(self) -> pd.DataFrame:
        """The rows by score, best first; those found in an earlier round before those of a later
        one."""
        if "round" not in self.frame:
            return self.frame.sort_values("score", ascending=False, kind="stable")
        return self.frame.sort_values(["round", "score"], ascending=[True, False], kind="stable")

    def about(self, fact: Fact | str, prompt: int) -> NeuronSet:
        """The rows about one prompt of those that were asked: its own, those summed over the set, or
        over its fact's category."""
        rows = self.frame[self.frame["prompt"].isin((prompt, -1))]
        if "category" in rows:
            rows = rows[rows["category"] == getattr(fact, "category", None)]
        return replace(self, frame=rows.reset_index(drop=True))

    def where(self, condition: Callable[[pd.DataFrame], pd.Series] | pd.Series) -> NeuronSet:
        """The rows for which a condition holds, `value.where(lambda f: f.layer == 7)`, or which a
        column of true and false marks. Raises `ConfigError` for any other column."""
        chosen: Any = condition(self.frame) if callable(condition) else condition
        if (
            not isinstance(chosen, (pd.Series, np.ndarray))
            or not pd.api.types.is_bool_dtype(chosen)
            or len(chosen) != len(self.frame)
        ):
            raise ConfigError(
                f"where() takes true or false for each of the {len(self.frame)} rows, got "
                f"{type(chosen).__name__} {chosen!r:.60}. To give rows of the frame back: "
                "qv.NeuronSet(rows)."
            )
        return replace(self, frame=self.frame[chosen].reset_index(drop=True))

    def layer(self, layer: int) -> NeuronSet:
        """The units of one layer. Raises `ConfigError` for what is not a number of one of the
        model's layers."""
        if isinstance(layer, bool) or not isinstance(layer, (int, np.integer)):
            raise ConfigError(f"A layer is a number, got {layer!r}.")
        layers = self.settings.get("layers")  # a set made by hand does not say
        if layer < 0 or (layers is not None and layer >= layers):
            model = (
                f"{self.settings['model']} has {layers}, 0 to {layers - 1}"
                if layers
                else "0 is the first"
            )
            raise ConfigError(f"There is no layer {layer}: {model}.")
        return self.where(lambda frame: frame["layer"] == layer)

    def union(self) -> NeuronSet:
        """The distinct units over all prompts, each with its highest score (of the earliest round in
        which it was found), as one set (prompt -1)."""
        ordered = replace(self, frame=self.best_first())
        best = ordered.frame[~ordered._keys().duplicated()]
        return replace(self, frame=best.assign(prompt=-1).reset_index(drop=True))

    def _keys(self) -> pd.MultiIndex:
        """What makes two rows the same unit: an attention unit at another position is another
        unit."""
        position = (
            self.frame["position"].fillna(-1)
            if "position" in self.frame and self.frame["unit"].ne("ffn").all()
            else -1
        )
        return pd.MultiIndex.from_frame(
            self.frame[["unit", "layer", "neuron"]].assign(position=position)
        )

    def __and__(self, other: NeuronSet) -> NeuronSet:
        check_set(other)
        return replace(
            self, frame=self.frame[self._keys().isin(other._keys())].reset_index(drop=True)
        )

    def __sub__(self, other: NeuronSet) -> NeuronSet:
        check_set(other)
        return replace(
            self, frame=self.frame[~self._keys().isin(other._keys())].reset_index(drop=True)
        )

    def __or__(self, other: NeuronSet) -> NeuronSet:
        check_set(other)
        return replace(self, frame=pd.concat([self.frame, (other - self).frame], ignore_index=True))

    def to_frame(self) -> pd.DataFrame:
        """A copy of the frame, the settings in `.attrs`."""
        frame = self.frame.copy()
        frame.attrs.update(self.settings)
        return frame

    def save(self, path: str | Path) -> Path:
        """Write the set as one Parquet file, the settings in its metadata. Raises `ConfigError` if
        it cannot."""
        target = Path(path)
        frame = self.frame.copy()
        frame.attrs = {"settings": json.dumps(self.settings)}
        with placed(target, "the neuron set") as file:
            frame.to_parquet(file, index=False)
        return target

    @classmethod
    def load(cls, path: str | Path) -> NeuronSet:
        """Read a set written by `save`. Raises `ConfigError` for a file that is absent or
        damaged."""
        try:
            frame = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"Cannot read a neuron set from {path}: {type(error).__name__}: {error}."
            ) from error
        settings = json.loads(frame.attrs.pop("settings", "{}"))
        return cls(frame, settings)


def _whole_numbers(column: pd.Series) -> pd.Series:
    """A column of layers or neurons as integers. Raises `ConfigError` for anything else."""
    whole = [
        isinstance(value, (int, float, np.number))
        and not isinstance(value, bool)
        and float(value) % 1 == 0
        for value in column
    ]
    if not all(whole):
        raise ConfigError(
            f"The column {str(column.name)!r} of a NeuronSet holds whole numbers, got "
            f"{column.iloc[whole.index(False)]!r}."
        )
    return column.astype("int64")


def check_set(neurons: object) -> None:
    """Raise `ConfigError` for what is not a NeuronSet."""
    if not isinstance(neurons, NeuronSet):
        raise ConfigError(
            "Neurons come as a NeuronSet, by hand NeuronSet.of([(layer, neuron), ...]); got "
            f"{neurons!r:.100}."
        )
