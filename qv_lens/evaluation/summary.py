"""An evaluation in few rows: means, intervals, and the harmonic score."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from qv_lens.errors import ConfigError, check_kind, unknown
from qv_lens.evaluation.intervals import bounds, interval
from qv_lens.evaluation.metrics import harmonic


def summary(frame: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Means over the cases with 95% intervals (`intervals`), by the columns `by`; of a curve its
    last step: `metric, before, after` of the same cases, those that have both (a refused edit has
    no `after`); the ends of the interval of `after` (`low`, `high`), `cases`, the largest
    `relative_norm`, median `seconds`.

    `score_gen`, `score_acc` and `score_success` are the harmonic means of efficacy, paraphrase and
    specificity (CounterFact). The same case number is the same case: frames put together need a
    column in `by` that tells them apart. Raises `ConfigError` for columns that the frame lacks, or that are means
    here."""
    check_kind(frame, pd.DataFrame, "A summary is of the frame that qv.evaluate gives")
    by = _columns(frame, by)
    last = frame[
        frame["step"] == frame.groupby([*by, "case"], dropna=False)["step"].transform("max")
    ]
    columns = [*by, "metric"]
    edited = last["after"].notna()
    any_edited = edited.groupby([last[name] for name in columns], dropna=False).transform("any")
    # both means are of the same cases; where no edit was made, that before is told all the same
    last = last.assign(before=last["before"].where(edited | ~any_edited))
    groups = last.groupby(columns, sort=False, dropna=False)
    out = groups[["before", "after"]].mean()
    ends = [interval(rows["after"], bounds(key[-1])) for key, rows in groups]
    out["low"] = [end.low for end in ends]
    out["high"] = [end.high for end in ends]
    out["cases"] = groups["after"].count()
    out["relative_norm"], out["seconds"] = groups["relative_norm"].max(), groups["seconds"].median()
    out = out.reset_index()
    scores = []
    for key, part in out.groupby(list(by), sort=False, dropna=False) if by else [((), out)]:
        means = part.set_index("metric")
        for kind in ("gen", "acc", "success"):
            names = [f"{name}_{kind}" for name in ("efficacy", "paraphrase", "specificity")]
            if set(names) <= set(means.index):
                values = {
                    column: harmonic(means.loc[names, column].tolist())
                    for column in ("before", "after")
                }
                scores.append(
                    {
                        **dict(zip(by, key, strict=True)),
                        "metric": f"score_{kind}",
                        **values,
                        "cases": means.loc[names[0], "cases"],
                    }
                )
    out = pd.concat([out, pd.DataFrame(scores)], ignore_index=True) if scores else out
    out.attrs.update(frame.attrs)  # which model and editor
    return out


def _columns(frame: pd.DataFrame, by: Sequence[str]) -> list[str]:
    """The columns to tell rows apart by. Raises `ConfigError`."""
    if isinstance(by, str):
        raise ConfigError(f"by is a list of columns: by=[{by!r}].")
    by = list(by)
    needed = ("case", "step", "metric", "before", "after")
    lacking = [name for name in needed if name not in frame]
    if lacking:
        raise ConfigError(
            f"summary takes what evaluate gives; this frame has no column {lacking[0]!r}."
        )
    means = (*needed, "relative_norm", "seconds")
    for name in by:
        if name not in frame or name in means:
            free = [str(column) for column in frame.columns if column not in means]
            raise unknown("Column of by", name, free)
    return by
