"""Frames -> plotly figures. Nothing here computes or shows anything.

`paper` styles a figure for print, `save` writes it as a page or a picture."""

from __future__ import annotations

import html
import itertools
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from qv_lens.errors import ConfigError
from qv_lens.evaluation.metrics import harmonic
from qv_lens.files import placed

__all__ = [
    "before_after",
    "category_heatmap",
    "counts",
    "head_heatmap",
    "lasting",
    "layer_heatmap",
    "layer_lines",
    "layer_profile",
    "method_bars",
    "method_dots",
    "metric_bars",
    "neuron_table",
    "node_lines",
    "paper",
    "pathway",
    "removal_curve",
    "save",
    "seconds_bars",
    "set_bars",
    "sweep_heatmap",
    "token_bars",
    "token_heatmap",
    "vocabulary_table",
]

INK, BLUE, ORANGE, GREY = "#1d2733", "#2a6fdb", "#e07b39", "#9aa5b1"
VIOLET = "#8e5ea2"
#: numbers to write at a logarithmic axis, without the small digits between them
ROUND = tuple(n * 10**power for power in range(7) for n in (1, 2, 5))
#: where a heatmap has no cell
GROUND = "#d5dbe1"
#: one per group; where there are more groups they come round again, so that no group is left out
COLOURS = (BLUE, ORANGE, "#5b8c5a", VIOLET, "#c9a227", "#2f9c95", "#b5476b", "#7a5c3e")
#: the parts of a layer table that are whole outputs
VECTORS = ("attn_vector", "ffn_vector")
#: what figures of editors are drawn from
SUMMARY = ("metric", "before", "after")
#: what tells rows of edits of one method apart
SEQUENCE = ("model", "data", "known", "batch", "count", "seed")
#: blue for increase, orange for decrease, white at zero
DIVERGING = [[0.0, ORANGE], [0.5, "#ffffff"], [1.0, BLUE]]


def layer_heatmap(frame: pd.DataFrame, title: str = "Layer importance") -> go.Figure:
    """Layers across, one row per kind (or per prompt where there is one kind); colour is the score
    in nats, the mean over the prompts of a cell."""
    _drawable(frame, ("kind", "layer", "score"), "layer_scores")
    rows = "kind" if frame["kind"].nunique() > 1 else "prompt" if "prompt" in frame else "kind"
    table = _grid(frame, rows, "layer")
    if rows == "prompt":
        table = table.rename(index=_texts(frame))
    return _heatmap(table, title, "layer", rows)


def token_heatmap(frame: pd.DataFrame, title: str = "Importance by token") -> go.Figure:
    """Tokens down, layers across (Table 5): a frame of `layer_scores(..., positions="all")`, the
    first prompt's, kinds side by side. Colours end where one cell in fifty would go further: what
    stands at a text's first token is often many times the rest."""
    needed = ("position", "token", "kind", "layer", "score")
    frame = _first_prompt(_drawable(frame, needed, "layer_scores(..., positions='all')"))
    rows = [
        f"{row.position}: {_plain(row.token.strip() or repr(row.token))}"
        for row in frame.itertuples()
    ]
    columns = (
        [f"{row.kind} {row.layer}" for row in frame.itertuples()]
        if frame["kind"].nunique() > 1
        else frame["layer"]
    )
    table = _grid(frame.assign(row=rows, column=columns), "row", "column", sort=False)
    return _heatmap(table, title, "layer", "token", beyond=0.02)


#: so many nodes of a pathway have room for their names
NAMED = 40
#: how far nodes of a layer at one token stand apart, and all of them together at most, in tokens
APART, TOGETHER = 0.06, 0.8


