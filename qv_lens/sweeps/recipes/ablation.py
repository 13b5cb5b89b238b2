"""The ablation sweep: layers x {top, random, query} neurons x fractions x seeds -> accuracy in and off a category.

1. Draw `prompts` facts of the category and as many of others (the task's seed); neurons are ranked on one half of the
   category, accuracy is measured on the other (`held_out=false`: ranked and measured on all of it, as the paper seems to).
2. Value neurons by I summed over the ranking prompts (Eq. 9), query neurons by Eq. 10 summed, random ones by the seed;
   `fraction` of the layer (or of the whole model, layer "all").
3. Zero them at all positions; accuracy, its drop in points and relative to the prompts that were right, change of log p.

Source: ACE, section 4 and Figure 2.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from math import nan
from typing import Literal

import pandas as pd
import plotly.graph_objects as go

from qv_lens.attribution.query import query_neurons
from qv_lens.attribution.value import value_neurons
from qv_lens.case_study import DROP, answers, drop
from qv_lens.errors import ConfigError
from qv_lens.facts.records import Fact
from qv_lens.interventions import Zero
from qv_lens.models.lens import Lens
from qv_lens.neurons import NeuronSet
from qv_lens.plots import sweep_heatmap
from qv_lens.sweeps.config import Recipe
from qv_lens.sweeps.engine import Context
from qv_lens.sweeps.recipes.material import check_asked, pool
from qv_lens.world.models import check_world


@dataclass(frozen=True)
class Ablation:
    """One cell of the sweep. `layer`: a number, "top" (where the ranking prompts' importance is largest), or "all" for the whole
    model. `facts`: a file of facts or edits
    (default: the bundled world)."""

    model: str
    neurons: Literal["top", "random", "query"]
    layer: int | Literal["top", "all"] = "all"
    fraction: float = 0.01
    seed: int = 0
    category: str = "sport"
    prompts: int = 60
    held_out: bool = True
    facts: str = ""

    def __post_init__(self) -> None:
        check_asked(self, every=False)
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction must be above 0 and at most 1, got {self.fraction}.")


@dataclass(frozen=True)
class Drawn:
    """What a seed draws: facts to rank on, and to measure on, with what the clean model makes of them."""

    ranking: list[Fact]
    groups: dict[str, list[Fact]]
    clean: dict[str, tuple[list[bool], list[float]]]


def ablate(task: Ablation, context: Context) -> pd.DataFrame:
    """The rows of one cell: group ('in category', 'off category'), count, how many of the prompts the model knows, clean,
    accuracy and the drops; NaN where there is nothing to zero (query neurons of a layer that feeds no value neuron)."""
    lens = context.lens(task.model)
    key = (task.category, task.prompts, task.held_out, task.facts, task.seed)
    drawn = context.once(("drawn", key), lambda: draw(lens, task))
    neurons = choose(lens, task, drawn, context)
    lost = {group: (nan,) * len(DROP) for group in drawn.groups}
    if len(neurons):
        with lens.intervene(Zero(neurons)):
            lost = {group: drop(drawn.clean[group], answers(lens, facts)) for group, facts in drawn.groups.items()}
    layers = neurons.by_layer()
    rows = [(group, len(facts), sum(drawn.clean[group][0]), len(neurons), *lost[group]) for group, facts in drawn.groups.items()]
    frame = pd.DataFrame(rows, columns=["group", "prompts_asked", "prompts_known", "count", *DROP])
    return frame.assign(zeroed_layer=next(iter(layers)) if len(layers) == 1 else None)


def draw(lens: Lens, task: Ablation) -> Drawn:
    """Facts of the category and of others, by the task's seed."""
    if not task.facts:
        check_world(lens)
    facts = pool(task.facts)
    inside, outside = [f for f in facts if f.category == task.category], [f for f in facts if f.category != task.category]
    if len(inside) < 2 or not outside:
        names = sorted({f.category for f in facts if f.category})
        raise ConfigError(
            f"{len(inside)} facts of category {task.category!r} and {len(outside)} others. Categories: {', '.join(names)}."
        )
    rng = random.Random(f"ablation:{task.seed}")
    inside, outside = (rng.sample(facts, min(task.prompts, len(facts))) for facts in (inside, outside))
    ranking, measured = (inside[::2], inside[1::2]) if task.held_out else (inside, inside)
    groups = {"in category": measured, "off category": outside}
    return Drawn(ranking, groups, {name: answers(lens, facts) for name, facts in groups.items()})


def choose(lens: Lens, task: Ablation, drawn: Drawn, context: Context) -> NeuronSet:
    """The neurons of one cell."""
    key = (task.category, task.prompts, task.held_out, task.facts, task.seed)
    value = context.once(("value", key), lambda: value_neurons(lens, drawn.ranking, None, over="set"))
    layer = task.layer
    if layer == "top":
        layer = int(value.frame.groupby("layer")["score"].sum().idxmax())
    scope = value if layer == "all" else value.layer(lens.check_layer(int(layer)))
    count = max(1, round(task.fraction * len(scope)))
    if task.neurons == "top":
        return scope.top(count)
    if task.neurons == "random":
        rows = random.Random(f"random:{task.seed}:{task.layer}").sample(range(len(scope)), count)
        return replace(scope, frame=scope.frame.iloc[sorted(rows)].reset_index(drop=True))
    query = context.once(("query", key), lambda: _queries(lens, drawn.ranking))
    return (query if layer == "all" else query.layer(int(layer))).top(count)


def _queries(lens: Lens, facts: list[Fact]) -> NeuronSet:
    """Query neurons of each prompt's own value neurons, added up over the prompts; those that feed them (above 0)."""
    trace = lens.trace(facts)
    found = query_neurons(lens, trace, value_neurons(lens, trace, 300), None, over="set")
    return found.where(lambda frame: frame["score"] > 0)


def figure(frame: pd.DataFrame) -> go.Figure:
    """Drop in points: layers across; sets, fractions and groups down."""
    return sweep_heatmap(
        frame, ["group", "neurons", "fraction"], "layer", "drop_points", "Accuracy lost when neurons are zeroed", "points"
    )


RECIPE = Recipe("ablation", Ablation, ablate, ("clean", "accuracy", "drop_points", "drop_relative", "logprob_change"), figure)
