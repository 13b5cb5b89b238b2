"""The run folder: the only place where results are written, and every file in it is whole or
absent.

    config.json            the run as described, written first; a run folder belongs to one config
    models/<name>.json     fingerprint of each model when first used, and the type of its weights
    shards/<task>.parquet  the rows of a finished task; written under another name, synced, then renamed
    failed/<task>.json     traceback of a task that raised (tried again when the run resumes)
    manifest.json          written last, when every task is finished or failed: config, fingerprints, versions, seeds,
                           command, machine

A task is finished when its shard bears its name, and only then; what a kill leaves half-written
bears another name."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from qv_lens.errors import ConfigError
from qv_lens.files import begun, whole
from qv_lens.runs.config import RunConfig, Task
from qv_lens.runs.experiment import Experiment, find_experiment

if TYPE_CHECKING:
    import pandas as pd

#: columns that `load_run` writes beside the fields and results
RESERVED = ("task", "status", "error")
#: bytes of a file in a folder of data above which its size stands for it
LARGE = 2**26
#: what two configs may differ in, and how it is called; the tasks always differ with another
PARTS = MappingProxyType({
    "experiment": "experiment", "settings": "settings", "grid": "grid", "more": "more",
    "measures": "the experiment's MEASURES",
    "tasks": "the experiment's VERSION, or a value that its Task has by itself",
})  # fmt: skip
PACKAGES = ("qv_lens", "torch", "transformer-lens", "transformers", "pandas", "pyarrow", "ray")


@dataclass(frozen=True)
class Store:
    """A run folder that exists and belongs to one config."""

    folder: Path
    """The run folder."""
    made_by: str = ""
    """Hash of the code and presets that make its rows now."""

    @classmethod
    def open(cls, folder: str | Path, config: RunConfig, tasks: list[Task]) -> Store:
        """Make the folder, or find the one begun with the same config. Raises `ConfigError` for
        another config, a folder with other files in it, or one that cannot be written."""
        described, beside = _description(config, tasks)
        store = cls(Path(folder), beside["made_by"])
        known = store._read("config.json") or store._begin({**described, **beside})
        if known is not None:
            store._check_same(known, described, beside)
            store._note_files(known, beside["files"])
        store._make_folders("shards", "failed", "models")
        return store

    @classmethod
    def found(cls, folder: str | Path, config: RunConfig, tasks: list[Task]) -> Store | None:
        """The folder that `open` would go on with, as it is; None where there is none yet. Raises
        what `open` raises."""
        described, beside = _description(config, tasks)
        store = cls(Path(folder), beside["made_by"])
        known = store._read("config.json")
        if known is None:
            store._check_free()
            return None
        store._check_same(known, described, beside)
        return store

    def _begin(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """Write the config into a folder that holds nothing else; where another process was first,
        what that one wrote. Raises `ConfigError`."""
        try:
            self._check_free()
        except ConfigError:
            known = self._read("config.json")  # it may have come meanwhile
            if known is None:
                raise
            return known
        self._make_folders("")
        target = self.folder / "config.json"
        try:
            first = begun(target, _bytes(config))
        except OSError:  # full, or a file system without links
            self._write("config.json", config)
            first = True
        return None if first else self._read("config.json")

    def _check_free(self) -> None:
        if self.folder.is_dir() and any(not p.name.startswith(".") for p in self.folder.iterdir()):
            raise ConfigError(
                f"{self.folder} holds files that are not a run. Choose another --out; nothing was "
                "changed."
            )

    def _check_same(
        self, known: dict[str, Any], described: dict[str, Any], beside: dict[str, Any]
    ) -> None:
        """Raise `ConfigError` for a folder of another config, or begun with other data; warn where
        the experiment's code has changed since."""
        different = [part for key, part in PARTS.items() if known.get(key) != described.get(key)]
        if different:
            raise ConfigError(
                f"{self.folder} holds a run with another config (different: "
                f"{', '.join(different[:-1]) or different[0]}). "
                "Choose another --out, or remove the folder; nothing was changed."
            )
        files, held = beside["files"], known.get("files", {})
        for name, content in held.items():
            if files.get(name, content) != content:
                raise ConfigError(
                    f"{self.folder} was begun when {name} held something else: rows of both would "
                    "be mixed. Put the old file back, or choose another --out; nothing was changed."
                )
        changed = [
            name
            for name, content in known.get("read", {}).items()
            if beside["read"].get(name, content) != content
        ]
        if known.get("code", beside["code"]) != beside["code"]:
            changed.insert(0, Path(beside["file"]).name)
        if changed:
            warnings.warn(
                f"{' and '.join(changed)} {'has' if len(changed) == 1 else 'have'} changed since "
                f"{self.folder} was begun: rows that are finished are kept as they are. If they "
                "would now come out otherwise, choose another --out (or raise VERSION in the file).",
                stacklevel=4,
            )

    def _note_files(self, known: dict[str, Any], files: dict[str, str]) -> None:
        """Keep the hashes of files that were absent when the run was begun."""
        held = known.get("files", {})
        if files.keys() - held.keys():
            self._write("config.json", {**known, "files": {**files, **held}})

    def finished(self) -> set[str]:
        """Ids of the tasks whose rows are here."""
        return {path.stem for path in (self.folder / "shards").glob("*.parquet")}

    def save(self, task: Task, rows: pd.DataFrame, seconds: float) -> None:
        """Write the rows of a task (`storable`), with its fields as columns: whole or not at all."""
        columns = {"task": task.index, **task.values}
        table = pa.Table.from_pandas(rows, preserve_index=False)
        for at, (name, value) in enumerate(columns.items()):
            table = table.add_column(at, name, pa.array([value] * len(rows)))
        table = table.replace_schema_metadata(
            {
                **(table.schema.metadata or {}),
                b"seconds": str(seconds).encode(),
                b"made_by": self.made_by.encode(),
            }
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self._put(self.folder / "shards" / f"{task.id}.parquet", sink.getvalue().to_pybytes())
        (self.folder / "failed" / f"{task.id}.json").unlink(missing_ok=True)

    def fail(self, task: Task, error: str) -> None:
        """Keep the traceback of a task that raised."""
        self._write(f"failed/{task.id}.json", {"task": task.index, **task.values, "error": error})

    def failures(self) -> list[dict[str, Any]]:
        """Fields and traceback of every failed task. (A kill, or a second process, may leave a
        finished one's mark.)"""
        own = set(self.config()["tasks"]) - self.finished()
        failures = [self._read(f"failed/{task}.json") for task in sorted(own)]
        failures = [failure for failure in failures if failure is not None]
        return sorted(failures, key=lambda failure: failure["task"])

    def check_model(self, name: str, fingerprint: str, dtype: str) -> None:
        """Keep a model's fingerprint and the type of its weights. Raises `ConfigError` if the run
        began with other weights of that name."""
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)
        if plain != name:  # other names may come out the same
            plain += "-" + hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
        path = f"models/{plain}.json"
        known = self._read(path)
        if known is None:
            self._write(path, {"name": name, "fingerprint": fingerprint, "dtype": dtype})
        elif known["fingerprint"] != fingerprint:
            raise ConfigError(
                f"{self.folder} was begun with other weights of {name!r} (fingerprint "
                f"{known['fingerprint']}, now {fingerprint}). Load the same checkpoint with the same "
                "--dtype, or start a new folder with --out."
            )

    def check_dtype(self, dtype: str | None) -> None:
        """Raise `ConfigError` where the rows that are here came from weights of another type than
        the one asked for."""
        for model in self.models():
            held = model.get("dtype", dtype)
            if dtype not in (None, held):
                raise ConfigError(
                    f"{self.folder} holds rows of {model['name']!r} in {held}, and {dtype} was asked "
                    f"for: ask for {held}, or choose another --out; nothing was changed."
                )

    def models(self) -> list[dict[str, str]]:
        """The models of the rows that are here: name, fingerprint, type of the weights."""
        marks = sorted((self.folder / "models").glob("*.json"))
        models = (self._read(f"models/{mark.name}") for mark in marks)
        return [model for model in models if model is not None]

    def seconds(self, tasks: Iterable[Task]) -> list[float]:
        """What each finished one of these tasks took."""
        shards = [self.folder / "shards" / f"{task.id}.parquet" for task in tasks]
        schemas = [_read_shard(pq.read_schema, path) for path in shards if path.exists()]
        return [float(_noted(schema, "seconds") or "nan") for schema in schemas]

    def close(self, config: RunConfig, tasks: list[Task]) -> None:
        """Write the manifest: every task is finished or has failed."""
        finished = self.finished()
        seeds = sorted(
            {seed for task in tasks if (seed := getattr(task.fields, "seed", None)) is not None}
        )
        failed = [task.id for task in tasks if task.id not in finished]
        self._write(
            "manifest.json",
            {
                **config.as_dict(),
                "file": str(find_experiment(config.experiment).file),
                "tasks": len(tasks),
                "failed": failed,
                "models": self.models(),
                "seeds": seeds,
                "command": sys.argv,
                "versions": {name: _version(name) for name in PACKAGES},
                "machine": machine(),
            },
        )

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of a run that is complete."""
        return self._read("manifest.json")

    def config(self) -> dict[str, Any]:
        """The config the folder belongs to. Raises `ConfigError` for a folder that is not a run."""
        known = self._read("config.json")
        if known is None:
            raise ConfigError(f"{self.folder} is not a run folder: it has no config.json.")
        return known

    def _make_folders(self, *names: str) -> None:
        try:
            for name in names:
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"Cannot write to the run folder {self.folder}: {error}. Choose another --out."
            ) from error

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} is damaged: {error}. Remove it, or choose another --out."
            ) from error

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self._put(self.folder / name, _bytes(content))

    def _put(self, target: Path, content: bytes) -> None:
        """Write whole or not at all. Raises `ConfigError`; what was there before stays."""
        try:
            with whole(target) as partial:
                partial.write_bytes(content)
        except OSError as error:
            raise ConfigError(
                f"Cannot write {target}: {error}. The finished tasks are kept; make room (or the "
                "folder writable) and run the same command again."
            ) from error


def load_run(folder: str | Path) -> pd.DataFrame:
    """All rows of a run, also of an unfinished one, in the order of its grid: fields, then results,
    then `status`.

    A failed task is one row with status 'failed' and its traceback in `error`. `.attrs`: the
    manifest (or the config, with complete=False), `measures`, the columns that are results. Warns of
    rows made by different versions of the experiment's code. Raises `ConfigError` for a folder that
    is not a run."""
    import pandas as pd

    store = Store(Path(folder))
    config = store.config()
    order = {task: i for i, task in enumerate(config["tasks"])}
    shards = [path for path in (store.folder / "shards").glob("*.parquet") if path.stem in order]
    shards.sort(key=lambda path: order[path.stem])
    tables = [_read_shard(pq.read_table, path) for path in shards]
    made_by = {_noted(table.schema, "made_by") for table in tables} - {None}
    if len(made_by) > 1:
        warnings.warn(
            f"The rows of {folder} were made by {len(made_by)} versions of its code or presets, which "
            "changed on the way: if rows now come out otherwise, run it anew in another folder.",
            stacklevel=2,
        )
    tables = [
        table.replace_schema_metadata(None).append_column(
            "status", pa.array(["finished"] * len(table))
        )
        for table in tables
    ]
    for failure in store.failures():
        tables.append(pa.Table.from_pylist([{**failure, "status": "failed"}]))
    if tables:
        rows = pa.concat_tables(_of_one_type(tables), promote_options="permissive")
        frame = rows.to_pandas().sort_values("task", kind="stable").reset_index(drop=True)
    else:
        frame = pd.DataFrame(columns=["task", "status"])
    manifest = store.manifest()
    there = store.finished() | {path.stem for path in (store.folder / "failed").glob("*.json")}
    complete = manifest is not None and there >= set(order)
    frame.attrs.update(manifest or config, complete=complete, measures=config["measures"])
    return frame


def knows_nothing(rows: pd.DataFrame) -> bool:
    """Whether a task's rows say that the model knows none of the prompts that they ask."""
    if not {"prompts_asked", "prompts_known"} <= set(rows):
        return False
    return bool((rows["prompts_asked"] > 0).any() and (rows["prompts_known"] == 0).all())