def pathway(
    nodes: pd.DataFrame,
    edges: pd.DataFrame,
    title: str = "Query neurons and the value neurons they feed",
) -> go.Figure:
    """The Q-V graph of the first prompt (`qv_graph`): layers across, strongest neurons on top; of
    neurons at several tokens, tokens across and layers upwards. Width is the edge's weight. Of more
    than 120 edges the strongest are drawn; what a test of them showed (`edge_effects`) stands below
    the title. Hovering over an edge's middle tells its weight; of few nodes each shows its name."""
    _drawable(nodes, ("id", "layer", "value_score", "query_score", "role"), "qv_graph(...).nodes")
    _drawable(edges, ("source", "target", "weight"), "qv_graph(...).edges")
    nodes = _first_prompt(nodes)
    if "prompt" in edges:
        edges = edges[edges["prompt"].isin(nodes["prompt"])]  # it may have none, where a later has
    nodes = nodes.assign(size=nodes[["value_score", "query_score"]].abs().max(axis=1))
    nodes = nodes.sort_values("size", ascending=False)
    tokens = _tokens_across(nodes, edges)
    if tokens is None:
        nodes = nodes.assign(x=nodes["layer"], y=-nodes.groupby("layer").cumcount())
    else:
        place = nodes.groupby(["position", "layer"]).cumcount()
        step = min(APART, TOGETHER / (place.max() + 1))
        nodes = nodes.assign(x=nodes["position"] + step * place, y=nodes["layer"])
    at = {row.id: (row.x, row.y) for row in nodes.itertuples()}
    figure, largest = go.Figure(), float(edges["weight"].abs().max()) if len(edges) else 1.0
    middles = []
    for edge in edges.sort_values("weight", key=abs).tail(120).itertuples():
        (x0, y0), (x1, y1) = at[edge.source], at[edge.target]
        hover = f"{edge.source} → {edge.target}: weight {edge.weight:+.4f} nats"
        middles.append(((x0 + x1) / 2, (y0 + y1) / 2, hover))
        line = {
            "color": BLUE if edge.weight > 0 else ORANGE,
            "width": 0.3 + 4 * abs(edge.weight) / largest,
        }
        figure.add_scatter(
            x=[x0, x1],
            y=[y0, y1],
            mode="lines",
            line=line,
            opacity=0.5,
            showlegend=False,
            hoverinfo="skip",
        )
    if middles:
        x, y, hover = map(list, zip(*middles, strict=True))
        unseen = {"mode": "markers", "marker": {"size": 9, "opacity": 0}, "showlegend": False}
        figure.add_scatter(x=x, y=y, hovertext=hover, hoverinfo="text", **unseen)
        for name, colour in (("raises it", BLUE), ("lowers it", ORANGE)):
            figure.add_scatter(x=[None], y=[None], mode="lines", name=name, line={"color": colour})
    mode = "markers+text" if len(nodes) <= NAMED else "markers"
    for role, colour in (("query", ORANGE), ("value", BLUE), ("shared", VIOLET)):
        rows = nodes[nodes["role"] == role]
        text = [
            f"{row.id}<br>score {row.size:.4f} nats<br>m {row.coefficient:.2f}"
            for row in rows.itertuples()
        ]
        figure.add_scatter(
            x=rows["x"],
            y=rows["y"],
            mode=mode,
            text=[f"f{row.layer}-{row.neuron}" for row in rows.itertuples()],
            # of two neighbours' names one stands above, one below
            textposition=[("top center", "bottom center")[layer % 2] for layer in rows["layer"]],
            textfont={"size": 9},
            name=role,
            hovertext=text,
            hoverinfo="text",
            customdata=rows["id"],
            marker={"color": colour, "size": 10, "line": {"color": "white", "width": 1}},
        )
    if tokens is None:
        _layers_across(figure, nodes["layer"], room=0.9)
        figure.update_yaxes(visible=False)
    else:
        figure.update_xaxes(title="token", tickvals=list(range(len(tokens))), ticktext=tokens)
        figure.update_yaxes(title="layer", dtick=1)
    tested = edges.attrs.get("tested")
    if tested is None:
        return _layout(figure, title, height=520)
    hover = _broken(tested, 90)
    figure = _layout(figure, f"{title}<br><sup>{hover}</sup>", height=520)
    return figure.update_layout(margin_t=100 + 24 * hover.count("<br>"))


def _tokens_across(nodes: pd.DataFrame, edges: pd.DataFrame) -> list[str] | None:
    """The prompt's tokens, for a graph whose neurons lie at any of them."""
    if edges.attrs.get("through") != "attention":
        return None
    prompt = int(nodes["prompt"].iloc[0])
    return [_plain(repr(token)[1:-1]) for token in edges.attrs["prompts"][prompt]["tokens"]]


