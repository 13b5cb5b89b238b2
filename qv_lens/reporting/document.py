"""A view -> one HTML file that needs nothing else: templates, style, script and plotly.js are
written into it once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from qv_lens.files import placed
from qv_lens.reporting.tables import Table


@dataclass(frozen=True)
class Picture:
    """A plotly figure, and its numbers where there is no script to draw it."""

    name: str
    """Of the file that a download writes."""
    drawn: Markup
    """The figure."""
    table: Table | None = None
    """Its numbers."""


def picture(name: str, figure: go.Figure, table: Table | None = None) -> Picture:
    """A figure as a part of a page: as wide as its place, on the page's own ground."""
    figure = go.Figure(figure)
    legend = {"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom", "x": 0}
    figure.update_layout(paper_bgcolor="rgba(0,0,0,0)", legend=legend, title_x=0.01, margin_b=90)
    if not figure.layout.plot_bgcolor:  # pyright: ignore[reportAttributeAccessIssue]
        figure.update_layout(plot_bgcolor="rgba(0,0,0,0)")
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"figure-{name}",
        config={"displayModeBar": False, "responsive": True},
    )
    return Picture(name, Markup(html), table)


def document(template: str, **view: Any) -> str:
    """The page that a template makes of a view, `number()` counting its sections. What the view
    holds is escaped."""
    rooms = Environment(
        loader=PackageLoader("qv_lens.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return rooms.get_template(template).render(
        plotly=lambda: Markup(get_plotlyjs()),
        number=itertools.count(1).__next__,
        **view,
    )


def write(page: str, path: str | Path) -> Path:
    """Write a page, whole or not at all. Raises `ConfigError` if the path cannot be written."""
    target = Path(path)
    with placed(target, "the page") as file:
        file.write_text(page, encoding="utf-8")
    return target
