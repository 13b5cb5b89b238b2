"""Two runs of an experiment side by side."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from qv_lens.errors import ConfigError
from qv_lens.runs.rows import load_run
from qv_lens.runs.store import Store

if TYPE_CHECKING:
    import pandas as pd

#: columns that two runs of the same need not share
NOT_KEYS = ("task", "status", "error", "prompts_asked", "prompts_known")


def compare_runs(first: str | Path, second: str | Path) -> pd.DataFrame:
    """Two runs of an experiment side by side: finished rows with the same fields joined, results as
    `x_first`, `x_second`, `x_difference`.

    Raises `ConfigError` for runs of different experiments.
    """
    from pandas.api.types import is_numeric_dtype

    from qv_lens.reporting.tables import alike, finished_rows

    a, b = finished_rows(load_run(first)), finished_rows(load_run(second))
    if a.attrs["experiment"] != b.attrs["experiment"]:
        raise ConfigError(
            f"{first} is a run of {a.attrs['experiment']!r}, {second} of {b.attrs['experiment']!r}: "
            "compare runs of one experiment."
        )
    measures = a.attrs["measures"]
    for folder, frame in ((first, a), (second, b)):
        if missing := [name for name in measures if name not in frame]:
            raise ConfigError(
                f"{folder} has no {missing[0]!r} yet: no task is finished. qv.load_run shows what "
                "failed."
            )
    shared = [c for c in a.columns if c in b.columns and c not in (*measures, *NOT_KEYS)]
    fields = Store(Path(first)).config().get("fields", shared)
    results = [c for c in shared if c not in fields and _is_result(a[c], b[c])]
    keys = [name for name in shared if name not in results]
    if results:
        warnings.warn(
            f"{', '.join(results)} holds other values in the two runs: rows that nothing else tells "
            "apart are joined in their order.",
            stacklevel=2,
        )
    # rows that no field tells apart are joined in their order
    left, right = (
        frame.assign(_row=frame.groupby(keys, dropna=False).cumcount() if keys else frame.index)
        for frame in alike([a[[*keys, *measures]], b[[*keys, *measures]]], keys)
    )
    joined = left.merge(right, on=[*keys, "_row"], how="outer", suffixes=("_first", "_second"))
    if joined[[f"{measures[0]}_first", f"{measures[0]}_second"]].isna().any(axis=1).all():
        warnings.warn(
            f"No row of {first} has the fields of a row of {second} ({', '.join(keys)}): nothing is "
            "compared.",
            stacklevel=2,
        )
    for name in measures:
        # of the runs' own columns: rows that one alone has make objects of truth values
        if is_numeric_dtype(a[name]) and is_numeric_dtype(b[name]):
            before, after = joined[f"{name}_first"], joined[f"{name}_second"]
            joined[f"{name}_difference"] = after.astype(float) - before.astype(float)
    return joined.drop(columns="_row")


def _is_result(first: pd.Series, second: pd.Series) -> bool:
    """Whether a column that is not a measure is a result all the same (seconds, the number of a
    process) and no key: the runs share none of its values or, of numbers that are not whole, not
    all."""
    from pandas.api.types import is_float_dtype

    a, b = set(first.dropna().astype(str)), set(second.dropna().astype(str))
    floats = is_float_dtype(first) or is_float_dtype(second)
    return bool(a and b) and (a.isdisjoint(b) or (floats and not (a <= b or b <= a)))
