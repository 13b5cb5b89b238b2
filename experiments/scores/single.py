"""Neurons zeroed one at a time: which score says what the model loses?

    qv-lens run experiments/scores/single.py                          # 50 facts: an hour of one core
    qv-lens run experiments/scores/single.py --set 'fact=[0,1,2]'
    qv-lens run experiments/scores/single.py --model MODEL            # a name or a folder

1. A fact that the model knows; every FFN neuron of three layers, and `others` of the other layers by
   chance.
2. Truth: log p of the answer less log p with the neuron zeroed at the last token, in a real pass.
3. Of each score over these neurons: Spearman's rho and Pearson's r with the truth, and the share of
   the truth's `top` best that are among its own."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import torch

from experiments.decide import NOT_MEASURED, Claim, Estimate, Verdict, decided, difference, rounded
from experiments.models import STUDIED
from experiments.prompts import KnownFact, at_least
from qv_lens.attribution.effects import neuron_effects
from qv_lens.attribution.query import query_neurons
from qv_lens.attribution.value import value_neurons
from qv_lens.evaluation.intervals import UNBOUNDED
from qv_lens.facts.records import Fact
from qv_lens.models.lens import Lens
from qv_lens.models.one_neuron import logp_with_each
from qv_lens.neurons import NeuronSet
from qv_lens.plots.parts import COLOURS, laid_out
from qv_lens.runs.experiment import Once, directly

__all__ = ["CLAIMS", "GRID", "MEASURES", "Task", "figure", "rows"]

GRID = {"model": STUDIED, "fact": list(range(50))}
MEASURES = ("spearman", "pearson", "overlap")
#: where the three layers lie whose neurons are all zeroed
DEPTHS = (0.25, 0.5, 1.0)
#: value neurons whose activation Eq. 10 explains
EXPLAINED = 300
#: a rank correlation from which on a score ranks as the truth does
LEAST = 0.95


@dataclass(frozen=True)
class Task:
    """One fact."""

    model: str
    """The model's name."""
    about: KnownFact = field(default_factory=KnownFact)
    """The fact."""
    others: int = 1_000
    """How many neurons of the other layers."""
    top: int = 100
    """How many of the best are compared."""

    def __post_init__(self) -> None:
        at_least(self, others=0, top=1)


def rows(task: Task, lens: Lens, once: Once = directly) -> pd.DataFrame:
    """One row per score."""
    fact = task.about.of(lens, once)
    truth = zeroed(lens, fact, drawn(lens, fact, task.others))
    best = set(truth.nlargest(task.top).index)
    cells = []
    for name, every in scores(lens, fact, truth.index).items():
        score = every.reindex(truth.index).fillna(0.0)
        overlap = len(best & set(score.nlargest(task.top).index)) / task.top
        spearman, pearson = score.rank().corr(truth.rank()), score.corr(truth)
        cells.append((fact.text, name, len(truth), spearman, pearson, overlap))
    return pd.DataFrame(cells, columns=["text", "score", "neurons", *MEASURES])


def drawn(lens: Lens, fact: Fact, others: int) -> dict[int, list[int]]:
    """Every neuron of three layers, and `others` by chance, by layer."""
    whole = [round(depth * (lens.n_layers - 1)) for depth in DEPTHS]
    every = [(layer, neuron) for layer in range(lens.n_layers) for neuron in range(lens.d_mlp)]
    rest = [unit for unit in every if unit[0] not in whole]
    units = [(layer, neuron) for layer in whole for neuron in range(lens.d_mlp)]
    units += random.Random(fact.text).sample(rest, min(others, len(rest)))
    return NeuronSet.of(units).by_layer()


