"""Files of facts -> records."""

from __future__ import annotations

import json
from pathlib import Path

from qv_lens.errors import FactError
from qv_lens.facts.records import Fact


def plain_facts(path: str | Path) -> list[Fact]:
    """A JSON list of {"prompt" with {}, "subject", "answer"} and, if there, "category" and "relation".

    Raises `FactError` for a file that cannot be read, or a record that is no fact, with its number.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FactError(f"Cannot read facts from {path}: {error}.") from error
    if not isinstance(records, list):
        raise FactError(
            f'{path} holds no JSON list. Facts are [{{"prompt": "{{}} plays the sport of", "subject": ..., "answer": ...}}].'
        )
    found = []
    for number, record in enumerate(records):
        try:
            texts = [str(record[key]) for key in ("prompt", "subject", "answer")]
            found.append(Fact(*texts, relation=record.get("relation"), category=record.get("category")))
        except (KeyError, TypeError, AttributeError) as error:
            raise FactError(f"{path}, record {number}: no {error}. A fact has prompt, subject and answer.") from error
        except FactError as error:
            raise FactError(f"{path}, record {number}: {error}") from error
    return found
