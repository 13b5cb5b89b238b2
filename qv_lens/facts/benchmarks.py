"""Files of facts and edits -> records.

`read` takes a JSON list, JSON lines, parquet or a dataset by name (extra `data`), `parse`
dictionaries or a data frame; `files.py` reads them, `formats.py` knows what they hold. A record
that cannot be used is refused with its number, line (of a file), field and reason: `read` raises an
error, or with `skip=True` reports the record."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from qv_lens.errors import FactError, QVLensError, unknown
from qv_lens.facts.fields import Record, RefusedError
from qv_lens.facts.files import SUFFIXES, Where, of_memory, read_records
from qv_lens.facts.formats import READERS, recognised
from qv_lens.facts.records import Case, EditRequest, Fact, MultiHopCase, edited_facts


@dataclass(frozen=True)
class ReadResult:
    """What a file held. `refused`: one row per record that could not be read: `source, record,
    line, field, reason` (no `line` of a dataset)."""

    format: str
    """The format that was recognised."""
    cases: tuple[Case, ...]
    """Its cases."""
    facts: tuple[Fact, ...]
    """Its facts, of a file of facts."""
    refused: pd.DataFrame
    """What could not be read, with the reason."""

    def __repr__(self) -> str:
        held = f"{len(self.cases)} cases" if self.cases else f"{len(self.facts)} facts"
        return f"ReadResult({self.format}: {held}, {len(self.refused)} refused)"

    @property
    def edited(self) -> tuple[Fact, ...]:
        """The facts that the cases edit, as they were before; without those whose record gives no
        old answer."""
        return tuple(edited_facts(self.cases))


def read(source: str | Path, format: str | None = None, *, skip: bool = False) -> ReadResult:
    """Every record of a file or dataset ("name", "name:config", "name:config:split"; "name::split"
    where it has no configurations; without a split 'train'). `format`: 'mquake', 'counterfact', 'ripple',
    'flat', 'zsre', 'knowedit', 'known' or 'plain' (None: by its keys).

    Raises `FactError` for what cannot be read, or, unless `skip`, a record that is refused.
    """
    records, where = _records(source)
    return _parsed(records, where, format, source, skip)


def parse(
    records: Iterable[Any],
    format: str | None = None,
    *,
    source: str | Path = "records",
    skip: bool = False,
) -> ReadResult:
    """Like `read`, for records already in memory: dictionaries, or the rows of a data frame."""
    return _parsed(of_memory(records), list, format, source, skip)


def _parsed(
    records: list[Any], where: Where, format: str | None, source: str | Path, skip: bool
) -> ReadResult:
    if not records:
        raise FactError(f"{source} holds no records.")
    kind = recognised(records, source) if format is None else format
    if kind not in READERS:
        raise unknown("Format", kind, READERS, error=FactError)
    items, refused = [], []
    for number, record in enumerate(records):
        try:
            if isinstance(record, FactError):
                raise record
            if not isinstance(record, dict):
                raise FactError(f"it is a {type(record).__name__}, not a dictionary")
            items.append(READERS[kind](record))
        except KeyError as error:
            refused.append((number, str(error.args[0]), "missing"))
        except RefusedError as error:
            refused.append((number, error.field, str(error)))
        except (FactError, TypeError, AttributeError, IndexError, ValueError) as error:
            refused.append((number, "", str(error)))
    lines = where() if refused else []
    rows = [
        (str(source), number, lines[number] if lines else None, field, reason)
        for number, field, reason in refused
    ]
    table = pd.DataFrame(rows, columns=["source", "record", "line", "field", "reason"]).astype(
        {"line": "Int64"}
    )
    if refused and not skip:
        number, field, reason = refused[0]
        what = f"field {field!r}: {reason}" if field else reason
        line = f"line {lines[number]}, " if lines else ""
        raise FactError(
            f"{source}, {line}record {number} (of {len(records)}, read as {kind}), {what}. "
            f"{len(refused)} are refused; skip=True reads the others and lists these."
        )
    cases = tuple(item for item in items if not isinstance(item, Fact))
    return ReadResult(kind, cases, tuple(item for item in items if isinstance(item, Fact)), table)


def plain_facts(path: str | Path) -> list[Fact]:
    """The facts of a file: of facts, or of single edits what they edit, with a warning of those
    whose old answer is not known. Raises `FactError` for chains, for edits all without an old
    answer, and for what cannot be read."""
    records = read(path)
    if any(isinstance(case, MultiHopCase) for case in records.cases):
        raise FactError(
            f'{path} holds chains ({records.format}), not facts: [{{"prompt": "{{}} plays", "subject": ..., "answer": ...}}].'
        )
    if records.facts:
        return list(records.facts)
    facts = list(records.edited)
    if not facts:
        raise FactError(
            f"{path} holds {len(records.cases)} edits and no old answers ({records.format}): nothing "
            "says what the model is asked about. Give them (in KnowEdit's format as 'ground_truth')."
        )
    without = len(records.cases) - len(facts)
    if without:
        warnings.warn(
            f"{path}: {without} of {len(records.cases)} edits are left out, whose records give no old "
            "answer.",
            stacklevel=2,
        )
    return facts


def _records(source: str | Path) -> tuple[list[Any], Where]:
    """The records of a file or dataset, and a function that gives the line of a file on which each
    begins."""
    if not isinstance(source, (str, Path)):
        raise FactError(
            f"read takes a file or the name of a dataset, got a {type(source).__name__}; parse "
            "takes records in memory."
        )
    path = Path(source)
    if not path.exists() and isinstance(source, str) and path.suffix.lower() not in SUFFIXES:
        return of_memory(dataset(source)), list
    return read_records(path)


def dataset(
    source: str, error: type[QVLensError] = FactError, *, streaming: bool = False
) -> Iterator[Record]:
    """The rows of a dataset by name, as `read` takes it; `streaming` fetches them as they are read.

    Raises `error` where `datasets` is absent or the rows cannot be fetched.
    """
    try:
        datasets = import_module("datasets")
    except ImportError as cause:
        raise error(
            f"{source!r} is not a file; for a dataset of that name: pip install 'qv_lens[data]'."
        ) from cause
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        yield from datasets.load_dataset(
            name, config or None, split=split or "train", streaming=streaming
        )
    except Exception as cause:  # the hub's own errors are many
        raise error(
            f"The dataset {source!r} cannot be read: {type(cause).__name__}: {cause}. (A name is "
            "followed by its configuration and split: 'name:config:split', or 'name::split'; without "
            "one the split is 'train'.)"
        ) from cause


def named(
    cases: Iterable[Case], category: Callable[[EditRequest], str | None]
) -> dict[str, list[Case]]:
    """Cases by the category of their first edit (`categories.of_relation`, or a labeller of your
    own); those of no category are listed as "unknown"."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(category(case.requests[0]) or "unknown", []).append(case)
    return groups


