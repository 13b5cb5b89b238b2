"""Command line: thin verbs over the library. `qv-lens --help` imports no torch."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, TextIO

from cyclopts import App, CycloptsError, Parameter

from qv_lens import __version__
from qv_lens.cli import edits, experiments, one_fact
from qv_lens.cli.models import models
from qv_lens.cli.options import QUIET
from qv_lens.cli.patches import patch
from qv_lens.errors import QVLensError

app = App(
    name="qv-lens",
    help="Where a language model keeps a fact, and how to change it.",
    version=__version__,
    default_parameter=Parameter(negative=()),
    exit_on_error=False,
    print_error=False,
)
app.command(models)
app.command(patch)
for verb in (
    one_fact.demo,
    one_fact.study,
    one_fact.attribute,
    one_fact.ablate,
    experiments.report,
    edits.stats,
    edits.edit,
    edits.evaluate,
    edits.tune,
    experiments.run,
):
    app.command(verb)
app.register_install_completion_command(add_to_startup=False)


@app.meta.default
def start(
    *words: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)], quiet: bool = False
) -> None:
    """Run a verb.

    Parameters
    ----------
    quiet
        No progress bars and no warnings: results and errors alone.
    """
    with _quiet() if quiet else _warnings_as_lines():
        app(words)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no warnings; afterwards as before."""
    before = dict(os.environ)
    os.environ.update({"TQDM_DISABLE": "1", QUIET: "1"})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Warnings as one line on stderr, without the place in the source, each said once; afterwards
    as before."""
    printed: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = " ".join(str(message).split())
        if text not in printed:
            printed.add(text)
            print(f"qv-lens: warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def main(arguments: Annotated[list[str] | None, Parameter(parse=False)] = None) -> None:
    """Entry point: an error of ours, or in the words of the command, is one line and exit code 2,
    never a traceback; a warning is one line too. A reader that has seen enough (`| head`) ends it,
    with a shell's code for that."""
    try:
        try:
            app.meta(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # what is still to be flushed
        sys.exit(128 + signal.SIGPIPE)
    except (QVLensError, CycloptsError) as error:
        print(f"qv-lens: {error}", file=sys.stderr)
        sys.exit(2)
