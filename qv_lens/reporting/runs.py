"""A run folder as a page, and several of the same experiment side by side.

1. What was varied are the columns in front, sorted; what was measured are means over everything
   else.
2. A measure that is the same in every row is named and left out: a column of zeros says nothing.
3. Side by side: the rows that the runs have in common by what was varied, a column for each measure
   (but for zeros) and run, and the settings in which the runs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from qv_lens.errors import ConfigError
from qv_lens.reporting.document import document, picture
from qv_lens.reporting.tables import Column, Table, alike, as_text, finished_rows, missing, table

#: rows of a page's table
MOST = 400
#: a column with more values than this is not one that was varied
VALUES = 40
#: columns over which nobody averages, however many values they have
ALWAYS = frozenset(("layer", "head", "metric"))
#: columns that tell rows apart, or say something of one row
SINGLE = frozenset((
    "task", "status", "case", "subject", "text", "prompt", "written", "skipped", "promoted",
    "prompts_asked", "prompts_known", "error",
))  # fmt: skip
#: what a page shows of how a run was made
SHOWN = ("experiment", "settings", "grid", "models", "versions", "machine", "command")


def run_page(name: str, frame: pd.DataFrame, figure: go.Figure | None) -> str:
    """A run (`runs.rows.load_run`) as a page: its figure, its means, its settings."""
    finished = _finished(frame)
    varied, measures = _varied(finished), _measures(finished)
    same = [
        measure
        for measure in measures
        if finished[measure].nunique(dropna=False) < 2 and len(finished) > 1
    ]
    kept = [measure for measure in measures if measure not in same]
    means = _means(finished, varied, kept)
    settings = {key: frame.attrs.get(key) for key in SHOWN}
    return document(
        "run.html.j2",
        title=name,
        state=_state(frame),
        figure=None if figure is None else picture("run", figure),
        failures=_failures(frame),
        shown=min(len(means), MOST),
        combinations=len(means),
        same=[f"{measure} ({_only(finished[measure])})" for measure in same],
        results=table("results", means.head(MOST), _columns(varied, kept))
        if len(finished)
        else None,
        settings=json.dumps(settings, indent=1),
    )


def runs_page(frames: Mapping[str, pd.DataFrame]) -> str:
    """Runs of one experiment side by side, by name. Raises `ConfigError` for runs of different
    experiments, or with nothing in common."""
    names = {frame.attrs["experiment"] for frame in frames.values()}
    if len(names) > 1:
        raise ConfigError(
            f"These runs are of different experiments: {', '.join(sorted(names))}. Compare runs of "
            "one."
        )
    finished = {name: _finished(frame) for name, frame in frames.items()}
    several = {column for rows in finished.values() for column in _varied(rows)}
    shared = set.intersection(*(set(rows) for rows in finished.values()))
    first, *others = finished.values()
    varied = [column for column in first if column in several & shared]
    finished = dict(zip(finished, alike(list(finished.values()), varied), strict=True))
    first, *others = finished.values()
    numeric = [set(_measures(rows)) for rows in others]
    measures = [each for each in _measures(first) if all(each in names for names in numeric)]
    together = pd.concat([rows[measures] for rows in finished.values()])
    measures = [each for each in measures if (together[each].fillna(0) != 0).any()] or measures
    if not measures:
        raise ConfigError("These runs have no measure in common: there is nothing to compare.")
    parts = []
    for name, rows in finished.items():
        means = _means(rows, varied, measures)
        parts.append((means.set_index(varied) if varied else means).add_suffix(f" · {name}"))
    joined = pd.concat(parts, axis=1, join="inner").reset_index(drop=not varied)
    if joined.empty:
        raise ConfigError(
            "These runs have no combination of what was varied in common: there is nothing to "
            "compare. qv.load_run reads each."
        )
    numbers = [f"{measure} · {name}" for measure in measures for name in finished]
    settings = _differences(frames)
    return document(
        "runs.html.j2",
        title=" and ".join(frames),
        runs=[f"{name}: {_state(frame)}" for name, frame in frames.items()],
        settings=settings,
        shown=min(len(joined), MOST),
        combinations=len(joined),
        results=table("comparison", joined.head(MOST), _columns(varied, numbers)),
    )


def _state(frame: pd.DataFrame) -> str:
    """How much of a run is there."""
    failed = int((frame["status"] == "failed").sum())
    rows = int((frame["status"] == "finished").sum())
    unfinished = "" if frame.attrs["complete"] else "; unfinished"
    return f"{frame['task'].nunique()} tasks, {failed} failed, {rows} rows{unfinished}"


def _varied(finished: pd.DataFrame) -> list[str]:
    """What the run's grid varies, and other columns of which the rows hold several values, but not
    one each; seeds only where nothing else was varied, so that a mean is one over seeds."""
    more = finished.attrs.get("more", {}).values()
    in_grid = {*finished.attrs["grid"], *(name for grid in more for name in grid)}
    texts = {column: as_text(finished[column]) for column in finished}
    counts = {column: values.nunique() for column, values in texts.items()}
    columns = [
        column
        for column, count in counts.items()
        if column not in finished.attrs["measures"]
        and count > 1
        and (column in in_grid | ALWAYS or (count <= VALUES and column not in SINGLE))
    ]
    several = [column for column in columns if column != "seed"]
    # of columns that say the same the first is enough: a layer, and the layer that was zeroed
    firsts: dict[tuple[str, ...], str] = {}
    for column in several:
        firsts.setdefault(tuple(texts[column]), column)
    return list(firsts.values()) or columns


def _finished(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of finished tasks; measures that are numbers there, though failed tasks lack them, are
    numbers."""
    rows = finished_rows(frame)
    measures = [name for name in frame.attrs["measures"] if name in rows]
    plain = rows[measures].convert_dtypes()
    numbers = [name for name in measures if plain[name].dtype.kind in "fiub"]
    return rows.assign(**{name: plain[name].astype("float64") for name in numbers})


