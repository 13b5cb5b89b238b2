"""Cases and worked examples: of the bundled world for its own models, of files and of ACE's
appendix for any other."""

from __future__ import annotations

import random
from collections.abc import Sequence

from qv_lens.evaluation.cases import DrawnCases, draw_cases, worked_examples
from qv_lens.facts.benchmarks import parse
from qv_lens.facts.prompts import G1
from qv_lens.facts.records import Case, MultiHopCase
from qv_lens.models.lens import Lens
from qv_lens.world import cases as world_cases
from qv_lens.world import generator
from qv_lens.world.models import check_world, of_world

#: cases of the world: single edits, and MQuAKE's chains of 2 to 4 hops
OF_WORLD = ("facts", "multihop")


def cases_of(lens: Lens, data: str, count: int, seed: int = 0, known: bool = False) -> DrawnCases:
    """`count` cases: 'facts' or 'multihop' of the bundled world, or those of a file
    (`evaluation.cases.draw_cases`).

    Raises `ConfigError` for the bundled world with a model that was not trained on it, and what
    `draw_cases` raises."""
    if data not in OF_WORLD:
        return draw_cases(lens, data, count, seed, known)
    check_world(lens)
    world = generator.build(0)
    if data == "facts":
        return DrawnCases(list(world_cases.edit_cases(world, count, 2000 + seed)))
    return DrawnCases(list(parse(world_cases.mquake(world, count, 2000 + seed)).cases))


def examples_of(
    lens: Lens, cases: Sequence[Case], seed: int = 0, file: str = ""
) -> tuple[str, ...]:
    """Worked examples: from a file if one is named; else from the bundled world (avoiding the
    cases' entities where it can) for its models; else ACE's five of Appendix G.1."""
    if file:
        return worked_examples(file)
    if not of_world(lens):
        return G1
    rng = random.Random(f"editors:{seed}")
    return tuple(world_cases.cot_blocks(generator.build(0), _entities(cases), rng))


def _entities(cases: Sequence[Case]) -> set[str]:
    """Every entity that the cases' edits and hops name: worked examples should not name them."""
    names: set[str] = set()
    for case in cases:
        for request in case.requests:
            names |= {request.fact.subject, request.fact.answer, request.new}
        if isinstance(case, MultiHopCase):
            names |= {hop.answer for hop in (*case.hops, *case.new_hops)}
    return names
