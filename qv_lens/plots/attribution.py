"""Figures of what attribution gives: layers, tokens, heads, neurons, the Q-V graph, and what the model
loses without them."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from qv_lens.plots.parts import (
    BLUE,
    COLOURS,
    GREY,
    LAYER_NATS,
    ORANGE,
    VIOLET,
    broken,
    coloured,
    drawable,
    error_bars,
    first_prompt,
    grid,
    heatmap,
    laid_out,
    layers_across,
    marked_line,
    model_of,
    plain_text,
    quoted,
    text_table,
    texts_of,
    that_differ,
    with_lines,
)

#: the parts of a layer table that are whole outputs
VECTORS = ("attn_vector", "ffn_vector")


def layer_heatmap(frame: pd.DataFrame, title: str = "Layer importance") -> go.Figure:
    """Layers across, one row per kind (or per prompt where there is one kind); colour is the score
    in nats, the mean over the prompts of a cell."""
    drawable(frame, ("kind", "layer", "score"), "layer_scores")
    of_prompts = "prompt" in frame and frame["kind"].nunique() == 1
    rows = "prompt" if of_prompts else "kind"
    table = grid(frame, rows, "layer")
    if rows == "prompt":
        table = table.rename(index=texts_of(frame))
    return heatmap(table, title, "layer", rows)


def token_heatmap(frame: pd.DataFrame, title: str = "Importance by token") -> go.Figure:
    """Tokens down, layers across (Table 5): a frame of `layer_scores(..., positions="all")`, the
    first prompt's, kinds side by side. Colours end where one cell in fifty would go further: what
    stands at a text's first token is often many times the rest."""
    needed = ("position", "token", "kind", "layer", "score")
    frame = first_prompt(drawable(frame, needed, "layer_scores(..., positions='all')"))
    rows = [
        f"{row.position}: {plain_text(row.token.strip() or repr(row.token))}"
        for row in frame.itertuples()
    ]
    columns = (
        [f"{row.kind} {row.layer}" for row in frame.itertuples()]
        if frame["kind"].nunique() > 1
        else frame["layer"]
    )
    table = grid(frame.assign(row=rows, column=columns), "row", "column", sort=False)
    return heatmap(table, title, "layer", "token", beyond=0.02)


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
    drawable(nodes, ("id", "layer", "value_score", "query_score", "role"), "qv_graph(...).nodes")
    drawable(edges, ("source", "target", "weight"), "qv_graph(...).edges")
    nodes = first_prompt(nodes)
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
    figure = go.Figure()
    largest = max(edges["weight"].abs(), default=0.0) or 1.0
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
        layers_across(figure, nodes["layer"], room=0.9)
        figure.update_yaxes(visible=False)
    else:
        figure.update_xaxes(title="token", tickvals=list(range(len(tokens))), ticktext=tokens)
        figure.update_yaxes(title="layer", dtick=1)
    tested = edges.attrs.get("tested")
    if tested is None:
        return laid_out(figure, title, height=520)
    subtitle = broken(tested, 90)
    figure = laid_out(figure, f"{title}<br><sup>{subtitle}</sup>", height=520)
    return figure.update_layout(margin_t=100 + 24 * subtitle.count("<br>"))


def _tokens_across(nodes: pd.DataFrame, edges: pd.DataFrame) -> list[str] | None:
    """The prompt's tokens, for a graph whose neurons lie at any of them."""
    if edges.attrs.get("through") != "attention":
        return None
    prompt = int(nodes["prompt"].iloc[0])
    return [plain_text(repr(token)[1:-1]) for token in edges.attrs["prompts"][prompt]["tokens"]]


def head_heatmap(frame: pd.DataFrame, title: str = "Attention heads") -> go.Figure:
    """Heads down, layers across (ACE, Figure 6); the mean over prompts and categories."""
    drawable(frame, ("head", "layer", "score"), "layer_scores(..., kind='head')")
    heads = frame.dropna(subset="head")
    table = grid(heads, [*that_differ(heads, ["model"]), "head"], "layer")
    if table.index.nlevels > 1:
        table.index = [f"{model} · {head:g}" for model, head in table.index]
    return heatmap(table, title, "layer", "head")


def layer_lines(frame: pd.DataFrame, title: str = "What whole layers add") -> go.Figure:
    """I of each layer's whole output, the mean over the categories: attention at l, FFN at l + 0.5
    (ACE, Figure 5)."""
    if "part" not in frame and "kind" in frame:
        frame = frame.assign(part=frame["kind"] + "_vector")
    needed = ("part", "layer", "score")
    frame = drawable(frame, needed, "layer_scores(..., how='layer_vector')", model=model_of(frame))
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
        line = marked_line(at, rows["score"], f"{model} {kind}", None, hover)
        figure.add_scatter(**line, customdata=rows["layer"])
    layers_across(figure, frame["layer"], end=0.5)
    figure.update_yaxes(title="nats")
    return laid_out(figure, title)


