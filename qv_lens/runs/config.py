"""From an experiment's file, or a TOML file over it, to tasks.

    experiment = "figure_2.py"     # a Python file (`experiment`), found from where the TOML file lies
    [settings]                     # one value for all tasks
    prompts = 60
    [grid]                         # every combination is a task
    model = ["toy-gptj"]
    layer = "layers"               # every layer of the model
    seed = [0, 1, 2]

1. The experiment has settings and a grid of its own. A key in the TOML file replaces the
   experiment's, and a key on the command line (`--set key=value`, a list is varied; `--model`)
   replaces both. All other keys stay.
2. A key is a field of the experiment's `Task`. A field that is a table (an editor's
   hyperparameters) is reached with a dot: "editor.lam" = [5, 10].
3. A task is one combination. Its id is a hash of the experiment's name and its fields: the same
   task has the same id in every run, on every machine, and its random draws come from its own
   `seed`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from qv_lens.errors import ConfigError, QVLensError, several, unknown
from qv_lens.runs.experiment import Experiment, Grid, find_experiment, flat, hints_of, parts_of

#: what stands for every layer of a task's model in a grid over `layer`
ALL_LAYERS = "layers"


@dataclass(frozen=True)
class RunConfig:
    """One run: the experiment's file, what is fixed, and what is varied in the order of the
    file."""

    experiment: str
    """Path of the experiment's file."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """One value for all tasks."""
    grid: Grid = field(default_factory=dict)
    """Every combination is a task; `ALL_LAYERS` stands for the layers of the model."""
    more: Mapping[str, Grid] = field(default_factory=dict)
    """By model: values that it has besides those of the grid."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as written into the run folder: the experiment by its name, which is the same
        on every machine."""
        plain = {
            "experiment": find_experiment(self.experiment).name,
            "settings": dict(self.settings),
            "grid": _plain(self.grid),
        }
        if self.more:
            plain["more"] = {model: _plain(grid) for model, grid in self.more.items()}
        return plain


@dataclass(frozen=True)
class Task:
    """One combination: its place in the run, its id, its fields."""

    index: int
    """Its place in the run."""
    id: str
    """A hash of the experiment's name and the fields."""
    fields: Any
    """An instance of the experiment's `Task`."""

    @property
    def values(self) -> dict[str, Any]:
        """The fields as columns: tables become JSON text."""
        columns = {}
        for name, value in flat(self.fields).items():
            is_table = isinstance(value, (dict, list, tuple))
            columns[name] = json.dumps(value, sort_keys=True) if is_table else value
        return columns


def read_config(
    path: str | Path, changes: Sequence[str] = (), models: Sequence[str] = ()
) -> RunConfig:
    """The run of an experiment's file, or of a TOML file over one. `changes` are "key=value" (a
    list varies, anything else is fixed); `models` takes the place of the file's. Raises
    `ConfigError` for what cannot be read or is not known."""
    is_python = Path(path).suffix == ".py"
    file, over = (Path(path), {}) if is_python else _read_toml(Path(path))
    experiment = find_experiment(file)
    settings: dict[str, Any] = dict(experiment.settings)
    grid = _plain(experiment.grid)
    more = {model: dict(values) for model, values in experiment.more.items()}
    replaced: dict[str, Any] = {
        key: {"varied": False, "value": value}
        for key, value in _dotted(over.get("settings", {})).items()
    }
    for key, value in _dotted(over.get("grid", {})).items():
        if key in replaced:
            raise ConfigError(f"{key!r} stands in [settings] and in [grid]: keep one.")
        replaced[key] = {"varied": True, "value": value}
    changed = [_change(change) for change in changes]
    for key, value in changed:
        replaced = {name: new for name, new in replaced.items() if not name.startswith(f"{key}.")}
        every = value == ALL_LAYERS and not _takes_text(experiment.task, key)
        replaced[key] = {"varied": every or isinstance(value, list), "value": value}
    if models and any(key == "model" for key, _ in changed):
        raise ConfigError("The model is named twice, by --set and by --model: keep one.")
    if models:
        replaced["model"] = {"varied": True, "value": list(models)}
    for key, new in replaced.items():
        settings.pop(key, None)
        (grid if new["varied"] else settings)[key] = new["value"]
        if not new["varied"]:
            grid.pop(key, None)
        for values in more.values():
            values.pop(key, None)
        # a whole table takes the place of what was said of its parts
        for values in (settings, grid, *more.values()):
            parts = [part for part in values if part.startswith(f"{key}.")]
            for part in parts:
                if part not in replaced:
                    del values[part]
    for key, values in grid.items():
        _check_grid(key, values)
    fixed = {key: values if values == ALL_LAYERS else tuple(values) for key, values in grid.items()}
    return RunConfig(
        str(file), settings, fixed, {model: values for model, values in more.items() if values}
    )