def before_after(
    frame: pd.DataFrame, title: str = "FFN importance by layer, before and after the edit"
) -> go.Figure:
    """One line per `state`: which layers write the answer that the model gives then. Frames of
    `layer_scores` side by side: pd.concat([before.assign(state="before"), after.assign(...)])."""
    frame = _drawable(frame, ("layer", "score"), "layer_scores", state="as it is")
    figure = go.Figure()
    for colour, state, rows in _coloured(frame, "state", first=GREY):
        figure.add_scatter(**_line(rows["layer"], rows["score"], state, colour, LAYER_NATS))
    _layers_across(figure, frame["layer"])
    figure.update_yaxes(title="nats")
    return _layout(figure, title)


def head_heatmap(frame: pd.DataFrame, title: str = "Attention heads") -> go.Figure:
    """Heads down, layers across (ACE, Figure 6); the mean over prompts and categories."""
    _drawable(frame, ("head", "layer", "score"), "layer_scores(..., kind='head')")
    heads = frame.dropna(subset="head")
    table = _grid(heads, [*_that_differ(heads, ["model"]), "head"], "layer")
    if table.index.nlevels > 1:
        table.index = [f"{model} · {head:g}" for model, head in table.index]
    return _heatmap(table, title, "layer", "head")


def category_heatmap(frame: pd.DataFrame, title: str = "Layer importance by category") -> go.Figure:
    """Layers across; FFN, attention, query layers and value-neuron counts of each category down,
    each row scaled to its largest value (ACE, Table 1 and Figure 3)."""
    _drawable(frame, ("part", "category", "layer", "score"), "experiments/ace/table_1.py")
    shown = frame[~frame["part"].isin(("head", *VECTORS))]
    table = shown.pivot_table(
        index=[*_that_differ(shown, ["model"]), "part", "category"],
        columns="layer",
        values="score",
        aggfunc="mean",
        sort=False,
    ).sort_index(axis=1)
    table = table.div(table.abs().max(axis=1).replace(0, 1), axis=0)  # a row of zeros stays one
    table.index = [" · ".join(PARTS.get(name, name) for name in names) for names in table.index]
    return _heatmap(table, title, "layer", "part and category", "share of the largest")


#: the parts of Table 1 and Figure 3 in words
PARTS = MappingProxyType({
    "ffn": "FFN, Eq. 9", "attn": "attention, Eq. 9", "query": "query neurons, Eq. 10",
    "count": "value neurons, number", "ffn_effect": "FFN, by effect",
    "attn_effect": "attention, by effect", "effect_count": "neurons by effect, number",
})  # fmt: skip


def _that_differ(frame: pd.DataFrame, names: Iterable[str]) -> list[str]:
    """Those of these columns in which the rows differ."""
    return [name for name in names if name in frame and frame[name].nunique() > 1]


def layer_lines(frame: pd.DataFrame, title: str = "What whole layers add") -> go.Figure:
    """I of each layer's whole output, the mean over the categories: attention at l, FFN at l + 0.5
    (ACE, Figure 5)."""
    if "part" not in frame and "kind" in frame:
        frame = frame.assign(part=frame["kind"] + "_vector")
    needed = ("part", "layer", "score")
    frame = _drawable(frame, needed, "layer_scores(..., how='layer_vector')", model=_model(frame))
    figure = go.Figure()
    for model, part in itertools.product(frame["model"].unique(), VECTORS):
        rows = (
            frame[(frame["model"] == model) & (frame["part"] == part)]
            .groupby("layer", as_index=False)["score"]
            .mean()
        )
        kind, at = (
            part.removesuffix("_vector"),
            rows["layer"] + (0.5 if part == "ffn_vector" else 0.0),
        )
        hover = LAYER_NATS.replace("%{x}", "%{customdata}")  # FFN's lie beside their layer
        line = _line(at, rows["score"], f"{model} {kind}", None, hover)
        figure.add_scatter(**line, customdata=rows["layer"])
    _layers_across(figure, frame["layer"], end=0.5)
    figure.update_yaxes(title="nats")
    return _layout(figure, title)


