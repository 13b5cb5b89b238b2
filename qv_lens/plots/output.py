"""A figure for print, and as a file."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go

from qv_lens.errors import ConfigError
from qv_lens.files import placed

#: a column's width in print, and the height that goes with it, in pixels of 1/96 inch
COLUMN, PRINTED = 330, 240


def paper(figure: go.Figure, columns: int = 1) -> go.Figure:
    """The figure as it goes into a paper: as wide as so many columns (3.4 inches each), a serif
    type of 9 points, no title (that is the caption's), the legend above, black axes. The figure
    itself stays as it is."""
    printed = go.Figure(figure)
    axis = {"showline": True, "linecolor": "black", "linewidth": 1, "ticks": "outside"}
    printed.update_xaxes(**axis, showgrid=False)
    printed.update_yaxes(**axis, gridcolor="#e5e5e5")
    rows = max(1.0, (figure.layout.height or 0) / 430)  # pyright: ignore[reportAttributeAccessIssue]
    return printed.update_layout(
        template="simple_white",
        title=None,
        width=COLUMN * columns,
        height=int(PRINTED * rows),
        font={"family": "Times New Roman, Times, serif", "size": 12, "color": "black"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "title": None},
        margin={"l": 48, "r": 8, "t": 36, "b": 40},
    )


#: the ends of a figure's name: a page, and pictures
FIGURES = (".html", ".png", ".svg", ".pdf")


def check_figure(file: Path) -> None:
    """Raise `ConfigError` for a name that no figure is written under."""
    if file.suffix.lower() not in FIGURES:
        raise ConfigError(
            f"A figure is written as {', '.join(FIGURES)}; {file.name} ends otherwise."
        )


def save(figure: go.Figure, path: str | Path, scale: float = 2.0) -> Path:
    """Write a figure: .html as a page that needs nothing else, .png, .svg or .pdf as a picture
    (`pip install kaleido`, and a Chrome or Chromium; `scale`: pixels of a PNG per pixel of the
    figure). Raises `ConfigError` for another ending, where a picture cannot be drawn, and if the path
    cannot be written."""
    file = Path(path)
    check_figure(file)
    with placed(file, "the figure") as partial:
        if file.suffix.lower() == ".html":
            figure.write_html(partial, include_plotlyjs=True)
        else:
            partial.write_bytes(_drawn(figure, file.suffix.lower().removeprefix("."), scale))
    return file


def _drawn(figure: go.Figure, kind: str, scale: float) -> bytes:
    try:
        return figure.to_image(format=kind, scale=scale)
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"A .{kind} cannot be drawn here. It needs kaleido (pip install 'qv_lens[pictures]') and a "
            f"Chrome or Chromium; .html needs nothing. ({str(error).strip().splitlines()[0].strip(' ,')})"
        ) from error
