"""ACE, Figure 2: zeroing the 1% most important value neurons destroys recall; 1% at random does
not.

    qv-lens run experiments/ace/figure_2.py
    qv-lens run experiments/ace/figure_2.py --model EleutherAI/gpt-j-6B \\
        --set facts=MQuAKE-CF-3k-v2.json

1. Draw `prompts` facts of the category and as many of others (the task's seed); neurons are ranked
   on one half of the category, accuracy is measured on the other (`held_out=false`: ranked and
   measured on all of it, as the paper seems to).
2. Value neurons by I summed over the ranking prompts (Eq. 9), query neurons by Eq. 10 summed,
   random ones by the seed; beside them neurons by their effect on log p (`neuron_effects`, ours);
   `fraction` of the layer (or of the whole model, layer "all").
3. Zero them at all positions; accuracy, its drop in points and relative to the prompts that were
   right, change of log p.

Source: ACE, section 4 and Figure 2.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
import plotly.graph_objects as go

from experiments.ace import BY_EFFECT, NO_CODE
from experiments.decide import (
    OPEN,
    Claim,
    Estimate,
    Verdict,
    decided,
    minus,
    read_as,
    share_lost,
    share_of,
    together,
)
from experiments.models import STUDIED
from experiments.prompts import check_asked, drawn, pool, usual
from qv_lens.attribution.effects import neuron_effects
from qv_lens.attribution.query import query_neurons
from qv_lens.attribution.value import for_every_neuron, value_neurons
from qv_lens.errors import ConfigError
from qv_lens.evaluation.ablation import DROP, Answers, ablate, answers
from qv_lens.facts.records import Fact
from qv_lens.models.lens import Lens
from qv_lens.neurons import NeuronSet
from qv_lens.plots import sweep_heatmap
from qv_lens.runs.experiment import Once, directly

SETTINGS = {"fraction": 0.01, "prompts": 200}  # all that exist where there are fewer
GRID = {
    "model": STUDIED,
    # each category's most important layer (--set layer=24: a layer by number), and the whole model
    "layer": ["top", "all"],
    "category": ["nationality", "continent", "capital", "language"],
    "neurons": ["top", "effects", "random", "query"],
    # the ranking prompts are also the prompts asked (as in the paper, it seems), or one half ranks
    # and the other half is asked
    "held_out": [False, True],
    "seed": [0, 1, 2, 3, 4],
}
MEASURES = DROP


@dataclass(frozen=True)
class Task:
    """One set of neurons."""

    model: str
    """The model's name."""
    neurons: Literal["top", "effects", "random", "query"]
    """Value neurons by importance, neurons by their effect on log p, random ones, or query
    neurons."""
    layer: int | Literal["top", "all"] = "all"
    """A number, "top" (where the ranking prompts' importance is largest), or "all" for the whole
    model."""
    fraction: float = 0.01
    """Share of the layer's (or the model's) neurons."""
    seed: int = 0
    """Which facts, and which random neurons."""
    category: str = "sport"
    """One of ACE's categories."""
    prompts: int = 60
    """How many facts of the category, and of others."""
    held_out: bool = True
    """Whether the facts asked differ from those that rank the neurons."""
    facts: str = ""
    """A file of facts or edits (default: `prompts.usual`)."""

    def __post_init__(self) -> None:
        check_asked(self, every=False)
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction must be above 0 and at most 1, got {self.fraction}.")


@dataclass(frozen=True)
class Drawn:
    """What a seed draws."""

    ranking: tuple[Fact, ...]
    """Facts by which neurons are ranked."""
    groups: Mapping[str, tuple[Fact, ...]]
    """Facts that are asked, by group."""
    clean: Mapping[str, Answers]
    """What the clean model makes of them."""


def rows(task: Task, lens: Lens, once: Once = directly) -> pd.DataFrame:
    """group ('in category', 'off category'), count, how many of the prompts the model knows, clean,
    accuracy and the drops; NaN where there is nothing to zero (query neurons of a layer that feeds
    no value neuron)."""
    drawn = draw(lens, task, once)
    neurons = choose(lens, task, once)
    frame = ablate(lens, neurons, drawn.groups, drawn.clean)
    frame.insert(1, "prompts_asked", [len(facts) for facts in drawn.groups.values()])
    frame.insert(2, "prompts_known", [sum(drawn.clean[group].right) for group in drawn.groups])
    frame.insert(3, "count", len(neurons))
    layers = neurons.by_layer()
    return frame.assign(zeroed_layer=next(iter(layers)) if len(layers) == 1 else None)


def draw(lens: Lens, task: Task, once: Once = directly) -> Drawn:
    """Facts of the category and of others, by the task's seed."""
    return once(_draw, lens, task.category, task.prompts, task.held_out, task.facts, task.seed)


def _draw(lens: Lens, category: str, prompts: int, held_out: bool, source: str, seed: int) -> Drawn:
    source = usual(lens, source)
    facts = pool(source)
    inside = [fact for fact in facts if fact.category == category]
    outside = [fact for fact in facts if fact.category != category]
    if len(inside) < 2 or not outside:
        names = sorted({fact.category for fact in facts if fact.category})
        raise ConfigError(
            f"{len(inside)} facts of category {category!r} and {len(outside)} others. "
            + (
                f"Categories: {', '.join(names)}."
                if names
                else f"None in {source or 'the bundled world'} names its category: a JSON list of "
                "facts does, with the key 'category' (docs/data.md)."
            )
        )
    rng = random.Random(f"ablation:{seed}")
    inside = drawn(lens, source, inside, prompts, rng)
    outside = drawn(lens, source, outside, prompts, rng)
    ranking = inside[::2] if held_out else inside
    measured = inside[1::2] if held_out else inside
    groups = {"in category": tuple(measured), "off category": tuple(outside)}
    return Drawn(
        tuple(ranking), groups, {name: answers(lens, facts) for name, facts in groups.items()}
    )


