"""Hyperparameters by model and method, each with where it comes from: `settings/MODEL.toml`.

GPT-J-6B: the methods' own releases, or EasyEdit where a method has none for it. Qwen3-8B: ACE's
release; for the others what their authors or EasyEdit use for Qwen2.5-7B, untuned. The bundled
models: chosen by `experiments/toys/tune.py`. Any other model: what `qv-lens tune` found, in the
package or in the user's cache; an editor in the cache takes precedence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qv_lens.editing.bounds import check_bounds
from qv_lens.editing.editors import HOMES, VARIANTS, editors, spelled
from qv_lens.editing.job import Editor
from qv_lens.editing.preset_files import PACKAGE, files_of, model_of, read_presets
from qv_lens.errors import ConfigError, unknown
from qv_lens.models.lens import Lens


@dataclass(frozen=True)
class Preset:
    """An editor with its source."""

    editor: Editor
    """The editor with its settings."""
    source: str
    """Where they come from."""


def presets(model: str) -> dict[str, Preset]:
    """The editors for a model by name, those that were tuned for it in the place of others.

    `model`: a model's name, or a file that `qv-lens tune` wrote.
    Raises `ConfigError` for a model without presets, or a file that cannot be read.

    >>> import qv_lens as qv
    >>> qv.presets("toy-gptj")["MEMIT"].editor.layers
    (3, 4, 5)
    """
    if not isinstance(model, str):
        raise ConfigError(f"presets takes a model's name, got {model!r:.60}: presets(lens.name).")
    files = [Path(model)] if model.endswith(".toml") else files_of(model)
    table: dict[str, Preset] = {}
    for file in files:
        for name, (editor, source) in read_presets(file, editors()).items():
            table[name] = Preset(editor, source)
    if not table:
        named = ", ".join(sorted(model_of(file) for file in PACKAGE.glob("*.toml")))
        raise ConfigError(
            f"There are no presets for the model {model!r}, only for {named}. Let qv-lens tune "
            f"{model} look for some; or begin with another model's and change its layers: --preset "
            "smollm2-135m --set layers=[3,4,5] (layer=3 where an editor has one), preset in a run "
            "file, in Python presets('smollm2-135m')['MEMIT'].editor, or qv.MEMIT(layers=(3, 4, 5))."
        )
    return table


def has_presets(model: str) -> bool:
    """Whether a model has presets of its own."""
    return bool(files_of(model))


def editor_of(lens: Lens, editor: Editor | str) -> Editor:
    """The editor itself or, for a name in any capitals, the model's preset of that name; an editor
    inside another one (`SimIE`) likewise. Raises `ConfigError` for a model without that preset."""
    chosen: Any = preset_of(lens.name, editor).editor if isinstance(editor, str) else editor
    inner = getattr(chosen, "editor", None)
    if not isinstance(inner, str):
        return chosen
    return replace(chosen, editor=preset_of(lens.name, inner).editor)


def with_settings(editor: Editor, settings: Mapping[str, Any]) -> Editor:
    """The editor with some settings changed; a list is taken as a tuple. Raises `ConfigError` for a
    setting that it does not have, or a value of another kind than it takes, `EditError` for one out
    of its bounds."""
    name, changed = type(editor).__name__, {}
    known = {each.name: getattr(editor, each.name) for each in fields(editor)}  # pyright: ignore[reportArgumentType]
    for key, value in settings.items():
        if key not in known:
            raise unknown(f"Setting of {name}:", key, sorted(known))
        taken = tuple(value) if isinstance(value, list) else value
        if not _alike(taken, known[key]):
            kind = "several values, as [3,4]" if isinstance(known[key], tuple) else "one value"
            raise ConfigError(
                f"{key} of {name} takes {kind}; it is {known[key]!r}, a value of another kind than "
                f"{value!r}."
            )
        changed[key] = taken
    made = replace(editor, **changed)  # pyright: ignore[reportArgumentType]
    check_bounds(made)
    return made


def _alike(value: object, now: object) -> bool:
    """Whether a value can stand where another one stands."""
    if now is None or value is None:
        return now is None or type(now) in (int, float)
    if isinstance(now, bool) or isinstance(value, bool):
        return isinstance(now, bool) and isinstance(value, bool)
    if isinstance(now, float):
        return isinstance(value, (int, float))
    return isinstance(value, type(now))


def preset_of(model: str, method: str) -> Preset:
    """A method's preset for a model, whatever the capitals. Raises `ConfigError` for a model without
    that preset."""
    table = presets(model)
    name = spelled(method, (*HOMES, *VARIANTS, *table))
    if name in table:
        return table[name]
    if name not in (*HOMES, *VARIANTS):
        raise unknown(f"Preset of {model} for", name, table)
    raise ConfigError(
        f"{model} has no preset of {name}, only of {', '.join(sorted(table))}. Let qv-lens tune {model} "
        f"--editor {name} look for one, or write one into a file of presets and pass that as "
        f"--preset FILE.toml (docs/editing.md); in Python pass the editor itself, qv.{name}(...)."
    )
