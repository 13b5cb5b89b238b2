"""The rows of one task as a Parquet file: made storable, read, and of one type with those of others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from qv_lens.errors import ConfigError
from qv_lens.runs.config import Task

if TYPE_CHECKING:
    import pandas as pd

#: columns that `load_run` writes beside the fields and results
RESERVED = ("task", "status", "error")


def read_shard(read: Callable[[Path], Any], shard: Path) -> Any:
    """What `read` finds in a shard. Raises `ConfigError` for a damaged one."""
    try:
        return read(shard)
    except pa.ArrowException as error:
        raise ConfigError(
            f"{shard} is damaged: {error}. Remove it and run the same command again: that task alone "
            "is done again."
        ) from error


def note_of(schema: pa.Schema, name: str) -> str | None:
    """What a shard says of how it came about."""
    noted = (schema.metadata or {}).get(name.encode())
    return None if noted is None else noted.decode()


def storable(rows: pd.DataFrame, task: Task, measures: Sequence[str]) -> pd.DataFrame:
    """A task's rows as they are stored: a named index becomes columns. Raises `ConfigError` for a
    column that the run itself writes, for rows without a result, and where there are none."""
    import pandas as pd

    if not isinstance(rows, pd.DataFrame):
        raise ConfigError(
            f"rows of an experiment returns a pandas DataFrame, got {type(rows).__name__}."
        )
    if rows.empty:
        raise ConfigError(
            "This task gave no rows, so that it would be missing from the results without a word: "
            "return one, with NaN where there is nothing to measure."
        )
    if any(name is not None for name in rows.index.names):
        rows = rows.reset_index()
    clash = sorted({*RESERVED, *task.values} & set(rows.columns))
    if clash:
        raise ConfigError(
            f"An experiment's rows must not hold the run's own column {clash[0]!r}: choose another "
            "name."
        )
    if not set(measures) & set(rows.columns):
        raise ConfigError(
            f"The rows hold none of the MEASURES ({', '.join(measures)}); their columns: "
            f"{', '.join(map(str, rows.columns)) or 'none'}."
        )
    return rows.reset_index(drop=True)


def of_one_type(tables: list[pa.Table]) -> list[pa.Table]:
    """Tables whose columns can be put below each other. A column that has several types, none of
    which holds them all, becomes a number where truth, counts and numbers meet (a mean that is
    missing once), otherwise text (layer 2 and "all")."""
    kinds: dict[str, set[str]] = {}
    for table in tables:
        for f in table.schema:
            if not pa.types.is_null(f.type):
                kinds.setdefault(f.name, set()).add(_kind(f.type))
    for name, several in kinds.items():
        if len(several) < 2:
            continue
        for i, table in enumerate(tables):
            if name in table.column_names:
                column = table[name]
                # rounded where a count has more digits than a number
                column = (
                    column.cast(pa.float64(), safe=False)
                    if several <= NUMBERS
                    else _as_text(column)
                )
                tables[i] = table.set_column(table.column_names.index(name), name, column)
    return tables


#: kinds of columns that are numbers when put together
NUMBERS = frozenset({"truth", "count", "count without sign", "number"})


def _kind(of: pa.DataType) -> str:
    """What a column holds: types of one kind go into one column as they are."""
    if pa.types.is_string(of) or pa.types.is_large_string(of):
        return "text"
    if pa.types.is_boolean(of):
        return "truth"
    if pa.types.is_integer(of):
        return "count without sign" if of == pa.uint64() else "count"
    return "number" if pa.types.is_floating(of) else str(of)


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as text; a list or a table as JSON."""
    if not pa.types.is_nested(column.type):
        return column.cast(pa.string())
    texts = [None if each is None else json.dumps(each, default=str) for each in column.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])