def token_bars(frame: pd.DataFrame, title: str = "Importance by token") -> go.Figure:
    """FFN's and attention's importance at each token of the first prompt (ACE, Table 5); hover for
    what is predicted there. (`token_heatmap` draws what `layer_scores` gives, by layer.)"""
    needed = ("position", "token", "ffn", "attn", "promoted")
    frame = _drawable(frame, needed, "experiments/ace/table_5.py", model=_model(frame))
    figure, frame = go.Figure(), _first_prompt(frame)
    bars = itertools.product(frame["model"].unique(), ("ffn", "attn"))
    for colour, (model, kind) in zip(itertools.cycle(COLOURS), bars, strict=False):
        rows = frame[frame["model"] == model]
        at = zip(rows["position"], rows["token"], strict=True)
        labels = [f"{position}: {_plain(token.strip())}" for position, token in at]
        figure.add_bar(
            x=labels,
            y=rows[kind],
            name=f"{model} {kind}",
            marker_color=colour,
            hovertext=rows["promoted"].map(_plain),
            hovertemplate=f"{model} {kind} at %{{x}}: %{{y:.3f}} nats<br>next: %{{hovertext}}<extra></extra>",
        )
    figure.update_xaxes(title="token", type="category")
    figure.update_yaxes(title="nats")
    return _layout(figure, title)


def _first_prompt(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["prompt"] == frame["prompt"].min()] if "prompt" in frame else frame


def _plain(text: Any) -> str:
    """A text of a model as it stands: plotly reads HTML, in which the token <s> is nothing."""
    return html.escape(str(text), quote=False)


def vocabulary_table(
    frame: pd.DataFrame, title: str = "Query, value and shared neurons"
) -> go.Figure:
    """Neurons of the first prompt by role with the tokens they promote (ACE, Tables 6 and 7)."""
    needed = ("layer", "neuron", "score", "promoted")
    frame = _drawable(frame, needed, "vocabulary", role="neuron", model=_model(frame))
    frame = _first_prompt(frame)
    names = [
        f"f{layer}-{neuron} ({role})"
        for layer, neuron, role in zip(frame["layer"], frame["neuron"], frame["role"], strict=True)
    ]
    cells = [frame["model"], names, frame["score"].map("{:.4f}".format), frame["promoted"]]
    return _table(["model", "neuron", "score", "promotes"], cells, [1.5, 1.3, 0.8, 5.5], title)


def node_lines(
    frame: pd.DataFrame, title: str = "Importance of the nodes of T+ by layer"
) -> go.Figure:
    """Mean node score by layer, key and value nodes, as a share of the largest layer's (CTP, Figure
    4)."""
    needed = ("path", "model", "score", "kind", "layer", "importance")
    _drawable(frame, needed, "experiments/ctp/figure_4.py")
    figure, shown = go.Figure(), frame[frame["path"] == "T+"]
    for (model, score, kind), rows in shown.groupby(["model", "score", "kind"], sort=False):
        rows = rows.groupby("layer", as_index=False)["importance"].mean()
        # scores of different kinds differ by orders of magnitude
        share = rows["importance"] / rows["importance"].max()
        hover = "layer %{x}: %{y:.1%} of the largest layer's"
        figure.add_scatter(**_line(rows["layer"], share, f"{model} {kind}, {score}", None, hover))
    _layers_across(figure, shown["layer"])
    figure.update_yaxes(title="share of the largest layer's", tickformat=".0%")
    return _layout(figure, title)


def set_bars(
    frame: pd.DataFrame, title: str = "Probability of the answer when neurons are zeroed"
) -> go.Figure:
    """Mean probability and sampled accuracy by set of neurons (ACE, section 6.4)."""
    needed = ("model", "set", "sampled", "probability")
    _drawable(frame, needed, "experiments/ace/neurons_27.py")
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
    return _layout(figure, title)


def sweep_heatmap(
    frame: pd.DataFrame, rows: list[str], column: str, value: str, title: str, unit: str
) -> go.Figure:
    """The mean of a result over everything else that was varied: `rows` down, `column` across.
    Where nothing was measured the cell is empty, and its row and column are there all the same."""
    _drawable(frame, (*rows, column, value), "a run's rows")
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
    return _heatmap(table, title, column, ", ".join(rows), unit).update_xaxes(type="category")


