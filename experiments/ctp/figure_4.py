"""CTP, Figure 4: importance of the nodes of T+ by layer.

    qv-lens run experiments/ctp/figure_4.py

On a real model: --model NAME --set facts=FILE (facts).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from experiments.decide import Claim, Verdict, decided, difference, share, together
from experiments.models import STUDIED
from experiments.prompts import APART, asked, at_least, check_asked, pool
from qv_lens.attribution.paths import NodeScore, transmission_paths
from qv_lens.errors import ConfigError
from qv_lens.evaluation.intervals import UNBOUNDED
from qv_lens.evaluation.known_cases import knowledge
from qv_lens.facts.records import EditRequest, Fact
from qv_lens.models.lens import Lens
from qv_lens.plots import node_lines

SETTINGS = {"prompts": 100}
GRID = {
    "model": STUDIED,
    # each a sample of what the claims are about, as many as decide anything
    "category": ["all", *APART],
    # as CTP's code (z-scored within each layer); the gradient's own size, which compares layers
    "score": ["mean_abs_z", "norm"],
}
MEASURES = ("importance", "count")
#: what the release does
SCALED = (
    "the code's z-scores are scaled within each layer, by which no layer can be far below another"
)


@dataclass(frozen=True)
class Task:
    """CTP's nodes for edits of `prompts` facts, each to the answer of another fact of its relation.
    `score`: as `transmission_paths` takes it; 'mean_abs_z' (CTP's code) is scaled within each
    layer, so layers compare by 'norm'."""

    model: str
    category: str = "all"
    prompts: int = 100
    top: int = 15
    score: NodeScore = "mean_abs_z"
    seed: int = 0
    facts: str = ""

    def __post_init__(self) -> None:
        check_asked(self)
        at_least(self, top=1)


def edits_of(facts: list[Fact], task: Task) -> list[EditRequest]:
    """Each fact edited to another object of its relation, drawn by the seed; facts whose relation
    has only one object are left out."""
    answers, rng = (
        {(f.relation, f.answer) for f in pool(task.facts)},
        random.Random(f"nodes:{task.seed}"),
    )
    others = [
        sorted({a for r, a in answers if r == fact.relation} - {fact.answer}) for fact in facts
    ]
    requests = [
        fact.to(rng.choice(other)) for fact, other in zip(facts, others, strict=True) if other
    ]
    if not requests:
        raise ConfigError(
            "No two of the facts share a relation and differ in their answers: there is nothing to "
            "edit them to."
        )
    return requests


def rows(task: Task, lens: Lens) -> pd.DataFrame:
    """`layer, kind ('key', 'value'), path ('T+', 'T-', ''), importance` (mean score of the nodes)
    and their `count`."""
    edits = edits_of(asked(lens, task), task)
    frame = transmission_paths(lens, edits, task.top, score=task.score)
    importance = (
        frame.groupby(["layer", "kind", "path"])["score"].agg(["mean", "size"]).reset_index()
    )
    return importance.rename(columns={"mean": "importance", "size": "count"}).assign(
        **knowledge(lens, [edit.fact for edit in edits])
    )


def figure(frame: pd.DataFrame) -> go.Figure:
    """A line per kind of node, over all prompts together where they were asked."""
    together = frame[frame["category"] == "all"]
    return node_lines(together if len(together) else frame, "Nodes of T+ by layer (CTP, Figure 4)")


def nodes_by_layer(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Mean importance of T+ by layer (columns) for each group of facts (rows: the categories where
    there are any, else all facts), keys and values apart as the figure has them."""
    rows = frame[(frame["path"] == "T+") & (frame["score"] == "norm")]
    apart = rows[rows["category"] != "all"]
    rows = apart if len(apart) else rows
    return {
        str(kind): of.pivot_table(index=["category", "seed"], columns="layer", values="importance")
        for kind, of in rows.groupby("kind")
    }


def all_layers(frame: pd.DataFrame) -> Verdict:
    """The smallest layer against a tenth of the largest, keys and values each."""
    sentences, verdicts = [], []
    for kind, table in nodes_by_layer(frame).items():
        means = table.mean()
        small, large = means.idxmin(), means.idxmax()
        gap = difference(table[small], table[large] / 10, UNBOUNDED)
        sentences.append(
            f"{kind}s: smallest layer {small:g} at {share(means[small] / means[large])} of layer "
            f"{large:g}"
        )
        verdicts.append(decided(gap))
    return f"{'; '.join(sentences)} ({len(table)} groups of facts)", together(verdicts)


def early_over_late(frame: pd.DataFrame) -> Verdict:
    """Middle layers over early ones and these over late ones, keys and values each."""
    sentences, verdicts = [], []
    for kind, table in nodes_by_layer(frame).items():
        layers = table.shape[1]
        # the paper's 1 to 4, 4 to 18 and 28 to 32 of 32
        edges = [round(layer * layers / 32) for layer in (4, 18, 27)]
        early, middle, late = (
            table.iloc[:, first:end].mean(axis=1)
            for first, end in ((0, edges[0]), (edges[0], edges[1]), (edges[2], layers))
        )
        largest = table.mean().max()
        shares = ", ".join(
            f"{name} {share(part.mean() / largest)}"
            for name, part in (("early", early), ("middle", middle), ("late", late))
        )
        sentences.append(f"{kind}s: {shares} of the largest layer's")
        gaps = difference(middle, early, UNBOUNDED), difference(early, late, UNBOUNDED)
        verdicts += [decided(gap) for gap in gaps]
    return f"{'; '.join(sentences)} ({len(table)} groups of facts)", together(verdicts)


CLAIMS = (
    Claim(
        source="CTP, Figure 4",
        words="nodes of all layers contribute",
        statistic=(
            "importance of T+ (norm of the gradient, not z-scored) by layer, keys and values each: "
            "the smallest above a tenth of the largest, over categories of facts"
        ),
        decide=all_layers,
        release=SCALED,
    ),
    Claim(
        source="CTP, Figure 4",
        words="middle layers contribute most, early ones more than late ones",
        statistic=(
            "means over the paper's 1 to 4, 4 to 18 and 28 to 32 of 32 layers, scaled, keys and "
            "values each, over categories of facts"
        ),
        decide=early_over_late,
        release=SCALED,
    ),
)
