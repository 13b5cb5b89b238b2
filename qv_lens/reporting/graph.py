"""The Q-V pathway as a drawing: where nodes and edges lie, and what each node's card says.

1. Tokens across, layers upwards; of the layers those in which a node lies.
2. A token's column is as wide as the most of its nodes that one layer holds; within it they stand
   side by side, the strongest first, as many in a line as leave the columns no wider than `WIDTH`:
   a wider drawing is shown smaller, until its names cannot be read. Of a long prompt two stand side
   by side even so, since a tall one could not be seen at a glance.
3. An edge is as wide as its share of the largest weight; of many the strongest are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from qv_lens.reporting.tables import fixed, shown_tokens, signed

#: pixels: of a node with its name, of a token without nodes, of a row, beside the columns
NODE, EMPTY, ROW, MARGIN = 68, 40, 40, 64
#: pixels that a page has for the columns
WIDTH = 700
#: nodes side by side: of a short prompt at most, of a long one all the same
SIDE, LEAST = 7, 2
#: edges that are drawn; of those of one node how many its card names
EDGES, NAMED = 150, 6
#: characters of a token that fit the width of a node
LETTERS = 7


@dataclass(frozen=True)
class Tie:
    """An edge as a card names it."""

    id: str
    """The other node."""
    weight: str
    """In nats."""


@dataclass(frozen=True)
class Node:
    """A neuron at a token."""

    id: str
    """As the graph names it: f12-34@5."""
    x: float
    """Its middle, in pixels."""
    y: float
    """Its middle, in pixels."""
    role: str
    """query, value or shared."""
    layer: int
    """Its layer."""
    neuron: int
    """Its number in the layer."""
    token: str
    """The token at which it lies."""
    coefficient: str
    """m."""
    scores: tuple[tuple[str, str], ...]
    """By method, nats."""
    effect: str
    """What zeroing it alone does to the answer's log p, nats."""
    promoted: tuple[str, ...]
    """Tokens."""
    suppressed: tuple[str, ...]
    """Tokens."""
    feeds: tuple[Tie, ...]
    """Its strongest edges upwards."""
    fed_by: tuple[Tie, ...]
    """Its strongest edges from below."""

    @property
    def name(self) -> str:
        return f"f{self.layer}-{self.neuron}"


@dataclass(frozen=True)
class Edge:
    """From a query neuron to a value neuron."""

    source: str
    """The lower node."""
    target: str
    """The upper node."""
    path: str
    """As SVG writes it."""
    sign: str
    """plus or minus."""
    width: float
    """Pixels."""
    share: float
    """Of the largest weight."""
    told: str
    """Its weight, and what a test of it found."""


@dataclass(frozen=True)
class Label:
    """A token or a layer beside the drawing."""

    x: float
    """Pixels."""
    y: float
    """Pixels."""
    text: str
    """What is read."""
    whole: str
    """The whole of it."""


@dataclass(frozen=True)
class Drawing:
    """Everything that is drawn."""

    width: float
    """Pixels."""
    height: float
    """Pixels."""
    nodes: tuple[Node, ...]
    """In the order in which the keyboard walks them: upwards, then across."""
    edges: tuple[Edge, ...]
    """The weakest first."""
    tokens: tuple[Label, ...]
    """Across."""
    layers: tuple[Label, ...]
    """Upwards."""
    edges_in_all: int
    """Drawn or not."""


#: scores of a node's card: column, name
SCORES = (
    ("value_score", "Eq. 9, value"),
    ("query_score", "Eq. 10, query"),
    ("gradient", "gradient"),
    ("relp", "RelP"),
)


