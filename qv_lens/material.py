"""What a study asks about besides its fact: other facts, chains over it, edits like it, and text
for C0.

atlas_material   of any real model: facts of the atlas that it knows
file_material    a user's own facts and text
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from qv_lens.editing.kept_statistics import default_texts
from qv_lens.errors import ConfigError
from qv_lens.evaluation.answers import correct
from qv_lens.evaluation.known_cases import answered_onward
from qv_lens.facts import atlas
from qv_lens.facts.benchmarks import plain_facts
from qv_lens.facts.records import Asked, EditCase, Fact
from qv_lens.models.lens import Lens

AnyAsked = TypeVar("AnyAsked", bound=Asked)

#: how many facts of the atlas are asked for each kind, and how many that the model knows are kept
ASKED = 60
KEPT = 24
#: chains over a fact's relation that are asked
CHAINS_ASKED = 100
CHAINS_KEPT = 16


@dataclass(frozen=True)
class Material:
    """What a study asks besides its fact."""

    same: tuple[Fact, ...]
    """Facts of its kind."""
    other: tuple[Fact, ...]
    """Facts of other kinds."""
    chains: tuple[Fact, ...]
    """Two-hop prompts over its kind of fact, with their answers."""
    cases: tuple[EditCase, ...]
    """What is edited, the fact's own case first."""
    texts: tuple[str, ...]
    """Text for C0."""
    asked: tuple[int, ...] = ()
    """How many facts of its kind, facts of other kinds and two-hop prompts were asked, of which
    these are the ones that the model answers (empty: they were not chosen this way)."""
    known: tuple[int, ...] = ()
    """How many of those it answered; more of them may be known than were kept."""


def atlas_material(lens: Lens, fact: Fact, new: str, seed: int = 0) -> Material:
    """Facts of the atlas that the model knows, around any fact. Text: Python's own reference, as
    much as C0 needs.

    Facts with the fact's own relation (or prompt) are of its kind. The neighbours and two-hop
    prompts of an edit are those that the model answered before the edit; the phrasings are the
    atlas's, whether the model answered them or not."""
    fact = _of_the_atlas(fact)
    rng = random.Random(f"study:{seed}")
    kin = [
        other for other in atlas.atlas() if _alike(other, fact) and other.subject != fact.subject
    ]
    strangers = [other for other in atlas.atlas() if not _alike(other, fact)]
    asked_same = rng.sample(kin, min(ASKED, len(kin)))
    asked_other = rng.sample(strangers, min(ASKED, len(strangers)))
    known_same, known_other = _known(lens, asked_same), _known(lens, asked_other)
    same, other = known_same[:KEPT], known_other[:KEPT]
    own = _own_case(lens, fact, new, same or other, seed)
    more = [_believed(lens, atlas.edit_case(each, seed), same, seed) for each in same]
    chains = [
        chain for chain in atlas.chains() if _alike(chain.first, fact) or _alike(chain.second, fact)
    ]
    drawn = rng.sample(chains, min(CHAINS_ASKED, len(chains)))
    two_hop = [
        Fact("{}", chain.cloze, chain.second.answer, aliases=chain.second.aliases)
        for chain in drawn
    ]
    known_chains = _known(lens, two_hop)
    return Material(
        same=tuple(same),
        other=tuple(other),
        chains=tuple(known_chains[:CHAINS_KEPT]),
        cases=(own, *more),
        texts=tuple(default_texts(lens)),
        asked=(len(asked_same), len(asked_other), len(two_hop)),
        known=(len(known_same), len(known_other), len(known_chains)),
    )


def _of_the_atlas(fact: Fact) -> Fact:
    """The atlas's own fact of these words, with its relation, phrasings and aliases; or the fact
    itself."""
    words = (fact.prompt, fact.subject, fact.answer)
    return next(
        (own for own in atlas.atlas() if (own.prompt, own.subject, own.answer) == words), fact
    )


def _alike(first: Fact, second: Fact) -> bool:
    """Whether two facts are of one kind."""
    return first.prompt == second.prompt or (
        first.relation is not None and first.relation == second.relation
    )


def _known(lens: Lens, probes: Sequence[AnyAsked]) -> list[AnyAsked]:
    """What the model answers: every token of the answer is the likeliest."""
    return [probe for probe, right in zip(probes, correct(lens, probes), strict=True) if right]


def _own_case(lens: Lens, fact: Fact, new: str, near: Sequence[Fact], seed: int) -> EditCase:
    """The edit of the study's own fact."""
    onward = tuple(atlas.onward(fact, new)) if fact in atlas.atlas() else ()
    paraphrases = tuple(fact.with_prompt(prompt) for prompt in fact.paraphrases)
    return _believed(lens, EditCase(fact.to(new), paraphrases, onward=onward), near, seed)


def _believed(lens: Lens, case: EditCase, same: Sequence[Fact], seed: int) -> EditCase:
    """A case with the two-hop prompts whose answer the model knew, and neighbours that it knows."""
    near = atlas.neighbours(case.request, same, random.Random(f"{seed} {case.request.fact.text}"))
    return replace(answered_onward(lens, case), neighbours=near)


def file_material(
    fact: Fact, new: str, facts: str | Path, text: str | Path | Sequence[str]
) -> Material:
    """Material from files: `facts`, a JSON list of {"prompt" with {}, "subject", "answer"}, and
    `text`, a file of plain paragraphs or the paragraphs themselves.

    Facts with the fact's own prompt are of its kind (and its neighbours), all others are of other
    kinds.
    Raises `ConfigError` for a file that cannot be read, `FactError` for a record that is not a fact.
    """
    read = plain_facts(facts)
    paragraphs = _paragraphs(text) if isinstance(text, (str, Path)) else text
    same = tuple(f for f in read if f.prompt == fact.prompt and f.subject != fact.subject)
    other = tuple(f for f in read if f.prompt != fact.prompt)
    # of a neighbour whose answer is the new one nothing could be seen to change
    near = tuple(f for f in same if new not in (f.answer, *f.aliases))[:8]
    return Material(same, other, (), (EditCase(fact.to(new), (), near),), tuple(paragraphs))


def _paragraphs(file: str | Path) -> list[str]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Cannot read the text for the statistics from {file}: {error}."
        ) from error
    return [line for line in text.splitlines() if line.strip()]
