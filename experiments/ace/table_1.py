"""ACE, Table 1: the most important attention and FFN layers per category of facts. Takeaway 1.

    qv-lens run experiments/ace/table_1.py
    qv-lens run experiments/ace/table_1.py --model EleutherAI/gpt-j-6B \\
        --set facts=MQuAKE-CF-3k-v2.json

The same rows hold Figure 5 (whole layers: `figure_5.py`), Figure 6 (heads: `figure_6.py`) and, over
two-hop prompts, Figure 3 (query layers and value neurons by layer: `figure_3.py`). Beside the
paper's scores its claims are asked by the effect on log p (`neuron_effects`, ours). Nothing is
intervened on. """

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from experiments.ace import BY_EFFECT, NO_CODE, sums_to_nothing
from experiments.ace.overlap import best_layers, mean_overlap, overlap
from experiments.decide import (
    NOT_MEASURED,
    Claim,
    Estimate,
    Verdict,
    decided,
    read_as,
    verdict_of,
)
from experiments.models import STUDIED
from experiments.prompts import asked, at_least, check_asked
from qv_lens.attribution.effects import neuron_effects
from qv_lens.attribution.layers import layer_scores
from qv_lens.attribution.query import query_layers
from qv_lens.attribution.value import value_neurons
from qv_lens.evaluation.ablation import by_layer
from qv_lens.evaluation.intervals import student
from qv_lens.evaluation.known_cases import knowledge
from qv_lens.facts.categories import RELATED
from qv_lens.facts.records import Fact
from qv_lens.models.architectures import Sublayer
from qv_lens.models.lens import Lens
from qv_lens.neurons import NeuronSet
from qv_lens.plots import category_heatmap

CATEGORIES = (
    "nationality",
    "continent",
    "language",
    "capital",
    "leadership",
    "author",
    "sport",
    "founder",
)
SETTINGS = {"prompts": 100}  # all that exist where there are fewer
GRID = {"model": STUDIED, "category": CATEGORIES}
MEASURES = ("score", "interval", "rank")
#: value neurons per prompt that count (ACE's notebooks)
TOP = 300


@dataclass(frozen=True)
class Task:
    """The prompts of one category."""

    model: str
    """The model's name."""
    category: str
    """One of ACE's categories, or 'all'."""
    hops: int = 1
    """1 for single facts, 2 for two-hop prompts (Figure 3)."""
    prompts: int = 100
    """How many prompts are drawn."""
    seed: int = 0
    """Which ones."""
    facts: str = ""
    """A file or dataset of facts or chains (default: `prompts.usual`)."""

    def __post_init__(self) -> None:
        check_asked(self)
        at_least(self, hops=1)


def rows(task: Task, lens: Lens) -> pd.DataFrame:
    """`part, layer, head, score` (mean over the prompts), `interval` (half of its 95% interval, NaN
    where all prompts are alike) and `rank` among layers.

    Parts: 'ffn', 'attn' (sums over neurons: Table 1), 'ffn_vector', 'attn_vector' (whole outputs:
    Figure 5), 'head' (Figure 6), 'query', 'count' (Figure 3); by effect on log p 'ffn_effect' and
    'attn_effect' (sums over neurons and channels) and 'effect_count'."""
    facts = asked(lens, task, task.hops)
    trace = lens.trace(list(facts))
    value = value_neurons(lens, trace, TOP)
    sums = [layer_scores(lens, trace, kind).assign(part=kind) for kind in ("ffn", "attn")]
    wholes = [each.assign(part=each["part"] + "_vector", score=each["whole"]) for each in sums]
    heads = layer_scores(lens, trace, "head", "layer_vector").assign(part="head")
    query = query_layers(lens, trace, value)
    query = query[query["kind"] == "ffn"].assign(part="query")
    counts = counted(lens, value, len(facts)).assign(part="count")
    each = pd.concat([*sums, *wholes, heads, query, counts, *effects(lens, list(facts))])
    by_layer = each.groupby(["part", "layer", "head"], sort=False, dropna=False)["score"]
    frame = by_layer.agg(["mean", "sem", "count"]).reset_index().rename(columns={"mean": "score"})
    frame = frame.assign(interval=student(frame["sem"], frame["count"]), **knowledge(lens, facts))
    frame["rank"] = frame.groupby("part")["score"].rank(ascending=False, method="first").astype(int)
    return frame[
        ["part", "layer", "head", "score", "interval", "rank", "prompts_asked", "prompts_known"]
    ]


