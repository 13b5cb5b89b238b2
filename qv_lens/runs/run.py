"""Tasks to rows: in this process, or on Ray. The same tasks, the same seeds, the same rows.

1. Every task that has no shard yet is run; a model is loaded when the first task asks for it and
   kept.
2. A task that raises is marked failed with its traceback, and the rest goes on. Ctrl-C and a kill
   leave a run that resumes.
3. Ray: one actor per GPU, or per CPU share with one torch thread each; an actor loads a model once.
   Placement, retries and scheduling are Ray's. Rows come back to the driver, which alone writes, so
   no shared disk is needed.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from qv_lens.errors import ConfigError, QVLensError, unknown
from qv_lens.progress import progress_bar
from qv_lens.runs.config import RunConfig, Task, tasks_of
from qv_lens.runs.experiment import Experiment, find_experiment
from qv_lens.runs.rows import knows_nothing
from qv_lens.runs.shards import storable
from qv_lens.runs.store import Store, remaining

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    import pandas as pd

    from qv_lens.models.lens import Lens
    from qv_lens.trace import Setup

Engine = Literal["inline", "ray"]
RETRIES = 2
#: options that an engine does not read, and why
UNREAD = MappingProxyType({
    "inline": (("workers", "address"), "one process runs all tasks"),
    "ray": (("device",), "Ray gives every worker its share of the machine"),
})  # fmt: skip
#: the error of a task that leaves other weights behind
WRITTEN = (
    "qv_lens.errors.ConfigError: The task wrote into the weights of {model!r} and did not put them "
    "back, so its rows are not kept and the model is loaded anew: edit with lens.patched(patch)."
)


@dataclass
class Shelf:
    """What a worker keeps between tasks: the model loaded last, and what experiments computed once
    on it."""

    device: str | None = None
    """Where models are loaded."""
    dtype: str | None = None
    """The type of their weights."""
    loaded: dict[str, Lens] = field(default_factory=dict)
    """The model loaded last, by name."""
    known: dict[Any, Any] = field(default_factory=dict)
    """What was computed on it."""
    setup: Setup | None = None
    """Its weights as they were loaded."""

    def lens(self, name: str) -> Lens:
        """The model, loaded once; loading another model discards it, with everything computed on
        it."""
        if name not in self.loaded:
            from qv_lens.models.zoo import load

            self.forget()
            self.loaded[name] = load(name, device=self.device, dtype=self.dtype)
            self.setup = self.loaded[name].setup
        return self.loaded[name]

    def forget(self) -> None:
        """Discard the model, with everything computed on it."""
        self.loaded.clear()
        self.known.clear()

    def once(self, compute: Callable[..., Any], *arguments: Any) -> Any:
        """What `compute(*arguments)` gives, kept until another model is loaded: the function and
        its arguments are the key. Lists, tables, frames and arrays come as copies.

        Raises `ConfigError` for arguments that cannot be a key, or while the model is patched or
        intervened on, because the remembered result would be that of the changed model."""
        key = (compute, _typed(arguments))
        try:
            known = key in self.known
        except TypeError as error:
            raise ConfigError(
                f"once({compute.__name__}, ...) remembers by its arguments: pass what can be "
                f"hashed, a tuple instead of a list ({error})."
            ) from error
        if not known:
            if any(lens.patches or lens.interventions for lens in self.loaded.values()):
                raise ConfigError(
                    f"once({compute.__name__}, ...) was first asked while a patch or an "
                    "intervention is in force, and would remember what the changed model says: "
                    "ask it before the block."
                )
            self.known[key] = compute(*arguments)
        kept = self.known[key]
        # a task that changes what it gets would change what the next one gets
        return kept.copy() if callable(getattr(kept, "copy", None)) else kept


def _typed(value: Any) -> Any:
    """A value with its type, and those of a tuple with theirs: 1, 1.0 and True are equal."""
    return (type(value), tuple(map(_typed, value)) if isinstance(value, tuple) else value)


@dataclass(frozen=True)
class Outcome:
    """What became of a task."""

    index: int
    """The task's place in the run."""
    rows: pd.DataFrame | None
    """Its rows."""
    error: str | None
    """The traceback, where it has none."""
    seconds: float
    """What it took."""
    model: tuple[str, str, str] | None = None
    """The model it ran on: name, fingerprint, type of the weights."""


