"""The best neurons of a ranking zeroed together: which ranking loses the answer with the fewest?

    qv-lens run experiments/scores/sets.py                            # 50 facts: an hour of one core
    qv-lens run experiments/scores/sets.py --set 'ranking=["gradient"]' --set 'fact=[0,1,2]'
    qv-lens run experiments/scores/sets.py --set 'keep=[true]' \\
        --set 'ranking=["Eq. 9", "gradient", "RelP", "random"]'       # all other neurons zeroed

1. A fact that the model knows, and a ranking of its FFN neurons at the last token. A ranking "in
   rounds" is computed again without the neurons already taken; with candidates, those that look
   best in a round are really taken out, each alone, and the one that costs most goes.
2. The best 1, 3, 10, 30 and 100 are zeroed there, all together, in a real pass; or, with `keep`, all
   but so many hundreds and thousands.
3. log p of the answer's first token, and whether it is still the likeliest."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go

from experiments.decide import NOT_MEASURED, Claim, Decide, Verdict, decided, difference
from experiments.models import STUDIED
from experiments.prompts import KnownFact
from qv_lens.attribution.effects import neuron_effects
from qv_lens.attribution.query import query_neurons
from qv_lens.attribution.value import value_neurons
from qv_lens.errors import ConfigError, unknown
from qv_lens.evaluation.faithfulness import RANDOM, faithfulness
from qv_lens.evaluation.intervals import UNBOUNDED
from qv_lens.facts.records import Fact
from qv_lens.models.lens import Lens
from qv_lens.neurons import NeuronSet
from qv_lens.plots import removal_curve
from qv_lens.runs.experiment import Once, directly

__all__ = ["CLAIMS", "GRID", "MEASURES", "Task", "figure", "rows"]

Ranking = Callable[[Lens, Fact], NeuronSet]
#: the hundred best, or thirty of a ranking that is computed again after each one
RANKINGS: Mapping[str, Ranking] = {
    "Eq. 9": lambda lens, fact: value_neurons(lens, fact, 100, method="topk"),
    "Eq. 9, norm full": lambda lens, fact: value_neurons(
        lens, fact, 100, norm="full", method="topk"
    ),
    "Eq. 10": lambda lens, fact: query_neurons(
        lens, fact, value_neurons(lens, fact, 300, method="topk"), 100
    ),
    "gradient": lambda lens, fact: neuron_effects(lens, fact, 100),
    "RelP": lambda lens, fact: neuron_effects(lens, fact, 100, method="relp"),
    "integrated": lambda lens, fact: neuron_effects(lens, fact, 100, method="integrated", steps=8),
    "gradient, rounds of 10": lambda lens, fact: neuron_effects(lens, fact, 100, rounds=10),
    "gradient, rounds of 1": lambda lens, fact: neuron_effects(lens, fact, 30, rounds=30),
    "RelP, rounds of 10": lambda lens, fact: neuron_effects(
        lens, fact, 100, method="relp", rounds=10
    ),
    "RelP, rounds of 1": lambda lens, fact: neuron_effects(
        lens, fact, 30, method="relp", rounds=30
    ),
    "integrated, rounds of 10": lambda lens, fact: neuron_effects(
        lens, fact, 30, method="integrated", steps=4, rounds=3
    ),
    "gradient, rounds of 1, 16 candidates": lambda lens, fact: neuron_effects(
        lens, fact, 30, rounds=30, candidates=16
    ),
}
#: every neuron, for what is kept alone
EVERY: Mapping[str, Ranking] = {
    "Eq. 9": lambda lens, fact: value_neurons(lens, fact, None, method="moments"),
    "gradient": lambda lens, fact: neuron_effects(lens, fact, None),
    "RelP": lambda lens, fact: neuron_effects(lens, fact, None, method="relp"),
}
GRID = {"model": STUDIED, "fact": list(range(50)), "ranking": [*RANKINGS, RANDOM]}
MEASURES = ("logprob", "clean", "right")
#: how many neurons are taken out, and how many are kept alone
OUT = (1, 3, 10, 30, 100)
KEPT = (100, 1_000, 5_000, 20_000)
#: the rankings of the figure, which has room for so many
DRAWN = (
    "Eq. 9",
    "Eq. 10",
    "gradient",
    "RelP",
    "gradient, rounds of 10",
    "gradient, rounds of 1",
    "RelP, rounds of 1",
    RANDOM,
)
#: random orders of each fact
ORDERS = 2


@dataclass(frozen=True)
class Task:
    """One fact and one ranking."""

    model: str
    """The model's name."""
    about: KnownFact = field(default_factory=KnownFact)
    """The fact."""
    ranking: str = "gradient"
    """One of `RANKINGS`, or 'random'."""
    keep: bool = False
    """Whether all but the best are zeroed."""

    def __post_init__(self) -> None:
        if self.ranking not in (*RANKINGS, RANDOM):
            raise unknown("Ranking", self.ranking, (*RANKINGS, RANDOM))
        if self.keep and self.ranking not in (*EVERY, RANDOM):
            raise ConfigError(
                f"keep needs a ranking of every neuron, {', '.join((*EVERY, RANDOM))}; got "
                f"{self.ranking!r}."
            )