def knowledge(frame: pd.DataFrame) -> pd.DataFrame:
    """Counts over a run's rows (`load_run`), per model: `tasks`, the prompts `asked` in all of
    them, how many of these are `known`, and `none`, the number of tasks in which no prompt is
    known. Empty where the experiment does not count them."""
    import pandas as pd

    columns = ["model", "tasks", "asked", "known", "none"]
    if not {"model", "prompts_asked", "prompts_known"} <= set(frame):
        return pd.DataFrame(columns=columns)
    rows = frame.dropna(subset=["prompts_known"])
    rows = rows.drop_duplicates([name for name in ("task", "group") if name in rows])
    tasks = (
        rows.groupby(["model", "task"], sort=False)[["prompts_asked", "prompts_known"]]
        .sum()
        .reset_index()
    )
    tasks["none"] = tasks["prompts_known"] == 0
    table = tasks.groupby("model", sort=False).agg(
        tasks=("task", "size"),
        asked=("prompts_asked", "sum"),
        known=("prompts_known", "sum"),
        none=("none", "sum"),
    )
    return table.reset_index().astype(dict.fromkeys(columns[1:], int))


def _read_shard(read: Callable[[Path], Any], shard: Path) -> Any:
    """What `read` finds in a shard. Raises `ConfigError` for a damaged one."""
    try:
        return read(shard)
    except pa.ArrowException as error:
        raise ConfigError(
            f"{shard} is damaged: {error}. Remove it and run the same command again: that task alone "
            "is done again."
        ) from error