def run_task(experiment: Experiment, task: Task, shelf: Shelf) -> Outcome:
    """Run one task; an exception becomes part of the outcome. The next task finds the model as it
    was: patches left in force are taken off, and a model whose weights are others is loaded anew,
    with the task failed."""
    start = time.perf_counter()
    model = getattr(task.fields, "model", None)
    rows, error, mark = None, None, None
    try:
        lens = shelf.lens(model) if isinstance(model, str) else None
        rows = experiment.rows(task.fields, lens, shelf.once)
        # rows that cannot be stored are the task's failure, not the run's
        rows = storable(rows, task, experiment.measures)
        pa.Table.from_pandas(rows, preserve_index=False)
    except (Exception, SystemExit):
        rows, error = None, traceback.format_exc()
    lens = shelf.loaded.get(model) if isinstance(model, str) else None
    if lens is not None:
        from qv_lens.models.norms import dtype_name

        while lens.patches:
            lens.revert()
        if lens.setup == shelf.setup:
            mark = (str(model), lens.fingerprint, dtype_name(lens.dtype))
        else:
            shelf.forget()
            rows, error = None, error or WRITTEN.format(model=model)
    return Outcome(task.index, rows, error, time.perf_counter() - start, mark)


def run(
    config: RunConfig,
    out: str | Path,
    *,
    engine: Engine = "inline",
    workers: int | None = None,
    address: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Run every task of `config` that `out` does not hold yet, and return the folder; run it again
    to resume.

    `engine`: 'inline' or 'ray'.
    `workers`: Ray actors (default: one per GPU, or per CPU core).
    `address`: of a Ray cluster to join ('auto': the one of this machine). `device` (inline) and
    `dtype`: of the models (None: the first GPU, the checkpoint's own).
    Raises `ConfigError` for a folder of another run or of another `dtype`, one that cannot be
    written, or weights that changed on the way."""
    if engine not in ("inline", "ray"):
        raise unknown("Engine", engine, ("inline", "ray"))
    check_options(engine, workers=workers, address=address, device=device)
    experiment, tasks = find_experiment(config.experiment), all_tasks(config)
    store = Store.open(out, config, tasks)
    store.check_dtype(dtype)
    todo = remaining(tasks, store.finished())
    if todo:
        inline = engine == "inline"
        outcomes = (
            _inline(experiment, todo, device, dtype)
            if inline
            else _on_ray(config, todo, workers, address, dtype)
        )
        bar = progress_bar(
            of=experiment.name.rpartition("experiments.")[2],
            total=len(tasks),
            initial=len(tasks) - len(todo),
            unit="task",
        )
        ignorant, count = [], len(tasks) - len(todo)
        with bar:
            for outcome in outcomes:
                task = tasks[outcome.index]
                _keep(store, task, outcome)
                count += 1
                end = "finished" if outcome.rows is not None else "failed"
                logger.info(
                    "%d of %d tasks: %s %s in %.0f s",
                    count, len(tasks), _named(task, config), end, outcome.seconds,
                )  # fmt: skip
                if outcome.rows is not None and knows_nothing(outcome.rows):
                    ignorant.append(task)
                bar.update()
        if ignorant:
            warnings.warn(
                f"In {len(ignorant)} of {len(todo)} tasks the model knows none of the prompts (the "
                f"first: {_named(ignorant[0], config)}): what is measured there says nothing about "
                "its facts. Name facts= or data= that the model was trained on.",
                stacklevel=2,
            )
    store.close(config, tasks)
    return Path(out)


def check_options(engine: Engine, **options: Any) -> None:
    """Raise `ConfigError` for an option that the engine does not read."""
    unread, why = UNREAD[engine]
    for name in unread:
        if options[name] is not None:
            raise ConfigError(f"{name} has no effect with engine={engine!r}: {why}. Leave it out.")


def _named(task: Task, config: RunConfig) -> str:
    varied = [name for name in task.values if name == "model" or name in config.grid]
    return ", ".join(f"{name}={task.values[name]}" for name in varied)


def _keep(store: Store, task: Task, outcome: Outcome) -> None:
    if outcome.model is not None:
        store.check_model(*outcome.model)
    if outcome.rows is None:
        store.fail(task, outcome.error or "no rows")
    else:
        store.save(task, outcome.rows, outcome.seconds)


def all_tasks(config: RunConfig) -> list[Task]:
    """The run's tasks, with `layers` filled in from the models."""
    return tasks_of(config, _n_layers)


def _n_layers(name: str) -> int:
    # only where a grid asks for it: a Ray worker starts quickly
    from qv_lens.models.zoo import n_layers

    return n_layers(name)


def _inline(
    experiment: Experiment, tasks: list[Task], device: str | None, dtype: str | None
) -> Iterator[Outcome]:
    shelf = Shelf(device, dtype)
    for task in tasks:
        yield run_task(experiment, task, shelf)


def _shares(gpus: int, cpus: int, workers: int | None, tasks: int) -> tuple[int, dict[str, float]]:
    """How many workers there are, and what each takes of the cluster: with GPUs whole ones, or a
    share of one, otherwise a CPU. Ray waits for ever for what the cluster does not have."""
    cores = max(1, cpus)
    count = min(workers or gpus or cores, tasks)
    if gpus:
        return count, {"num_gpus": gpus // count if count <= gpus else 1 / ceil(count / gpus)}
    if count > cores:
        warnings.warn(
            f"Ray has {cores} CPU cores: as many workers in place of {count}.", stacklevel=3
        )
    return min(count, cores), {"num_cpus": 1}


def _on_ray(
    config: RunConfig,
    tasks: list[Task],
    workers: int | None,
    address: str | None,
    dtype: str | None,
) -> Iterator[Outcome]:
    try:
        ray: Any = import_module("ray")
        pools: Any = import_module("ray.util")
    except ImportError as error:
        raise ConfigError("engine='ray' needs Ray: pip install 'qv_lens[ray]'.") from error
    ours = not ray.is_initialized()
    if ours:
        local = {} if address else {"num_cpus": workers, "include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error", **local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"Ray cannot start or join {address or 'this machine'}: {error}."
            ) from error
    try:
        gpus, cpus = (int(ray.cluster_resources().get(kind, 0)) for kind in ("GPU", "CPU"))
        count, share = _shares(gpus, cpus, workers, len(tasks))
        remote = ray.remote(max_restarts=-1, max_task_retries=RETRIES, **share)(Worker)
        pool = pools.ActorPool([remote.remote(config, dtype) for _ in range(count)])
        for task in tasks:
            pool.submit(lambda actor, index: actor.run.remote(index), task.index)
        answered: set[int] = set()
        lost = ""
        while pool.has_next():
            try:
                outcome: Outcome = pool.get_next_unordered()
            except ray.exceptions.RayError as error:  # a worker died, and Ray's retries with it
                lost = lost or str(error)
                continue
            answered.add(outcome.index)
            yield outcome
        for task in tasks:
            if task.index not in answered:
                died = f"The worker died on this task, {RETRIES + 1} times: {lost}"
                yield Outcome(task.index, None, died, float("nan"))
    finally:
        if ours:
            ray.shutdown()


class Worker:
    """A Ray actor: one share of the machine, one torch thread per CPU of it, models loaded once. It
    reads the experiment's file itself, which lies at the same place on every machine."""

    def __init__(self, config: RunConfig, dtype: str | None = None) -> None:
        # torch reads it where a task first imports it: not for tasks without a model
        os.environ["OMP_NUM_THREADS"] = "1"
        self.experiment = find_experiment(config.experiment)
        self.tasks = all_tasks(config)
        self.shelf = Shelf(dtype=dtype)

    def run(self, index: int) -> Outcome:
        """The outcome of the task at this place."""
        return run_task(self.experiment, self.tasks[index], self.shelf)


@dataclass(frozen=True)
class Estimate:
    """The cost of a run: the `seconds` of one worker, the `source` of that estimate, and the
    `gigabytes` of weights per worker."""

    tasks: list[Task]
    """All tasks of the run."""
    todo: int
    """How many are still to do."""
    seconds: float
    """Of one worker."""
    source: str
    """What the seconds rest on."""
    gigabytes: float
    """Of weights per worker."""


def told(error: str) -> str:
    """A task's error: one raised on purpose as its own sentence, any other with its traceback."""
    last = error.strip().splitlines()[-1] if error.strip() else error
    return last.partition(": ")[2] if last.startswith("qv_lens.errors.") else error


def estimate(
    config: RunConfig,
    out: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> Estimate:
    """Tasks, time and memory, without writing anything: from the finished tasks in `out`, or by
    running the first two. Raises `ConfigError` for a folder with which `run` would not go on."""
    from qv_lens.models.zoo import weight_gigabytes

    experiment, tasks = find_experiment(config.experiment), all_tasks(config)
    store = None if out is None else Store.found(out, config, tasks)
    if store:
        store.check_dtype(dtype)
    finished = store.finished() if store else set()
    todo = remaining(tasks, finished)
    models = {m for task in tasks if isinstance(m := getattr(task.fields, "model", None), str)}
    gigabytes = max((weight_gigabytes(model, dtype) for model in models), default=0.0)
    known = [s for s in (store.seconds(tasks) if store else []) if s == s]
    if known:
        return Estimate(
            tasks,
            len(todo),
            len(todo) * sum(known) / len(known),
            f"{len(known)} finished tasks",
            gigabytes,
        )
    if not todo:
        return Estimate(tasks, 0, 0.0, "nothing to do", gigabytes)
    shelf = Shelf(device, dtype)
    # the first one loads the model
    outcomes = [run_task(experiment, task, shelf) for task in todo[:2]]
    if outcomes[0].error:
        raise QVLensError(f"The first task fails: {told(outcomes[0].error)}")
    return Estimate(
        tasks,
        len(todo),
        outcomes[0].seconds + (len(todo) - 1) * outcomes[-1].seconds,
        "a probe of two tasks",
        gigabytes,
    )
