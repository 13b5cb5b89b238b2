"""What a model says, kept.

1. Which facts it knows (`looked_up`), in the user's cache: every command that draws cases asks the
   same facts of the same weights, and of thousands that takes minutes.
2. What it answers to the questions of a case before any edit (`kept_in`), in a folder of the user's,
   a file for each case.

`looked_up` keeps a file for each state of a model (its weights, name and BOS) and version of the
libraries; in it a hash of each fact's prompt and accepted answers, and whether it is known. It keeps
nothing of a model that is patched, intervened on or hooked by the user."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from qv_lens.cache import cache_folder
from qv_lens.errors import ConfigError
from qv_lens.evaluation.questions import CaseAnswers
from qv_lens.facts.records import Case, Fact
from qv_lens.files import whole
from qv_lens.models.backend import versions
from qv_lens.models.lens import Lens

#: raised when another answer counts as right: what was kept before is asked again
RULE = 1
#: changes when the same questions are asked in another way, so that older answers are not taken
FORMAT = 3
#: facts from which on an answer is looked up: hashing the weights takes as long as asking a few
MANY = 64


def looked_up(
    lens: Lens, facts: Sequence[Fact], ask: Callable[[Sequence[Fact]], list[bool]]
) -> list[bool]:
    """What `ask` says of each fact; of those kept from an earlier call, that."""
    file = _file(lens) if len(facts) >= MANY else None
    if file is None:
        return ask(facts)
    names = [_name(fact) for fact in facts]
    kept = _read(file)
    new = [fact for fact, name in zip(facts, names, strict=True) if name not in kept]
    if new:
        fresh = dict(zip(map(_name, new), ask(new), strict=True))
        kept = {**_read(file), **kept, **fresh}  # another process may have written meanwhile
        _write(file, kept)
    return [kept[name] for name in names]


def kept_in(
    folder: Path,
    lens: Lens,
    cases: Sequence[Case],
    asked: Sequence[tuple[object, ...]],
    ask: Callable[[Sequence[Case]], list[CaseAnswers]],
) -> list[CaseAnswers]:
    """What `ask` says of each case; of those whose file the folder holds, that. `asked`: all that an
    answer depends on beside the model, case by case. Raises `ConfigError` where the folder cannot be
    written."""
    state = lens.state()
    files = [folder / f"{_digest((FORMAT, state, *key))}.json" for key in asked]
    read = {file: _answers(file) for file in files}
    kept = {file: answers for file, answers in read.items() if answers is not None}
    missing = {file: case for file, case in zip(files, cases, strict=True) if file not in kept}
    for file, made in zip(missing, ask(list(missing.values())), strict=True):
        try:
            with whole(file) as partial:
                partial.write_text(json.dumps(made.plain()))
        except OSError as error:
            raise ConfigError(f"Cannot keep results in {folder}: {error}.") from error
        kept[file] = made
    return [kept[file] for file in files]


def _answers(file: Path) -> CaseAnswers | None:
    """The answers in a file; None where it is absent or damaged."""
    try:
        return CaseAnswers.of(json.loads(file.read_text()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _file(lens: Lens) -> Path | None:
    folder = cache_folder()
    state = None if folder is None else lens.bare_state
    if folder is None or state is None:
        return None
    key = state, str(lens.dtype), lens.device.type, versions(), RULE
    return folder / "known" / f"{_digest(key)}.json"


def _name(fact: Fact) -> str:
    return _digest((fact.text, fact.answer, fact.aliases, fact.space), 8)


def _digest(key: tuple[object, ...], size: int = 16) -> str:
    return hashlib.blake2b(repr(key).encode(), digest_size=size).hexdigest()


def _read(file: Path) -> dict[str, bool]:
    """What is kept; nothing where the file is absent or damaged."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    items = table.items() if isinstance(table, dict) else ()
    return {name: right for name, right in items if isinstance(right, bool)}


def _write(file: Path, kept: dict[str, bool]) -> None:
    try:
        with whole(file) as partial:
            partial.write_text(json.dumps(kept), encoding="utf-8")
    except OSError:
        return  # it is asked again next time
