"""ACE, section 6.4: 27 interpretable neurons zeroed, against 27 important ones that are not, and 27
at random.

    qv-lens run experiments/ace/neurons_27.py
    qv-lens run experiments/ace/neurons_27.py --model EleutherAI/gpt-j-6B \\
        --set facts=MQuAKE-CF-3k-v2.json

Per fact the 300 best value neurons are split by the vocabulary test; `count` of each are zeroed. On
a model with fewer interpretable ones all of them are, and `zeroed` says how many. Accuracy over
1,000 draws from the model, and its exact probability. Beside them the `count` best by their effect
on log p (ours), and as many at random. """

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pandas as pd
import plotly.graph_objects as go
import torch

from experiments.ace import BY_EFFECT, NO_CODE
from experiments.decide import (
    NOT_MEASURED,
    Claim,
    Verdict,
    decided,
    difference,
    points,
    share,
    together,
    unless,
)
from experiments.models import STUDIED
from experiments.prompts import asked, at_least, check_asked
from qv_lens.attribution.effects import neuron_effects
from qv_lens.attribution.projection import interpretable as holds_answer
from qv_lens.attribution.projection import surface_forms
from qv_lens.attribution.value import value_neurons
from qv_lens.evaluation.known_cases import knowledge
from qv_lens.models.interventions import Zero
from qv_lens.models.lens import Lens
from qv_lens.models.units import random_neurons
from qv_lens.neurons import NeuronSet
from qv_lens.plots import set_bars

SETTINGS = {"prompts": 100}
GRID = {"model": STUDIED, "category": ["sport", "capital"]}
MEASURES = ("sampled", "probability", "argmax")
#: how many neurons the paper zeroes
COUNT = 27
#: rows of earlier versions had no random neurons beside those by effect (2), and counted the answer's
#: own first token alone (1)
VERSION = 3


@dataclass(frozen=True)
class Task:
    """`prompts` facts of a category; `count` neurons (ACE: 27), `samples` draws of the next token
    (ACE: 1,000)."""

    model: str
    category: str = "sport"
    prompts: int = 100
    count: int = COUNT
    samples: int = 1000
    top: int = 300
    seed: int = 0
    facts: str = ""

    def __post_init__(self) -> None:
        check_asked(self)
        at_least(self, count=1, samples=1, top=1)


def rows(task: Task, lens: Lens) -> pd.DataFrame:
    """One row per prompt and set: how many neurons (`zeroed`), the share of draws that give the
    answer's first token or another form of it (`sampled`), their exact `probability`, and whether
    the first token is the argmax.

    Sets: 'none', 'interpretable', 'important' and 'random' (as many as are interpretable), 'effects'
    (by the effect on log p) and 'random beside effects' (`count` each)."""
    cells = []
    facts = asked(lens, task)
    value = value_neurons(lens, list(facts), task.top)
    for i, fact in enumerate(facts):
        rng, mine = (
            random.Random(f"interpretable:{task.seed}:{i}"),
            value.where(lambda frame, i=i: frame["prompt"] == i),
        )
        good = holds_answer(lens, mine, fact.answer)
        telling = mine.where(lambda frame, good=good: good).top(task.count)
        sets: dict[str, NeuronSet] = {
            "interpretable": telling,
            "important": mine.where(lambda frame, good=good: ~good).top(len(telling)),
            "random": random_neurons(lens, len(telling), rng),
            "effects": neuron_effects(lens, fact, task.count),
            "random beside effects": random_neurons(lens, task.count, rng),
        }
        target = lens.answer_ids(fact)[0]
        forms = sorted(surface_forms(lens, fact.answer) | {target})
        for name, chosen in (("none", None), *sets.items()):
            with lens.intervene(
                *(
                    [Zero(replace(chosen, frame=chosen.frame.assign(prompt=-1)))]
                    if chosen is not None and len(chosen)
                    else []
                )
            ):
                p = lens.next_token_logits(fact)[0].softmax(-1)
            draws = torch.multinomial(
                p.cpu(),
                task.samples,
                True,
                generator=torch.Generator().manual_seed(task.seed * 1000 + i),
            )
            share = float(torch.isin(draws, torch.tensor(forms)).float().mean())
            count = 0 if chosen is None else len(chosen)
            cells.append(
                (i, fact.text, name, count, share, float(p[forms].sum()), int(p.argmax()) == target)
            )
    columns = ["prompt", "text", "set", "zeroed", "sampled", "probability", "argmax"]
    return pd.DataFrame(cells, columns=columns).assign(**knowledge(lens, facts))


def figure(frame: pd.DataFrame) -> go.Figure:
    """A bar per set of neurons."""
    return set_bars(frame, "The answer when neurons are zeroed (ACE, section 6.4)")


def interpretable_ones_matter(frame: pd.DataFrame) -> Verdict:
    """Of the prompts that have interpretable neurons: without them less than half of what was there
    is left, and less than without as many other important neurons, case by case."""
    case = ["category", "prompt"]
    zeroed = frame[frame["set"] == "interpretable"].groupby(case)["zeroed"].mean()
    table = frame.pivot_table(index=case, columns="set", values="sampled")
    with_any = table[zeroed.reindex(table.index) > 0]
    below_half = difference(with_any["none"] / 2, with_any["interpretable"])
    gap = difference(with_any["important"], with_any["interpretable"])
    shares = ", ".join(
        f"{name} {share(with_any[name].mean())}"
        for name in ("none", "interpretable", "important", "random")
    )
    held = zeroed[zeroed > 0].mean()
    return unless(
        f"{len(with_any)} of {len(table)} prompts have any, {held:.1f} on average, there {shares} "
        f"(half of none − interpretable {points(below_half)}; important − interpretable "
        f"{points(gap)})",
        together([decided(below_half), decided(gap)]),
        "" if held >= COUNT / 2 else f"far fewer than the paper's {COUNT}",
    )


def effects_matter(frame: pd.DataFrame) -> Verdict:
    """Without the neurons by effect less than half of what was there is left, and less than without
    as many at random, case by case."""
    table = frame.pivot_table(index=["category", "prompt"], columns="set", values="sampled")
    if not {"effects", "random beside effects"} <= set(table):
        return NOT_MEASURED
    below_half = difference(table["none"] / 2, table["effects"])
    gap = difference(table["random beside effects"], table["effects"])
    statistic = ", ".join(
        f"{name} {share(table[name].mean())}"
        for name in ("none", "effects", "random beside effects")
    )
    return (
        f"{statistic} (half of none − effects {points(below_half)}; random − effects {points(gap)})",
        together([decided(below_half), decided(gap)]),
    )


CLAIMS = (
    Claim(
        source="ACE, section 6.4",
        words="27 interpretable neurons zeroed leave 3.2%, 27 important others 59.4%",
        statistic=(
            "share of 1,000 draws that give the answer, over prompts that have such neurons: below half "
            "of the untouched share, and below as many other important ones"
        ),
        decide=interpretable_ones_matter,
        release=NO_CODE,
    ),
    Claim(
        source="ACE, section 6.4",
        words=f"27 neurons zeroed leave less than half of it, {BY_EFFECT}",
        statistic="share of 1,000 draws that give the answer",
        decide=effects_matter,
    ),
)
