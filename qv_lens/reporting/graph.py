"""The Q-V pathway as an SVG that needs no script: a click on a neuron opens its card (CSS :target).

Layers across, the strongest neurons of each layer on top; orange query, blue value, violet shared
neurons; an edge is as wide as its term of Eq. 10's sum. A card holds the tokens a neuron promotes,
its scores, what zeroing it alone does to the answer's log-probability, and the code that reproduces
it."""

from __future__ import annotations

from html import escape

import pandas as pd

from qv_lens.plots import BLUE, ORANGE, VIOLET

COLOUR = {"query": ORANGE, "value": BLUE, "shared": VIOLET}
WIDTH, STEP_Y, RADIUS, EDGES = 900, 40, 9, 80


def svg(nodes: pd.DataFrame, edges: pd.DataFrame) -> str:
    """The drawing. Every node is a link to its card, `#neuron-<id>`."""
    nodes = nodes.assign(size=nodes[["value_score", "query_score"]].abs().max(axis=1)).sort_values(
        "size", ascending=False
    )
    nodes = nodes.assign(place=nodes.groupby("layer").cumcount())
    layers = sorted(nodes["layer"].unique())
    step = max(76, (WIDTH - 96) // max(1, len(layers) - 1))
    at = {
        n.id: (48 + step * layers.index(n.layer), 34 + STEP_Y * n.place) for n in nodes.itertuples()
    }
    width, height = 96 + step * (len(layers) - 1), 70 + STEP_Y * int(nodes["place"].max())
    largest = float(edges["weight"].abs().max()) if len(edges) else 1.0
    lines = []
    for edge in edges.sort_values("weight", key=abs).tail(EDGES).itertuples():
        (x0, y0), (x1, y1) = at[edge.source], at[edge.target]
        colour, stroke = (BLUE if edge.weight > 0 else ORANGE), 0.4 + 4 * abs(edge.weight) / largest
        middle = (x0 + x1) / 2
        lines.append(
            f'<path d="M{x0},{y0} C{middle},{y0} {middle},{y1} {x1},{y1}" stroke="{colour}" stroke-width="{stroke:.2f}" '
            f'fill="none" opacity="0.35"><title>{edge.source} → {edge.target}: {edge.weight:.5f}</title></path>'
        )
    dots = [
        f'<a href="#neuron-{n.id}"><circle cx="{at[n.id][0]}" cy="{at[n.id][1]}" r="{RADIUS}" fill="{COLOUR[n.role]}">'
        f"<title>{n.id}, {n.role} neuron, score {n.size:.4f}</title></circle></a>"
        for n in nodes.itertuples()
    ]
    names = [
        f'<text x="{48 + step * i}" y="{height - 6}" text-anchor="middle">layer {layer}</text>'
        for i, layer in enumerate(layers)
    ]
    return (
        f'<svg id="pathway" viewBox="0 0 {width} {height}" width="{width}" role="img" '
        f'aria-label="Query neurons and the value neurons they feed">{"".join(lines)}{"".join(dots)}{"".join(names)}</svg>'
    )


def cards(nodes: pd.DataFrame, code: str) -> str:
    """One card per node, hidden until it is the page's target; `code` gets the node's layer and
    neuron."""
    return (
        "".join(_card(node, code) for node in nodes.itertuples())
        + "<p class='note hint'>Click a neuron.</p>"
    )


def _card(node, code: str) -> str:
    scores = [(name, getattr(node, f"{name}_score")) for name in ("value", "query")]
    scores_text = ", ".join(f"{name} score {value:.4f}" for name, value in scores if value == value)
    chips = "".join(
        f"<span class=tok>{escape(token.strip() or repr(token))}</span>" for token in node.promoted
    )
    snippet = code.format(layer=node.layer, neuron=node.neuron)
    return (
        f"<div class='card neuron' id='neuron-{node.id}'><b><code>{node.id}</code></b> {node.role} "
        f"neuron, layer {node.layer}: {scores_text}, m = {node.coefficient:.2f}<p>promotes "
        f"{chips}</p><p>Zeroed alone, it changes the answer's log-probability by "
        f"<b>{node.effect:+.4f}</b> nats.</p><pre>{escape(snippet)}</pre></div>"
    )