def _measures(finished: pd.DataFrame) -> list[str]:
    return [
        m for m in finished.attrs["measures"] if m in finished and finished[m].dtype.kind in "fiub"
    ]


def _means(finished: pd.DataFrame, varied: Sequence[str], measures: Sequence[str]) -> pd.DataFrame:
    """Means by what was varied, in its order; of the whole where nothing was."""
    if not varied:
        return finished[list(measures)].mean().to_frame().T
    keyed = finished.assign(**{column: finished[column].map(_plain) for column in varied})
    means = keyed.groupby(list(varied), dropna=False)[list(measures)].mean().reset_index()
    ordered = means.sort_values(list(varied), key=lambda column: column.map(_order), kind="stable")
    return ordered.reset_index(drop=True)


def _order(value: Any) -> tuple[int, Any]:
    """Numbers by size, also where they are text beside a word (2, 10, "all"); then words."""
    try:
        number = float(value)
    except ValueError:
        return 1, value
    return (0, number) if number == number else (2, 0)


def _plain(value: Any) -> Any:
    """What groupby can take and order."""
    if missing(value):
        return "none"
    return value if isinstance(value, (int, float, str)) else str(value)


def _only(column: pd.Series) -> str:
    left = column.dropna()
    return "missing" if left.empty else f"{float(left.iloc[0]):g}"


def _columns(varied: Sequence[str], measures: Sequence[str]) -> dict[str, Column]:
    heads = {name: Column(name.replace("_", " ")) for name in varied}
    return heads | {name: Column(name.replace("_", " "), number=True) for name in measures}


def _failures(frame: pd.DataFrame) -> Table | None:
    """Which tasks failed, by what was varied, and each one's last line."""
    failed = frame[frame["status"] == "failed"]
    if failed.empty:
        return None
    in_grid = dict.fromkeys(name.partition(".")[0] for name in frame.attrs["grid"])
    names = [name for name in in_grid if name in failed]
    last = [str(error).strip().splitlines()[-1] for error in failed["error"]]
    # a column that some rows lack holds floats: whole numbers are shown as such
    varied = failed[names].convert_dtypes().astype(object)
    return table("failed", varied.assign(error=last), _columns([*names, "error"], ()))


def _settings(frame: pd.DataFrame) -> dict[str, Any]:
    """What a run was set to, the values of its grid, and those of models that have others."""
    settings = {**frame.attrs["settings"], **frame.attrs["grid"]}
    for model, grid in frame.attrs.get("more", {}).items():
        settings.update({f"{key} ({model})": values for key, values in grid.items()})
    return settings


def _differences(frames: Mapping[str, pd.DataFrame]) -> Table:
    """Settings in which the runs differ."""
    settings = {name: _settings(frame) for name, frame in frames.items()}
    rows = []
    for key in dict.fromkeys(key for each in settings.values() for key in each):
        values = {name: str(each.get(key, "–")) for name, each in settings.items()}
        if len(set(values.values())) > 1:
            rows.append({"setting": key, **values})
    columns = ["setting", *frames]
    return table("settings", pd.DataFrame(rows, columns=columns), _columns(columns, ()))
