"""From a TOML file to tasks.

    recipe = "ablation"            # a name from `recipes`, or module:NAME of your own
    [settings]                     # one value for all tasks
    prompts = 60
    [grid]                         # every combination is a task
    model = ["toy-gptj"]
    layer = "layers"               # every layer of the model
    neurons = ["top", "random"]
    seed = [0, 1, 2]

1. A recipe says what a task is: a frozen dataclass, whose fields are the keys allowed above. A field that is a table
   (an editor's hyperparameters) is reached with a dot: "editor.lam" = [5, 10].
2. A task is one combination. Its id is a hash of the recipe's name and its fields: the same task has the same id in every
   run, on every machine, and its random draws come from its own `seed`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from qv_lens.errors import ConfigError, unknown

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from qv_lens.sweeps.engine import Context

#: what stands for every layer of a task's model in a grid over `layer`
ALL_LAYERS = "layers"


@dataclass(frozen=True)
class Recipe:
    """What a run does: `task` is the frozen dataclass of one task's fields, `run` makes its rows (tidy, without those
    fields), `measures` names the columns that are results, `figure` draws the finished frame."""

    name: str
    task: type
    run: Callable[[Any, Context], pd.DataFrame]
    measures: tuple[str, ...]
    figure: Callable[[pd.DataFrame], go.Figure] | None = None
    version: int = 1


@dataclass(frozen=True)
class RunConfig:
    """One run: the recipe's name, what is fixed, and what is varied in the order of the file (`ALL_LAYERS`: the layers)."""

    recipe: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...] | str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as written into the run folder."""
        return {
            "recipe": self.recipe,
            "settings": dict(self.settings),
            "grid": {k: v if isinstance(v, str) else list(v) for k, v in self.grid.items()},
        }


@dataclass(frozen=True)
class Task:
    """One combination: its place in the run, its id, its fields."""

    index: int
    id: str
    fields: Any

    @property
    def values(self) -> dict[str, Any]:
        """The fields as columns: tables become JSON text."""
        plain = asdict(self.fields)
        return {k: json.dumps(v, sort_keys=True) if isinstance(v, (dict, list, tuple)) else v for k, v in plain.items()}


def read_config(path: str | Path, changes: Sequence[str] = (), models: Sequence[str] = ()) -> RunConfig:
    """The run that a TOML file describes. `changes` are "key=value" (a list varies, anything else is fixed); `models`
    takes the place of the file's. Raises `ConfigError` for what cannot be read or is not known."""
    try:
        raw = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the run file {path}: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    strange = sorted(set(raw) - {"recipe", "settings", "grid"})
    if strange or not isinstance(raw.get("recipe"), str):
        wrong = f"unknown key {strange[0]!r}" if strange else "no recipe"
        raise ConfigError(f'{path}: {wrong}. A run file holds recipe = "...", [settings] and [grid].')
    settings, grid = dict(raw.get("settings", {})), _dotted(raw.get("grid", {}))
    for change in changes:
        key, found, text = change.partition("=")
        if not found:
            raise ConfigError(f"--set takes key=value, got {change!r}.")
        key, value = key.strip().removeprefix("settings.").removeprefix("grid."), _value(text.strip())
        settings.pop(key, None)
        grid.pop(key, None)
        (grid if isinstance(value, list) else settings)[key] = value
    if models:
        settings.pop("model", None)
        grid["model"] = list(models)
    for key, values in grid.items():
        if values != ALL_LAYERS and (not isinstance(values, list) or not values):
            raise ConfigError(
                f"[grid] {key} must be a list with at least one value, got {values!r}. Fixed values go into [settings]."
            )
        if values != ALL_LAYERS and len({json.dumps(v, sort_keys=True) for v in values}) < len(values):
            raise ConfigError(f"[grid] {key} holds a value twice: {values}.")
    both = sorted(set(settings) & set(grid))
    if both:
        raise ConfigError(f"{both[0]!r} stands in [settings] and in [grid]: keep one.")
    return RunConfig(raw["recipe"], settings, {k: v if v == ALL_LAYERS else tuple(v) for k, v in grid.items()})


