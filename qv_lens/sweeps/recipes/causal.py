"""What breaks when neurons are taken away: query suppression, and the interpretable neurons of one fact.

    suppression     ACE, section 4.2: the top query neurons of the strongest query layers, for every reader (Zero) or for
                    the value neurons alone (Suppress); two-hop accuracy, and value neurons that stay activated by layer
    interpretable   ACE, section 6.4: 27 neurons whose tokens hold the answer, against as many important ones whose tokens
                    do not, and as many at random; accuracy over 1,000 draws from the model, and its exact probability

The second measures per fact: the 300 best value neurons are split by the vocabulary test; `count` of each are zeroed. On a
model with fewer interpretable ones all of them are, and `count` says how many.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pandas as pd
import torch

from qv_lens.attribution.projection import interpretable as holds_answer
from qv_lens.attribution.projection import surface_forms
from qv_lens.attribution.value import value_neurons
from qv_lens.case_study import suppress
from qv_lens.interventions import Zero
from qv_lens.neurons import NeuronSet
from qv_lens.plots import counts, set_bars
from qv_lens.sweeps.config import Recipe
from qv_lens.sweeps.engine import Context
from qv_lens.sweeps.recipes.material import asked, at_least, check_asked, knowledge


@dataclass(frozen=True)
class Suppression:
    """Two-hop prompts of one category ('all': of any). `top`: query neurons per layer (0: ACE's 100, scaled to d_mlp)."""

    model: str
    category: str = "all"
    prompts: int = 100
    top: int = 0
    seed: int = 0
    facts: str = ""

    def __post_init__(self) -> None:
        check_asked(self)
        at_least(self, top=0)


def suppression(task: Suppression, context: Context) -> pd.DataFrame:
    """`condition, layer`: a row per layer with `count` activated value neurons per prompt (`interval`: half of its 95% one; `original`:
    those of them that were so before); and what was suppressed in `suppressed`, with clean accuracy, accuracy and their drop in points."""
    lens = context.lens(task.model)
    chains = asked(lens, task, 2)
    found, counted = suppress(lens, chains, task.top or None)
    found = found.assign(condition=found["intervention"] + " layer " + found["layer"].astype(str))
    found = found.rename(columns={"layer": "suppressed", "count": "neurons"}).drop(columns="intervention")
    return counted.merge(found, on="condition", how="left").assign(**knowledge(lens, chains))


@dataclass(frozen=True)
class Interpretable:
    """`prompts` facts of a category; `count` neurons (ACE: 27), `samples` draws of the next token (ACE: 1,000)."""

    model: str
    category: str = "sport"
    prompts: int = 100
    count: int = 27
    samples: int = 1000
    top: int = 300
    seed: int = 0
    facts: str = ""

    def __post_init__(self) -> None:
        check_asked(self)
        at_least(self, count=1, samples=1, top=1)


def interpretable(task: Interpretable, context: Context) -> pd.DataFrame:
    """One row per prompt and set ('none', 'interpretable', 'important', 'random'): how many neurons (`zeroed`), the share
    of draws that give the answer's first token or another form of it (`sampled`), their exact `probability`, and whether the first
    token is the argmax."""
    lens, rows = context.lens(task.model), []
    facts = asked(lens, task)
    value = value_neurons(lens, list(facts), task.top)
    for i, fact in enumerate(facts):
        rng, mine = random.Random(f"interpretable:{task.seed}:{i}"), value.where(lambda frame, i=i: frame["prompt"] == i)
        good = holds_answer(lens, mine, fact.answer)
        telling = mine.where(lambda frame, good=good: good).top(task.count)
        sets: dict[str, NeuronSet] = {
            "interpretable": telling,
            "important": mine.where(lambda frame, good=good: ~good).top(len(telling)),
            "random": NeuronSet.drawn(lens, len(telling), rng),
        }
        target = lens.answer_ids(fact)[0]
        forms = sorted(surface_forms(lens, fact.answer) | {target})
        for name, chosen in (("none", None), *sets.items()):
            with lens.intervene(
                *([Zero(replace(chosen, frame=chosen.frame.assign(prompt=-1)))] if chosen is not None and len(chosen) else [])
            ):
                p = lens.next_token_logits(fact)[0].softmax(-1)
            draws = torch.multinomial(p.cpu(), task.samples, True, generator=torch.Generator().manual_seed(task.seed * 1000 + i))
            share = float(torch.isin(draws, torch.tensor(forms)).float().mean())
            count = 0 if chosen is None else len(chosen)
            rows.append((i, fact.text, name, count, share, float(p[forms].sum()), int(p.argmax()) == target))
    columns = ["prompt", "text", "set", "zeroed", "sampled", "probability", "argmax"]
    return pd.DataFrame(rows, columns=columns).assign(**knowledge(lens, facts))


SUPPRESSION = Recipe(
    "suppression", Suppression, suppression, ("count", "interval", "original", "accuracy", "drop_points", "drop_relative"), counts
)
INTERPRETABLE = Recipe("interpretable", Interpretable, interpretable, ("sampled", "probability", "argmax"), set_bars, version=2)