def choose(lens: Lens, task: Task, once: Once = directly) -> NeuronSet:
    """The neurons of one cell."""
    ranking = draw(lens, task, once).ranking
    value = once(_value, lens, ranking)
    layer = task.layer
    if layer == "top":
        layer = int(value.frame.groupby("layer")["score"].sum().idxmax())
    scope = value if layer == "all" else value.layer(lens.check_layer(int(layer)))
    count = max(1, round(task.fraction * len(scope)))
    if task.neurons == "top":
        return scope.top(count)
    if task.neurons == "random":
        places = random.Random(f"random:{task.seed}:{task.layer}").sample(range(len(scope)), count)
        return replace(scope, frame=scope.frame.iloc[sorted(places)].reset_index(drop=True))
    if task.neurons == "effects":
        effects = once(_effects, lens, ranking)
        return (effects if layer == "all" else effects.layer(int(layer))).top(count)
    query = once(_query, lens, ranking)
    return (query if layer == "all" else query.layer(int(layer))).top(count)


def _value(lens: Lens, facts: tuple[Fact, ...]) -> NeuronSet:
    return value_neurons(lens, list(facts), None, over="set", method=for_every_neuron(lens))


def _effects(lens: Lens, facts: tuple[Fact, ...]) -> NeuronSet:
    """Every neuron's effect on log p of the answers, summed over the tokens and prompts."""
    return neuron_effects(lens, list(facts), None, over="set", positions="all")


def _query(lens: Lens, facts: tuple[Fact, ...]) -> NeuronSet:
    """Query neurons of each prompt's own value neurons, added up over the prompts; those that feed
    them (above 0)."""
    trace = lens.trace(list(facts))
    query = query_neurons(lens, trace, value_neurons(lens, trace, 300), None, over="set")
    return query.where(lambda frame: frame["score"] > 0)


def figure(frame: pd.DataFrame) -> go.Figure:
    """Share of the right answers lost: layers across; categories, groups and neurons down. Over
    other prompts than rank the neurons, where these were asked."""
    apart = frame[frame["held_out"]]
    shown = apart if len(apart) else frame
    return sweep_heatmap(
        shown.assign(lost=100 * shown["drop_relative"]),
        ["category", "group", "neurons"],
        "layer",
        "lost",
        "Right answers lost when 1% of the neurons are zeroed (ACE, Figure 2)",
        "% of them",
    )


def loses_more_than_half(frame: pd.DataFrame) -> Verdict:
    """In the best layer, as the caption has it, and in every category: more than half is lost, and
    more than with random neurons or off category. The whole model is told beside it."""
    lines, verdicts = [], []
    for (layer, apart), scope in frame.groupby(["layer", "held_out"]):
        where = {"all": "whole model", "top": "best layer"}.get(str(layer), f"layer {layer}")
        where += ", other prompts than rank" if apart else ", the prompts that rank"
        categories = {name: _of_category(rows) for name, rows in scope.groupby("category")}
        shares = "; ".join(f"{name} {words}" for name, (words, _) in categories.items())
        lines.append(f"{where}: {shares}")
        if layer == "top":
            verdicts += [verdict for _, verdict in categories.values()]
    return "<br>".join(lines), together(verdicts) if verdicts else OPEN


def _of_category(rows: pd.DataFrame) -> Verdict:
    top, words = share_lost_of(rows, "top", "in category")
    random, random_words = share_lost_of(rows, "random", "in category")
    outside, outside_words = share_lost_of(rows, "top", "off category")
    return (
        f"{words}, at random {random_words}, of other categories {outside_words}",
        together(
            [decided(top.shifted(-0.5)), decided(minus(top, random)), decided(minus(top, outside))]
        ),
    )


def share_lost_of(rows: pd.DataFrame, neurons: str, group: str) -> tuple[Estimate, str]:
    """The share of right answers lost, and in words.

    Its interval is that over the prompts of one seed, for another seed asks the same facts again;
    or that over the seeds' draws (Student's t), where it is wider."""
    rows = rows[(rows["neurons"] == neurons) & (rows["group"] == group)]
    if rows.empty:
        return Estimate(float("nan"), float("nan"), float("nan")), "not measured"
    right = rows["clean"] * rows["prompts_asked"]
    sums = rows.assign(right=right, gone=right * rows["drop_relative"]).groupby("seed")
    sums = sums[["gone", "right"]].sum()
    lost_sum, right_sum = sums.mean()
    estimate, prompts = share_lost(lost_sum, right_sum), f"{right_sum:.0f} prompts"
    if len(sums) > 1:
        draws = Estimate.of((sums["gone"] / sums["right"]).clip(lower=0))
        low, high = max(estimate[1:3], draws[1:3], key=lambda ends: ends[1] - ends[0])
        estimate, prompts = Estimate(estimate.mean, low, high), f"{prompts}, {len(sums)} seeds"
    return estimate, share_of(estimate, prompts)


CLAIMS = (
    Claim(
        source="ACE, Figure 2",
        words=(
            "zeroing 1% important neurons costs over 90% of accuracy; 1% at random 9.47% and 8.19%"
        ),
        statistic=(
            "share of right answers lost, category by category: above half, and more than at random "
            "and of other categories; in the best layer"
        ),
        decide=loses_more_than_half,
        release=NO_CODE,
    ),
    Claim(
        source="ACE, Figure 2",
        words=f"the same, {BY_EFFECT}",
        statistic="the same, neurons by their effect, summed over tokens and prompts",
        decide=read_as("neurons", {"effects": "top"}, loses_more_than_half),
    ),
)
