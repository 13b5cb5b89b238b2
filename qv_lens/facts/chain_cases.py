"""Chains of the atlas with edits, as MQuAKE has them.

1. A chain asks for a fact about the answer of another. Its first fact is edited, its second, or
   both; the seed draws which, and to what.
2. The first fact's new answer is an answer of its relation of which the atlas knows the second
   relation too, in the same words: the chain goes on from there.
3. The second fact, of the old or the new bridge, is edited as by `atlas.edit_case`.
4. The answer after the edits is by none of its names the one before."""

from __future__ import annotations

import random
from collections.abc import Iterator

from qv_lens.facts.atlas import (
    Chain,
    bare,
    false_answers,
    names_of,
    question,
    second_about,
)
from qv_lens.facts.records import Fact, Hop, MultiHopCase

#: which facts of a chain are edited
EDITED = ((0,), (1,), (0, 1))


def chain_case(chain: Chain, seed: int = 0, case_id: int = 0) -> MultiHopCase | None:
    """A chain of the atlas with one or both of its facts edited; None where no edit changes its
    answer.

    Raises `FactError` for a fact whose relation is not one of the atlas."""
    rng = random.Random(f"{seed} {chain.cloze}")
    for edited in rng.sample(EDITED, len(EDITED)):
        rewritten = list(_rewritten(chain, edited))
        if rewritten:
            first, second, answer = rng.choice(rewritten)
            return _case(chain, edited, first, second, answer, case_id)
    return None


def _rewritten(chain: Chain, edited: tuple[int, ...]) -> Iterator[tuple[str, Fact, str]]:
    """Every way to edit the chain: the first fact's answer, the fact about it, and the answer of
    that, after the edits."""
    before = _folded(chain.second.answer, *chain.second.aliases)
    bridges = [(chain.first.answer, chain.second)]
    if 0 in edited:
        candidates = [(new, second_about(chain.second, new)) for new in false_answers(chain.first)]
        bridges = [(new, second) for new, second in candidates if second is not None]
    for first, second in bridges:
        for answer in false_answers(second) if 1 in edited else [second.answer]:
            if not before & _folded(answer, *_aliases(second, answer)):
                yield first, second, answer


def _case(
    chain: Chain, edited: tuple[int, ...], first: str, second: Fact, answer: str, case_id: int
) -> MultiHopCase:
    edits = []
    if 0 in edited:
        edits.append(chain.first.to(first))
    if 1 in edited:
        edits.append(second.to(answer))
    aliases = _aliases(second, answer)
    return MultiHopCase(
        case_id=case_id,
        edits=tuple(edits),
        questions=(chain.question,),
        answer=chain.second.answer,
        new_answer=answer,
        aliases=chain.second.aliases,
        new_aliases=aliases,
        hops=(
            _hop(chain.first, chain.first.answer, chain.first.aliases),
            _hop(chain.second, chain.second.answer, chain.second.aliases),
        ),
        new_hops=(
            _hop(chain.first, first, _aliases(chain.first, first)),
            _hop(second, answer, aliases),
        ),
        edited=edited,
        clozes=(chain.cloze,),
    )


def _aliases(fact: Fact, answer: str) -> tuple[str, ...]:
    """Other names of a fact's own answer, or of another answer in its place."""
    return fact.aliases if answer == fact.answer else names_of(answer)


def _hop(fact: Fact, answer: str, aliases: tuple[str, ...]) -> Hop:
    return Hop(question(fact), fact.text, answer, aliases, fact.subject, fact.relation)


def _folded(*names: str) -> set[str]:
    """Names as they are compared: without article and capitals."""
    return {bare(name).casefold() for name in names}
