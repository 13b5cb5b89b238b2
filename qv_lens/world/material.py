"""What a study of one fact of the bundled world asks besides that fact."""

from __future__ import annotations

import itertools
import random

from qv_lens.errors import FactError
from qv_lens.facts.corpora import corpus
from qv_lens.facts.records import Fact
from qv_lens.material import Material
from qv_lens.models.lens import Lens
from qv_lens.models.zoo import BUNDLED
from qv_lens.world import cases, generator


def demo_fact() -> tuple[Fact, str]:
    """The fact of `qv-lens demo` on a bundled model, and its new answer."""
    world = generator.build(0)
    chain = next(c for c in world.facts() if c.relations[0].id == "P641")
    new = next(o for o in cases.objects(world, chain.relations[0]) if o != chain.answer)
    return cases.as_fact(world, chain), new


def world_material(lens: Lens, fact: Fact, new: str, seed: int = 0) -> Material:
    """The bundled world's facts, chains and text around one of its own facts."""
    world, rng = generator.build(0), random.Random(f"study:{seed}")
    chain = next(
        (
            c
            for c in world.facts()
            if c.subject == fact.subject and fact.prompt in c.relations[0].phrasings
        ),
        None,
    )
    if chain is None or lens.name not in BUNDLED:
        raise FactError(
            f"The bundled world does not hold {fact.text!r:.200} as one of its phrasings, or {lens.name} "
            "was not trained on it. Pass material= with facts of your own (qv-lens study: --facts "
            "and --text)."
        )
    relation = chain.relations[0]
    if fact.answer != chain.answer:
        raise FactError(
            f"The bundled world says {chain.answer!r} of {fact.text!r:.200}, not {fact.answer!r}."
        )
    if new == fact.answer:
        raise FactError(
            f"The new answer of {fact.text!r:.200} is the old one, {new!r}: there is nothing to edit."
        )
    if new not in cases.objects(world, relation):
        raise FactError(
            f"{new!r} is not an object of {relation.label!r}. Some: "
            f"{', '.join(cases.objects(world, relation)[:12])}."
        )
    same = [f for f in cases.facts(world, relation.id) if f.subject != fact.subject]
    other = [f for f in cases.facts(world) if f.relation != relation.id]
    onward = [c for c in world.chains(2) if c.relations[0].id == relation.id]
    phrasing = relation.phrasings.index(fact.prompt)
    edits = [cases.edit_case(world, chain, new, rng, phrasing=phrasing)]
    edits += [
        c
        for c in cases.edit_cases(world, 24, seed, relation.id)
        if c.request.fact.subject != fact.subject
    ]
    texts = list(itertools.islice(corpus("world"), 2000))
    return Material(
        tuple(rng.sample(same, min(60, len(same)))),
        tuple(rng.sample(other, 60)),
        tuple(cases.as_fact(world, c) for c in rng.sample(onward, min(40, len(onward)))),
        tuple(edits),
        tuple(texts),
    )