def _read_toml(path: Path) -> tuple[Path, dict[str, Any]]:
    """The experiment's file that a TOML file names, and what it says."""
    try:
        # with or without a byte order mark
        raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the run file {path}: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    strange = sorted(set(raw) - {"experiment", "settings", "grid"})
    if strange or not isinstance(raw.get("experiment"), str):
        wrong = f"unknown key {strange[0]!r}" if strange else "no experiment"
        raise ConfigError(
            f'{path}: {wrong}. A run file holds experiment = "FILE.py", [settings] and [grid].'
        )
    return path.parent / raw["experiment"], raw


def assigned(change: str) -> tuple[str, Any]:
    """Name and value of key=value, the value as TOML reads it. Raises `ConfigError` for anything
    else."""
    key, equals, text = change.partition("=")
    if not equals:
        raise ConfigError(f"--set takes key=value, got {change!r}.")
    return key.strip(), _value(text.strip())


def _change(change: str) -> tuple[str, Any]:
    """A key of a run file, with or without its table, and its value."""
    key, value = assigned(change)
    return key.removeprefix("settings.").removeprefix("grid."), value


def _takes_text(task: type, key: str) -> bool:
    """Whether a field takes any text, by its annotation."""
    hints, outer = hints_of(task), key.partition(".")[0]
    if outer in hints:
        members = _members(hints[outer])
        choices = [get_args(each) for each in members if get_origin(each) is Literal]
        return outer != key or str in members or any(ALL_LAYERS in each for each in choices)
    return any(_takes_text(part, key) for part in parts_of(task).values())


def _check_grid(key: str, values: Any) -> None:
    if isinstance(values, str) and values == ALL_LAYERS:
        return
    if not isinstance(values, list) or not values:
        raise ConfigError(
            f"[grid] {key} must be a list with at least one value, got {values!r}. Fixed values go "
            "into [settings]."
        )
    if len({json.dumps(value, sort_keys=True, default=str) for value in values}) < len(values):
        raise ConfigError(f"[grid] {key} holds a value twice: {values}.")


def _plain(grid: Grid) -> dict[str, Any]:
    """A grid with lists, as TOML and JSON hold it."""
    return {key: _listed(key, values) for key, values in grid.items()}


def _listed(key: str, values: Any) -> Any:
    """The values of a key as a list of Python's own; `ALL_LAYERS` as it is. Raises `ConfigError` for
    one value alone."""
    if isinstance(values, str):
        return values
    values = values.tolist() if hasattr(values, "tolist") else values  # an array's
    every = several(values)
    if every is None:
        raise ConfigError(
            f"GRID[{key!r}] must be a list of values, got {values!r:.80}. Fixed values go into "
            "SETTINGS."
        )
    return list(every)


def tasks_of(config: RunConfig, n_layers: Callable[[str], int] | None = None) -> list[Task]:
    """Every task of a run, in the order of the grid. `n_layers` tells how many layers a model has,
    by name.

    Raises `ConfigError` for a key that is not a field of the experiment's task, a missing one, or a
    value of the wrong kind."""
    experiment = find_experiment(config.experiment)
    tasks: list[Task] = []
    for combination in _combinations(config, _with_model(config, experiment.task), n_layers):
        fields_of_task = _make(experiment, combination)
        text = json.dumps(
            [experiment.name, experiment.version, asdict(fields_of_task)],
            sort_keys=True,
            default=str,
        )
        tasks.append(
            Task(
                len(tasks),
                hashlib.blake2b(text.encode(), digest_size=8).hexdigest(),
                fields_of_task,
            )
        )
    if len({task.id for task in tasks}) < len(tasks):
        raise ConfigError(
            f"Two tasks of {experiment.name} have the same fields: the grid names one thing twice."
        )
    return tasks