def find_recipe(name: str) -> Recipe:
    """A recipe by its name, or one of the user's own as module:NAME. Raises `ConfigError`."""
    from qv_lens.sweeps.recipes import RECIPES

    if name not in RECIPES and ":" not in name:
        raise unknown("Recipe", name, [*RECIPES, "module:NAME of your own"])
    module, _, attribute = RECIPES.get(name, name).partition(":")
    if name not in RECIPES and os.getcwd() not in sys.path:  # a module beside the run file, as `python -m` finds it
        sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"The recipe {name!r} cannot be imported: {error}. Its module lies in this folder ({os.getcwd()}) or on PYTHONPATH."
        ) from error
    if not isinstance(found, Recipe):
        raise ConfigError(f"{name!r} is a {type(found).__name__}, not a Recipe.")
    return found


def tasks_of(config: RunConfig, n_layers: Callable[[str], int] | None = None) -> list[Task]:
    """Every task of a run, in the order of the grid. `n_layers` tells how many layers a model has, by name.

    Raises `ConfigError` for a key that is no field of the recipe's task, a missing one, or a value of the wrong kind.
    """
    recipe = find_recipe(config.recipe)
    found = []
    for combination in _combinations(config, n_layers):
        made = _make(recipe, combination)
        text = json.dumps([recipe.name, recipe.version, asdict(made)], sort_keys=True, default=str)
        found.append(Task(len(found), hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), made))
    if len({task.id for task in found}) < len(found):
        raise ConfigError(f"Two tasks of {config.recipe} have the same fields: the grid names one thing twice.")
    return found


def _combinations(config: RunConfig, n_layers: Callable[[str], int] | None) -> list[dict[str, Any]]:
    varied = {key: values for key, values in config.grid.items() if not isinstance(values, str)}
    combinations = [
        {**config.settings, **dict(zip(varied, chosen, strict=True))} for chosen in itertools.product(*varied.values())
    ]
    for key in (key for key, values in config.grid.items() if values == ALL_LAYERS):
        if n_layers is None or any("model" not in c for c in combinations):
            raise ConfigError(f'[grid] {key} = "{ALL_LAYERS}" needs a model.')
        combinations = [{**c, key: layer} for c in combinations for layer in range(n_layers(c["model"]))]
    return combinations


def _make(recipe: Recipe, values: dict[str, Any]) -> Any:
    known = {f.name: f for f in fields(recipe.task)}
    whole: dict[str, Any] = {}
    for key, value in sorted(values.items(), key=lambda item: item[0].count(".")):  # a table first, then what changes in it
        name, _, inner = key.partition(".")
        if name not in known:
            raise unknown(f"Key of recipe {recipe.name!r}:", key, list(known))
        if not inner:
            whole[name] = dict(value) if isinstance(value, dict) else value
        elif isinstance(whole.setdefault(name, {}), dict):
            whole[name] = {**whole[name], inner: value}
        else:
            raise ConfigError(f"{key!r} reaches into {name!r}, which is {whole[name]!r} and no table.")
    for name, declared in known.items():
        if name not in whole and declared.default is MISSING and declared.default_factory is MISSING:
            raise ConfigError(f"Recipe {recipe.name!r} needs a value for {name!r}, in [settings] or [grid].")
    hints = _hints(recipe.task)
    for name, value in whole.items():
        _check_kind(recipe.name, name, value, hints.get(name), known[name].type)
    return recipe.task(**whole)


def _hints(task: type) -> dict[str, Any]:
    """The annotations of a task's fields, read; none where one names what is imported for type checkers alone."""
    try:
        return get_type_hints(task)
    except NameError:
        return {}


#: what TOML can say, and an annotation names
KINDS: Mapping[Any, tuple[type, ...]] = MappingProxyType({
    int: (int,), float: (int, float), str: (str,), bool: (bool,), dict: (dict,), type(None): (type(None),)
})  # fmt: skip


def _check_kind(recipe: str, name: str, value: Any, hint: Any, declared: Any) -> None:
    """Refuse a value that is none of the kinds and none of the choices (`Literal`) of a field's annotation. An annotation that
    names anything else is not checked."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    kinds = [get_origin(part) or part for part in parts if get_origin(part) is not Literal]
    if hint is None or any(kind not in KINDS for kind in kinds):
        return
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return
    for kind in kinds:
        if isinstance(value, KINDS[kind]) and (kind is bool or not isinstance(value, bool)):
            return
    if not choices:
        raise ConfigError(f"Recipe {recipe!r}: {name} must be {declared}, got {value!r}.")
    others = [f"any {kind.__name__}" for kind in kinds]
    raise unknown(f"Recipe {recipe!r}: {name}", value, [*choices, *others])


def _dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """[grid] editor.lam = [5, 10] as {"editor.lam": [5, 10]}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string
