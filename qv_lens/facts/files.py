"""Files and tables -> records and texts.

1. A file is read by its suffix, in upper or lower case: JSON lines (.jsonl, .ndjson), parquet, a
   table (.csv, .tsv: a record a row, an empty cell is missing), else JSON. A .json file may hold
   JSON lines or one record, and a .jsonl file a JSON list.
2. Lines end at a line feed alone: JSON may hold U+2028, U+2029 and U+0085 inside a string.
3. Records of a data frame hold numpy arrays for lists and NaN for what is missing: `plain` makes
   them lists and None.
4. A byte order mark is not part of the text, at the start or where files were joined.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qv_lens.errors import ConfigError, FactError, QVLensError, several

#: gives the line on which each record begins (none for a dataset); called only where a record is
#: refused
Where = Callable[[], list[int]]

JSON_LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
#: suffixes of files: a name that ends in one of them is not a dataset's
SUFFIXES = (".json", *JSON_LINES, ".parquet", *TABLES, ".txt", ".md")
BOM = "\ufeff"


# ------------------------------------------------------------------ records


def read_records(path: Path) -> tuple[list[Any], Where]:
    """The records of a file, with an error in the place of a line that is not JSON; and a function
    that gives the line on which each begins.

    Raises `FactError` for a file that cannot be read or holds none.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return of_frame(pd.read_parquet(path)), list
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
        if suffix in TABLES:
            return _of_table(text, suffix)
        listed = suffix not in JSON_LINES or text.lstrip()[:1] == "["
        records = _whole(text, suffix) if listed else None
    except OSError as error:
        raise FactError(f"Cannot read facts from {path}: {error}.") from error
    except UnicodeDecodeError as error:
        raise FactError(f"{path} is not in UTF-8 ({error}): save it in that encoding.") from error
    except (ValueError, csv.Error) as error:  # pyarrow's errors are of this kind too
        kind = {".parquet": "parquet file", ".csv": "table", ".tsv": "table"}.get(suffix, "JSON")
        raise FactError(
            f"{path} is no {kind}: {error}. Facts and edits come as a JSON list, as JSON lines "
            "(.jsonl), as parquet or as a table (.csv, .tsv)."
        ) from error
    if records is None:
        return _of_lines(text)
    if isinstance(records, dict) and records:
        records = [records]
    if isinstance(records, FactError):
        raise FactError(f"{path}, record 0: {records}.")
    if records == []:
        raise FactError(f"{path} holds an empty list: there are no records in it.")
    if not isinstance(records, list):
        raise FactError(
            f'{path} holds no JSON list of records. Facts are [{{"prompt": "{{}} plays", "subject": ..., "answer": ...}}].'
        )
    return [plain(record) for record in records], lambda: _lines(text)


def _whole(text: str, suffix: str) -> Any:
    """The file as one JSON value; None where it holds JSON lines. Raises `ValueError` where it
    holds neither."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except ValueError:
        first = next((line for line in text.split("\n") if line.strip()), "")
        if suffix in JSON_LINES or _is_object(first):
            return None
        raise


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object, also one that `_json` refuses for a name that stands twice."""
    try:
        return isinstance(json.loads(line.lstrip(BOM)), dict)
    except ValueError:
        return False


def _of_table(text: str, suffix: str) -> tuple[list[Any], Where]:
    """A record for each row of a table that has a cell, under the names of the first row."""
    sign = "\t" if suffix == ".tsv" else ","
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=sign, strict=True)
    names = [name.strip() for name in next(rows, [])]
    if twice := _twice([name for name in names if name]):
        raise ValueError(f"its column {twice!r} stands there twice")
    other = next((mark for mark in ";\t," if len(names) == 1 and mark in names[0]), None)
    if other is not None:
        raise ValueError(f"its columns are parted by {other!r}, not by {sign!r}")
    records, lines, end = [], [], rows.line_num
    for row in rows:
        begin, end = end + 1, rows.line_num
        if not any(row):
            continue
        lines.append(begin)
        if len(row) == len(names):
            records.append({name: cell for name, cell in zip(names, row, strict=True) if cell})
        else:
            records.append(FactError("it has not as many cells as the first row"))
    return records, lambda: lines


def _of_lines(text: str) -> tuple[list[Any], Where]:
    lines = [
        (number, line)
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip(BOM + " \t\r")
    ]
    return [plain(_json(line)) for _, line in lines], lambda: [number for number, _ in lines]


