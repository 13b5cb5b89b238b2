"""Edges of the Q-V graph taken out one at a time: do their weights say what is lost?

    qv-lens run experiments/scores/edges.py                           # 20 facts

1. A fact that the model knows; its `count` value neurons by Eq. 9 or by the gradient, and the
   `count` best query neurons of these, at the last token through the stream, or at any token
   through attention.
2. Each edge is taken out: the query neuron is zeroed for that one value neuron, in a real pass.
3. Spearman's rho and Pearson's r of the predicted and the real loss of the value neuron's
   coefficient, and of the edge's weight and the real loss of log p (`qv.edge_effects`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from experiments.decide import NOT_MEASURED, Claim, Decide, Estimate, Verdict, decided
from experiments.models import STUDIED
from experiments.prompts import KnownFact, at_least
from qv_lens.attribution.edges import MEASURES, edge_effects, qv_graph
from qv_lens.attribution.effects import neuron_effects
from qv_lens.attribution.query import query_neurons
from qv_lens.attribution.value import value_neurons
from qv_lens.evaluation.intervals import UNBOUNDED
from qv_lens.models.lens import Lens
from qv_lens.plots.parts import COLOURS, laid_out
from qv_lens.runs.experiment import Once, directly

__all__ = ["CLAIMS", "GRID", "MEASURES", "Task", "figure", "rows"]

GRID = {
    "model": STUDIED,
    "fact": list(range(20)),
    "by": ["gradient", "Eq. 9"],
    "through": ["stream", "attention"],
}


@dataclass(frozen=True)
class Task:
    """One graph."""

    model: str
    """The model's name."""
    about: KnownFact = field(default_factory=KnownFact)
    """The fact."""
    by: Literal["gradient", "Eq. 9"] = "gradient"
    """How the value neurons are chosen."""
    through: Literal["stream", "attention"] = "stream"
    """Which way the query neurons act: at the last token alone, or at any."""
    count: int = 30
    """How many neurons of each kind."""

    def __post_init__(self) -> None:
        at_least(self, count=2)


def rows(task: Task, lens: Lens, once: Once = directly) -> pd.DataFrame:
    """One row: how the weights of the edges agree with what is lost without them."""
    fact = task.about.of(lens, once)
    trace = lens.trace(fact)
    value = (
        value_neurons(lens, trace, task.count, method="topk")
        if task.by == "Eq. 9"
        else neuron_effects(lens, trace, task.count)
    )
    query = query_neurons(lens, trace, value, task.count, through=task.through)
    graph = edge_effects(lens, trace, qv_graph(lens, trace, value, query))
    place = graph.nodes["position"]
    return pd.DataFrame(
        [
            {
                "text": fact.text,
                **graph.edges.attrs["agreement"],
                "edges": len(graph.edges),
                "elsewhere": float((place < place.max()).mean()),
            }
        ]
    )


def figure(frame: pd.DataFrame) -> go.Figure:
    """Spearman's rho of every graph, by how its value neurons were chosen and what its edges go
    through."""
    boxes = px.box(
        frame,
        x="through",
        y="spearman_logprob",
        color="by",
        points="all",
        color_discrete_sequence=COLOURS,
        labels={
            "through": "",
            "by": "value neurons by",
            "spearman_logprob": "Spearman's ρ with the loss of log p",
        },
    )
    return laid_out(boxes, "Do the weights of edges say what the answer loses without them?")


def agree(measure: str, through: str, least: float) -> Decide:
    """Weights of graphs of value neurons by gradient agree at least so well."""

    def decide(frame: pd.DataFrame) -> Verdict:
        some = frame[frame["through"] == through]
        by = some.pivot_table(index=["seed", "fact"], columns="by", values=measure)
        if "gradient" not in by:
            return NOT_MEASURED
        means = ", ".join(f"value neurons by {name} {mean:.3f}" for name, mean in by.mean().items())
        estimate = Estimate.of(by["gradient"], UNBOUNDED)
        kinds = f"{some['count'].iloc[0]} neurons of each kind"
        words = f"{means} (gradient {estimate.spread(digits=3)}, {estimate.cases} facts, {kinds})"
        return words, decided(estimate.shifted(-least))

    return decide


CLAIMS = (
    Claim(
        source="ours",
        words=(
            "an edge's weight says what log p loses without it (ρ at least 0.95): value neurons by "
            "gradient, query neurons at the last token"
        ),
        statistic="Spearman's ρ over the edges between the best value and query neurons",
        decide=agree("spearman_logprob", "stream", 0.95),
    ),
    Claim(
        source="ours",
        words="the same of query neurons at any token, through attention (ρ at least 0.85)",
        statistic="the same",
        decide=agree("spearman_logprob", "attention", 0.85),
    ),
)