#: MQuAKE-Remastered's labels of cases that are edited, the first that a case has counts
EDITED_SPLITS = ("edited", "train_edited", "test_edited")


def by_split(cases: Iterable[MultiHopCase], edits: int) -> dict[str, list[MultiHopCase]]:
    """MQuAKE-Remastered's groups of cases where so many are edited: 'edited' and 'unedited', of
    CF-6334 'train_edited', 'test_edited' and 'unedited'; its other cases are left out. The edits of
    the first two are made, the questions of all are asked.

    Raises `FactError` for a case whose record has no `split` for this number.
    Source: MQuAKE-Remastered (its loader).
    """
    cases = list(cases)
    labels = [_split_labels(case, str(edits)) for case in cases]
    of_halves = any(label.startswith(("train_", "test_")) for some in labels for label in some)
    groups: dict[str, list[MultiHopCase]] = {}
    for case, some in zip(cases, labels, strict=True):
        edited = next((name for name in EDITED_SPLITS if name in some), None)
        if edited is not None:
            groups.setdefault(edited, []).append(case)
        elif not of_halves or "test_unedited" in some:
            groups.setdefault("unedited", []).append(case)
    return groups


def _split_labels(case: MultiHopCase, edits: str) -> Collection[str]:
    split = dict(case.extra).get("split")
    sizes = split if isinstance(split, Mapping) else {}
    if edits not in sizes:
        raise FactError(
            f"Case {case.case_id} has no split for {edits} edits (it has: "
            f"{', '.join(map(str, sizes)) or 'none'}): the records of MQuAKE-Remastered have them."
        )
    return sizes[edits] or ()


def warn_of(refused: pd.DataFrame) -> None:
    """Say how many records of a file were left out, and the first reason."""
    if len(refused):
        row = refused.iloc[0]
        warnings.warn(
            f"{row['source']}: {len(refused)} records are left out, the first one record "
            f"{row['record']}{', field ' + repr(row['field']) if row['field'] else ''}: "
            f"{row['reason']}.",
            stacklevel=3,
        )


def uncontaminated(case: MultiHopCase, edits: Iterable[EditRequest]) -> list[EditRequest]:
    """Those of the edits that leave a case's right path as it is: dropped is an edit with subject
    and relation of one of its steps and another object. A step whose relation is not named matches no
    edit.

    The steps are those after its own edits. Of a case that is not edited itself pass
    `replace(case, new_hops=case.hops)`.
    Source: MQuAKE-Remastered (its loader); of many edits together some answer another case's step
    differently, and its question then has another right answer.
    """
    path = _right_path(case)
    return [
        edit
        for edit in edits
        if edit.new in path.get((edit.fact.subject, edit.fact.relation), {edit.new})
    ]


def contaminated(cases: Sequence[Case]) -> list[int]:
    """Which cases have a step on their right path that an edit of another case answers differently:
    once all are edited, the right answer to their questions is another one."""
    edits_of: dict[tuple[str | None, str | None], list[tuple[int, str]]] = {}
    for i, case in enumerate(cases):
        for edit in case.requests:
            edits_of.setdefault((edit.fact.subject, edit.fact.relation), []).append((i, edit.new))
    return [
        i
        for i, case in enumerate(cases)
        if isinstance(case, MultiHopCase)
        and any(
            other != i and new not in names
            for step, names in _right_path(case).items()
            for other, new in edits_of.get(step, ())
        )
    ]


def _right_path(case: MultiHopCase) -> dict[tuple[str | None, str | None], set[str]]:
    """The accepted answers by subject and relation of the steps."""
    return {
        (hop.subject, hop.relation): {hop.answer, *hop.aliases}
        for hop in case.new_hops
        if hop.relation
    }
