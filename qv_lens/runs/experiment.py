"""An experiment is one Python file: a table or a figure of a paper, or a sweep of a user's.

    '''What is measured, and where it is claimed.     qv-lens run experiments/ace/figure_2.py'''

    @dataclass(frozen=True)
    class Task:                     # the fields of one cell
        model: str
        layer: int | Literal["all"] = "all"
        seed: int = 0

    SETTINGS = {"prompts": 100}     # one value for all cells
    GRID = {"model": ["toy-gptj"], "layer": "layers", "seed": [0, 1, 2]}    # every combination is a cell
    MORE = {"toy-qwen3": {"seed": [3]}}     # values that one model has besides
    MEASURES = ("accuracy",)        # the columns that are results

    def rows(task: Task, lens: Lens, once: Once = directly) -> pd.DataFrame: ...     # tidy, without the fields of the task
    def figure(frame: pd.DataFrame) -> go.Figure: ...

1. `Task`, `rows` and `MEASURES` must be there; the rest may be. A `VERSION` above 1 says that rows
   are made differently.
2. A field of `Task` that is itself a frozen dataclass falls into its fields: `count` names the one
   of `task.cases.count`.
3. `rows` gets the task's model, loaded (None where a task has no field `model`). Where it takes a
   third argument, that argument is `once`: `once(compute, *arguments)` returns
   `compute(*arguments)`, and remembers the result for the other cells of the model.
4. A file in a package (folders with `__init__.py`) is imported by its name in that package, any
   other beside the files of its folder, so that files can share code."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, get_type_hints

from qv_lens.errors import ConfigError, QVLensError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from qv_lens.models.lens import Lens

Value = TypeVar("Value")
#: in front of the module's name of a file that belongs to no package: a file called random.py must
#: not take the library's place
ALONE = "qv_lens experiment "
#: a grid: every value of a key, or `ALL_LAYERS`
Grid = Mapping[str, Sequence[Any] | str]


class Once(Protocol):
    """Computes something for the first cell that asks, and remembers it for the others."""

    def __call__(self, compute: Callable[..., Value], *arguments: Any) -> Value: ...


def directly(compute: Callable[..., Value], *arguments: Any) -> Value:
    """The `Once` that remembers nothing, for a cell computed by itself."""
    return compute(*arguments)


@dataclass(frozen=True)
class Experiment:
    """What an experiment's file says."""

    module: str
    """The name of its module in this process."""
    file: Path
    """Where it lies."""
    task: type
    """The frozen dataclass of one cell."""
    compute: Callable[..., pd.DataFrame]
    """`rows` of the file."""
    measures: tuple[str, ...]
    """The columns of its rows that are results."""
    settings: Mapping[str, Any]
    """One value for all cells."""
    grid: Grid
    """Every combination is a cell."""
    more: Mapping[str, Grid]
    """Values that one model has besides, by model."""
    figure: Callable[[pd.DataFrame], go.Figure] | None
    """Draws the finished rows."""
    version: int
    """Rows of another version are other rows."""

    @property
    def name(self) -> str:
        """Its name: the same on every machine."""
        return self.module.removeprefix(ALONE)

    @property
    def shared(self) -> list[Path]:
        """The files of its package, or beside it, that it takes something from, and that these
        do."""
        package, beside = self.module.partition(".")[0] + ".", self.file.parent
        modules, todo = {self.module}, [self.module]
        while todo:
            values = vars(sys.modules[todo.pop()]).values()
            names = {
                v.__name__ if isinstance(v, ModuleType) else getattr(v, "__module__", None)
                for v in values
            }
            fresh = {
                n
                for n in names - modules
                if n in sys.modules and (str(n).startswith(package) or _lies_in(beside, n))
            }
            modules |= fresh
            todo += fresh
        files = [sys.modules[name].__file__ for name in modules - {self.module}]
        return sorted(Path(file) for file in files if file is not None)

    def rows(self, task: Any, lens: Lens | None, once: Once = directly) -> pd.DataFrame:
        """The rows of one cell."""
        if len(signature(self.compute).parameters) > 2:
            return self.compute(task, lens, once)
        return self.compute(task, lens)


