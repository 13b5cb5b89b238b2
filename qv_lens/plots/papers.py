"""Figures of the papers' tables and of scripted sweeps (`experiments/`)."""

from __future__ import annotations

import itertools
from types import MappingProxyType

import pandas as pd
import plotly.graph_objects as go

from qv_lens.plots.attribution import VECTORS
from qv_lens.plots.parts import (
    COLOURS,
    drawable,
    first_prompt,
    heatmap,
    laid_out,
    layers_across,
    marked_line,
    model_of,
    plain_text,
    that_differ,
)


def category_heatmap(frame: pd.DataFrame, title: str = "Layer importance by category") -> go.Figure:
    """Layers across; FFN, attention, query layers and value-neuron counts of each category down,
    each row scaled to its largest value (ACE, Table 1 and Figure 3)."""
    drawable(frame, ("part", "category", "layer", "score"), "experiments/ace/table_1.py")
    shown = frame[~frame["part"].isin(("head", *VECTORS))]
    table = shown.pivot_table(
        index=[*that_differ(shown, ["model"]), "part", "category"],
        columns="layer",
        values="score",
        aggfunc="mean",
        sort=False,
    ).sort_index(axis=1)
    table = table.div(table.abs().max(axis=1).replace(0, 1), axis=0)  # a row of zeros stays one
    table.index = [" · ".join(PARTS.get(name, name) for name in names) for names in table.index]
    return heatmap(table, title, "layer", "part and category", "share of the largest")


#: the parts of Table 1 and Figure 3 in words
PARTS = MappingProxyType({
    "ffn": "FFN, Eq. 9", "attn": "attention, Eq. 9", "query": "query neurons, Eq. 10",
    "count": "value neurons, number", "ffn_effect": "FFN, by effect",
    "attn_effect": "attention, by effect", "effect_count": "neurons by effect, number",
})  # fmt: skip


def token_bars(frame: pd.DataFrame, title: str = "Importance by token") -> go.Figure:
    """FFN's and attention's importance at each token of the first prompt (ACE, Table 5); hover for
    what is predicted there. (`token_heatmap` draws what `layer_scores` gives, by layer.)"""
    needed = ("position", "token", "ffn", "attn", "promoted")
    frame = drawable(frame, needed, "experiments/ace/table_5.py", model=model_of(frame))
    figure, frame = go.Figure(), first_prompt(frame)
    bars = itertools.product(frame["model"].unique(), ("ffn", "attn"))
    for colour, (model, kind) in zip(itertools.cycle(COLOURS), bars, strict=False):
        rows = frame[frame["model"] == model]
        at = zip(rows["position"], rows["token"], strict=True)
        labels = [f"{position}: {plain_text(token.strip())}" for position, token in at]
        figure.add_bar(
            x=labels,
            y=rows[kind],
            name=f"{model} {kind}",
            marker_color=colour,
            hovertext=rows["promoted"].map(plain_text),
            hovertemplate=f"{model} {kind} at %{{x}}: %{{y:.3f}} nats<br>next: %{{hovertext}}<extra></extra>",
        )
    figure.update_xaxes(title="token", type="category")
    figure.update_yaxes(title="nats")
    return laid_out(figure, title)


def node_lines(
    frame: pd.DataFrame, title: str = "Importance of the nodes of T+ by layer"
) -> go.Figure:
    """Mean node score by layer, key and value nodes, as a share of the largest layer's (CTP, Figure
    4)."""
    needed = ("path", "model", "score", "kind", "layer", "importance")
    drawable(frame, needed, "experiments/ctp/figure_4.py")
    figure, shown = go.Figure(), frame[frame["path"] == "T+"]
    for (model, score, kind), rows in shown.groupby(["model", "score", "kind"], sort=False):
        rows = rows.groupby("layer", as_index=False)["importance"].mean()
        # scores of different kinds differ by orders of magnitude
        share = rows["importance"] / rows["importance"].max()
        hover = "layer %{x}: %{y:.1%} of the largest layer's"
        figure.add_scatter(
            **marked_line(rows["layer"], share, f"{model} {kind}, {score}", None, hover)
        )
    layers_across(figure, shown["layer"])
    figure.update_yaxes(title="share of the largest layer's", tickformat=".0%")
    return laid_out(figure, title)


def set_bars(
    frame: pd.DataFrame, title: str = "Probability of the answer when neurons are zeroed"
) -> go.Figure:
    """Mean probability and sampled accuracy by set of neurons (ACE, section 6.4)."""
    needed = ("model", "set", "sampled", "probability")
    drawable(frame, needed, "experiments/ace/neurons_27.py")
    figure, table = (
        go.Figure(),
        frame.groupby(["model", "set"], sort=False)[["sampled", "probability"]]
        .mean()
        .reset_index(),
    )
    for name in ("sampled", "probability"):
        hover = f"{name}, %{{x}}: %{{y:.1%}}<extra></extra>"
        at = table["model"] + " · " + table["set"]
        figure.add_bar(x=at, y=table[name], name=name, hovertemplate=hover)
    figure.update_xaxes(type="category")
    figure.update_yaxes(range=[0, 1.05], tickformat=".0%")
    return laid_out(figure, title)


def sweep_heatmap(
    frame: pd.DataFrame, rows: list[str], column: str, value: str, title: str, unit: str
) -> go.Figure:
    """The mean of a result over everything else that was varied: `rows` down, `column` across.
    Where nothing was measured the cell is empty, and its row and column are there all the same."""
    drawable(frame, (*rows, column, value), "a run's rows")
    table = (
        frame.groupby([*rows, column], sort=False, dropna=False)[value]
        .mean()
        .unstack(column, sort=False)
    )
    table.index = [
        " · ".join(str(part) for part in (key if isinstance(key, tuple) else (key,)))
        for key in table.index
    ]
    table.columns = [str(name) for name in table.columns]  # what was varied, not a scale
    return heatmap(table, title, column, ", ".join(rows), unit).update_xaxes(type="category")