def neuron_table(frame: pd.DataFrame, title: str = "Neurons") -> go.Figure:
    """A vocabulary frame as a table: neuron, coefficient, score, promoted tokens (ACE, Tables 6 and
    7)."""
    names = [
        f"f{layer}-{neuron}" for layer, neuron in zip(frame["layer"], frame["neuron"], strict=True)
    ]
    tokens = [", ".join(repr(t.strip()) for t in row) for row in frame["promoted"]]
    cells = [
        names,
        frame["coefficient"].map("{:.2f}".format),
        frame["score"].map("{:.4f}".format),
        tokens,
    ]
    return _table(["neuron", "m", "score", "promotes"], cells, [1, 1, 1, 6], title)


def lasting(
    frame: pd.DataFrame, metric: str = "efficacy_gen", title: str = "Edits in a row"
) -> go.Figure:
    """How many edits of each group still hold (`evaluation.sequence`), against their number, a line
    per method (and model, file, seed and so on, where there are several); last the perplexity of
    ordinary text."""
    if frame.empty:
        return _layout(go.Figure(), title, height=430)
    needed = ("step", "group", "metric", "after")
    frame = _drawable(frame, needed, "evaluation.sequence", method=_method(frame))
    lengths = frame.groupby("method")["count"].nunique() if "count" in frame else pd.Series([1])
    told_apart = [name for name in SEQUENCE if name != "count" or lengths.max() > 1]
    frame = _named(frame, "method", told_apart)
    panels = [group for group in ("newest", "first", "drawn") if (frame["group"] == group).any()]
    names = [f"{group} edits {SAID.get(metric, metric)}" for group in panels]
    if (frame["metric"] == "perplexity").any():
        panels, names = [*panels, "model"], [*names, "perplexity of ordinary text"]
    figure = make_subplots(1, len(panels), subplot_titles=[_broken(name, 24) for name in names])
    colours = {name: colour for colour, name, _ in _coloured(frame, "line")}
    for column, group in enumerate(panels, 1):
        wanted = "perplexity" if group == "model" else metric
        hover = "%{x} edits: %{y:.1f}" if group == "model" else "%{x} edits: %{y:.1%}"
        shown = frame[(frame["group"] == group) & (frame["metric"] == wanted) & (frame["step"] > 0)]
        for name, rows in shown.groupby("line", sort=False):
            line = _line(rows["step"], rows["after"], str(name), colours[str(name)], hover)
            figure.add_scatter(
                **line, legendgroup=str(name), showlegend=column == 1, row=1, col=column
            )
        if group == "model":
            figure.update_yaxes(type="log", tickvals=ROUND, row=1, col=column)
        else:
            figure.update_yaxes(range=[0, 1.05], tickformat=".0%", row=1, col=column)
    figure.update_xaxes(title="edits", type="log")
    return _layout(figure, title, height=430).update_layout(margin_t=110)


#: what the model says of edited facts, in words
SAID = MappingProxyType({"efficacy_gen": "said", "paraphrase_gen": "said in other words"})
#: a table's pixels: of the narrowest figure that is usual, per character and line, and beside the
#: rows
WIDTH, CHARACTER, LINE, CELL, FRAME = 600, 8.0, 18, 8, 150


def _table(names: list[str], cells: Sequence[Any], shares: list[float], title: str) -> go.Figure:
    """A table that is high enough for every row, with the lines into which its texts are broken."""
    texts = [[str(value) for value in column] for column in cells]
    height = 0
    for row in zip(*texts, strict=True):
        lines = [
            len(textwrap.wrap(text, max(4, int(WIDTH * share / sum(shares) / CHARACTER)))) or 1
            for text, share in zip(row, shares, strict=True)
        ]
        height += CELL + LINE * max(lines)
    columns = [list(map(_plain, column)) for column in texts]
    header = {"values": names, "fill_color": "#eef2f6", "align": "left"}
    body = {"values": columns, "align": "left", "fill_color": "white", "height": CELL + LINE}
    figure = go.Figure(go.Table(header=header, cells=body, columnwidth=shares))
    return _layout(figure, title, height=FRAME + height)


def metric_bars(frame: pd.DataFrame, title: str = "Metrics", by: str = "variant") -> go.Figure:
    """Shares before and after by metric, with their intervals; one colour per value of column `by`,
    the unedited model in grey. Of several summaries: `pd.concat`, each with its `by` assigned."""
    frame = _by_method(frame, by, SUMMARY, "summary(evaluate(...))")
    first = frame.drop_duplicates("metric")
    figure = go.Figure(_shares(first["metric"], first["before"], "before", GREY))
    for colour, name, rows in _coloured(frame, by):
        figure.add_trace(
            _shares(rows["metric"], rows["after"], name, colour, _error(rows, "after", 1.0))
        )
    figure.update_xaxes(type="category")
    figure.update_yaxes(range=[0, 1.08], tickformat=".0%", title="share of the prompts")
    return _layout(figure, title)


