"""Figures of what an edit does: metrics before and after, editors against each other, edits in a row."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from qv_lens.evaluation.metrics import harmonic
from qv_lens.plots.parts import (
    COLOURS,
    GREY,
    LAYER_NATS,
    broken,
    coloured,
    drawable,
    error_bars,
    laid_out,
    layers_across,
    marked_line,
    with_lines,
)

#: numbers to write at a logarithmic axis, without the small digits between them
ROUND = tuple(n * 10**power for power in range(7) for n in (1, 2, 5))

#: what figures of editors are drawn from
SUMMARY = ("metric", "before", "after")

#: what tells rows of edits of one method apart
SEQUENCE = ("model", "data", "known", "batch", "count", "seed")


def before_after(
    frame: pd.DataFrame, title: str = "FFN importance by layer, before and after the edit"
) -> go.Figure:
    """One line per `state`: which layers write the answer that the model gives then. Frames of
    `layer_scores` side by side: pd.concat([before.assign(state="before"), after.assign(...)])."""
    frame = drawable(frame, ("layer", "score"), "layer_scores", state="as it is")
    figure = go.Figure()
    for colour, state, rows in coloured(frame, "state", first=GREY):
        figure.add_scatter(**marked_line(rows["layer"], rows["score"], state, colour, LAYER_NATS))
    layers_across(figure, frame["layer"])
    figure.update_yaxes(title="nats")
    return laid_out(figure, title)


def lasting(
    frame: pd.DataFrame, metric: str = "efficacy_gen", title: str = "Edits in a row"
) -> go.Figure:
    """How many edits of each group still hold (`evaluation.sequence`), against their number, a line
    per method (and model, file, seed and so on, where there are several); last the perplexity of
    ordinary text."""
    if frame.empty:
        return laid_out(go.Figure(), title, height=430)
    needed = ("step", "group", "metric", "after")
    frame = drawable(frame, needed, "evaluation.sequence", method=method_of(frame))
    lengths = frame.groupby("method")["count"].nunique() if "count" in frame else pd.Series([1])
    told_apart = [name for name in SEQUENCE if name != "count" or lengths.max() > 1]
    frame = with_lines(frame, "method", told_apart)
    panels = [group for group in ("newest", "first", "drawn") if (frame["group"] == group).any()]
    names = [f"{group} edits {SAID.get(metric, metric)}" for group in panels]
    if (frame["metric"] == "perplexity").any():
        panels, names = [*panels, "model"], [*names, "perplexity of ordinary text"]
    figure = make_subplots(1, len(panels), subplot_titles=[broken(name, 24) for name in names])
    colours = {name: colour for colour, name, _ in coloured(frame, "line")}
    for column, group in enumerate(panels, 1):
        wanted = "perplexity" if group == "model" else metric
        hover = "%{x} edits: %{y:.1f}" if group == "model" else "%{x} edits: %{y:.1%}"
        shown = frame[(frame["group"] == group) & (frame["metric"] == wanted) & (frame["step"] > 0)]
        for name, rows in shown.groupby("line", sort=False):
            line = marked_line(rows["step"], rows["after"], str(name), colours[str(name)], hover)
            figure.add_scatter(
                **line, legendgroup=str(name), showlegend=column == 1, row=1, col=column
            )
        if group == "model":
            figure.update_yaxes(type="log", tickvals=ROUND, row=1, col=column)
        else:
            figure.update_yaxes(range=[0, 1.05], tickformat=".0%", row=1, col=column)
    figure.update_xaxes(title="edits", type="log")
    return laid_out(figure, title, height=430).update_layout(margin_t=110)


#: what the model says of edited facts, in words
SAID = MappingProxyType({"efficacy_gen": "said", "paraphrase_gen": "said in other words"})


def metric_bars(frame: pd.DataFrame, title: str = "Metrics", by: str = "variant") -> go.Figure:
    """Shares before and after by metric, with their intervals; one colour per value of column `by`,
    the unedited model in grey. Of several summaries: `pd.concat`, each with its `by` assigned."""
    frame = by_method(frame, by, SUMMARY, "summary(evaluate(...))")
    first = frame.drop_duplicates("metric")
    figure = go.Figure(_shares(first["metric"], first["before"], "before", GREY))
    for colour, name, rows in coloured(frame, by):
        figure.add_trace(
            _shares(rows["metric"], rows["after"], name, colour, error_bars(rows, "after", 1.0))
        )
    figure.update_xaxes(type="category")
    figure.update_yaxes(range=[0, 1.08], tickformat=".0%", title="share of the prompts")
    return laid_out(figure, title)


def method_bars(frame: pd.DataFrame, title: str = "Editors", by: str = "method") -> go.Figure:
    """One group of bars per method, one colour per metric, with the intervals of
    `evaluation.summary.summary`. Of several: `pd.concat`, each with its `by` assigned."""
    frame = by_method(frame, by, ("metric", "after"), "summary(evaluate(...))")
    figure = go.Figure()
    for colour, name, rows in coloured(frame, "metric"):
        figure.add_trace(
            _shares(rows[by], rows["after"], name, colour, error_bars(rows, "after", 1.0))
        )
    figure.update_xaxes(type="category")
    figure.update_yaxes(range=[0, 1.08], tickformat=".0%", title="share of the prompts")
    return laid_out(figure, title)


def method_dots(frame: pd.DataFrame, title: str = "Editors", by: str = "method") -> go.Figure:
    """A line per method and a dot per metric with its interval (`evaluation.summary.summary`), the
    best method on top: by the harmonic mean of its metrics. A dotted line is the unedited model's
    share, where it has one. Of several: `pd.concat`, each with its `by` assigned."""
    frame = by_method(frame, by, SUMMARY, "summary(evaluate(...))")
    score = frame.groupby(by)["after"].agg(lambda values: harmonic(values.tolist()))
    order = score.sort_values(kind="stable", na_position="first").index.astype(str)
    figure = go.Figure()
    for colour, name, rows in coloured(frame, "metric"):
        dots = {"color": colour, "size": 10}
        hover = f"%{{y}}, {name}: %{{x:.1%}}<extra></extra>"
        error = error_bars(rows, "after", 1.0)
        if error is not None:
            error |= {"color": colour, "thickness": 1.5, "width": 0}
        figure.add_scatter(
            x=rows["after"],
            y=rows[by].astype(str),
            name=name,
            mode="markers",
            marker=dots,
            error_x=error,
            hovertemplate=hover,
        )
        before = rows["before"].mean()
        if before > 0:
            line = {"color": colour, "dash": "dot", "width": 1.5}
            figure.add_vline(
                before, line=line, annotation_text=f"{name}, unedited", annotation_position="top"
            )
    figure.update_xaxes(range=[-0.02, 1.02], tickformat=".0%", title="share of the prompts")
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=list(order))
    return laid_out(figure, title, height=170 + 26 * len(order)).update_layout(margin_l=110)


def _shares(
    x: pd.Series, y: pd.Series, name: str, colour: str, error: dict[str, Any] | None = None
) -> go.Bar:
    """Bars of shares."""
    hover = f"{name}, %{{x}}: %{{y:.1%}}<extra></extra>"
    return go.Bar(x=x, y=y, name=name, marker_color=colour, error_y=error, hovertemplate=hover)


def seconds_bars(
    frame: pd.DataFrame, title: str = "Seconds per edit", by: str = "method"
) -> go.Figure:
    """Seconds per edit, a box per method (CTP, Figure 3)."""
    needed = ("seconds",) if by == "method" else (by, "seconds")
    frame = drawable(frame, needed, "evaluate", **{by: method_of(frame)})
    same = [name for name in (by, "model", "data", "protocol", "seed", "case") if name in frame]
    each = frame.drop_duplicates(same)
    figure = go.Figure(
        [
            go.Box(
                x=rows[by],
                y=rows["seconds"],
                name=str(name),
                marker_color=COLOURS[0],
                hovertemplate="%{x}: %{y:.2f} seconds<extra></extra>",
            )
            for name, rows in each.groupby(by, sort=False, dropna=False)
        ]
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(title="seconds")
    figure.update_layout(showlegend=False)
    return laid_out(figure, title)


def by_method(frame: pd.DataFrame, by: str, needed: Sequence[str], of: str) -> pd.DataFrame:
    """The frame with a column `by`: of one summary the editor's name, where the frame knows it.
    Raises `ConfigError` for several summaries that no column tells apart."""
    alone = by in ("method", "variant") and ("metric" not in frame or frame["metric"].is_unique)
    return drawable(frame, needed if alone else (by, *needed), of, **{by: method_of(frame)})


def method_of(frame: pd.DataFrame) -> str:
    """The editor's name, where the frame knows it."""
    return str(frame.attrs.get("editor") or "edited").partition("(")[0]
