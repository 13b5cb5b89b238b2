"""Files of facts and edits -> records.

`read` takes a JSON list, JSON lines or a dataset by name (extra `data`); `formats.py` knows what the records hold.
A record that cannot be used is refused with its number, line (of a file), field and reason: `read` raises, or with
`skip=True` reports it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from qv_lens.errors import FactError, QVLensError, unknown
from qv_lens.facts.formats import READERS, Record, RefusedError, recognised
from qv_lens.facts.records import Case, EditRequest, Fact

#: gives the line on which each record begins (none of a dataset), asked only where one is refused
Where = Callable[[], list[int]]


@dataclass(frozen=True)
class Read:
    """What a file held. `refused`: one row per record that could not be read: `source, record, line, field, reason`
    (no `line` of a dataset)."""

    format: str
    cases: tuple[Case, ...]
    facts: tuple[Fact, ...]
    refused: pd.DataFrame


def read(source: str | Path, format: str | None = None, *, skip: bool = False) -> Read:
    """Every record of a file or dataset ("name", "name:config"). `format`: 'mquake', 'counterfact', 'flat', 'zsre', 'knowedit',
    'known' or 'plain' (None: by its keys).

    Raises `FactError` for what cannot be read, or, unless `skip`, a record that is refused.
    """
    records, where = _records(source)
    return _parsed(records, where, format, source, skip)


def parse(records: list[Any], format: str | None = None, *, source: str | Path = "records", skip: bool = False) -> Read:
    """As `read`, of records already in memory."""
    return _parsed(records, list, format, source, skip)


def _parsed(records: list[Any], where: Where, format: str | None, source: str | Path, skip: bool) -> Read:
    if not records:
        raise FactError(f"{source} holds no records.")
    kind = recognised(records, source) if format is None else format
    if kind not in READERS:
        raise unknown("Format", kind, READERS, error=FactError)
    found, refused = [], []
    for number, record in enumerate(records):
        try:
            if isinstance(record, FactError):
                raise record
            if not isinstance(record, dict):
                raise FactError(f"it is a {type(record).__name__}, not a dictionary")
            found.append(READERS[kind](record))
        except KeyError as error:
            refused.append((number, str(error.args[0]), "missing"))
        except RefusedError as error:
            refused.append((number, error.field, str(error)))
        except (FactError, TypeError, AttributeError, IndexError, ValueError) as error:
            refused.append((number, "", str(error)))
    lines = where() if refused else []
    rows = [(str(source), number, lines[number] if lines else None, field, reason) for number, field, reason in refused]
    table = pd.DataFrame(rows, columns=["source", "record", "line", "field", "reason"]).astype({"line": "Int64"})
    if refused and not skip:
        number, field, reason = refused[0]
        what = f"field {field!r}: {reason}" if field else reason
        line = f"line {lines[number]}, " if lines else ""
        raise FactError(
            f"{source}, {line}record {number} (of {len(records)}, read as {kind}), {what}. "
            f"{len(refused)} are refused; skip=True reads the others and lists these."
        )
    cases = tuple(item for item in found if not isinstance(item, Fact))
    return Read(kind, cases, tuple(item for item in found if isinstance(item, Fact)), table)


def plain_facts(path: str | Path) -> list[Fact]:
    """The facts of a file in the format `plain` or `known`. Raises `FactError`."""
    got = read(path)
    if got.cases:
        raise FactError(
            f'{path} holds edits ({got.format}), not facts: [{{"prompt": "{{}} plays", "subject": ..., "answer": ...}}].'
        )
    return list(got.facts)


def _records(source: str | Path) -> tuple[list[Any], Where]:
    """The records, an error in the place of a line that is no JSON; and what tells on which line of a file each begins."""
    path = Path(source)
    if (
        not path.exists()
        and isinstance(source, str)
        and path.suffix not in (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet")
    ):
        return list(dataset(source)), list
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
        if path.suffix == ".jsonl":
            lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
            return [_json(line) for _, line in lines], lambda: [number for number, _ in lines]
        found = json.loads(text)
    except OSError as error:
        raise FactError(f"Cannot read facts from {path}: {error}.") from error
    except ValueError as error:
        raise FactError(f"{path} is no JSON: {error}. Facts and edits come as a JSON list, or as JSON lines (.jsonl).") from error
    if not isinstance(found, list) or not found:
        raise FactError(
            f'{path} holds no JSON list of records. Facts are [{{"prompt": "{{}} plays", "subject": ..., "answer": ...}}].'
        )
    return found, lambda: _lines(text)


def _lines(text: str) -> list[int]:
    """Where each element of a JSON list begins."""
    decoder, found, at, line = json.JSONDecoder(), [], text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
    while True:
        start = re.compile(r"[\s,]*").match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        if text[start] == "]":
            return found
        line += text.count("\n", at, start)
        found.append(line)
        _, at = decoder.raw_decode(text, start)
        line += text.count("\n", start, at)


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return FactError(f"it is no JSON: {error}")


def dataset(source: str, error: type[QVLensError] = FactError, *, streaming: bool = False) -> Iterator[Record]:
    """The rows of a dataset's training split by name ("name", "name:config"); `streaming` fetches them as they are read.

    Raises `error` where `datasets` is absent or the rows cannot be fetched.
    """
    try:
        datasets = import_module("datasets")
    except ImportError as cause:
        raise error(f"{source!r} is no file; for a dataset of that name: pip install 'qv_lens[data]'.") from cause
    name, _, config = source.partition(":")
    try:
        yield from datasets.load_dataset(name, config or None, split="train", streaming=streaming)
    except Exception as cause:  # the hub's own errors are many
        raise error(f"The dataset {source!r} cannot be read: {type(cause).__name__}: {cause}.") from cause


def named(cases: Iterable[Case], category: Callable[[EditRequest], str | None]) -> dict[str, list[Case]]:
    """Cases by the category of their first edit (`categories.of_relation`, or a labeller of your own); those of no category
    are listed as "unknown"."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(category(case.requests[0]) or "unknown", []).append(case)
    return found


def warn_of(refused: pd.DataFrame) -> None:
    """Say how many records of a file were left out, and the first reason."""
    if len(refused):
        row = refused.iloc[0]
        warnings.warn(
            f"{row['source']}: {len(refused)} records are left out, the first one record {row['record']}"
            f"{', field ' + repr(row['field']) if row['field'] else ''}: {row['reason']}.",
            stacklevel=3,
        )
