"""Which cases of a file are asked: drawn by a seed, known to the model where that is wanted."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from qv_lens.errors import ConfigError
from qv_lens.evaluation.known_cases import known, known_edits
from qv_lens.facts.benchmarks import read, warn_of
from qv_lens.facts.records import Case, EditCase, MultiHopCase
from qv_lens.models.lens import Lens

Found = TypeVar("Found")
#: how many records of a file are tested together for whether the model knows them
KNOWN_AT_ONCE = 256


@dataclass(frozen=True)
class DrawnCases:
    """Cases, and what was left out on the way to them."""

    cases: list[Case]
    """What is asked."""
    refused: int = 0
    """Records of the file that could not be read."""
    unknown: int = 0
    """Cases that were passed over because the model does not know them."""


def draw_cases(lens: Lens, file: str, count: int, seed: int = 0, known: bool = False) -> DrawnCases:
    """`count` cases of a file (`facts.benchmarks`); each seed takes others of it.

    `known`: only chains all of whose hops, and edits whose fact, the model answers (ACE, Appendix
    B.1).
    Raises `ConfigError` for a file without edits, or with too few of them for the seed.
    """
    records = read(file, skip=True)
    warn_of(records.refused)
    if not records.cases and records.facts:
        raise ConfigError(
            f"{file} holds {len(records.facts)} facts and no edits: nothing says what their new "
            "answers are. Name a file of edits (in MQuAKE's, CounterFact's, ZsRE's or KnowEdit's "
            "format), or edit one fact (qv-lens edit --new, fact.to('new answer'))."
        )
    cases = random.Random("editors").sample(records.cases, len(records.cases))
    upto = (seed + 1) * count
    passed = 0
    if known:
        cases, passed = first_known_cases(lens, cases, upto)
    what = f"edits whose facts (of a chain all its hops) {lens.name} answers" if known else "edits"
    drawn = of_seed(cases, count, seed, f"{file} holds {len(cases)} {what}")
    return DrawnCases(drawn, len(records.refused), passed)


def of_seed(items: Sequence[Found], count: int, seed: int, beginning: str) -> list[Found]:
    """The `count` that belong to a seed. Raises `ConfigError`, which starts with `beginning`, for
    too few."""
    upto = (seed + 1) * count
    if len(items) <= upto - count:
        raise ConfigError(
            f"{beginning}, none of them for seed {seed}: each seed takes {count} others. Take a lower "
            "seed or a smaller count."
        )
    drawn = list(items[upto - count : upto])
    if len(drawn) < count:
        warnings.warn(
            f"{beginning}: {len(drawn)} of the {count} asked for are left for seed {seed}.",
            stacklevel=3,
        )
    return drawn


def first_known_cases(lens: Lens, cases: Sequence[Case], wanted: int) -> tuple[list[Case], int]:
    """The first cases that the model knows, at least as many as are wanted if the file holds that
    many, and the number of cases that it does not know."""
    kept: list[Case] = []
    passed = 0
    for start in range(0, len(cases), KNOWN_AT_ONCE):
        if len(kept) >= wanted:
            break
        some = cases[start : start + KNOWN_AT_ONCE]
        right = _known(lens, some)
        passed += len(some) - len(right)
        kept += right
    return kept, passed


def _known(lens: Lens, cases: Sequence[Case]) -> list[Case]:
    """The chains all of whose hops, and the edits whose fact, the model answers."""
    chains = [case for case in cases if isinstance(case, MultiHopCase)]
    edits = [case for case in cases if isinstance(case, EditCase)]
    kept = {id(case) for case in (*known(lens, chains)[0], *known_edits(lens, edits))}
    return [case for case in cases if id(case) in kept]


def worked_examples(file: str) -> tuple[str, ...]:
    """The worked examples of a text file, separated by empty lines. Raises `ConfigError` for one
    that cannot be read."""
    try:
        with open(file, encoding="utf-8") as opened:
            text = opened.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {file}: {error}.") from error
    return tuple(block + "\n\n" for block in text.strip().split("\n\n"))
