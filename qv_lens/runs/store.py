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
import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from qv_lens.errors import ConfigError
from qv_lens.files import begun, whole
from qv_lens.runs.config import RunConfig, Task
from qv_lens.runs.experiment import find_experiment
from qv_lens.runs.provenance import as_json, description_of, machine, versions
from qv_lens.runs.shards import note_of, read_shard

if TYPE_CHECKING:
    import pandas as pd

#: what two configs may differ in, and how it is called; the tasks always differ with another
PARTS = MappingProxyType({
    "experiment": "experiment", "settings": "settings", "grid": "grid", "more": "more",
    "measures": "the experiment's MEASURES",
    "tasks": "the experiment's VERSION, or a value that its Task has by itself",
})  # fmt: skip


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
        described, beside = description_of(config, tasks)
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
        described, beside = description_of(config, tasks)
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
        dtype = dtype and str(dtype).removeprefix("torch.")
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
        schemas = [read_shard(pq.read_schema, path) for path in shards if path.exists()]
        return [float(note_of(schema, "seconds") or "nan") for schema in schemas]

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
                "versions": versions(),
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


def _bytes(content: dict[str, Any]) -> bytes:
    return (as_json(content) + "\n").encode()


def remaining(tasks: Iterable[Task], finished: set[str]) -> list[Task]:
    """The tasks still to do, those of one model together, so that it is loaded once."""
    return sorted(
        (task for task in tasks if task.id not in finished),
        key=lambda task: str(getattr(task.fields, "model", "")),
    )