def _noted(schema: pa.Schema, name: str) -> str | None:
    """What a shard says of how it came about."""
    noted = (schema.metadata or {}).get(name.encode())
    return None if noted is None else noted.decode()


def _description(config: RunConfig, tasks: list[Task]) -> tuple[dict[str, Any], dict[str, Any]]:
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
    return json.loads(_plain(described)), beside  # as it will be read: tuples are lists


def _bytes(content: dict[str, Any]) -> bytes:
    return (_plain(content) + "\n").encode()


def _plain(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, default=str)


def storable(rows: pd.DataFrame, task: Task, measures: Sequence[str]) -> pd.DataFrame:
    """A task's rows as they are stored: a named index becomes columns. Raises `ConfigError` for a
    column that the run itself writes, for rows without a result, and where there are none."""
    import pandas as pd

    if not isinstance(rows, pd.DataFrame):
        raise ConfigError(
            f"rows of an experiment returns a pandas DataFrame, got {type(rows).__name__}."
        )
    if rows.empty:
        raise ConfigError(
            "This task gave no rows, so that it would be missing from the results without a word: "
            "return one, with NaN where there is nothing to measure."
        )
    if any(name is not None for name in rows.index.names):
        rows = rows.reset_index()
    clash = sorted({*RESERVED, *task.values} & set(rows.columns))
    if clash:
        raise ConfigError(
            f"An experiment's rows must not hold the run's own column {clash[0]!r}: choose another "
            "name."
        )
    if not set(measures) & set(rows.columns):
        raise ConfigError(
            f"The rows hold none of the MEASURES ({', '.join(measures)}); their columns: "
            f"{', '.join(map(str, rows.columns)) or 'none'}."
        )
    return rows.reset_index(drop=True)


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


