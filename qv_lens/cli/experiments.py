"""run, report: experiments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from qv_lens.cli.options import (
    AS_IT_IS,
    Loading,
    Several,
    at_least,
    check_writable,
    not_empty,
    phases,
)
from qv_lens.errors import ConfigError
from qv_lens.files import whole

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from qv_lens.runs.experiment import Experiment

#: tasks that a dry run lists
SHOWN = 12


def run(
    file: Path,
    *,
    model: Annotated[list[str] | None, Several] = None,
    changes: Annotated[list[str] | None, Parameter(name="--set", consume_multiple=True)] = None,
    out: Path | None = None,
    engine: Literal["inline", "ray"] = "inline",
    workers: int | None = None,
    address: str | None = None,
    dry_run: bool = False,
    loading: Loading = AS_IT_IS,
) -> None:
    """Run an experiment; run it again to resume.

    Parameters
    ----------
    file
        A table or figure (experiments/ace/figure_2.py), an experiment of your own, or a TOML file
        with settings over one.
    model
        Models to run on, instead of the file's.
    changes
        key=value, for any key of the file; a list is varied, anything else is fixed.
    out
        The run folder (default: runs/ and the file's name, with that of its paper).
    engine
        inline, or ray: one worker per GPU or CPU core.
    workers
        Ray workers.
    address
        Address of a running Ray cluster; 'auto' for this machine's.
    dry_run
        Print the tasks, the time (from what is finished, or two trial tasks) and the size of the
        weights; write nothing.
    """
    from qv_lens.runs.config import read_config
    from qv_lens.runs.experiment import find_experiment
    from qv_lens.runs.rows import knowledge, load_run
    from qv_lens.runs.run import check_options, estimate, told
    from qv_lens.runs.run import run as start

    not_empty("--model", model)
    not_empty("--set", changes)
    at_least("--workers", workers, 1)
    config = read_config(file, changes or (), model or ())
    folder = out or Path("runs") / _run_name(file)
    if dry_run:
        check_options(engine, workers=workers, address=address, device=loading.device)
        cost = estimate(config, folder, device=loading.device, dtype=loading.dtype)
        for task in cost.tasks[:SHOWN]:
            print(
                f"{task.index:>5}  "
                + "  ".join(f"{key}={value}" for key, value in task.values.items())
            )
        if len(cost.tasks) > SHOWN:
            print(f"  ... and {len(cost.tasks) - SHOWN} more")
        time = f"{cost.seconds / 60:.1f} minutes on one worker (from {cost.source})"
        print(
            f"{len(cost.tasks)} tasks, {cost.todo} to do: {time}; weights {cost.gigabytes:.2f} GB "
            "per worker"
        )
        return
    try:
        with phases("runs", unless_seen=True), phases("evaluation", unless_seen=True):
            start(
                config,
                folder,
                engine=engine,
                workers=workers,
                address=address,
                device=loading.device,
                dtype=loading.dtype,
            )
    except KeyboardInterrupt:
        print(
            f"\nStopped. What is finished is in {folder}; the same command goes on from there.",
            file=sys.stderr,
        )
        sys.exit(130)
    frame = load_run(folder)
    failed = frame[frame["status"] == "failed"]
    print(
        f"{folder}: {frame['task'].nunique()} tasks, {len(failed)} failed, "
        f"{len(frame) - len(failed)} rows (qv.load_run reads them)"
    )
    for row in knowledge(frame).itertuples():
        nothing = f"; in {row.none} of {row.tasks} tasks none" if row.none else ""
        each = f" (in {row.tasks} tasks, each counted)" if row.tasks > 1 else ""
        print(f"{row.model} knows {row.known} of the {row.asked} prompts asked{each}{nothing}")
    experiment = find_experiment(config.experiment)
    figure = _drawn(experiment, frame)
    if figure is not None:
        _write_figure(figure, folder / "figure.html")
    if len(failed):
        print(f"first failure:\n{told(str(failed['error'].iloc[0]))}", file=sys.stderr)
        sys.exit(1)


def _drawn(experiment: Experiment, frame: pd.DataFrame) -> go.Figure | None:
    """The experiment's figure of a run's finished rows; None where it has none, or none are. Raises
    `ConfigError` where its code raises."""
    from qv_lens.reporting.tables import finished_rows

    finished = finished_rows(frame)
    if experiment.figure is None or finished.empty:
        return None
    try:
        return experiment.figure(finished)
    except Exception as error:  # whatever the file raises
        raise ConfigError(
            f"The rows are kept, and the figure of {experiment.file} cannot be drawn: "
            f"{type(error).__name__}: {error}."
        ) from error


def _write_figure(figure: go.Figure, file: Path) -> None:
    """Write the figure. Raises `ConfigError` where the file cannot be written."""
    try:
        with whole(file) as partial:
            figure.write_html(partial, include_plotlyjs="directory")
    except OSError as error:
        raise ConfigError(
            f"The rows are kept, and the figure cannot be written to {file}: {error}."
        ) from error
    print(f"figure: {file}")


def _run_name(file: Path) -> str:
    """ace-figure_2 of experiments/ace/figure_2.py: files of different papers bear the same name."""
    in_package = (file.parent / "__init__.py").exists() and (
        file.parent.parent / "__init__.py"
    ).exists()
    return f"{file.parent.name}-{file.stem}" if in_package else file.stem


def report(folders: list[Path], *, out: Path | None = None) -> None:
    """A run folder as one page that needs nothing else: its figure, its means, its settings; or
    several runs of one experiment side by side.

    Parameters
    ----------
    folders
        What qv-lens run wrote; of several runs the names of their folders head the columns.
    out
        The HTML file (default: report.html in the folder; of several runs comparison.html in the
        first).
    """
    from qv_lens.runs.experiment import find_experiment
    from qv_lens.runs.rows import load_run

    not_empty("FOLDERS", folders)
    frames = {folder.name: load_run(folder) for folder in folders}
    if len(frames) < len(folders):
        raise ConfigError("Runs are told apart by their folders' names: two of these are the same.")
    target = out or folders[0] / ("report.html" if len(folders) == 1 else "comparison.html")
    check_writable(target)

    from qv_lens.reporting.document import write
    from qv_lens.reporting.runs import run_page, runs_page

    frame, *others = frames.values()
    if others:
        page = runs_page(frames)
    else:
        experiment = find_experiment(frame.attrs["file"])
        try:
            figure = _drawn(experiment, frame)
        except ConfigError as error:  # the page is worth having without it
            print(f"qv-lens: {error}", file=sys.stderr)
            figure = None
        page = run_page(experiment.name, frame, figure)
    print(write(page, target))
