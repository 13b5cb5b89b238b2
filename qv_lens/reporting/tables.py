"""Frames -> the tables of a page: what is read in a cell, and the whole number that a download
gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Column:
    """The head of a column."""

    name: str
    """What is read."""
    meaning: str = ""
    """A sentence that says what is counted, in which unit."""
    number: bool = False
    """Whether its cells are numbers."""
    share: bool = False
    """Whether they are shown as percentages."""
    digits: int = 3
    """Decimals that are shown."""


@dataclass(frozen=True)
class Cell:
    """One cell."""

    text: str = ""
    """What is read."""
    value: str = ""
    """What a download gets."""
    tokens: tuple[str, ...] = ()
    """Tokens, each drawn as a chip."""
    node: str = ""
    """The node of the pathway that it names."""
    anchor: str = ""
    """By which the rest of the page finds this cell."""
    changed: bool = False
    """Whether it differs from what was before."""


@dataclass(frozen=True)
class Table:
    """A table of the page."""

    name: str
    """Of the file that a download writes."""
    columns: tuple[Column, ...]
    """Heads."""
    rows: tuple[tuple[Cell, ...], ...]
    """Cells by row."""


def table(name: str, frame: pd.DataFrame, columns: Mapping[str, Column]) -> Table:
    """The named columns of a frame, in that order."""
    heads = tuple(columns.values())
    rows = frame[list(columns)].itertuples(index=False, name=None)
    return Table(
        name,
        heads,
        tuple(tuple(cell(v, c) for v, c in zip(row, heads, strict=True)) for row in rows),
    )


def cell(value: Any, column: Column) -> Cell:
    """A value as its column shows it; a dash for what is missing."""
    if not column.number:
        return Cell(str(value), str(value))
    if value != value:
        return Cell("–")
    shown = f"{fixed(100 * value, 1)}%" if column.share else fixed(value, column.digits)
    return Cell(shown, repr(value))


def fixed(value: float, digits: int) -> str:
    """With so many decimals, and no minus in front of zeros."""
    text = f"{value:,.{digits}f}"
    return text if float(text.replace(",", "")) else text.removeprefix("-")


def signed(value: float) -> str:
    """With its sign and four decimals; "about 0" where these show nothing, a dash where it was not
    measured."""
    if value != value:
        return "–"
    # a zero has no minus
    return f"{value + 0.0:+.4f}" if abs(value) >= 0.00005 or value == 0 else "about 0"


def by_layer(name: str, frame: pd.DataFrame, rows: str, value: str = "score") -> Table:
    """A row for each value of column `rows`, layers across, means of `value` in nats."""
    wide = frame.pivot_table(
        index=rows, columns="layer", values=value, aggfunc="mean", sort=False, dropna=False
    )
    columns = {rows: Column(rows)}
    columns |= {layer: Column(f"layer {layer}", "nats", number=True) for layer in wide.columns}
    return table(name, wide.reset_index(), columns)


def shown_tokens(tokens: Sequence[str], most: int) -> tuple[str, ...]:
    """Tokens as chips: without their blanks, or as Python writes them where nothing else is
    left."""
    return tuple(token.strip() or repr(token) for token in tokens[:most])


def missing(value: object) -> bool:
    """Whether a cell holds nothing: None or NaN, not a list."""
    return pd.api.types.is_scalar(value) and bool(pd.isna(value))


def as_text(column: pd.Series) -> pd.Series:
    """A column's values as text; one that is missing is a value too, which pandas would not
    count."""
    return column.astype(object).map(lambda value: "none" if missing(value) else str(value))


#: from here on a float does not tell neighbouring whole numbers apart
EXACT = 2.0**53


def finished_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of a run's finished tasks. Whole numbers that became floats, and truth values that
    became objects, where the row of a failed task has none, are again what they were."""
    done = frame["status"] == "finished"
    if done.all():
        return frame
    lacking = frame.columns[frame[~done].isna().any()]
    rows = frame[done].infer_objects()
    floats = rows[lacking].select_dtypes("float64")
    whole = [
        name
        for name, values in floats.items()
        if (values.abs().lt(EXACT) & (values % 1 == 0)).all()
    ]
    return rows.astype(dict.fromkeys(whole, "int64"))


def alike(frames: Sequence[pd.DataFrame], keys: Sequence[str]) -> list[pd.DataFrame]:
    """Frames whose keys can be compared: as text where some are text and others numbers (layer 2
    beside "all"), in different frames or in one."""

    def text(value: object) -> object:
        if missing(value):
            return None
        whole = isinstance(value, float) and value.is_integer()
        return str(int(value) if whole else value)  # pyright: ignore[reportArgumentType]

    kinds = {key: {frame[key].dtype for frame in frames} for key in keys}
    unlike = [key for key, of in kinds.items() if len(of) > 1 or object in of]
    return [frame.assign(**{key: frame[key].map(text) for key in unlike}) for frame in frames]