def drawing(nodes: pd.DataFrame, edges: pd.DataFrame, tokens: Sequence[str]) -> Drawing:
    """The drawing of a study's `nodes` and `edges` over the tokens of its prompt."""
    size = nodes[["value_score", "query_score"]].abs().max(axis=1)
    nodes = nodes.assign(size=size).sort_values("size", ascending=False)
    nodes = nodes.assign(place=nodes.groupby(["position", "layer"]).cumcount())
    layers = sorted(nodes["layer"].unique(), reverse=True)
    most = nodes.groupby(["position", "layer"]).size()
    by_token = most.groupby("position").max()
    counts = [int(by_token.get(i, 0)) for i in range(len(tokens))]
    fitting = [side for side in range(LEAST, SIDE + 1) if sum(_widths(counts, side)) <= WIDTH]
    side = max(fitting, default=LEAST)
    widths = _widths(counts, side)
    lines = (most.groupby("layer").max() - 1) // side + 1
    left = [MARGIN + sum(widths[:i]) for i in range(len(tokens))]
    top = {layer: ROW * sum(int(lines[l]) for l in layers if l > layer) for layer in layers}
    at = {
        n.id: (
            left[n.position] + NODE * (n.place % side + 0.5),
            top[n.layer] + ROW * (n.place // side + 0.6),
        )
        for n in nodes.itertuples()
    }
    bottom = ROW * int(lines.sum()) + 24
    columns = [
        Label(x + width / 2, bottom, _short(token, width), token)
        for x, width, token in zip(left, widths, tokens, strict=True)
    ]
    rows = [
        Label(8, top[layer] + ROW * 0.6 + 4, f"layer {layer}", f"layer {layer}") for layer in layers
    ]
    ordered = nodes.sort_values(["layer", "position", "place"])
    return Drawing(
        MARGIN + sum(widths) + 8,
        bottom + 14,
        tuple(_node(node, at[node.id], edges, tokens) for node in ordered.itertuples()),
        tuple(_drawn(edges, at)),
        tuple(columns),
        tuple(rows),
        len(edges),
    )


def _widths(counts: Sequence[int], side: int) -> list[int]:
    """The columns' widths with at most so many nodes side by side."""
    return [NODE * min(count, side) or EMPTY for count in counts]


def _short(token: str, width: float) -> str:
    """As much of a token as its column holds."""
    text, most = token.strip() or repr(token), int(LETTERS * width / NODE)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _drawn(edges: pd.DataFrame, at: dict[str, tuple[float, float]]) -> list[Edge]:
    largest = float(edges["weight"].abs().max()) if len(edges) else 0.0
    drawn = []
    for edge in edges.sort_values("weight", key=abs).tail(EDGES).itertuples():
        (x0, y0), (x1, y1) = at[edge.source], at[edge.target]
        middle = (y0 + y1) / 2
        share = abs(edge.weight) / (largest or 1.0)
        hover = (
            f"{edge.source} → {edge.target}: weight {signed(edge.weight)} nats; without this edge log p "
            f"of the answer really falls by {signed(edge.lost_logprob)}"
        )
        path = f"M{x0:.0f},{y0:.0f} C{x0:.0f},{middle:.0f} {x1:.0f},{middle:.0f} {x1:.0f},{y1:.0f}"
        sign = "plus" if edge.weight > 0 else "minus"
        drawn.append(
            Edge(edge.source, edge.target, path, sign, round(0.5 + 4 * share, 2), share, hover)
        )
    return drawn


def _node(node, at: tuple[float, float], edges: pd.DataFrame, tokens: Sequence[str]) -> Node:
    scores = [
        (name, signed(getattr(node, column)))
        for column, name in SCORES
        if getattr(node, column) == getattr(node, column)
    ]
    return Node(
        id=node.id,
        x=at[0],
        y=at[1],
        role=node.role,
        layer=int(node.layer),
        neuron=int(node.neuron),
        token=str(tokens[node.position]).strip() or repr(tokens[node.position]),
        coefficient=fixed(node.coefficient, 2),
        scores=tuple(scores),
        effect=signed(node.effect),
        promoted=shown_tokens(node.promoted, 8),
        suppressed=shown_tokens(node.suppressed, 8),
        feeds=_ties(edges[edges["source"] == node.id], "target"),
        fed_by=_ties(edges[edges["target"] == node.id], "source"),
    )


def _ties(edges: pd.DataFrame, other: str) -> tuple[Tie, ...]:
    strongest = edges.sort_values("weight", key=abs, ascending=False).head(NAMED)
    return tuple(Tie(getattr(e, other), signed(e.weight)) for e in strongest.itertuples())