def _json(line: str) -> Any:
    try:
        return json.loads(line.lstrip(BOM), object_pairs_hook=_object)
    except ValueError as error:
        return FactError(f"it is no JSON: {error}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | FactError:
    """A JSON object; an error in the place of one that names something twice, of which one value
    would be lost."""
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    return FactError(f"its {_twice([name for name, _ in pairs])!r} stands there twice")


def _twice(names: Iterable[str]) -> str | None:
    """The first of the names that is there a second time."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _lines(text: str) -> list[int]:
    """The line on which each element of a JSON list begins; for a single record, its first line."""
    start = len(text) - len(text.lstrip())
    line = 1 + text.count("\n", 0, start)
    if text[start] != "[":
        return [line]
    decoder = json.JSONDecoder()
    starts: list[int] = []
    at = start + 1
    while True:
        start = re.compile(r"[\s,]*").match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        if text[start] == "]":
            return starts
        line += text.count("\n", at, start)
        starts.append(line)
        _, at = decoder.raw_decode(text, start)
        line += text.count("\n", start, at)


def of_memory(records: Any) -> list[Any]:
    """Records that are in memory: a data frame, or dictionaries in any order of their own. Raises
    `FactError`."""
    if isinstance(records, pd.DataFrame):
        return of_frame(records)
    every = several(records)
    if every is None:
        advice = "pass [record]" if isinstance(records, Mapping) else "read(path) takes a file"
        raise FactError(
            f"parse takes a list of records (dictionaries) or a data frame, got {records!r:.80}; "
            f"{advice}."
        )
    return [plain(record) for record in every]


def of_frame(frame: pd.DataFrame) -> list[Any]:
    """The rows of a data frame as dictionaries."""
    return [plain(record) for record in frame.to_dict("records")]


def plain(value: Any) -> Any:
    """The value as JSON would hold it: arrays as lists, numbers as Python's, NaN and its like as
    None."""
    if isinstance(value, (str, FactError)):
        return value
    if isinstance(value, pd.Series):
        return plain(value.to_dict())
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    missing = value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)
    return None if missing else value


# ------------------------------------------------------------------ texts


def read_texts(path: Path, error: type[QVLensError] = FactError) -> Iterator[str]:
    """The texts of a file: the "text" of each record or, in a file of another kind, each line that
    is not blank.

    Raises `error` for a file that cannot be read or holds no text, or records without texts.
    """
    empty = True
    for text in _texts_in(path, error):
        empty = False
        yield text
    if empty:
        raise error(f"{path} holds no text.")


def _texts_in(path: Path, error: type[QVLensError]) -> Iterator[str]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".json" or (suffix in JSON_LINES and _is_list(path)):
            yield from _texts_of(path, read_records(path)[0], error)
        elif suffix == ".parquet":
            yield from _texts_of(path, of_frame(pd.read_parquet(path)), error)
        elif suffix in TABLES:
            frame = pd.read_csv(  # texts as they stand: "NA" and "1984" too
                path, sep="\t" if suffix == ".tsv" else ",", encoding="utf-8-sig", dtype=str,
                keep_default_na=False,
            )  # fmt: skip
            yield from _texts_of(path, of_frame(frame), error)
        else:
            yield from _texts_of_lines(path, suffix in JSON_LINES, error)
    except FactError as cause:
        raise error(str(cause)) from cause
    except (OSError, ValueError) as cause:
        # UnicodeDecodeError, and what pandas and pyarrow raise, are ValueErrors.
        raise error(f"Cannot read the text {path}: {cause}.") from cause


def _is_list(path: Path) -> bool:
    """Whether a file of JSON lines is one list."""
    with path.open(encoding="utf-8-sig") as lines:
        return next((line.strip() for line in lines if line.strip()), "").startswith("[")


def _texts_of_lines(path: Path, json_lines: bool, error: type[QVLensError]) -> Iterator[str]:
    """Texts line by line, for files that are larger than memory. JSON lines are recognised by the
    first line."""
    as_json = json_lines
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            text = line.lstrip(BOM).strip()
            if not text:
                continue
            if not as_json:
                json_lines = _is_object(text)
                as_json = True
            yield from (
                [text] if not json_lines else _text_of(f"{path}, line {number}", _json(text), error)
            )


def _texts_of(path: Path, records: list[Any], error: type[QVLensError]) -> Iterator[str]:
    for number, record in enumerate(records):
        yield from _text_of(f"{path}, record {number}", record, error)


def _text_of(where: str, record: Any, error: type[QVLensError]) -> list[str]:
    """A record's text as a list, empty where the text is blank."""
    text = record.get("text") if isinstance(record, dict) else record
    if isinstance(text, str):
        return [text.lstrip(BOM)] if text.strip(BOM + " \t\r\n") else []
    if isinstance(record, FactError):
        raise error(f"{where}: {record}.")
    if isinstance(record, dict) and "text" not in record:
        raise error(
            f'{where}: texts are expected in a field "text", the record has {sorted(map(str, record))}.'
        )
    raise error(f'{where}: texts are expected in a field "text", it holds {text!r:.80}.')


def check_there(what: str, name: str | Path) -> None:
    """Raise `ConfigError` for the name of a file that is not there, before anything is loaded."""
    path = Path(name)
    if path.suffix.lower() in SUFFIXES and not path.exists():
        raise ConfigError(f"{what}: there is no file {path}.")
