"""Processes that tests kill: each starts from one that has imported everything, in a moment."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.models", "qv_lens.runs.run"])


def started(work: Callable[..., None], *args: Any) -> Any:
    """A process that is about to do `work(*args)`."""
    told, tell = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_ready, args=(tell, work, args))
    process.start()
    assert told.recv() == "ready"
    return process


def _ready(tell: Any, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    tell.send("ready")
    work(*args)


def wait_for_more_than(before: float, now: Callable[[], float], seconds: float = 60.0) -> None:
    """Until something has grown beyond what it was. Raises `AssertionError` after so long."""
    end = time.monotonic() + seconds
    while now() <= before:
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)
