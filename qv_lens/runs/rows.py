"""The rows of a run folder as a frame, and what they say of the model's knowledge."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from qv_lens.runs.shards import note_of, of_one_type, read_shard
from qv_lens.runs.store import Store

if TYPE_CHECKING:
    import pandas as pd


def load_run(folder: str | Path) -> pd.DataFrame:
    """All rows of a run, also of an unfinished one, in the order of its grid: fields, then results,
    then `status`.

    A failed task is one row with status 'failed' and its traceback in `error`. `.attrs`: the
    manifest (or the config, with complete=False); `measures`, the columns that are results;
    `seconds`, what each finished task took, by `task`. Warns of rows made by different versions of
    the experiment's code. Raises `ConfigError` for a folder that is not a run."""
    import pandas as pd

    store = Store(Path(folder))
    config = store.config()
    order = {task: i for i, task in enumerate(config["tasks"])}
    shards = [path for path in (store.folder / "shards").glob("*.parquet") if path.stem in order]
    shards.sort(key=lambda path: order[path.stem])
    tables = [read_shard(pq.read_table, path) for path in shards]
    made_by = {note_of(table.schema, "made_by") for table in tables} - {None}
    seconds = {
        order[path.stem]: float(note_of(table.schema, "seconds") or "nan")
        for path, table in zip(shards, tables, strict=True)
    }
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
        rows = pa.concat_tables(of_one_type(tables), promote_options="permissive")
        frame = rows.to_pandas().sort_values("task", kind="stable").reset_index(drop=True)
    else:
        frame = pd.DataFrame(columns=["task", "status"])
    manifest = store.manifest()
    there = store.finished() | {path.stem for path in (store.folder / "failed").glob("*.json")}
    complete = manifest is not None and there >= set(order)
    frame.attrs.update(
        manifest or config, complete=complete, measures=config["measures"], seconds=seconds
    )
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
