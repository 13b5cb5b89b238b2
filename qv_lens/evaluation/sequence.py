"""Thousands of edits in a row: what is left of the first ones, and of the model.

1. Cases are edited one after another, or so many at a time (`batch`; the releases of AlphaEdit and
   its successors take 100); one patch is in force, the sum of all edits so far, so that memory does
   not grow with their number.
2. At each checkpoint are asked: the newest edits, the first ones, and some drawn from all so far
   (`sample` of each), with their paraphrases and neighbours, each beside what the
   unedited model says; and the perplexity of ordinary text, and the largest ||dW|| / ||W||.
3. Every `save_every` edits, and at each checkpoint, the patch in force and the rows so far are
   written to the folder. Killed at any moment, the same call goes on from there and gives the same
   rows: contexts and draws depend on the seed alone."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from qv_lens.editing.edit import check_statistics, checked_texts, edit
from qv_lens.editing.job import Editor, Factored, check_editor, style_of
from qv_lens.editing.keys import contexts
from qv_lens.editing.presets import editor_of
from qv_lens.editing.statistics import Statistics
from qv_lens.errors import (
    ConfigError,
    EditError,
    PatchError,
    check_count,
    check_counts,
    check_seed,
)
from qv_lens.evaluation.answers import look
from qv_lens.evaluation.metrics import measured
from qv_lens.evaluation.perplexity import perplexity
from qv_lens.evaluation.protocols import check_metrics, largest, total
from qv_lens.evaluation.selection import (
    OF_ONE_CASE,
    checked_cases,
    continued,
    groups_of,
    unreadable,
    warn_of_skipped,
)
from qv_lens.facts.records import EditCase
from qv_lens.files import whole
from qv_lens.models.lens import Lens
from qv_lens.patch import Patch
from qv_lens.progress import progress_bar

logger = logging.getLogger(__name__)

CHECKPOINTS = (1, 10, 100, 300, 1_000, 3_000, 10_000)
METRICS = (
    "efficacy_gen", "efficacy_acc", "efficacy_success", "paraphrase_gen", "paraphrase_acc", "specificity_gen", "specificity_acc",
)  # fmt: skip
COLUMNS = ("step", "group", "metric", "before", "after", "cases")
RECORD = "sequence.json"
#: so many refused at the beginning, and none made: the editor's settings are wrong, not the facts
HOPELESS = 10


@dataclass
class _Progress:
    """How far a sequence has come; written to its folder."""

    key: str
    done: int
    seconds: float
    skipped: list[tuple[int, str]]
    """Places of the cases that could not be edited, or asked, and why."""
    rows: list[list[Any]]
    patch: str | None = None


def sequence(
    lens: Lens,
    cases: Sequence[EditCase],
    editor: Editor | str,
    folder: str | Path,
    *,
    statistics: Statistics | None = None,
    metrics: Sequence[str] = METRICS,
    checkpoints: Sequence[int] = CHECKPOINTS,
    batch: int = 1,
    sample: int = 50,
    held_out: Sequence[str] = (),
    save_every: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """Edit the cases in a row and ask at the checkpoints, and at the end: `step, group, metric,
    before, after, cases`, means over the cases of a group.

    The group `model` holds the model's own: `perplexity` of the texts `held_out`, `relative_norm`
    (the largest ||dW|| / ||W||), `seconds` per edit and `refused`, the number of edits that could
    not be made, or whose case does not tokenise; these are not asked, and stand with the reason
    in `.attrs["skipped"]`, the first in a warning. `folder`: where progress is kept; another
    call with the same arguments goes on from it. The lens is left as it was. `batch`: how many
    cases are edited together; none reaches over a checkpoint, and one that is refused is edited
    case by case.

    Raises `ConfigError` for a folder that holds another sequence, or in which another process is at
    work, no cases, an unknown metric, or
    counts below 1; what the editor raises for its statistics; `EditError` where the first ten edits
    or more are all refused.
    """
    check_metrics(metrics)
    cases, held_out = checked_cases("sequence", cases, (EditCase,)), checked_texts(held_out)
    checkpoints = check_counts("checkpoints", checkpoints)
    for name, count in (("batch", batch), ("sample", sample), ("save_every", save_every)):
        check_count(name, count)
    seed = check_seed(seed)
    editor = editor_of(lens, editor)
    check_editor(editor)
    check_statistics(lens, editor, statistics)
    room = Path(folder)
    wanted = sorted({at for at in checkpoints if at <= len(cases)} | {len(cases)})
    key = _key(lens, cases, editor, metrics, wanted, batch, sample, held_out, seed, statistics)
    groups = groups_of(metrics)
    templates, factored = contexts(lens, seed, style_of(editor)), Factored(statistics)
    with _alone_in(room):
        progress = _resumed(room, key)
        patches = _kept(room, progress)
        if progress.done == 0 and not progress.rows and held_out:
            progress.rows.append([0, "model", "perplexity", *[perplexity(lens, held_out)] * 2, 1])
        with progress_bar(of=type(editor).__name__, unit="edit", total=len(cases)) as bar:
            bar.update(progress.done)
            while progress.done < len(cases):
                before = progress.done
                stop = min(before + batch, next(at for at in wanted if at > before))
                reasons = {at: unreadable(lens, cases[at], groups) for at in range(before, stop)}
                readable = [at for at, reason in reasons.items() if reason is None]
                start = time.perf_counter()
                made, refused = _edited(
                    lens, [cases[at] for at in readable], patches, editor, statistics=statistics,
                    templates=templates, seed=seed, factored=factored,
                )  # fmt: skip
                progress.seconds += time.perf_counter() - start
                reasons |= {readable[place]: reason for place, reason in refused.items()}
                skipped = [(at, reason) for at, reason in reasons.items() if reason is not None]
                if skipped and not progress.skipped:
                    warn_of_skipped(*skipped[0])
                progress.skipped += skipped
                if made:
                    patches = [total([*patches, *made])]
                elif not patches and refused and len(progress.skipped) >= HOPELESS:
                    raise EditError(
                        f"All of the first {len(progress.skipped)} edits were refused, the last "
                        f"because of this: {progress.skipped[-1][1]} Nothing was edited."
                    )
                progress.done = stop
                bar.update(stop - before)
                if progress.done in wanted:
                    progress.rows += _asked(
                        lens, cases, progress, patches, metrics, sample, held_out, seed
                    )
                    logger.info(
                        "%s: %d of %d edits, %.1f s each",
                        type(editor).__name__, progress.done, len(cases), progress.seconds / progress.done,
                    )  # fmt: skip
                if progress.done in wanted or stop // save_every > before // save_every:
                    _save(room, progress, patches)
    frame = pd.DataFrame(progress.rows, columns=list(COLUMNS))
    skipped = {str(at): reason for at, reason in progress.skipped}
    frame.attrs.update({**lens.label, "editor": repr(editor), "seed": seed, "skipped": skipped})
    return frame


def _edited(
    lens: Lens, cases: Sequence[EditCase], patches: Sequence[Patch], editor: Editor, **options: Any
) -> tuple[list[Patch], dict[int, str]]:
    """The patches of cases edited together, on top of those in force, and which of the cases were
    refused, with the reason: where all together are, each is edited alone."""
    if not cases:
        return [], {}
    with lens.patched(*patches):
        try:
            return [edit(lens, [case.request for case in cases], editor, **options)], {}
        except OF_ONE_CASE as error:
            if len(cases) == 1:
                return [], {0: str(error)}
    made: list[Patch] = []
    refused: dict[int, str] = {}
    for place, case in enumerate(cases):
        more, reasons = _edited(lens, [case], [*patches, *made], editor, **options)
        made += more
        if reasons:
            refused[place] = reasons[0]
    return made, refused


def _key(lens: Lens, *settings: object) -> str:
    """What a sequence is about: the weights, the cases, the editor and every setting."""
    cases, *others, statistics = settings
    source = None if statistics is None else statistics.source  # pyright: ignore[reportAttributeAccessIssue]
    key = repr((lens.state(), list(cases), *others, source))  # pyright: ignore[reportArgumentType]
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


@contextmanager
def _alone_in(room: Path) -> Iterator[None]:
    """The folder, made where it is not there, for this process alone; what a killed one was writing
    is removed. Raises `ConfigError` for one that another process is at work in, or that cannot be
    written."""
    lock = FileLock(room / "lock", blocking=False)
    try:
        room.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ConfigError(
            f"Another process edits in a row in {room}: wait for it, or name another folder."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"Cannot keep progress in {room}: {error}. Name another folder."
        ) from error
    try:
        for partial in room.glob(f".{RECORD}.*.partial"):
            partial.unlink()
        yield
    finally:
        lock.release()


def _resumed(room: Path, key: str) -> _Progress:
    """What the folder holds. Raises `ConfigError` for another sequence, a damaged one, or a file."""
    try:
        progress = _Progress(**json.loads((room / RECORD).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return _Progress(key, 0, 0.0, [], [])
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{room / RECORD} is no progress of edits in a row: {error}. Remove it, or name another "
            "folder; nothing was changed."
        ) from error
    if progress.key != key:
        raise ConfigError(
            f"{room} holds another sequence (other weights, cases, editor or settings). Name "
            "another folder, or remove it."
        )
    for patch in room.glob("patch-*"):
        if patch.name != progress.patch:  # a process killed between the record and this left it
            shutil.rmtree(patch, ignore_errors=True)
    progress.rows = [[nan if value is None else value for value in row] for row in progress.rows]
    return progress


def _kept(room: Path, progress: _Progress) -> list[Patch]:
    """The patch in force, if any. Raises `ConfigError` for one that cannot be read."""
    if progress.patch is None:
        return []
    try:
        return [Patch.load(room / progress.patch)]
    except PatchError as error:
        raise ConfigError(
            f"The edits of {room / RECORD} cannot be read: {error} Remove the folder {room}, which "
            "begins the row again, or name another one."
        ) from error


def _save(room: Path, progress: _Progress, patches: Sequence[Patch]) -> None:
    """The patch first, then the record that names it; what it replaces goes last."""
    before = progress.patch
    for patch in patches:  # one, or none
        progress.patch = f"patch-{progress.done}"
        shutil.rmtree(room / progress.patch, ignore_errors=True)  # what a killed process left
        patch.save(room / progress.patch)
    rows = [[None if value != value else value for value in row] for row in progress.rows]
    with whole(room / RECORD) as file:
        file.write_text(json.dumps(replace(progress, rows=rows).__dict__), encoding="utf-8")
    if before is not None and before != progress.patch:
        shutil.rmtree(room / before, ignore_errors=True)


def _asked(
    lens: Lens,
    cases: Sequence[EditCase],
    progress: _Progress,
    patches: Sequence[Patch],
    metrics: Sequence[str],
    sample: int,
    held_out: list[str],
    seed: int,
) -> list[list[Any]]:
    """The rows of one checkpoint."""
    step = progress.done
    skipped = {place for place, _ in progress.skipped}
    every = [place for place in range(step) if place not in skipped]
    drawn = random.Random(f"{seed}:{step}").sample(every, min(sample, len(every)))
    members = {"newest": every[-sample:], "first": every[:sample], "drawn": sorted(drawn)}
    places = sorted(set().union(*members.values()))
    about = [cases[i] for i in places]
    generation, groups = continued(None, metrics, seed), groups_of(metrics)
    before = look(lens, about, generation, groups)
    with lens.patched(*patches):
        now = look(lens, about, generation, groups)
        surprised = perplexity(lens, held_out) if held_out else nan
    values = {}
    for i, case, was, after in zip(places, about, before, now, strict=True):
        values[i] = (
            measured(case, metrics, was, was, False),
            measured(case, metrics, after, was, True),
        )
    rows: list[list[Any]] = []
    for group, index in members.items():
        for metric in metrics:
            pairs = pd.DataFrame(
                [[values[i][k][metric] for k in (0, 1)] for i in index], columns=[0, 1], dtype=float
            )
            # before and after of the same cases; a metric that has no before is asked after alone
            pairs = pairs.dropna(axis=1, how="all").dropna().reindex(columns=[0, 1])
            asked_of = int(pairs[1].notna().sum())
            rows.append([step, group, metric, *pairs.mean().tolist(), asked_of])
    own = {
        "relative_norm": (0.0, largest(lens, patches)),
        "seconds": (nan, progress.seconds / step),
        "refused": (0, len(progress.skipped)),
    }
    if held_out:
        clean = next(row[4] for row in progress.rows if row[2] == "perplexity")
        own["perplexity"] = (clean, surprised)
    return [*rows, *([step, "model", name, *pair, 1] for name, pair in own.items())]