def rows(task: Task, lens: Lens, once: Once = directly) -> pd.DataFrame:
    """`qv.faithfulness`, a row for each size (and random order), with the seconds that the ranking
    took."""
    fact = task.about.of(lens, once)
    rankings = EVERY if task.keep else RANKINGS
    sizes = KEPT if task.keep else OUT
    begin = time.perf_counter()
    ranked = {} if task.ranking == RANDOM else {task.ranking: rankings[task.ranking](lens, fact)}
    seconds = time.perf_counter() - begin
    # each fact has orders of its own
    seed = random.Random(f"{task.about.seed}:{fact.text}").getrandbits(32)
    frame = faithfulness(
        lens, fact, ranked, sizes, keep=task.keep, seeds=0 if ranked else ORDERS, seed=seed
    )
    frame = frame.rename(columns={"seed": "order"}).drop(columns=["prompt", "ranking", "kept"])
    return frame.assign(text=fact.text, seconds=seconds, units=lens.n_layers * lens.d_mlp)


def figure(frame: pd.DataFrame) -> go.Figure:
    """The removal curves, the mean over the facts; of a run in which all others are zeroed, what is
    left then."""
    drawn = frame[frame["ranking"].isin(DRAWN)]
    removed = drawn[~drawn["keep"]] if (~drawn["keep"]).any() else drawn
    facts = removed["fact"].nunique()
    removed = removed.assign(of=f"{facts} facts; hollow: most lost")
    removed = removed.rename(columns={"keep": "kept"})
    mean = removed.groupby(["ranking", "of", "kept", "k"], sort=False).agg(
        logprob=("logprob", "mean"), clean=("clean", "mean"), right=("right", "mean"),
        said=("said", "first"),
    )  # fmt: skip
    return removal_curve(
        mean.reset_index().assign(seed=0), "Without its best neurons, by ranking", by="of"
    )


def losses(frame: pd.DataFrame, k: int) -> pd.DataFrame:
    """log p lost (nats) at one size, one column per ranking, of rows in which the best are taken
    out, or of such in which they are kept."""
    out = frame[frame["k"] == k]
    return out.assign(lost=out["clean"] - out["logprob"]).pivot_table(
        index=["seed", "fact"], columns="ranking", values="lost"
    )


def loses_more(k: int, first: str, second: str, times: float = 1.0) -> Decide:
    """The k best of `first` cost more than so many times what the k best of `second` do."""

    def decide(frame: pd.DataFrame) -> Verdict:
        table = losses(frame[~frame["keep"]], k)
        if not {first, second} <= set(table):
            return NOT_MEASURED
        pair = table[[first, second]].dropna()
        means = ", ".join(
            f"{name} {mean:.1f}" for name, mean in pair.mean().sort_values(ascending=False).items()
        )
        gap = difference(pair[first], times * pair[second], UNBOUNDED)
        factor = pair[first].mean() / pair[second].mean()
        scaled = f"{times:g} × {second}" if times != 1 else second
        return (
            f"{means} nats, {factor:.2f} times ({first} − {scaled} {gap.mean:+.1f} {gap.spread()}, "
            f"{gap.cases} facts)",
            decided(gap),
        )

    return decide


CLAIMS = (
    Claim(
        source="ours",
        words="the gradient computed again after each neuron finds thirty that cost more than 1.8 times what RelP's thirty do",
        statistic="log p lost without thirty neurons together, paired by fact",
        decide=loses_more(30, "gradient, rounds of 1", "RelP", 1.8),
    ),
    Claim(
        source="ours",
        words="thirty neurons by gradient × activation cost more than thirty by Eq. 9",
        statistic="the same",
        decide=loses_more(30, "gradient", "Eq. 9"),
    ),
    Claim(
        source="ours",
        words="thirty neurons by RelP cost more than thirty by gradient × activation",
        statistic="the same",
        decide=loses_more(30, "RelP", "gradient"),
    ),
)
