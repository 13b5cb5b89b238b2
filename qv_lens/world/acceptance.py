"""What the bundled models must know, measured: `qv-lens models check`.

Single facts, unseen phrasings, unseen two-hop chains from the cloze and by chain of thought, unseen
three-hop chains by chain of thought, and single edits by MEMIT at the subject's last token."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pandas as pd

from qv_lens.editing.presets import presets
from qv_lens.editing.statistics import Statistics
from qv_lens.evaluation.answers import accuracy, look
from qv_lens.evaluation.metrics import mean, measured
from qv_lens.evaluation.protocols import evaluate
from qv_lens.evaluation.questions import Generation
from qv_lens.evaluation.summary import summary
from qv_lens.facts.records import MultiHopCase
from qv_lens.models.lens import Lens
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from qv_lens.world.generator import Chain

TUNED = 16  # the presets were chosen on the first 8 of them (experiments/toys/tune.py)
COLUMNS = ["measure", "wanted", "measured", "of"]


def check(
    lens: Lens, statistics: Statistics, *, edits: int = 50, chains: int = 120, seed: int = 0
) -> pd.DataFrame:
    """`knowledge`, and single edits by MEMIT's preset on facts that it was not chosen on: `measure,
    wanted, measured, of`."""
    world = generator.build(0)
    tuned = {
        (c.request.fact.subject, c.request.fact.prompt)
        for c in world_cases.edit_cases(world, TUNED)
    }
    cases = world_cases.edit_cases(world, edits + TUNED, seed=1000 + seed)
    cases = [c for c in cases if (c.request.fact.subject, c.request.fact.prompt) not in tuned][
        :edits
    ]
    table = summary(
        evaluate(lens, cases, editor=presets(lens.name)["MEMIT"].editor, statistics=statistics)
    ).set_index("metric")["after"]
    rows = [
        (f"MEMIT at subject-last, {metric}", wanted, float(table[metric]), len(cases))
        for metric, wanted in (("efficacy_acc", 0.90), ("specificity_acc", 0.80))
    ]
    return pd.concat(
        [knowledge(lens, chains=chains, seed=seed), pd.DataFrame(rows, columns=COLUMNS)],
        ignore_index=True,
    )


def knowledge(lens: Lens, *, chains: int = 120, seed: int = 0) -> pd.DataFrame:
    """What the model answers: `measure, wanted, measured, of` (shares, and the number of
    prompts)."""
    world, rng = generator.build(0), random.Random(f"check:{seed}")
    facts = world.facts()
    unseen = [(f, i) for f in facts if (i := world.unseen_phrasing(f)) is not None]
    two, three = ([c for c in world.chains(hops) if not world.seen(c)] for hops in (2, 3))
    groups = [
        ("single facts", 0.99, [world_cases.as_fact(world, f) for f in facts]),
        ("unseen phrasing", 0.90, [world_cases.as_fact(world, f, i) for f, i in unseen]),
        ("unseen two-hop, cloze", 0.90, [world_cases.as_fact(world, c) for c in two]),
    ]
    rows = [(name, wanted, accuracy(lens, probes), len(probes)) for name, wanted, probes in groups]
    for name, wanted, pool in (
        ("unseen two-hop, chain of thought", 0.95, two),
        ("unseen three-hop, chain of thought", 0.85, three),
    ):
        drawn = rng.sample(pool, min(chains, len(pool)))
        rows.append((name, wanted, _by_thought(lens, world, drawn, rng), len(drawn)))
    return pd.DataFrame(rows, columns=COLUMNS)


def _by_thought(
    lens: Lens, world: generator.World, chains: Sequence[Chain], rng: random.Random
) -> float:
    """Share of chains whose first question is answered after worked examples, about other entities
    where there are any."""
    blocks = world_cases.cot_blocks(
        world, {name for chain in chains for name in chain.entities}, rng
    )
    cases = [
        MultiHopCase(i, (), (chain.questions()[0],), chain.answer, chain.answer)
        for i, chain in enumerate(chains)
    ]
    looks = look(lens, cases, Generation(kinds=("cot",), blocks=tuple(blocks)), ())
    return mean(
        [
            measured(case, ["multihop_cot"], answers, answers, edited=False)["multihop_cot"]
            for case, answers in zip(cases, looks, strict=True)
        ]
    )
