"""What the rows of a run rest on: the config, the experiment's code and files, presets, versions and
machine, as hashes where they are long."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qv_lens.errors import ConfigError
from qv_lens.runs.config import RunConfig, Task
from qv_lens.runs.experiment import Experiment, find_experiment
from qv_lens.runs.shards import RESERVED

#: bytes of a file in a folder of data above which its size stands for it
LARGE = 2**26

PACKAGES = ("qv_lens", "torch", "transformer-lens", "transformers", "pandas", "pyarrow", "ray")


def description_of(config: RunConfig, tasks: list[Task]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run folder belongs to, and what its rows were made with. Raises `ConfigError` for a
    field that the run itself writes."""
    experiment = find_experiment(config.experiment)
    taken = [name for name in RESERVED if any(name in task.values for task in tasks)]
    if taken:
        raise ConfigError(
            f"{config.experiment} has a field {taken[0]!r}, which the run itself writes: choose "
            "another name."
        )
    described = {
        **config.as_dict(),
        "measures": list(experiment.measures),
        "tasks": [task.id for task in tasks],
    }
    code, read = _hash(experiment.file), _read_beside(experiment, tasks)
    beside = {
        "file": str(experiment.file),
        "fields": sorted({name for task in tasks for name in task.values}),
        "code": code,
        "files": _files(tasks),
        "read": read,
        "made_by": hashlib.blake2b(
            " ".join([code, *sorted(read.values())]).encode(), digest_size=8
        ).hexdigest(),
    }
    return json.loads(as_json(described)), beside  # as it will be read: tuples are lists


def as_json(content: dict[str, Any]) -> str:
    """As it is written into a run folder."""
    return json.dumps(content, indent=1, ensure_ascii=False, default=str)


def _files(tasks: list[Task]) -> dict[str, str]:
    """Hash of every file and folder that a task's fields name, also within lists and tables: rows
    of other data must not join those that are here. (Models are known by their weights.)"""
    named: set[str] = set()
    for task in tasks:
        for field, value in asdict(task.fields).items():
            if field != "model":
                named.update(_texts(value))
    around = {Path.cwd(), *Path.cwd().parents}  # a text that happens to be "." names no data
    return {
        name: _hash(Path(name))
        for name in sorted(named)
        if _exists(name) and Path(name).resolve() not in around
    }


def _exists(name: str) -> bool:
    """Whether a text names a file or a folder; one that is too long for a name does not."""
    try:
        return bool(name) and Path(name).exists()
    except OSError:
        return False


def _read_beside(experiment: Experiment, tasks: list[Task]) -> dict[str, str]:
    """Hashes of what rows may depend on besides: the code that the experiment shares with others, and
    the presets of its models ('' where there are none)."""
    from qv_lens.editing.preset_files import files_of

    shared = {f"{file.parent.name}/{file.name}": _hash(file) for file in experiment.shared}
    models = {m for task in tasks if isinstance(m := getattr(task.fields, "model", None), str)}
    presets = {
        f"the presets of {model}": " ".join(map(_hash, files_of(model))) for model in sorted(models)
    }
    return {**shared, **presets}


def _texts(value: object) -> Iterator[str]:
    """Every text in a field's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, Iterable):
        for each in value:
            yield from _texts(each)


def _hash(place: Path) -> str:
    """Hash of a file, or of a folder's: their names and what they hold, of very large ones the
    size."""
    if place.is_file():
        return hashlib.blake2b(place.read_bytes(), digest_size=8).hexdigest()
    files = {file: file.stat().st_size for file in sorted(place.rglob("*")) if file.is_file()}
    contents = [
        f"{file.relative_to(place)} {_hash(file) if size < LARGE else size}"
        for file, size in files.items()
    ]
    return hashlib.blake2b("\n".join(contents).encode(), digest_size=8).hexdigest()


def machine() -> dict[str, Any]:
    """Where this runs."""
    gpu = None
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    return {
        "platform": platform.platform(),
        "processor": platform.processor(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "python": platform.python_version(),
    }


def versions() -> dict[str, str | None]:
    """Of the packages that rows rest on; None for one that is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
