"""ACE, Tables 6 and 7: query, value and shared neurons with the tokens that they promote.

    qv-lens run experiments/ace/table_6_7.py
    qv-lens run experiments/ace/table_6_7.py --model EleutherAI/gpt-j-6B \\
        --set facts=MQuAKE-CF-3k-v2.json

MQuAKE-CF-3k-v2.json is the release's file.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from experiments.ace import BY_EFFECT, NO_CODE
from experiments.decide import Claim, Decide, Verdict, decided, difference, points, share
from experiments.models import STUDIED
from experiments.prompts import asked, at_least, check_asked
from qv_lens.attribution.effects import neuron_effects
from qv_lens.attribution.projection import interpretable, vocabulary
from qv_lens.attribution.query import query_neurons
from qv_lens.attribution.value import value_neurons
from qv_lens.evaluation.known_cases import knowledge
from qv_lens.models.lens import Lens
from qv_lens.plots import vocabulary_table
from qv_lens.plots.parts import quoted

SETTINGS = {"category": "sport", "prompts": 100, "top": 10}
GRID = {"model": STUDIED, "seed": [0]}
MEASURES = ("coefficient", "score", "interpretable")
#: neurons of each role per prompt that count (ACE's notebooks)
TOP = 300


@dataclass(frozen=True)
class Task:
    """Prompts of a category, each by itself."""

    model: str
    """The model's name."""
    category: str = "sport"
    """One of ACE's categories, or 'all'."""
    prompts: int = 100
    """How many prompts are drawn."""
    top: int = 10
    """Neurons of each role."""
    seed: int = 0
    """Which ones."""
    facts: str = ""
    """A file or dataset of facts or chains (default: `prompts.usual`)."""

    def __post_init__(self) -> None:
        check_asked(self)
        at_least(self, top=1)


def rows(task: Task, lens: Lens) -> pd.DataFrame:
    """Per `prompt`, the best `top` neurons per `role`: `layer, neuron, coefficient, score, promoted,
    interpretable` (the answer is among the ten promoted tokens).

    Roles: 'query', 'value', 'shared' (among the 300 best of both), 'effect' (by the effect on log
    p)."""
    parts = []
    facts = asked(lens, task)
    for i, fact in enumerate(facts):
        trace = lens.trace(fact)
        value = value_neurons(lens, trace, TOP)
        query = query_neurons(lens, trace, value, TOP)
        roles = {
            "query": query,
            "value": value,
            "shared": value & query,
            "effect": neuron_effects(lens, fact, TOP),
        }
        for role, neurons in roles.items():
            best = neurons.top(task.top)
            tokens = vocabulary(lens, best)
            part = tokens[["layer", "neuron", "coefficient", "score"]].assign(
                role=role,
                promoted=tokens["promoted"].map(quoted),
                interpretable=interpretable(lens, best, fact.answer).to_numpy(),
                found=len(neurons),
                prompt=i,
                text=fact.text,
                answer=fact.answer,
            )
            parts.append(part)
    return pd.concat(parts, ignore_index=True).assign(**knowledge(lens, facts))


def figure(frame: pd.DataFrame) -> go.Figure:
    """The neurons of the first prompt."""
    return vocabulary_table(frame)


def readable(role_read: str) -> Decide:
    def decide(frame: pd.DataFrame) -> Verdict:
        table = frame.pivot_table(
            index="prompt", columns="role", values="interpretable", aggfunc="mean"
        )
        gap = difference(table[role_read], table["query"])
        statistic = ", ".join(f"{role} {share(value)}" for role, value in table.mean().items())
        return (
            f"{statistic} of the ten best hold the answer ({role_read} − query {points(gap)})",
            decided(gap),
        )

    return decide


CLAIMS = (
    Claim(
        source="ACE, Tables 6 and 7",
        words="query neurons are not interpretable, value neurons are",
        statistic="share of the ten best whose promoted tokens hold the answer, value minus query",
        decide=readable("value"),
        release=NO_CODE,
    ),
    Claim(
        source="ACE, Tables 6 and 7",
        words=f"the same of value neurons {BY_EFFECT}",
        statistic="the same, neurons of the largest effects minus query neurons",
        decide=readable("effect"),
    ),
    Claim(
        source="ACE, Appendix D",
        words="neurons that are both are highly interpretable",
        statistic="the same, shared minus query",
        decide=readable("shared"),
        release=NO_CODE,
    ),
)