def method_bars(frame: pd.DataFrame, title: str = "Editors", by: str = "method") -> go.Figure:
    """One group of bars per method, one colour per metric, with the intervals of
    `evaluation.protocols.summary`. Of several: `pd.concat`, each with its `by` assigned."""
    frame = _by_method(frame, by, ("metric", "after"), "summary(evaluate(...))")
    figure = go.Figure()
    for colour, name, rows in _coloured(frame, "metric"):
        figure.add_trace(_shares(rows[by], rows["after"], name, colour, _error(rows, "after", 1.0)))
    figure.update_xaxes(type="category")
    figure.update_yaxes(range=[0, 1.08], tickformat=".0%", title="share of the prompts")
    return _layout(figure, title)


def method_dots(frame: pd.DataFrame, title: str = "Editors", by: str = "method") -> go.Figure:
    """A line per method and a dot per metric with its interval (`evaluation.protocols.summary`), the
    best method on top: by the harmonic mean of its metrics. A dotted line is the unedited model's
    share, where it has one. Of several: `pd.concat`, each with its `by` assigned."""
    frame = _by_method(frame, by, SUMMARY, "summary(evaluate(...))")
    score = frame.groupby(by)["after"].agg(lambda values: harmonic(values.tolist()))
    order = score.sort_values(kind="stable", na_position="first").index.astype(str)
    figure = go.Figure()
    for colour, name, rows in _coloured(frame, "metric"):
        dots = {"color": colour, "size": 10}
        hover = f"%{{y}}, {name}: %{{x:.1%}}<extra></extra>"
        error = _error(rows, "after", 1.0)
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
    return _layout(figure, title, height=170 + 26 * len(order)).update_layout(margin_l=110)


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
    frame = _drawable(frame, needed, "evaluate", **{by: _method(frame)})
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
    return _layout(figure, title)


def counts(frame: pd.DataFrame, title: str = "Activated value neurons") -> go.Figure:
    """Mean number of activated value neurons per layer with its 95% interval, one line per
    condition (and model and seed, where there are several)."""
    _drawable(frame, ("condition", "layer", "count"), "evaluation.ablation.suppress")
    figure = go.Figure()
    lines = _named(frame, "condition", ("model", "seed"))
    for colour, name, rows in _coloured(lines, "line", first=GREY):
        hover = "layer %{x}: %{y:.1f} neurons per prompt"
        line = _line(rows["layer"], rows["count"], name, colour, hover)
        figure.add_scatter(**line, error_y=_error(rows, "count"))
    _layers_across(figure, frame["layer"])
    figure.update_yaxes(title="neurons per prompt")
    return _layout(figure, title)


def removal_curve(
    frame: pd.DataFrame, title: str = "What is left of the answer", by: str = "text"
) -> go.Figure:
    """log p of the answer's first token against how many neurons are taken out, or are kept alone,
    one line per ranking, the random orders as their mean with their range; a panel for each value of
    column `by` (`evaluation.faithfulness`; by prompt where there is none). A hollow mark: the model says
    something else. A column `went` names the neurons that a step takes out; hovering tells them."""
    if frame.empty:
        return _layout(go.Figure(), title)
    _drawable(frame, ("ranking", "k", "logprob", "clean"), "faithfulness")
    by = by if by in frame else "prompt"
    texts = _texts(frame) if by == "prompt" else {}
    panels = list(dict.fromkeys(frame[by]))
    names = [_broken(texts.get(name, str(name))) for name in panels]
    if len(panels) == 1:
        title, names = f"{title}<br><sup>{names[0]}</sup>", [""]
    figure = make_subplots(1, len(panels), shared_yaxes=True, subplot_titles=names)
    colours = dict(
        zip(
            dict.fromkeys(frame["ranking"]),
            itertools.cycle((BLUE, ORANGE, *COLOURS[2:])),
            strict=False,
        )
    )
    colours["random"] = GREY
    for column, name in enumerate(panels, 1):
        rows = frame[frame[by] == name]
        for ranking, drawn in rows.groupby("ranking", sort=False):
            for trace in _removal_lines(
                str(ranking), drawn, colours[str(ranking)], legend=column == 1
            ):
                figure.add_trace(trace, row=1, col=column)
        clean = float(rows["clean"].iloc[0])  # drawn last: an empty panel takes no line
        figure.add_hline(
            y=clean, line={"color": GREY, "dash": "dot", "width": 1}, row=1, col=column
        )  # pyright: ignore[reportArgumentType]
    kept = "kept" in frame and bool(frame["kept"].all())
    counted = "neurons kept, all others zero" if kept else "neurons taken out"
    figure.update_xaxes(title=counted, type="log", dtick=1)
    figure.update_yaxes(title="log p of first token, nats", exponentformat="power", col=1)
    lines = max(name.count("<br>") for name in (*names, title))
    return _layout(figure, title, height=430).update_layout(margin_t=80 + 18 * lines)