def zeroed(lens: Lens, fact: Fact, neurons_of: dict[int, list[int]]) -> pd.Series:
    """log p lost without each neuron at the last token, by (layer, neuron)."""
    prompt = lens.tokenize(fact)[0]
    token = torch.tensor(lens.answer_ids(fact)[:1])
    clean = lens.logprob(fact)
    lost: dict[tuple[int, int], float] = {}
    for layer, neurons in neurons_of.items():
        zeros = torch.zeros(len(neurons))
        logp = logp_with_each(
            lens, prompt, layer, prompt.last, torch.tensor(neurons), zeros, token
        )[:, 0]
        lost |= zip([(layer, neuron) for neuron in neurons], (clean - logp).tolist(), strict=True)
    return pd.Series(lost)


def scores(lens: Lens, fact: Fact, zeroed_ones: pd.Index) -> dict[str, pd.Series]:
    """Every score, by (layer, neuron); 'random' an order of the zeroed ones."""
    trace = lens.trace(fact)
    value = value_neurons(lens, trace, None, method="moments")
    sets = {
        "Eq. 9": value,
        "Eq. 9, first order": value_neurons(lens, trace, None, method="first_order"),
        "Eq. 10": query_neurons(lens, trace, value.top(EXPLAINED), None),
        "gradient": neuron_effects(lens, fact, None),
        "RelP": neuron_effects(lens, fact, None, method="relp"),
        "integrated": neuron_effects(lens, fact, None, method="integrated", steps=8),
    }
    shuffled = zeroed_ones.to_list()
    random.Random(fact.text).shuffle(shuffled)
    chance = pd.Series(range(len(shuffled)), pd.MultiIndex.from_tuples(shuffled), dtype=float)
    return {
        name: neurons.frame.set_index(["layer", "neuron"])["score"]
        for name, neurons in sets.items()
    } | {"random": chance}


def figure(frame: pd.DataFrame) -> go.Figure:
    """Spearman's rho of every fact, by score."""
    order = frame.groupby("score")["spearman"].mean().sort_values(ascending=False).index
    boxes = px.box(
        frame,
        x="score",
        y="spearman",
        points="all",
        color_discrete_sequence=COLOURS,
        category_orders={"score": list(order)},
        labels={"score": "", "spearman": "Spearman's ρ with the loss of log p"},
    )
    return laid_out(boxes, "Which score says what the model loses without a neuron?")


def by_fact(frame: pd.DataFrame, measure: str = "spearman") -> pd.DataFrame:
    """A measure, one column per score; of rows over several numbers of neurons those of the
    most."""
    most = frame[frame["neurons"] == frame["neurons"].max()]
    return most.pivot_table(index=["seed", "fact"], columns="score", values=measure)


def gradient_agrees(frame: pd.DataFrame) -> Verdict:
    table = by_fact(frame)
    means = ", ".join(
        f"{name} {rounded(mean, 3):.3f}"
        for name, mean in table.mean().sort_values(ascending=False).items()
    )
    estimate = Estimate.of(table["gradient"], UNBOUNDED)
    return (
        f"{means}; gradient {estimate.spread(digits=3)}, {len(table)} facts",
        decided(estimate.shifted(-LEAST)),
    )


def gradient_above_eq_9(frame: pd.DataFrame) -> Verdict:
    gaps: dict[str, Estimate] = {}
    for measure in MEASURES:
        table = by_fact(frame, measure)
        if not {"gradient", "Eq. 9"} <= set(table):
            return NOT_MEASURED
        gaps[measure] = difference(table["gradient"], table["Eq. 9"], UNBOUNDED)
    words = ", ".join(
        f"{measure} {gap.mean:+.2f} {gap.spread(digits=2)}" for measure, gap in gaps.items()
    )
    decisive = gaps["spearman"]
    return f"{words}, {decisive.cases} facts", decided(decisive)


CLAIMS = (
    Claim(
        source="ours",
        words=f"gradient × activation ranks neurons as zeroing each of them does (ρ at least {LEAST})",
        statistic="Spearman's ρ of each score with log p lost, every neuron of three layers and 1,000 others",
        decide=gradient_agrees,
    ),
    Claim(
        source="ours",
        words="gradient × activation says more of what is lost than Eq. 9",
        statistic="gradient − Eq. 9, paired by fact; decided by Spearman's ρ",
        decide=gradient_above_eq_9,
    ),
)
