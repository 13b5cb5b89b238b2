"""A thousand edits in a row: the newest, the first and some drawn from all, neighbours, ordinary
text.

    qv-lens run experiments/sequence.py --set data=counterfact.json --set held_out=wikitext-2.txt
    qv-lens run experiments/sequence.py --set data=counterfact.json --set 'method=["UltraEdit"]' --set count=10000 \
        --set batch=100

Facts that the model knows (CounterFact's, or without `data` those of the atlas, which are fewer),
in a row that a seed draws; checkpoints at 1, 10, 100, 300, 1,000 and so on. Killed at any moment,
the same command goes on within a row: the patch in force is kept in the user's cache. Source: the
consecutive protocol of ROME's and MEMIT's successors; MPES and ENCORE, UltraEdit and SimIE go to
10,000 and more."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from experiments.compare import drawn_cases, statistics_of
from experiments.prompts import at_least, check_files
from qv_lens.cache import cache_folder
from qv_lens.editing.job import reads_statistics
from qv_lens.editing.presets import preset_of
from qv_lens.editing.statistics import enough
from qv_lens.evaluation.sequence import sequence
from qv_lens.facts.files import read_texts
from qv_lens.models.lens import Lens
from qv_lens.plots import lasting as figure
from qv_lens.runs.experiment import Once, directly

__all__ = ["GRID", "MEASURES", "RESULTS", "Task", "figure", "rows"]

#: tokens of the text whose perplexity is measured
TOKENS = 4_000


@dataclass(frozen=True)
class Task:
    """One row of edits."""

    model: str
    """The model's name."""
    method: str
    """The editor's preset."""
    data: str = "facts"
    """A file of edits ('facts': those of the atlas that the model knows; of a toy its world's)."""
    count: int = 1_000
    """How many edits."""
    batch: int = 1
    """How many are made together."""
    sample: int = 50
    """How many are asked of each group."""
    known: bool = True
    """Of a file: only facts that the model answers."""
    held_out: str = ""
    """A file of ordinary text whose perplexity is measured ('': none)."""
    text: str = ""
    """Text for C0 ('': the default of the model)."""
    seed: int = 0
    """Which cases, in which order."""

    def __post_init__(self) -> None:
        at_least(self, count=1, batch=1, sample=1, seed=0)
        check_files(self, "data", "held_out", "text")
        preset_of(self.model, self.method)


GRID = {
    "model": ["smollm2-135m"],
    "method": [
        "MEMIT", "AlphaEdit", "EMMET", "PRUNE", "RECT", "PMET", "ROME", "RROME", "ENCORE", "SPHERE",
        "BetaEdit", "UltraEdit", "NSE", "LocFT", "FT",
    ],
}  # fmt: skip
MEASURES = ("before", "after")
#: the results that its rows belong to
RESULTS = "sequences"


def rows(task: Task, lens: Lens, once: Once = directly) -> pd.DataFrame:
    """The rows of `sequence`."""
    known = task.known and task.data != "facts"
    cases: list[Any] = drawn_cases(lens, task.data, task.count, task.seed, known, once).cases
    editor = preset_of(task.model, task.method).editor
    texts = enough(lens, read_texts(Path(task.held_out)), TOKENS) if task.held_out else ()
    C0 = once(statistics_of, lens, task.text, 0) if reads_statistics(editor) else None
    options = {
        "statistics": C0,
        "batch": task.batch,
        "sample": task.sample,
        "held_out": texts,
        "seed": task.seed,
    }
    place = cache_folder()
    if place is None:
        with TemporaryDirectory() as folder:
            return sequence(lens, cases, editor, folder, **options)
    return sequence(lens, cases, editor, _folder(place, task), **options)


def _folder(place: Path, task: Task) -> Path:
    """Where a row of edits keeps its progress."""
    name = hashlib.blake2b(repr(task).encode(), digest_size=8).hexdigest()
    return place / "sequences" / f"{task.method}-{name}"
