"""What is lost when neurons are silenced: accuracy and log-probability of facts, before and after.

1. `answers` asks the facts; `drop` compares two such answers.
2. `ablate` zeroes sets of neurons at all positions, and asks groups of facts under each (ACE,
   section 4 and Figure 2).
3. `suppress` silences the top query neurons of the two layers where they score highest: for every
   reader (`Zero`), or for the value neurons alone (`Suppress`); two-hop accuracy, and value neurons
   that stay activated (ACE, section 4.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
import pandas as pd

from qv_lens.attribution.query import query_neurons
from qv_lens.attribution.value import value_neurons
from qv_lens.errors import check_count
from qv_lens.evaluation.answers import tell
from qv_lens.evaluation.intervals import student
from qv_lens.facts.records import Fact
from qv_lens.models.interventions import Suppress, Zero
from qv_lens.models.lens import Lens
from qv_lens.neurons import NeuronSet

#: K: the neurons counted as activated on the clean model
ACTIVATED = 300
#: value neurons whose query neurons are silenced
TARGETS = 30
QUERY_LAYERS = 2
#: ACE's query neurons of a layer, and GPT-J's neurons of a layer
SILENCED = 100
OF = 16384
#: by how much a score may differ between two calls: the last neuron above a threshold is one of them
ROUNDING = 1e-6
#: the columns that `drop` gives
DROP = ("clean", "accuracy", "drop_points", "drop_relative", "logprob_change")


@dataclass(frozen=True)
class Answers:
    """What a model makes of facts."""

    right: list[bool]
    """Whether every token of the answer is the argmax."""
    logprobs: list[float]
    """The mean log-probability of the answer's tokens (nats)."""


def answers(lens: Lens, facts: Sequence[Fact]) -> Answers:
    """Which facts are answered right, and the mean log-probability of each answer."""
    probes = tell(lens, facts)
    return Answers([probe.right for probe in probes], [probe.logprob for probe in probes])


def drop(clean: Answers, now: Answers) -> tuple[float, ...]:
    """The columns `DROP`: clean accuracy, accuracy, their difference in points, the share lost of
    the prompts that were right, and the mean change of the answers' log-probability."""
    count = len(clean.right)
    before = sum(clean.right) / count
    after = sum(now.right) / count
    still_right = [hit for hit, was in zip(now.right, clean.right, strict=True) if was]
    kept = sum(still_right) / len(still_right) if still_right else nan
    change = (sum(now.logprobs) - sum(clean.logprobs)) / count
    return before, after, 100 * (before - after), 1 - kept, change


def ablate(
    lens: Lens,
    neurons: NeuronSet,
    groups: Mapping[str, Sequence[Fact]],
    clean: Mapping[str, Answers],
) -> pd.DataFrame:
    """Zero a set of neurons at all positions and ask groups of facts: a row per group, `group` and
    `DROP`.

    `clean`: what the model makes of each group as it is. An empty set drops nothing that could be
    measured: NaN."""
    rows = []
    if not len(neurons):
        rows = [(group, *[nan] * len(DROP)) for group in groups]
    else:
        with lens.intervene(Zero(neurons)):
            for group, facts in groups.items():
                rows.append((group, *drop(clean[group], answers(lens, facts))))
    frame = pd.DataFrame(rows, columns=["group", *DROP])
    frame.attrs.update(lens.label)
    return frame


