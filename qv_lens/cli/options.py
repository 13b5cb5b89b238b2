"""What the verbs of the command line have in common: their options, and what is refused before any work."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from qv_lens.editing.editors import HOMES
from qv_lens.errors import ConfigError

if TYPE_CHECKING:
    from qv_lens.facts.records import EditRequest
    from qv_lens.models.lens import Lens

Cloze = Annotated[
    str, Parameter(help="A cloze with {} for the subject, ending right before the answer.")
]
Subject = Annotated[str, Parameter(help="What {} stands for.")]
Answer = Annotated[str, Parameter(help="The true answer.")]
New = Annotated[str, Parameter(help="The new answer.")]
Model = Annotated[
    str,
    Parameter(
        help=(
            "toy-gptj, toy-qwen3, smollm2-135m (after models get), a hub name, a local folder, a "
            ".gguf file."
        )
    ),
]
#: what the shell completes; other capitals and variants are taken as well
Completed = Parameter(completer=lambda _: list(HOMES))
EditorName = Annotated[str, Completed, Parameter(help=f"{', '.join(HOMES)} (in capitals or not).")]
Settings = Annotated[
    list[str] | None,
    Parameter(
        name="--set",
        consume_multiple=True,
        help="Changes to the editor's settings, as lr=0.1 layers=[3,4].",
    ),
]
#: a list: its values follow one another, or each has the option's name in front
Several = Parameter(consume_multiple=True)
PresetOf = Annotated[
    str | None,
    Parameter(
        help="Whose settings of the editors are taken: another model, or a .toml file of presets "
        "(default: --model's own)."
    ),
]
Seed = Annotated[int, Parameter(help="Seed of every random draw.")]


@Parameter(name="*")
@dataclass(frozen=True)
class Loading:
    """How the model is loaded."""

    dtype: Literal["float32", "float64", "bfloat16", "float16"] | None = None
    """Type of the weights (default: the checkpoint's own)."""
    device: str | None = None
    """Where it runs, as torch names it (default: the first GPU, if there is one)."""


AS_IT_IS = Loading()
#: set while --quiet is in force
QUIET = "QV_LENS_QUIET"


def announce(model: str) -> None:
    """Say on a terminal what takes the time, before anything heavy is imported."""
    if sys.stderr.isatty() and not os.environ.get(QUIET):
        print(f"qv-lens: loading PyTorch, TransformerLens and {model} …", file=sys.stderr)


def loaded(model: str, loading: Loading) -> Lens:
    """The model as the options ask for it."""
    import qv_lens as qv

    return qv.load(model, **asdict(loading))


@contextmanager
def phases(room: str, unless_seen: bool = False) -> Iterator[None]:
    """What long work is doing, a line each on stderr: what the modules of a room of `qv_lens` log;
    nothing with --quiet. `unless_seen`: nothing either where a progress bar tells it already."""
    logger = logging.getLogger(f"qv_lens.{room}")
    if os.environ.get(QUIET) or (unless_seen and sys.stderr.isatty()):
        yield
        return
    handler, level, propagate = logging.StreamHandler(), logger.level, logger.propagate
    handler.setFormatter(logging.Formatter("qv-lens: %(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # libraries that log give the root logger a handler of their own
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def requested(prompt: str, subject: str, answer: str, new: str) -> EditRequest:
    """The edit that the options ask for. Raises `FactError` for a prompt, subject or answer that cannot
    be used, `EditError` where there is nothing to edit."""
    from qv_lens.facts.records import Fact, check_requests

    request = Fact(prompt, subject, answer).to(new)
    check_requests([request])
    return request


def settings_of(changes: Sequence[str] | None) -> dict[str, Any]:
    """The values by name of key=value words. Raises `ConfigError` for a word without =."""
    from qv_lens.runs.config import assigned

    not_empty("--set", changes)
    return dict(assigned(change) for change in changes or ())


def at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ConfigError(f"{option} must be at least {least}, got {value}.")


def not_empty(option: str, values: Sequence[object] | None) -> None:
    if values is not None and not values:
        raise ConfigError(f"{option} needs at least one value, or leave it out.")


def check_new(option: str, folder: Path | None) -> None:
    """Raise `ConfigError` for a folder that is there already, or cannot be made."""
    if folder is not None and folder.exists():
        raise ConfigError(f"{folder} is there already. Choose another {option}.")
    if folder is not None:
        check_writable(folder / "file", option)


def check_apart(folders: Mapping[str, Path | None]) -> None:
    """Raise `ConfigError` where two options name one folder."""
    named = [(option, folder) for option, folder in folders.items() if folder is not None]
    for (first, path), (second, other_path) in combinations(named, 2):
        if path.resolve() == other_path.resolve():
            raise ConfigError(
                f"{first} and {second} both name {path}, and what reads the one would read the other "
                "with it: choose two folders."
            )


def check_writable(path: Path, option: str = "--out") -> None:
    """Check before the work, not after it, that the file can be written; an existing file stays as
    it is, and no folder is left behind. Raises `ConfigError`."""
    absent = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"Cannot write to {path}: {error}. Choose another {option}.") from error
    finally:
        for folder in absent:
            with suppress(OSError):
                folder.rmdir()