def _removal_lines(
    ranking: str, rows: pd.DataFrame, colour: str, legend: bool
) -> Iterator[go.Scatter]:
    """The line of one ranking; of several orders their mean, and the area between the lowest and
    the highest."""
    table = rows.groupby("k")["logprob"].agg(["mean", "min", "max"])
    if rows["seed"].nunique() > 1:
        around = {
            "x": [*table.index, *table.index[::-1]],
            "y": [*table["max"], *table["min"][::-1]],
        }
        filled = {
            "mode": "lines",
            "line": {"width": 0},
            "fill": "toself",
            "fillcolor": colour,
            "opacity": 0.25,
        }
        yield go.Scatter(**around, **filled, hoverinfo="skip", showlegend=False)
    first = rows.drop_duplicates("k").set_index("k")
    answers = rows.groupby("k")["said"].agg(lambda words: words.mode().iloc[0])
    symbols = [
        "circle" if right else "circle-open" for right in rows.groupby("k")["right"].mean() >= 0.5
    ]
    words = [
        f"{k} neurons by {ranking}: log p {p:.2f} nats; says {_plain(repr(answers[k]))}{_went(first, k)}"
        for k, p in table["mean"].items()
    ]
    yield go.Scatter(
        x=table.index,
        y=table["mean"],
        mode="lines+markers",
        name=ranking,
        showlegend=legend,
        legendgroup=ranking,
        hovertext=words,
        hoverinfo="text",
        line={"color": colour},
        marker={"symbol": symbols, "size": 8},
    )


def _went(rows: pd.DataFrame, k: Any) -> str:
    """Which neurons this step takes out, where the frame says it; of many the first."""
    words = str(rows.loc[k, "went"]) if "went" in rows else ""
    return (
        f"<br>went: {_broken(textwrap.shorten(words, 150, placeholder=' …'), 60)}" if words else ""
    )


def _broken(text: str, width: int = 34) -> str:
    """A text on several lines."""
    return "<br>".join(textwrap.wrap(text, width))


def layer_profile(frame: pd.DataFrame, title: str = "Layers") -> go.Figure:
    """Layers across, a line for each `kind`, in nats."""
    _drawable(frame, ("kind", "layer", "score"), "layer_scores")
    figure = go.Figure()
    for colour, name, rows in _coloured(frame, "kind"):
        hover = "layer %{x}: %{y:.3f} nats per fact"
        figure.add_scatter(**_line(rows["layer"], rows["score"], name, colour, hover))
    _layers_across(figure, frame["layer"])
    figure.update_yaxes(title="nats per fact")
    return _layout(figure, title)


def _drawable(frame: pd.DataFrame, needed: Sequence[str], of: str, **labels: str) -> pd.DataFrame:
    """The frame, with a label throughout where it has no such column. Raises `ConfigError` for one
    without a column that is needed."""
    absent = [name for name in needed if name not in frame]
    if absent:
        raise ConfigError(
            f"This figure is drawn of what {of} gives, from the columns {', '.join(needed)}; the "
            f"frame has no {', '.join(absent)}. It has {', '.join(map(str, frame))}."
        )
    return frame.assign(**{name: label for name, label in labels.items() if name not in frame})


def _model(frame: pd.DataFrame) -> str:
    return str(frame.attrs.get("model", ""))


