"""Presets as files: a TOML file for each model, in the package or in the user's cache.

    model = "smollm2-135m"
    fingerprint = "..."

    ["MEMIT"]
    source = "qv-lens tune ... : 98% ..."

    ["MEMIT".settings]
    layers = [3, 4, 5]
    lam = 1536.0

Every field of an editor is written, except those that are None. An editor in the user's cache takes
precedence over the package's."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from qv_lens.cache import cache_folder
from qv_lens.editing.bounds import check_bounds
from qv_lens.editing.job import Editor
from qv_lens.errors import ConfigError, EditError, unknown
from qv_lens.files import placed

PACKAGE = Path(__file__).parent / "settings"

#: what a file holds: by editor's name its settings and their source
Entries = dict[str, dict[str, Any]]


def files_of(model: str) -> list[Path]:
    """The existing files of a model's presets: the package's, then the user's, whose editors
    replace the package's."""
    folder = cache_folder()
    places = [PACKAGE] if folder is None else [PACKAGE, folder / "presets"]
    return [file for file in (place / file_name(model) for place in places) if file.exists()]


def file_name(model: str) -> str:
    """What the file of a model is called: 'Qwen/Qwen3-8B' -> 'Qwen--Qwen3-8B.toml'."""
    return f"{model.strip('/').replace('/', '--')}.toml"


def model_of(file: Path) -> str:
    """The model that a file is of."""
    return file.stem.replace("--", "/")


def read_presets(file: Path, kinds: Mapping[str, type]) -> dict[str, tuple[Editor, str]]:
    """Editor and source by name. `kinds`: the classes by the first part of the name ('ACE.paper' is
    an ACE).

    Raises `ConfigError` for a file that cannot be read, an unknown editor or setting, or a value out
    of its bounds.
    """
    editors = {}
    for name, entry in entries_of(file).items():
        kind = kinds.get(name.split(".")[0])
        if kind is None:
            raise unknown(
                f"Editor in {file} (editing/editors.py names those that there are):", name, kinds
            )
        settings = {key: _frozen(value) for key, value in entry["settings"].items()}
        known = sorted(each.name for each in fields(kind))
        for key in settings:
            if key not in known:
                raise unknown(f"Setting of {name} in {file}:", key, known)
        editor = kind(**settings)
        try:
            check_bounds(editor)
        except EditError as error:
            raise ConfigError(f"{file}, {name}: {error}") from error
        editors[name] = (editor, str(entry["source"]))
    return editors


def entries_of(file: Path) -> Entries:
    """The editors of a file, as they stand there. Raises `ConfigError` for one that cannot be
    read."""
    table = _table(file)
    entries = {name: entry for name, entry in table.items() if isinstance(entry, dict)}
    for name, entry in entries.items():
        if not isinstance(entry.get("settings"), dict) or "source" not in entry:
            raise ConfigError(f"{file}: {name} needs a source and settings.")
    return entries


def text_of(file: Path) -> str | None:
    """The text for C0 with which a file's editors were tuned; None where none was read."""
    return _table(file).get("text") if file.exists() else None


def check_weights(file: Path, fingerprint: str) -> None:
    """Raise `ConfigError` for a file that holds the presets of other weights."""
    there = _table(file).get("fingerprint") if file.exists() else None
    if there not in (None, fingerprint):
        raise ConfigError(
            f"{file} holds settings that were chosen for other weights (fingerprint {there}, not "
            f"{fingerprint}). Name another file with --out, or remove it; nothing was changed."
        )


def _table(file: Path) -> dict[str, Any]:
    try:
        # with or without a byte order mark
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"Cannot read the presets in {file}: {error}.") from error


def entry_of(editor: Any, source: str) -> dict[str, Any]:
    """An editor as a file holds it. Raises `ConfigError` for a setting that no file can hold: None
    where it is not the default, or another editor (which a file names)."""
    settings = {}
    for each in fields(editor):
        value = getattr(editor, each.name)
        if is_dataclass(value) or (value is None and each.default is not None):
            raise ConfigError(
                f"A file of presets cannot hold {each.name}={value!r:.60} of "
                f"{type(editor).__name__}."
            )
        if value is not None:
            settings[each.name] = value
    return {"source": source, "settings": settings}


def write_presets(file: Path, header: Mapping[str, str | None], entries: Entries) -> None:
    """Write a file, whole or not at all; what is None stays out of its header. Raises `ConfigError`
    where it cannot be written."""
    lines = [f"{key} = {_toml(value)}" for key, value in header.items() if value is not None]
    for name, entry in sorted(entries.items()):
        lines += [
            "",
            f"[{_toml(name)}]",
            f"source = {_toml(entry['source'])}",
            "",
            f"[{_toml(name)}.settings]",
        ]
        lines += [f"{key} = {_toml(value)}" for key, value in entry["settings"].items()]
    with placed(file, "the presets") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _toml(value: Any) -> str:
    """A value as TOML writes it: JSON, but for numbers that JSON does not have, and for tables."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _frozen(value: Any) -> Any:
    return tuple(_frozen(inner) for inner in value) if isinstance(value, list) else value