def vocabulary_table(
    frame: pd.DataFrame, title: str = "Query, value and shared neurons"
) -> go.Figure:
    """Neurons of the first prompt by role with the tokens they promote (ACE, Tables 6 and 7)."""
    needed = ("layer", "neuron", "score", "promoted")
    frame = drawable(frame, needed, "vocabulary", role="neuron", model=model_of(frame))
    frame = first_prompt(frame)
    names = [
        f"f{layer}-{neuron} ({role})"
        for layer, neuron, role in zip(frame["layer"], frame["neuron"], frame["role"], strict=True)
    ]
    cells = [frame["model"], names, frame["score"].map("{:.4f}".format), frame["promoted"]]
    return text_table(["model", "neuron", "score", "promotes"], cells, [1.5, 1.3, 0.8, 5.5], title)


def neuron_table(frame: pd.DataFrame, title: str = "Neurons") -> go.Figure:
    """A vocabulary frame as a table: neuron, coefficient, score, promoted tokens (ACE, Tables 6 and
    7)."""
    names = [
        f"f{layer}-{neuron}" for layer, neuron in zip(frame["layer"], frame["neuron"], strict=True)
    ]
    cells = [
        names,
        frame["coefficient"].map("{:.2f}".format),
        frame["score"].map("{:.4f}".format),
        frame["promoted"].map(quoted),
    ]
    return text_table(["neuron", "m", "score", "promotes"], cells, [1, 1, 1, 6], title)


def counts(frame: pd.DataFrame, title: str = "Activated value neurons") -> go.Figure:
    """Mean number of activated value neurons per layer with its 95% interval, one line per
    condition (and model and seed, where there are several)."""
    drawable(frame, ("condition", "layer", "count"), "evaluation.ablation.suppress")
    figure = go.Figure()
    lines = with_lines(frame, "condition", ("model", "seed"))
    for colour, name, rows in coloured(lines, "line", first=GREY):
        hover = "layer %{x}: %{y:.1f} neurons per prompt"
        line = marked_line(rows["layer"], rows["count"], name, colour, hover)
        figure.add_scatter(**line, error_y=error_bars(rows, "count"))
    layers_across(figure, frame["layer"])
    figure.update_yaxes(title="neurons per prompt")
    return laid_out(figure, title)


def removal_curve(
    frame: pd.DataFrame, title: str = "What is left of the answer", by: str = "text"
) -> go.Figure:
    """log p of the answer's first token against how many neurons are taken out, or are kept alone,
    one line per ranking, the random orders as their mean with their range; a panel for each value of
    column `by` (`evaluation.faithfulness`; by prompt where there is none). A hollow mark: the model says
    something else. A column `went` names the neurons that a step takes out; hovering tells them."""
    if frame.empty:
        return laid_out(go.Figure(), title)
    drawable(frame, ("ranking", "k", "logprob", "clean"), "faithfulness")
    by = by if by in frame else "prompt"
    texts = texts_of(frame) if by == "prompt" else {}
    panels = list(dict.fromkeys(frame[by]))
    names = [broken(texts.get(name, plain_text(name))) for name in panels]
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
    return laid_out(figure, title, height=430).update_layout(margin_t=80 + 18 * lines)


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
        f"{k} neurons by {plain_text(ranking)}: log p {p:.2f} nats; says {plain_text(repr(answers[k]))}{_went(first, k)}"
        for k, p in table["mean"].items()
    ]
    yield go.Scatter(
        x=table.index,
        y=table["mean"],
        mode="lines+markers",
        name=plain_text(ranking),
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
        f"<br>went: {broken(textwrap.shorten(words, 150, placeholder=' …'), 60)}" if words else ""
    )


def layer_profile(frame: pd.DataFrame, title: str = "Layers") -> go.Figure:
    """Layers across, a line for each `kind`, in nats."""
    drawable(frame, ("kind", "layer", "score"), "layer_scores")
    figure = go.Figure()
    for colour, name, rows in coloured(frame, "kind"):
        hover = "layer %{x}: %{y:.3f} nats per fact"
        figure.add_scatter(**marked_line(rows["layer"], rows["score"], name, colour, hover))
    layers_across(figure, frame["layer"])
    figure.update_yaxes(title="nats per fact")
    return laid_out(figure, title)
