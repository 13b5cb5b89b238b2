"""What the figures are made of: colours, axes, lines, heatmaps, tables; and the checks of a frame
before it is drawn."""

from __future__ import annotations

import html
import itertools
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from qv_lens.errors import ConfigError

INK, BLUE, ORANGE, GREY = "#1d2733", "#2a6fdb", "#e07b39", "#9aa5b1"

VIOLET = "#8e5ea2"

#: where a heatmap has no cell
GROUND = "#d5dbe1"

#: one per group; where there are more groups they come round again, so that no group is left out
COLOURS = (BLUE, ORANGE, "#5b8c5a", VIOLET, "#c9a227", "#2f9c95", "#b5476b", "#7a5c3e")

#: blue for increase, orange for decrease, white at zero
DIVERGING = [[0.0, ORANGE], [0.5, "#ffffff"], [1.0, BLUE]]


def that_differ(frame: pd.DataFrame, names: Iterable[str]) -> list[str]:
    """Those of these columns in which the rows differ."""
    return [name for name in names if name in frame and frame[name].nunique() > 1]


def first_prompt(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first prompt."""
    return frame[frame["prompt"] == frame["prompt"].min()] if "prompt" in frame else frame


def plain_text(text: Any) -> str:
    """A text of a model as it stands: plotly reads HTML, in which the token <s> is nothing."""
    return html.escape(str(text), quote=False)


def quoted(tokens: Iterable[str]) -> str:
    """Tokens in a table's cell, without their blanks."""
    return ", ".join(repr(token.strip()) for token in tokens)


#: a table's pixels: of the narrowest figure that is usual, per character and line, and beside the
#: rows
WIDTH, CHARACTER, LINE, CELL, FRAME = 600, 8.0, 18, 8, 150


def text_table(
    names: list[str], cells: Sequence[Any], shares: list[float], title: str
) -> go.Figure:
    """A table that is high enough for every row, with the lines into which its texts are broken."""
    texts = [[str(value) for value in column] for column in cells]
    height = 0
    for row in zip(*texts, strict=True):
        lines = [
            len(textwrap.wrap(text, max(4, int(WIDTH * share / sum(shares) / CHARACTER)))) or 1
            for text, share in zip(row, shares, strict=True)
        ]
        height += CELL + LINE * max(lines)
    columns = [list(map(plain_text, column)) for column in texts]
    header = {"values": names, "fill_color": "#eef2f6", "align": "left"}
    body = {"values": columns, "align": "left", "fill_color": "white", "height": CELL + LINE}
    figure = go.Figure(go.Table(header=header, cells=body, columnwidth=shares))
    return laid_out(figure, title, height=FRAME + height)


def broken(text: str, width: int = 34) -> str:
    """A text on several lines."""
    return "<br>".join(textwrap.wrap(text, width))


def drawable(frame: pd.DataFrame, needed: Sequence[str], of: str, **labels: str) -> pd.DataFrame:
    """The frame, with a label throughout where it has no such column. Raises `ConfigError` for one
    without a column that is needed."""
    absent = [name for name in needed if name not in frame]
    if absent:
        raise ConfigError(
            f"This figure is drawn of what {of} gives, from the columns {', '.join(needed)}; the "
            f"frame has no {', '.join(absent)}. It has {', '.join(map(str, frame))}."
        )
    return frame.assign(**{name: label for name, label in labels.items() if name not in frame})


def model_of(frame: pd.DataFrame) -> str:
    """The model's name, where the frame knows it."""
    return str(frame.attrs.get("model", ""))


def texts_of(frame: pd.DataFrame) -> dict[Any, str]:
    """The texts of the prompts by number, where the frame knows them and no two are alike."""
    texts = [plain_text(text) for text in frame.attrs.get("texts", ())]
    return dict(enumerate(texts)) if len(set(texts)) == len(texts) else {}


def with_lines(frame: pd.DataFrame, by: str, also: Iterable[str]) -> pd.DataFrame:
    """The frame with a column `line`: column `by`, and those of `also` in which its rows differ, so
    that no line joins two models."""
    parts = frame[[by, *that_differ(frame, also)]]
    return frame.assign(line=parts.astype(str).agg(" · ".join, axis=1))


def coloured(
    frame: pd.DataFrame, by: str, first: str = ""
) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Every group of a frame in the order of its rows with a colour, `first` for the first of them,
    and its name."""
    colours = itertools.cycle(COLOURS)
    if first:
        colours = itertools.chain([first], colours)
    for name, rows in frame.groupby(by, sort=False, dropna=False):
        yield next(colours), str(name), rows


def error_bars(rows: pd.DataFrame, value: str, most: float = np.inf) -> dict[str, Any] | None:
    """Error bars from the columns `low` and `high`, or from half an `interval`, which is cut off
    below 0 and above `most`."""
    middle = rows[value].to_numpy(float)
    if {"low", "high"} <= set(rows):
        low, high = rows["low"].to_numpy(float), rows["high"].to_numpy(float)
    elif "interval" in rows:
        half = rows["interval"].to_numpy(float)
        low, high = middle - half, middle + half
    else:
        return None
    below = np.clip(middle - np.maximum(low, 0.0), 0.0, None)
    above = np.clip(np.minimum(high, most) - middle, 0.0, None)
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below}


def grid(
    frame: pd.DataFrame, rows: str | Sequence[str], column: str, sort: bool = True
) -> pd.DataFrame:
    """Means of `score` over all that is not an axis; where all scores are missing so is the mean,
    and its row and column are kept."""
    by = [rows] if isinstance(rows, str) else rows
    return frame.groupby([*by, column], sort=sort)["score"].mean().unstack(column, sort=sort)


def heatmap(
    table: pd.DataFrame, title: str, x: str, y: str, unit: str = "nats", beyond: float = 0.0
) -> go.Figure:
    """Cells that are missing do not count for the scale, and are as grey as the ground: white is
    zero. `beyond`: the share of the cells whose values may lie beyond the scale's end."""
    values = table.to_numpy(float)
    there = np.abs(values[np.isfinite(values)])
    limit = float(np.quantile(there, 1 - beyond)) if there.size else 0.0
    limit = limit or float(there.max(initial=0.0)) or 1.0
    heat: dict[str, Any] = {
        "z": values,
        "x": _whole(table.columns),
        "y": [str(name) for name in _whole(table.index)],
    }
    hover = f"{x} %{{x}}, {y} %{{y}}: %{{z:.4f}} {unit}<extra></extra>"
    scale = {
        "zmin": -limit,
        "zmax": limit,
        "colorscale": DIVERGING,
        "colorbar": {"title": {"text": unit, "side": "right"}},
    }
    figure = go.Figure(go.Heatmap(**heat, **scale, hovertemplate=hover, hoverongaps=False))
    figure.update_xaxes(title=x, dtick=1)
    figure.update_yaxes(title=y, autorange="reversed", type="category")
    row = 40 if len(table) <= MANY else 24
    figure = laid_out(figure, title, height=170 + row * len(table))
    return figure if there.size == values.size else figure.update_layout(plot_bgcolor=GROUND)


#: what hovering over a layer's score says
LAYER_NATS = "layer %{x}: %{y:.3f} nats"

#: rows of a heatmap up to which they are high
MANY = 16
#: layers up to which each has its number on the axis
EACH = 40


def marked_line(
    x: pd.Series, y: pd.Series, name: str, colour: str | None, hover: str
) -> dict[str, Any]:
    """A line with marks, and what hovering over a mark says."""
    line = {"x": x, "y": y, "name": name, "mode": "lines+markers"}
    line["hovertemplate"] = f"{name}, {hover}<extra></extra>"
    return line if colour is None else {**line, "line": {"color": colour}}


def layers_across(
    figure: go.Figure, layers: pd.Series, end: float = 0.0, room: float = 0.5
) -> None:
    """The axis of layers: from the first to the last, with some room beside them, each or every
    fifth with its number."""
    low, high = float(layers.min()), float(layers.max()) + end
    each = 1 if high - low <= EACH else 5
    figure.update_xaxes(title="layer", dtick=each, tick0=0, range=[low - room, high + room])


def _whole(names: pd.Index) -> list[Any]:
    """Labels of an axis, numbers without a fraction as integers: a column with a gap holds heads
    and layers as floats."""
    return [int(name) if isinstance(name, float) and name.is_integer() else name for name in names]


def laid_out(figure: go.Figure, title: str, height: int = 380) -> go.Figure:
    """A figure with its title, in the house's fonts and margins."""
    return figure.update_layout(
        title=title,
        height=height,
        template="plotly_white",
        font={"color": INK, "size": 13},
        margin={"l": 60, "r": 30, "t": 60, "b": 50},
        barmode="group",
    )