def suppress(
    lens: Lens, chains: Sequence[Fact], top: int | None = None, *, counted: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two-hop accuracy with the top query neurons of the two layers where these score highest, one
    layer at a time, zeroed for every reader or suppressed for the value neurons alone; and
    activated value neurons per layer under each condition.

    `top`: query neurons per layer; by default 100 scaled from GPT-J's 16,384 (at least 10). A
    layer's sum over all its neurons is not used: where most scores are negative, the layers with
    hardly any target above them would come first.
    `counted`: whether activated value neurons are counted, which scores neurons again under each
    condition."""
    nothing = pd.DataFrame(columns=["condition", "layer", "count", "interval", "original"])
    if not chains:
        return pd.DataFrame(columns=["intervention", "layer", "count", *DROP]), nothing
    count = max(10, round(SILENCED * lens.d_mlp / OF)) if top is None else top
    check_count("top", count)
    trace = lens.trace(list(chains))
    value = value_neurons(lens, trace, ACTIVATED if counted else TARGETS)
    targets = value.top(TARGETS).union()
    best = _best_query_neurons(lens, trace, value, count)
    threshold = value.frame.groupby("prompt")["score"].min().to_numpy()
    clean = answers(lens, chains)
    rows = []
    counts = [_activated(lens, value, chains, threshold, "clean")] if counted else []
    for layer, neurons in best.items():
        above = targets.where(targets.frame["layer"] > layer)
        conditions: dict[str, Any] = {"Zero": Zero(neurons)}
        if len(above):
            conditions["Suppress"] = Suppress(neurons, above)
        for name, intervention in conditions.items():
            with lens.intervene(intervention):
                rows.append((name, layer, count, *drop(clean, answers(lens, chains))))
                if counted:
                    counts.append(
                        _activated(lens, value, chains, threshold, f"{name} layer {layer}")
                    )
    table = pd.DataFrame(rows, columns=["intervention", "layer", "count", *DROP])
    active = pd.concat(counts, ignore_index=True) if counts else nothing
    for frame in (table, active):
        frame.attrs.update({**lens.label, "top": count})
    return table, active


def _best_query_neurons(
    lens: Lens, trace: Any, value: NeuronSet, count: int
) -> dict[int, NeuronSet]:
    """The top query neurons of the layers where they score highest, by layer, best layer first."""
    every = query_neurons(lens, trace, value, None, over="set")
    best = [every.layer(layer).top(count) for layer in range(lens.n_layers)]
    peaks = pd.Series([float(neurons.frame["score"].clip(lower=0).sum()) for neurons in best])
    highest = peaks[peaks > 0].nlargest(QUERY_LAYERS)
    return {int(layer): best[int(layer)] for layer in highest.index}


def _activated(
    lens: Lens, value: NeuronSet, chains: Sequence[Fact], threshold: np.ndarray, condition: str
) -> pd.DataFrame:
    """How many neurons' scores reach the prompt's clean threshold, by layer: the mean over the
    prompts and half its 95% interval (NaN where the number is the same for all prompts), and how
    many of these neurons also reached it before (`original`)."""
    frame = _reaching(lens, chains, threshold)
    same = frame.merge(value.frame[["prompt", "layer", "neuron"]])
    now = by_layer(lens, frame, len(chains))
    before = by_layer(lens, same, len(chains))
    half = student(now.sem(), len(chains))
    counted = {"count": now.mean(), "interval": half, "original": before.mean()}
    return pd.DataFrame({"condition": condition, "layer": now.columns, **counted})


def _reaching(lens: Lens, chains: Sequence[Fact], threshold: np.ndarray) -> pd.DataFrame:
    """The neurons whose scores reach their prompt's threshold. Best first, as many as it takes until
    each prompt has one below: with a real vocabulary to score all neurons takes many times
    longer."""
    every, count = lens.n_layers * lens.d_mlp, 2 * ACTIVATED
    trace, least = lens.trace(list(chains)), threshold - ROUNDING * np.abs(threshold)
    while True:
        frame = value_neurons(lens, trace, min(count, every)).frame
        reached = frame[frame["score"].to_numpy() >= least[frame["prompt"].to_numpy()]]
        if count >= every or reached.groupby("prompt").size().max() < count:
            return reached.reset_index(drop=True)
        count *= 2


def by_layer(lens: Lens, frame: pd.DataFrame, prompts: int) -> pd.DataFrame:
    """Neurons counted by prompt (rows) and layer (columns)."""
    table = pd.crosstab(frame["prompt"], frame["layer"])
    return table.reindex(range(prompts), columns=range(lens.n_layers), fill_value=0)