def _with_model(config: RunConfig, task: type) -> dict[str, Any]:
    """The settings, with the model that the task has by itself where no other is named."""
    own = {
        each.name: each.default
        for each in fields(task)
        if each.name == "model" and each.init and isinstance(each.default, str)
    }
    return dict(config.settings) if "model" in config.grid else {**own, **config.settings}


def _combinations(
    config: RunConfig, settings: Mapping[str, Any], n_layers: Callable[[str], int] | None
) -> list[dict[str, Any]]:
    """Every combination of the grid, then the combinations of the extra values of single models."""
    combinations = _product(settings, config.grid, n_layers)
    models = config.grid.get("model", (settings.get("model"),))
    for model, values in config.more.items():
        if model in models:
            combinations += _product(
                settings, {**config.grid, "model": (model,), **values}, n_layers
            )
    return combinations


def _product(
    settings: Mapping[str, Any], grid: Grid, n_layers: Callable[[str], int] | None
) -> list[dict[str, Any]]:
    varied = {key: values for key, values in grid.items() if not isinstance(values, str)}
    combinations = [
        {**settings, **dict(zip(varied, chosen, strict=True))}
        for chosen in itertools.product(*varied.values())
    ]
    for key in (key for key, values in grid.items() if values == ALL_LAYERS):
        if n_layers is None or any("model" not in combination for combination in combinations):
            raise ConfigError(f'[grid] {key} = "{ALL_LAYERS}" needs a model.')
        combinations = [
            {**each, key: layer}
            for each in combinations
            for layer in range(n_layers(each["model"]))
        ]
    return combinations


def _make(experiment: Experiment, values: dict[str, Any]) -> Any:
    """An instance of the experiment's task."""
    name = experiment.name
    declared = _declared(experiment.task)
    whole = _tables(experiment.task)
    # a table first, then what changes in it
    for key, value in sorted(values.items(), key=lambda item: item[0].count(".")):
        outer, *inner = key.split(".")
        if outer not in declared:
            raise unknown(f"Key of {name}:", key, list(declared))
        whole = _placed(whole, [outer, *inner], value)
    return _built(experiment.task, whole, name)


def _tables(task: type) -> dict[str, Any]:
    """The tables that a task's fields have by themselves, whose parts a key may change."""
    parts, tables = parts_of(task), {}
    for each in fields(task):
        made = each.default_factory
        value = each.default if made is MISSING else made()
        if each.name in parts:
            tables |= _tables(parts[each.name])
        elif each.init and isinstance(value, Mapping):
            tables[each.name] = dict(value)
    return tables


