"""An experiment for tests: no model, and tasks that wait, fail, or take their worker with them."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

MEASURES = ("draw",)


@dataclass(frozen=True)
class Task:
    n: int
    seed: int = 0
    wait: float = 0.0
    log: str = ""
    do: str = "work"
    editor: dict = field(default_factory=dict)


def first(mark: Path) -> bool:
    """Whether nobody was here before, also when two workers ask at once."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def rows(task: Task, lens) -> pd.DataFrame:
    if task.log:  # who ran, and how often; a field that names a file would be data of the run
        with Path(f"{task.log}.txt").open("a") as log:
            log.write(f"{task.n}\n")
    time.sleep(task.wait)
    if task.do == "raise" and task.n == 1:
        raise ValueError("task one is broken")
    if task.do == "die" and task.n == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if task.do == "die once" and task.n == 1 and first(Path(f"{task.log}.died")):
        os.kill(os.getpid(), signal.SIGKILL)
    if task.do == "list":
        return [1] if task.n == 1 else pd.DataFrame({"draw": [0.0]})  # pyright: ignore[reportReturnType]
    if task.do == "mixed":
        return pd.DataFrame({"draw": [1, "all"] if task.n == 1 else [0.0]})
    if task.do == "stop" and task.n == 3:
        raise KeyboardInterrupt
    draw = random.Random(f"{task.n}:{task.seed}").random()
    return pd.DataFrame({"part": ["a", "b"], "draw": [draw, -draw]})