def _of_one_type(tables: list[pa.Table]) -> list[pa.Table]:
    """Tables whose columns can be put below each other. A column that has several types, none of
    which holds them all, becomes a number where truth, counts and numbers meet (a mean that is
    missing once), otherwise text (layer 2 and "all")."""
    kinds: dict[str, set[str]] = {}
    for table in tables:
        for f in table.schema:
            if not pa.types.is_null(f.type):
                kinds.setdefault(f.name, set()).add(_kind(f.type))
    for name, several in kinds.items():
        if len(several) < 2:
            continue
        for i, table in enumerate(tables):
            if name in table.column_names:
                column = table[name]
                # rounded where a count has more digits than a number
                column = (
                    column.cast(pa.float64(), safe=False)
                    if several <= NUMBERS
                    else _as_text(column)
                )
                tables[i] = table.set_column(table.column_names.index(name), name, column)
    return tables


#: kinds of columns that are numbers when put together
NUMBERS = frozenset({"truth", "count", "count without sign", "number"})


def _kind(of: pa.DataType) -> str:
    """What a column holds: types of one kind go into one column as they are."""
    if pa.types.is_string(of) or pa.types.is_large_string(of):
        return "text"
    if pa.types.is_boolean(of):
        return "truth"
    if pa.types.is_integer(of):
        return "count without sign" if of == pa.uint64() else "count"
    return "number" if pa.types.is_floating(of) else str(of)


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as text; a list or a table as JSON."""
    if not pa.types.is_nested(column.type):
        return column.cast(pa.string())
    texts = [None if each is None else json.dumps(each, default=str) for each in column.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])


#: columns that two runs of the same need not share
NOT_KEYS = ("task", "status", "error", "prompts_asked", "prompts_known")


def compare_runs(first: str | Path, second: str | Path) -> pd.DataFrame:
    """Two runs of an experiment side by side: rows with the same fields joined, results as
    `x_first`, `x_second`, `x_difference`.

    Raises `ConfigError` for runs of different experiments.
    """
    from pandas.api.types import is_numeric_dtype

    from qv_lens.reporting.tables import alike

    a, b = load_run(first), load_run(second)
    if a.attrs["experiment"] != b.attrs["experiment"]:
        raise ConfigError(
            f"{first} is a run of {a.attrs['experiment']!r}, {second} of {b.attrs['experiment']!r}: "
            "compare runs of one experiment."
        )
    measures = a.attrs["measures"]
    for folder, frame in ((first, a), (second, b)):
        if missing := [name for name in measures if name not in frame]:
            raise ConfigError(
                f"{folder} has no {missing[0]!r} yet: no task is finished. qv.load_run shows what "
                "failed."
            )
    shared = [c for c in a.columns if c in b.columns and c not in (*measures, *NOT_KEYS)]
    fields = Store(Path(first)).config().get("fields", shared)
    results = [c for c in shared if c not in fields and _is_result(a[c], b[c])]
    keys = [name for name in shared if name not in results]
    if results:
        warnings.warn(
            f"{', '.join(results)} holds other values in the two runs: rows that nothing else tells "
            "apart are joined in their order.",
            stacklevel=2,
        )
    # rows that no field tells apart are joined in their order
    left, right = (
        frame.assign(_row=frame.groupby(keys, dropna=False).cumcount() if keys else frame.index)
        for frame in alike([a[[*keys, *measures]], b[[*keys, *measures]]], keys)
    )
    joined = left.merge(right, on=[*keys, "_row"], how="outer", suffixes=("_first", "_second"))
    if joined[[f"{measures[0]}_first", f"{measures[0]}_second"]].isna().any(axis=1).all():
        warnings.warn(
            f"No row of {first} has the fields of a row of {second} ({', '.join(keys)}): nothing is "
            "compared.",
            stacklevel=2,
        )
    for name in measures:
        before, after = joined[f"{name}_first"], joined[f"{name}_second"]
        if is_numeric_dtype(before) and is_numeric_dtype(after):
            joined[f"{name}_difference"] = after.astype(float) - before.astype(float)
    return joined.drop(columns="_row")


def _is_result(first: pd.Series, second: pd.Series) -> bool:
    """Whether a column that is no measure is a result all the same (seconds, the number of a
    process) and no key: the runs share none of its values or, of numbers that are not whole, not
    all."""
    from pandas.api.types import is_float_dtype

    a, b = set(first.dropna().astype(str)), set(second.dropna().astype(str))
    floats = is_float_dtype(first) or is_float_dtype(second)
    return bool(a and b) and (a.isdisjoint(b) or (floats and not (a <= b or b <= a)))


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


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def remaining(tasks: Iterable[Task], finished: set[str]) -> list[Task]:
    """The tasks still to do, those of one model together, so that it is loaded once."""
    return sorted(
        (task for task in tasks if task.id not in finished),
        key=lambda task: str(getattr(task.fields, "model", "")),
    )