def find_experiment(file: str | Path) -> Experiment:
    """The experiment in a file. Raises `ConfigError` for a file that is none."""
    path = Path(file).resolve()
    if not path.is_file():
        raise ConfigError(f"There is no experiment {file}.")
    module = _imported(path)
    missing = [name for name in ("Task", "rows", "MEASURES") if not hasattr(module, name)]
    if missing:
        raise ConfigError(
            f"{file} is not an experiment: it has no {missing[0]}. It needs Task, rows and "
            "MEASURES."
        )
    task = module.Task
    if not (isinstance(task, type) and is_dataclass(task)):
        raise ConfigError(f"{file}: Task must be a frozen dataclass.")
    if isinstance(module.MEASURES, str) or not isinstance(module.MEASURES, Sequence):
        raise ConfigError(
            f"{file}: MEASURES must be a tuple of columns, ('right',) with its comma, got "
            f"{module.MEASURES!r:.80}."
        )
    for name in ("SETTINGS", "GRID", "MORE"):
        if not isinstance(getattr(module, name, {}), Mapping):
            raise ConfigError(
                f"{file}: {name} must be a table, {{'seed': ...}}, got {getattr(module, name)!r:.80}."
            )
    return Experiment(
        module=module.__name__,
        file=path,
        task=task,
        compute=module.rows,
        measures=tuple(module.MEASURES),
        settings=getattr(module, "SETTINGS", {}),
        grid=getattr(module, "GRID", {}),
        more=getattr(module, "MORE", {}),
        figure=getattr(module, "figure", None),
        version=getattr(module, "VERSION", 1),
    )


def _lies_in(folder: Path, module: str) -> bool:
    file = getattr(sys.modules[module], "__file__", None)
    return file is not None and Path(file).parent == folder


def _imported(path: Path) -> ModuleType:
    """The module of a file; of a file in a package, as `import` finds it from the folder in which
    the package lies."""
    root = path.parent
    while (root / "__init__.py").exists():
        root = root.parent
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts)
    try:
        if str(root) not in sys.path:
            sys.path.append(str(root))
        if len(parts) == 1:
            module = _alone(name, path)
            _check_beside(path)
            return module
        module = import_module(name)
    except QVLensError:
        raise
    except Exception as error:  # whatever the file raises
        raise ConfigError(
            f"The experiment {path} cannot be imported: {type(error).__name__}: {error}."
        ) from error
    if Path(module.__file__ or "").resolve() != path:
        raise ConfigError(
            f"The experiment {path} cannot be imported: {name} is already {module.__file__}."
        )
    return module


def _check_beside(path: Path) -> None:
    """Raise `ConfigError` for a file beside the experiment that it imports by name and that Python
    took from the folder of another experiment."""
    for name in _imports(path):
        beside = path.with_name(f"{name}.py")
        file = getattr(sys.modules.get(name), "__file__", None)
        if name in sys.stdlib_module_names or file is None or not beside.exists():
            continue
        if Path(file) != beside and "site-packages" not in file:
            raise ConfigError(
                f"{path} imports {name}, which is {file} in this process and not {beside}: give one "
                "of the two another name."
            )


def _imports(path: Path) -> set[str]:
    """The modules that a file imports by name."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {
        node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module
    }


def _alone(name: str, path: Path) -> ModuleType:
    """A file that belongs to no package; read again, so that a changed file counts."""
    name = ALONE + name
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"The experiment {path} cannot be imported: it is not a Python file.")
    module = module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def flat(task: Any) -> dict[str, Any]:
    """The fields of a task by name, those of its parts among them."""
    values: dict[str, Any] = {}
    for field in fields(task):
        value = getattr(task, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            values.update(flat(value))
        else:
            values[field.name] = value
    return values


def parts_of(task: type) -> dict[str, type]:
    """The parts of a task: its fields that are dataclasses."""
    hints = hints_of(task)
    return {
        field.name: hints[field.name]
        for field in fields(task)
        if is_dataclass(hints.get(field.name))
    }


def hints_of(task: type) -> dict[str, Any]:
    """The annotations of a task's fields; empty if one of them names something that is imported
    only for type checkers."""
    try:
        return get_type_hints(task)
    except NameError:
        return {}
