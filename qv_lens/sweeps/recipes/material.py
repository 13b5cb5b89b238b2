"""The prompts that the papers' tables are measured on, by category: of the bundled world, or of a file."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Protocol

from qv_lens.errors import ConfigError
from qv_lens.facts import miniworld, worldrecords
from qv_lens.facts.benchmarks import read
from qv_lens.facts.categories import of_relation
from qv_lens.facts.records import Fact, MultiHopCase
from qv_lens.models.lens import Lens
from qv_lens.models.zoo import check_world


def pool(source: str = "", hops: int = 1) -> list[Fact]:
    """Every prompt, with its category. `source`: '' is the bundled world, else a file or dataset of facts or of MQuAKE's
    cases. `hops`: 1 single facts, 2 two-hop prompts (of a file: each case's first question, category of its last edit)."""
    if source:
        got = read(source, skip=True)
        if hops == 1:
            facts = [*got.facts, *(request.fact for case in got.cases for request in case.requests)]
        else:
            cases = [case for case in got.cases if isinstance(case, MultiHopCase)]
            facts = [Fact("{}", c.questions[0], c.answer, c.edits[-1].fact.relation) for c in cases]
        return [replace(fact, category=fact.category or of_relation(fact)) for fact in facts]
    world = miniworld.build(0)
    return worldrecords.facts(world) if hops == 1 else [worldrecords.as_fact(world, c) for c in world.chains(hops)]


class Asks(Protocol):
    """What tasks that draw prompts have in common. `facts`: a file or dataset (default: the bundled world)."""

    @property
    def category(self) -> str: ...
    @property
    def prompts(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def facts(self) -> str: ...


def asked(lens: Lens, task: Asks, hops: int = 1) -> list[Fact]:
    """A task's prompts. Raises `ConfigError` for a category that is not there, or the bundled world with another model."""
    if not task.facts:
        check_world(lens)
    return of_category(task.category, task.prompts, task.seed, task.facts, hops)


def of_category(category: str, count: int, seed: int, source: str = "", hops: int = 1) -> list[Fact]:
    """`count` prompts of a category ('all': of any), drawn by the seed; all where there are fewer. Raises `ConfigError`."""
    facts = pool(source, hops)
    found = [fact for fact in facts if category in ("all", fact.category)]
    if not found:
        names = sorted({fact.category for fact in facts if fact.category})
        raise ConfigError(f"No prompt of category {category!r}. Categories: {', '.join(names)}.")
    return random.Random(f"prompts:{seed}").sample(found, min(count, len(found)))