def effects(lens: Lens, facts: list[Fact]) -> list[pd.DataFrame]:
    """The effects on log p of the units of each layer, added up, by prompt (none where
    `sums_to_nothing`); and how many of the best neurons lie there."""
    neurons = neuron_effects(lens, facts, None)
    channels = neuron_effects(lens, facts, None, unit="attn_channel")
    added: tuple[tuple[Sublayer, NeuronSet], ...] = (("ffn", neurons), ("attn", channels))
    sums = [
        effect.frame.groupby(["prompt", "layer"])["score"]
        .sum()
        .reset_index()
        .assign(part=f"{kind}_effect")
        for kind, effect in added
        if not sums_to_nothing(lens, kind)
    ]
    counts = counted(lens, neurons.top(TOP), len(facts)).assign(part="effect_count")
    return [*sums, counts]


def counted(lens: Lens, neurons: NeuronSet, prompts: int) -> pd.DataFrame:
    """How many neurons lie in each layer, by prompt."""
    return by_layer(lens, neurons.frame, prompts).stack().rename("score").reset_index()


def figure(frame: pd.DataFrame) -> go.Figure:
    """Layers across, categories down, by Eq. 9 and by effect."""
    shown = frame[frame["part"].isin(("ffn", "attn", "ffn_effect", "attn_effect"))]
    return category_heatmap(shown, "FFN and attention importance by category (ACE, Table 1)")


def takeaway_1(frame: pd.DataFrame) -> Verdict:
    """Overlap within the similar categories, less that of all other pairs; p over every choice of
    as many categories."""
    sets = best_layers(frame, "ffn", 9)
    pairs = {
        frozenset(pair): overlap(sets[pair[0]], sets[pair[1]])
        for pair in itertools.combinations(sorted(sets), 2)
    }

    def gap(similar: frozenset[str]) -> float:
        inside = [value for pair, value in pairs.items() if pair <= similar]
        return float(
            np.mean(inside)
            - np.mean([value for pair, value in pairs.items() if not pair <= similar])
        )

    similar = RELATED & set(sets)
    if not 1 < len(similar) < len(sets):
        return NOT_MEASURED
    gaps = [gap(frozenset(chosen)) for chosen in itertools.combinations(sorted(sets), len(similar))]
    p = float(np.mean([value >= gap(similar) - 1e-12 for value in gaps]))
    lower = float(np.mean([value <= gap(similar) + 1e-12 for value in gaps]))
    verdict = verdict_of(p < 0.05, lower < 0.05)
    return (
        f"gap {gap(similar):+.2f}, p = {p:.2f} ({len(sets)} categories, "
        f"{len(next(iter(sets.values())))} layers each)",
        verdict,
    )


def attention_is_general(frame: pd.DataFrame) -> Verdict:
    """Overlap of attention's layers less that of FFN's; the interval leaves one category out at a
    time (jackknife)."""
    attn, ffn = best_layers(frame, "attn", 9), best_layers(frame, "ffn", 9)
    gap = mean_overlap(attn) - mean_overlap(ffn)
    left = [
        mean_overlap({k: v for k, v in attn.items() if k != out})
        - mean_overlap({k: v for k, v in ffn.items() if k != out})
        for out in attn
    ]
    estimate = Estimate.around(
        gap, float(student(np.sqrt((len(left) - 1) * np.var(left)), len(left))), len(left)
    )
    statistic = f"overlap of attention {mean_overlap(attn):.2f}, of FFN {mean_overlap(ffn):.2f}"
    return f"{statistic} (difference {gap:+.2f} {estimate.spread(digits=2)})", decided(estimate)


CLAIMS = (
    Claim(
        source="ACE, Table 1, Takeaway 1",
        words=(
            "FFN layers of similar semantics (NN, CT, LG, CP, LS) lie close, dissimilar ones (AT, "
            "ST, CF) apart"
        ),
        statistic=(
            "overlap (Jaccard) of the top layers (9 of 28), similar pairs minus all others; exact "
            "permutation p"
        ),
        decide=takeaway_1,
        release=NO_CODE,
    ),
    Claim(
        source="ACE, Table 1, Takeaway 1",
        words=f"the same, {BY_EFFECT}",
        statistic="the same, layers by the sum of their neurons' effects",
        decide=read_as("part", {"ffn_effect": "ffn"}, takeaway_1),
    ),
    Claim(
        source="ACE, Table 1",
        words="attention's top layers are the same for all knowledge (a27, a26, a7), FFN's its own",
        statistic=(
            "mean overlap of top layers between categories, attention minus FFN, jackknife over "
            "categories"
        ),
        decide=attention_is_general,
        release=NO_CODE,
    ),
    Claim(
        source="ACE, Table 1",
        words=f"the same, {BY_EFFECT}",
        statistic="the same, layers by the sum of their neurons' and channels' effects",
        decide=read_as("part", {"ffn_effect": "ffn", "attn_effect": "attn"}, attention_is_general),
    ),
)
