"""The prompts that the papers' tables are measured on, by category: of a file, or where none is
named of the bundled world for the bundled models, and of the atlas for any other model: those that
it knows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from qv_lens.errors import ConfigError, unknown
from qv_lens.evaluation.known_cases import as_said, first_known
from qv_lens.facts.atlas import Chain, atlas, chains
from qv_lens.facts.benchmarks import read, warn_of
from qv_lens.facts.categories import CATEGORIES, of_relation
from qv_lens.facts.files import check_there
from qv_lens.facts.records import EditCase, Fact, Hop, MultiHopCase, edited_facts
from qv_lens.facts.words import word_places
from qv_lens.models.lens import Lens
from qv_lens.runs.experiment import Once
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from qv_lens.world.evaluation import OF_WORLD
from qv_lens.world.models import of_world

#: the source of prompts about the real world
ATLAS = "atlas"
#: categories that are asked apart (no chain of the bundled world ends in an author)
APART = ("nationality", "continent", "language", "capital", "leadership", "sport", "founder")


def usual(lens: Lens, source: str) -> str:
    """The source of a model's prompts where none is named: the bundled world ('') for a model that
    was trained on it, else the atlas."""
    return source or ("" if of_world(lens) else ATLAS)


def pool(source: str = "", hops: int = 1) -> list[Fact]:
    """Every prompt, with its category, each once. `source`: '' is the bundled world, 'atlas' the
    atlas, else a file or dataset of facts or of MQuAKE's cases (of which every unedited hop is a
    single fact, as in ACE's section 4.1). `hops`: 1 single facts; 2 or more prompts over chains of that length: of a file
    each case's first question, of the category of the chain's end.

    Records that cannot be read are left out with a warning.
    """
    if not source:
        world = generator.build(0)
        return (
            world_cases.facts(world)
            if hops == 1
            else [world_cases.as_fact(world, c) for c in world.chains(hops)]
        )
    if source == ATLAS:
        return list(atlas()) if hops == 1 else [chained(chain) for chain in chains()]
    records = read(source, skip=True)
    warn_of(records.refused)
    asked_chains = [case for case in records.cases if isinstance(case, MultiHopCase)]
    if hops == 1:
        edits = edited_facts(case for case in records.cases if isinstance(case, EditCase))
        facts = [
            *records.facts,
            *edits,
            *(_link(hop) for case in asked_chains for hop in case.hops),
        ]
    else:
        facts = [
            Fact("{}", c.questions[0], c.answer, c.hops[-1].relation)
            for c in asked_chains
            if len(c.hops) == hops
        ]
    facts = list({(fact.text, fact.answer): fact for fact in facts}.values())
    return [replace(fact, category=fact.category or of_relation(fact)) for fact in facts]


def chained(chain: Chain) -> Fact:
    """A chain of the atlas as one prompt, of the category of its end."""
    end = chain.second
    return Fact(
        "{}", chain.cloze, end.answer, end.relation, category=end.category, aliases=end.aliases
    )


def _link(hop: Hop) -> Fact:
    """A hop as a fact; where its subject is not known or not found, the whole cloze is used as the
    subject."""
    if hop.subject and len(word_places(hop.cloze, hop.subject, case=True)) == 1:
        return replace(
            Fact.from_text(hop.cloze, hop.subject, hop.answer),
            relation=hop.relation,
            aliases=hop.aliases,
        )
    return Fact("{}", hop.cloze, hop.answer, hop.relation, aliases=hop.aliases)


class Asks(Protocol):
    """What tasks that draw prompts have in common. `facts`: a file or dataset (default: `usual`)."""

    @property
    def category(self) -> str: ...
    @property
    def prompts(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def facts(self) -> str: ...


def asked(lens: Lens, task: Asks, hops: int = 1) -> list[Fact]:
    """A task's prompts; of the atlas those that the model knows. Raises `ConfigError` for a category
    that is not there, or of which the model knows nothing."""
    source = usual(lens, task.facts)
    facts = _in_category(task.category, source, hops)
    return drawn(lens, source, facts, task.prompts, _rng(task.seed))


def drawn(
    lens: Lens, source: str, facts: Sequence[Fact], count: int, rng: random.Random
) -> list[Fact]:
    """`count` of a source's facts, by chance; of the atlas such as the model knows, with the
    answers that it says. All where there are fewer."""
    if source != ATLAS:
        return rng.sample(facts, min(count, len(facts)))
    return as_said(lens, first_known(lens, rng.sample(facts, len(facts)), count))


#: facts that the model knows are looked for so many at a time
SOUGHT = 50


@dataclass(frozen=True)
class KnownFact:
    """One of the facts that a model knows."""

    fact: int = 0
    """Its number among them, in an order that the seed draws."""
    data: str = "facts"
    """'facts' (of a bundled model its world's, else the atlas's), 'multihop' (two-hop prompts), or a
    file."""
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, fact=0, seed=0)
        check_files(self, "data")

    def of(self, lens: Lens, once: Once) -> Fact:
        """The model's. Raises `ConfigError` where it knows too few."""
        count = SOUGHT * (1 + self.fact // SOUGHT)
        known = once(known_facts, lens, self.data, count, self.seed)
        if self.fact >= len(known):
            raise ConfigError(
                f"fact={self.fact}: {lens.name} knows {len(known)} prompts of {self.data!r}; they "
                "are numbered from 0."
            )
        return known[self.fact]


def known_facts(lens: Lens, data: str, count: int, seed: int) -> list[Fact]:
    """The first `count` prompts of such data, in an order that the seed draws, that the model
    knows."""
    source = usual(lens, "") if data in OF_WORLD else data
    facts = pool(source, 2 if data == "multihop" else 1)
    random.Random(seed).shuffle(facts)
    return first_known(lens, facts, count)


# ------------------------------------------------------------------ what can be refused when a run
# file is read


def at_least(task: Any, **least: int) -> None:
    """Raise `ConfigError` for a field below its least value."""
    for name, value in least.items():
        if getattr(task, name) < value:
            raise ConfigError(f"{name} must be at least {value}, got {getattr(task, name)}.")


def check_files(task: Any, *names: str) -> None:
    """Raise `ConfigError` for a field that names a file which is not there."""
    for name in names:
        check_there(name, getattr(task, name))


def check_asked(task: Asks, every: bool = True) -> None:
    """Raise `ConfigError` for a category that the bundled world does not have, too few prompts, or
    no such file.

    `every`: whether 'all' stands for any category."""
    at_least(task, prompts=1)
    check_files(task, "facts")
    known = [*(["all"] if every else []), *sorted(set(CATEGORIES.values()))]
    if not task.facts and task.category not in known:
        raise unknown("Category", task.category, known)


def of_category(
    category: str, count: int, seed: int, source: str = "", hops: int = 1
) -> list[Fact]:
    """`count` prompts of a category ('all': of any), drawn by the seed; all where there are fewer.
    Raises `ConfigError`."""
    facts = _in_category(category, source, hops)
    return _rng(seed).sample(facts, min(count, len(facts)))


def _rng(seed: int) -> random.Random:
    return random.Random(f"prompts:{seed}")


def _in_category(category: str, source: str, hops: int) -> list[Fact]:
    """The prompts of a category ('all': of any). Raises `ConfigError` for none."""
    facts = pool(source, hops)
    matching = [fact for fact in facts if category in ("all", fact.category)]
    if not matching:
        names = sorted({fact.category for fact in facts if fact.category})
        none = sum(fact.category is None for fact in facts)
        raise ConfigError(
            f"No prompt of category {category!r} with {hops} hops in "
            f"{source or 'the bundled world'}. Categories: {', '.join(names)}; {none} of "
            f"{len(facts)} prompts have none (their relation is not one of ACE's)."
        )
    return matching