def _by_method(frame: pd.DataFrame, by: str, needed: Sequence[str], of: str) -> pd.DataFrame:
    """The frame with a column `by`: of one summary the editor's name, where the frame knows it.
    Raises `ConfigError` for several summaries that no column tells apart."""
    alone = by in ("method", "variant") and ("metric" not in frame or frame["metric"].is_unique)
    return _drawable(frame, needed if alone else (by, *needed), of, **{by: _method(frame)})


def _method(frame: pd.DataFrame) -> str:
    return str(frame.attrs.get("editor") or "edited").partition("(")[0]


def _texts(frame: pd.DataFrame) -> dict[Any, str]:
    """The texts of the prompts by number, where the frame knows them and no two are alike."""
    texts = [_plain(text) for text in frame.attrs.get("texts", ())]
    return dict(enumerate(texts)) if len(set(texts)) == len(texts) else {}


def _named(frame: pd.DataFrame, by: str, also: Iterable[str]) -> pd.DataFrame:
    """The frame with a column `line`: column `by`, and those of `also` in which its rows differ, so
    that no line joins two models."""
    parts = frame[[by, *_that_differ(frame, also)]]
    return frame.assign(line=parts.astype(str).agg(" · ".join, axis=1))


def _coloured(
    frame: pd.DataFrame, by: str, first: str = ""
) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Every group of a frame in the order of its rows with a colour, `first` for the first of them,
    and its name."""
    colours = itertools.cycle(COLOURS)
    if first:
        colours = itertools.chain([first], colours)
    for name, rows in frame.groupby(by, sort=False, dropna=False):
        yield next(colours), str(name), rows


def _error(rows: pd.DataFrame, value: str, most: float = np.inf) -> dict[str, Any] | None:
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


def _grid(
    frame: pd.DataFrame, rows: str | Sequence[str], column: str, sort: bool = True
) -> pd.DataFrame:
    """Means of `score` over all that is not an axis; where all scores are missing so is the mean,
    and its row and column are kept."""
    by = [rows] if isinstance(rows, str) else rows
    return frame.groupby([*by, column], sort=sort)["score"].mean().unstack(column, sort=sort)


def _heatmap(
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
    scale = {"zmin": -limit, "zmax": limit, "colorscale": DIVERGING, "colorbar": {"title": unit}}
    figure = go.Figure(go.Heatmap(**heat, **scale, hovertemplate=hover, hoverongaps=False))
    figure.update_xaxes(title=x, dtick=1)
    figure.update_yaxes(title=y, autorange="reversed", type="category")
    figure = _layout(figure, title, height=170 + 40 * len(table))
    return figure if there.size == values.size else figure.update_layout(plot_bgcolor=GROUND)


#: what hovering over a layer's score says
LAYER_NATS = "layer %{x}: %{y:.3f} nats"
#: layers up to which each has its number on the axis
EACH = 40


def _line(x: pd.Series, y: pd.Series, name: str, colour: str | None, hover: str) -> dict[str, Any]:
    """A line with marks, and what hovering over a mark says."""
    line = {"x": x, "y": y, "name": name, "mode": "lines+markers"}
    line["hovertemplate"] = f"{name}, {hover}<extra></extra>"
    return line if colour is None else {**line, "line": {"color": colour}}


def _layers_across(
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


def _layout(figure: go.Figure, title: str, height: int = 380) -> go.Figure:
    return figure.update_layout(
        title=title,
        height=height,
        template="plotly_white",
        font={"color": INK, "size": 13},
        margin={"l": 60, "r": 30, "t": 60, "b": 50},
        barmode="group",
    )


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
    if file.suffix not in FIGURES:
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
        if file.suffix == ".html":
            figure.write_html(partial, include_plotlyjs=True)
        else:
            partial.write_bytes(_drawn(figure, file.suffix.removeprefix("."), scale))
    return file


def _drawn(figure: go.Figure, kind: str, scale: float) -> bytes:
    try:
        return figure.to_image(format=kind, scale=scale)
    except (ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"A .{kind} cannot be drawn here. It needs kaleido (pip install 'qv_lens[pictures]') and a "
            f"Chrome or Chromium; .html needs nothing. ({str(error).strip().splitlines()[0].strip(' ,')})"
        ) from error