def _placed(table: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """The table with a value at the end of a path into it. Raises `ConfigError` where the path leads
    through something else than tables."""
    first, *rest = path
    if not rest:
        return {**table, first: value}
    inner = table.get(first, {})
    if not isinstance(inner, Mapping):
        raise ConfigError(
            f"{'.'.join(path)!r} reaches into {first!r}, which is {inner!r} and not a table."
        )
    return {**table, first: _placed(inner, rest, value)}


def _declared(task: type) -> list[str]:
    """The names of a task's fields, those of its parts in their place."""
    parts = parts_of(task)
    names: list[str] = []
    for each in fields(task):
        names += _declared(parts[each.name]) if each.name in parts else [each.name]
    return names


def _built(task: type, values: Mapping[str, Any], name: str) -> Any:
    """A task or a part of it from those values that are its fields."""
    parts, hints = parts_of(task), hints_of(task)
    values_of: dict[str, Any] = {}
    for each in fields(task):
        if each.name in parts:
            values_of[each.name] = _built(parts[each.name], values, name)
        elif each.name in values:
            hint = hints.get(each.name)
            values_of[each.name] = _as_declared(values[each.name], hint)
            _check_kind(name, each.name, values_of[each.name], hint, each.type)
        elif each.default is MISSING and each.default_factory is MISSING:
            raise ConfigError(f"{name} needs a value for {each.name!r}, in [settings] or [grid].")
    try:
        made = task(**values_of)
    except QVLensError:
        raise
    except (TypeError, ValueError) as error:  # what its own checks raise
        raise ConfigError(f"{name}: {error}") from error
    for each in fields(task):
        if each.name not in parts:
            _check_plain(name, each.name, getattr(made, each.name))
    return made


def _as_declared(value: Any, hint: Any) -> Any:
    """A value as a field's annotation has it: 5 and 5.0 of a field of floats are one task; "null" of
    a field that may be None is None; where tuples are declared a file's lists are tuples, and one value (of a list, which varies) is a tuple
    of it alone."""
    members = _members(hint)
    if value == "null" and type(None) in members:  # TOML has no word for it
        return None
    if type(value) is int and float in members and int not in members:
        return float(value)
    inner = [get_args(member) for member in members if get_origin(member) is tuple]
    if isinstance(value, list) and inner:
        return tuple(value)
    alone = any(args and _is_of(value, args[0]) for args in inner)
    return (value,) if alone and not any(_is_of(value, member) for member in members) else value


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of one of the kinds that TOML holds, and a list's or tuple's values of
    the kind that is named in it."""
    outer = get_origin(kind) or kind
    if isinstance(value, bool):
        return outer is bool
    if not isinstance(value, KINDS.get(outer, ())):
        return False
    inner = [each for each in get_args(kind) if each is not Ellipsis]
    if not isinstance(value, (list, tuple)) or len(inner) != 1:
        return True
    known = [member for member in _members(inner[0]) if (get_origin(member) or member) in KINDS]
    return len(known) < len(_members(inner[0])) or all(
        any(_is_of(each, member) for member in known) for each in value
    )


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that an annotation names: those of a union, or itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _check_plain(experiment: str, name: str, value: Any) -> None:
    """Refuse a value that the run folder could not hold as what it is."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(
            f"{experiment}: {name} holds {value}, a number beyond 64 bits: a run folder cannot hold "
            "it."
        )
    if value is None or isinstance(value, (str, bool, int, float)):
        return
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        inner = list(value.values())
    elif isinstance(value, (list, tuple)):
        inner = list(value)
    elif is_dataclass(value):
        inner = list(vars(value).values())
    else:
        raise ConfigError(
            f"{experiment}: {name} holds {value!r} ({type(value).__name__}), which a run folder "
            "cannot hold: write text, numbers, true or false, and lists and tables of these."
        )
    for each in inner:
        _check_plain(experiment, name, each)


#: the types that TOML can hold, as an annotation names them
KINDS: Mapping[Any, tuple[type, ...]] = MappingProxyType({
    int: (int,), float: (int, float), str: (str,), bool: (bool,), dict: (dict,), type(None): (type(None),),
    list: (list, tuple), tuple: (list, tuple),
})  # fmt: skip


def _check_kind(experiment: str, name: str, value: Any, hint: Any, declared: Any) -> None:
    """Refuse a value that is none of the kinds and none of the choices (`Literal`) of a field's
    annotation. An annotation that names anything else is not checked."""
    parts = _members(hint)
    choices = [choice for part in parts if get_origin(part) is Literal for choice in get_args(part)]
    kinds = [get_origin(part) or part for part in parts if get_origin(part) is not Literal]
    if hint is None or any(kind not in KINDS for kind in kinds):
        return
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return
    if any(_is_of(value, part) for part in parts if get_origin(part) is not Literal):
        return
    if not choices:
        expected = declared if get_args(declared) else getattr(declared, "__name__", declared)
        raise ConfigError(f"{experiment}: {name} must be {expected}, got {value!r}.")
    others = [f"any {kind.__name__}" for kind in kinds]
    raise unknown(f"{experiment}: {name}", value, [*choices, *others])


def _dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """editor.lam = [5, 10] as {"editor.lam": [5, 10]}: what it leaves out of the table stays."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= (
            _dotted(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else {prefix + key: value}
        )
    return flat


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        if text.startswith("[") and text.endswith("]"):
            raise ConfigError(f'{text} is no list: texts within are quoted, ["a", "b"].') from None
        return text  # a bare word is a string
