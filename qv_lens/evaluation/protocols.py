"""evaluate(): what a model answers before and after edits, weights put back bit for bit at the end.

    single       per case: its facts edited one after another, everything asked, weights put back (z* of `batch_size`
                 cases' first facts, which are all searched on the unedited weights, in one search)
    batch        `batch_size` cases at once: one edit of all their facts, all of them asked, weights put back
    consecutive  case after case without putting back; all of them asked at the end, or after every `every` cases

The unedited model is asked once for all cases, and its answers are kept in `cache` if that is
given. So are the z* of single edits, which editors with the same search share. Metrics:
`metrics`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from qv_lens.editing.edit import check_statistics, checked_texts, edit
from qv_lens.editing.job import Deltas, Editor, Factored, check_editor
from qv_lens.editing.layer_by_layer import ClosedForm, search_ahead
from qv_lens.editing.presets import editor_of
from qv_lens.editing.statistics import Statistics
from qv_lens.editing.targets import PrecomputedTargets
from qv_lens.errors import (
    ConfigError,
    EditError,
    check_count,
    check_seed,
    unknown,
)
from qv_lens.evaluation.answers import look
from qv_lens.evaluation.kept_answers import kept_in
from qv_lens.evaluation.metrics import (
    Judge,
    check_metrics,
    measured,
)
from qv_lens.evaluation.perplexity import perplexity
from qv_lens.evaluation.questions import CaseAnswers, Generation, questions
from qv_lens.evaluation.selection import (
    DEFAULT,
    OF_ONE_CASE,
    PROTOCOLS,
    Protocol,
    checked_cases,
    continued,
    fitting,
    groups_of,
    kind_of,
    unreadable,
    warn_of_skipped,
)
from qv_lens.facts.benchmarks import contaminated
from qv_lens.facts.records import Case, EditCase, EditRequest, MultiHopCase, check_requests
from qv_lens.models.lens import Lens, check_lens
from qv_lens.patch import Delta, Patch, summed
from qv_lens.progress import progress_bar

#: a chain of thought asked for with nothing in front of it
UNAIDED = (
    "multihop_cot asks without worked examples here, in front of which the papers put five: pass "
    "generation=Generation(blocks=...), as qv_lens.facts.prompts.G1 has ACE's, or Generation() to ask "
    "so."
)
COLUMNS = [
    "case",
    "subject",
    "edits",
    "hops",
    "step",
    "metric",
    "before",
    "after",
    "relative_norm",
    "seconds",
]


def evaluate(
    lens: Lens,
    cases: Sequence[Case],
    metrics: Sequence[str] | None = None,
    editor: Editor | str | None = None,
    protocol: Protocol = "single",
    seed: int = 0,
    *,
    statistics: Statistics | None = None,
    templates: Sequence[str] | None = None,
    batch_size: int = 32,
    every: int | None = None,
    generation: Generation | None = None,
    judge: Judge | None = None,
    held_out: Sequence[str] = (),
    cache: str | Path | None = None,
    factored: Factored | None = None,
) -> pd.DataFrame:
    """One row per case and metric: `case, subject, edits, hops, step, metric, before, after`, the
    largest ||dW|| / ||W|| of what was written (`relative_norm`), and the seconds of the edit per
    fact; of a search for several cases each case's share (`batch_size=1`: every edit timed alone).

    `metrics`: names of `metrics.GENERATED` (what the model says, with the settings `generation`), of
    `metrics.FORCED` (teacher-forced), of `metrics.NAMED` (denial, reversal, overfit), and of
    `metrics.JUDGED`: these are what `judge(prompt, continuation, accepted answers)` gives, a value
    from 0 to 1 of a model or a person. None is called unless it is passed. The default: those of
    `DEFAULT` that fit the cases.
    `held_out`: texts whose perplexity before and with the edits in force is a row of every case.
    `editor`: one with its settings, or the name of one of the model's presets; None asks the
    unedited model alone (`after` is `before`).
    `step`: how many cases had been edited; `every`: in the consecutive protocol, ask the
    cases edited so far after every so many edits (None: only after the last).
    `templates`: contexts of the edits (None: sampled once from the unedited model). `seed`: of what
    an edit draws.
    `cache`: a folder for what the unedited model says and for its z*; `seconds` count the search
    also where it was read from there. `before` of multi-hop metrics counts the answers before the
    edit. `factored`: a `Factored(statistics)` that several calls share, so that C0 is factored once
    for all. A case that cannot be asked or edited has NaN as `after` and its reason in
    `.attrs["skipped"]`; of the first one a warning tells it at once.

    Warns of a metric named that none of the cases can be asked, and of chains with a step that
    another case's edit answers differently, where all stay edited ("consecutive"); in batches such
    cases are kept apart.
    Raises `ConfigError` for an unknown metric or protocol, or no case, `EditError` for anything
    that is not an editor, or for an editor that reads C0 where none is given.

    >>> import qv_lens as qv
    >>> lens = qv.load("toy-gptj")
    >>> fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    >>> frame = qv.evaluate(lens, [qv.EditCase(fact.to("golf"))], ["efficacy_acc"], "FT")
    >>> frame[["before", "after"]].to_numpy().tolist()
    [[0.0, 1.0]]
    """
    check_lens(lens)
    check_metrics(metrics, judge)
    if protocol not in PROTOCOLS:
        raise unknown("Protocol", protocol, PROTOCOLS)
    cases = checked_cases("evaluate", cases, (EditCase, MultiHopCase))
    check_count("batch_size", batch_size)
    seed = check_seed(seed)
    if every is not None:
        check_count("every", every)
        if protocol != "consecutive":
            raise ConfigError(
                "every asks along a row of edits: it goes with protocol='consecutive', not "
                f"{protocol!r}."
            )
    if editor is not None:
        editor = editor_of(lens, editor)
        check_editor(editor)
        check_statistics(lens, editor, statistics)
    wanted = list(metrics) if metrics is not None else fitting(cases, DEFAULT) or list(DEFAULT)
    if generation is None and any(kind_of(name) == "cot" for name in wanted):
        warnings.warn(UNAIDED, stacklevel=2)
    ordinary = checked_texts(held_out)
    run = _Run(
        lens,
        metrics=wanted,
        groups=groups_of(wanted),
        generation=continued(generation, wanted, seed),
        editor=editor,
        statistics=statistics,
        templates=templates,
        seed=seed,
        folder=None if cache is None else Path(cache),
        factored=Factored.of(statistics, factored),
        judge=judge,
        held_out=ordinary,
        clean=perplexity(lens, ordinary) if ordinary else nan,
    )
    if editor is not None and protocol == "consecutive":
        _warn_of_contaminated(cases)
    good = run.readable(cases)
    looks = run.before([cases[i] for i in good])
    before = dict(zip(good, looks, strict=True))
    depth = len(lens.patches)
    try:
        way = _single if editor is None else _STEPS[protocol]
        # the patches of the steps are off when this is left, whatever happens
        with closing(way(run, cases, good, batch_size, every)) as steps:
            rows = [row for step in steps for row in run.rows(cases, before, *step)]
    finally:
        while len(lens.patches) > depth:
            lens.revert()
    for i in run.skipped:
        if i not in before:
            rows += [_row(i, cases[i], 0, name, (nan, nan), nan, nan) for name in wanted]
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame = frame.sort_values(["step", "case"], kind="stable", ignore_index=True)
    if metrics:
        _warn_of_nothing(frame[frame["case"].isin(before)])
    if editor is None:
        frame = frame.assign(relative_norm=0.0, seconds=0.0)
    frame.attrs.update(
        {
            **lens.label,
            "editor": repr(editor),
            "protocol": protocol,
            "seed": seed,
            "batch_size": batch_size,
            "skipped": {str(i): reason for i, reason in run.skipped.items()},
        }
    )
    return frame


def _warn_of_nothing(frame: pd.DataFrame) -> None:
    """Warn of metrics that none of the cases could be asked."""
    values = frame.groupby("metric")[["before", "after"]].count().sum(axis=1)
    empty = values.index[values == 0].tolist()
    if empty:
        warnings.warn(
            f"These cases hold no prompt to measure {', '.join(empty)} by: the values are NaN.",
            stacklevel=3,
        )


def _warn_of_contaminated(cases: Sequence[Case]) -> None:
    """Warn of chains that the edits of other cases lead elsewhere."""
    chains = contaminated(cases)
    if chains:
        warnings.warn(
            f"{len(chains)} of {len(cases)} cases have a step that another case's edit answers "
            "differently, so that after all edits the right answer to their questions is another "
            "one (MQuAKE-Remastered): leave out the cases of "
            "qv_lens.facts.benchmarks.contaminated(cases), or edit in batches.",
            stacklevel=3,
        )


@dataclass
class _Written:
    """The edits in force: their largest relative norm, and the seconds per fact that they took."""

    norm: float = 0.0
    seconds: float = 0.0


@dataclass
class _Run:
    """One evaluation in progress; `skipped` fills up with what could not be asked or edited,
    `unedited` with the unedited model's values."""

    lens: Lens
    metrics: list[str]
    groups: list[str]
    generation: Generation
    editor: Editor | None
    statistics: Statistics | None
    templates: Sequence[str] | None
    seed: int
    folder: Path | None
    factored: Factored
    judge: Judge | None = None
    held_out: Sequence[str] = ()
    clean: float = nan
    skipped: dict[int, str] = field(default_factory=dict)
    unedited: dict[int, dict[str, float]] = field(default_factory=dict)

    def readable(self, cases: Sequence[Case]) -> list[int]:
        """The cases whose probes tokenise."""
        good = []
        for i, case in enumerate(cases):
            reason = unreadable(self.lens, case, self.groups)
            if reason is None:
                good.append(i)
            else:
                self.skip([i], reason)
        return good

    def skip(self, places: Sequence[int], reason: str) -> None:
        """Leave cases out, the first with a warning."""
        if not self.skipped:
            warn_of_skipped(places[0], reason)
        self.skipped.update(dict.fromkeys(places, reason))

    def before(self, cases: Sequence[Case]) -> list[CaseAnswers]:
        """What the unedited model answers; of the cases that the folder holds, that."""

        def ask(some: Sequence[Case]) -> list[CaseAnswers]:
            return look(self.lens, some, self.generation, self.groups)

        if self.folder is None:
            return ask(cases)
        keys = [(questions(case, self.groups), case, self.generation) for case in cases]
        return kept_in(self.folder, self.lens, cases, keys, ask)

    def ahead(self, cases: Sequence[Case]) -> PrecomputedTargets | None:
        """Of closed forms: z* of the cases' first facts in one search; None where that fails or
        does not fit into memory: each edit then searches alone, and tells what is wrong."""
        if not isinstance(self.editor, ClosedForm):
            return None
        try:
            first = [case.requests[0] for case in cases]
            targets = search_ahead(
                self.lens,
                first,
                self.editor,
                templates=self.templates,
                seed=self.seed,
                folder=self.folder,
            )
        except (*OF_ONE_CASE, torch.OutOfMemoryError):
            return None
        self.templates = targets.templates
        return targets

    def patch(
        self, requests: Sequence[EditRequest], ahead: PrecomputedTargets | None = None
    ) -> Patch:
        """One edit, of several facts together in the editor's own way; contexts sampled for the
        first one serve all others."""
        assert self.editor is not None
        options: dict[str, Any] = {
            "statistics": self.statistics,
            "seed": self.seed,
            "ahead": ahead,
            "factored": self.factored,
        }
        patch = edit(self.lens, requests, self.editor, templates=self.templates, **options)
        self.templates = self.templates or patch.info["contexts"] or None
        return patch

    def one_by_one(
        self, case: Case, ahead: PrecomputedTargets | None = None
    ) -> tuple[Patch, _Written]:
        """A case's facts, each edited on the weights with those before it written. Leaves the
        weights as they were."""
        start, depth, patches = time.perf_counter(), len(self.lens.patches), []
        try:
            for i, request in enumerate(case.requests):
                patches.append(self.patch([request], ahead=None if i else ahead))
                self.lens.apply(patches[-1])
        finally:
            while len(self.lens.patches) > depth:
                self.lens.revert()
        seconds = (time.perf_counter() - start) / len(case.requests)
        return total(patches), _Written(largest(self.lens, patches), seconds)

    def rows(
        self,
        cases: Sequence[Case],
        before: dict[int, CaseAnswers],
        step: int,
        index: Sequence[int],
        written: Mapping[int, _Written],
    ) -> Iterator[tuple]:
        """Ask the cases on the current model; the unedited model's answers are already known."""
        known = [before[i] for i in index]
        looks = (
            look(self.lens, [cases[i] for i in index], self.generation, self.groups)
            if self.editor
            else known
        )
        surprised = self.clean
        if self.held_out and self.editor is not None:
            surprised = perplexity(self.lens, self.held_out)
        for i, now in zip(index, looks, strict=True):
            if i not in self.unedited:  # once: a judge may be a person
                self.unedited[i] = measured(
                    cases[i], self.metrics, before[i], before[i], False, self.judge
                )
            was = values = self.unedited[i]
            if self.editor is not None:
                values = measured(cases[i], self.metrics, now, before[i], True, self.judge)
            if self.held_out:
                was = {**was, "perplexity": self.clean}
                values = {**values, "perplexity": surprised}
            for name, value in values.items():
                after = nan if i in self.skipped else value
                yield _row(
                    i,
                    cases[i],
                    step,
                    name,
                    (was.get(name, nan), after),
                    written[i].norm,
                    written[i].seconds,
                )


def _row(
    i: int,
    case: Case,
    step: int,
    name: str,
    values: tuple[float, float],
    norm: float,
    seconds: float,
) -> tuple:
    hops = max(1, len(getattr(case, "hops", ())))
    return (
        i,
        case.requests[0].fact.subject,
        len(case.requests),
        hops,
        step,
        name,
        *values,
        norm,
        seconds,
    )


#: how many cases are edited, which are asked, and what was written for each of these
Step = tuple[int, Sequence[int], Mapping[int, _Written]]


def _single(
    run: _Run, cases: Sequence[Case], good: list[int], batch_size: int, every: int | None
) -> Generator[Step, None, None]:
    if run.editor is None:
        for at in range(0, len(good), batch_size):
            chunk = good[at : at + batch_size]
            yield 0, chunk, dict.fromkeys(chunk, _Written())
        return
    ahead = None
    for count, i in enumerate(_bar(good, run, "case")):
        if count % batch_size == 0:
            ahead = run.ahead([cases[j] for j in good[count : count + batch_size]])
        try:
            patch, written = run.one_by_one(cases[i], ahead)
            if ahead is not None:
                written.seconds += ahead.seconds[cases[i].requests[0]] / len(cases[i].requests)
        except OF_ONE_CASE as error:
            run.skip([i], str(error))
            yield 1, [i], {i: _Written(nan, nan)}
            continue
        with run.lens.patched(patch):
            yield 1, [i], {i: written}


def _batch(
    run: _Run, cases: Sequence[Case], good: list[int], batch_size: int, every: int | None
) -> Generator[Step, None, None]:
    for chunk in _bar(_compatible(cases, good, batch_size), run, "batch"):
        requests = [request for i in chunk for request in cases[i].requests]
        start = time.perf_counter()
        try:
            patch = run.patch(requests)
        except OF_ONE_CASE as error:
            run.skip(chunk, str(error))
            yield len(chunk), chunk, dict.fromkeys(chunk, _Written(nan, nan))
            continue
        seconds = (time.perf_counter() - start) / len(requests)
        written = _Written(largest(run.lens, [patch]), seconds)
        with run.lens.patched(patch):
            yield len(chunk), chunk, dict.fromkeys(chunk, written)


def _consecutive(
    run: _Run, cases: Sequence[Case], good: list[int], batch_size: int, every: int | None
) -> Generator[Step, None, None]:
    """One patch is in force at a time, the sum of all edits so far: memory does not grow with their
    number."""
    patches: list[Patch] = []
    written: dict[int, _Written] = {}
    for count, i in enumerate(_bar(good, run, "case"), 1):
        try:
            patch, written[i] = run.one_by_one(cases[i])
            if patches:
                run.lens.revert()
            patches = [total([*patches, patch])]
            run.lens.apply(patches[0])
        except OF_ONE_CASE as error:
            run.skip([i], str(error))
            written[i] = _Written(nan, nan)
        if count == len(good) or (every and count % every == 0):
            norm = largest(run.lens, patches, applied=True)
            of_all = {j: _Written(norm, written[j].seconds) for j in good[:count]}
            yield count, good[:count], of_all


_STEPS: dict[
    str, Callable[[_Run, Sequence[Case], list[int], int, int | None], Generator[Step, None, None]]
] = {
    "single": _single,
    "batch": _batch,
    "consecutive": _consecutive,
}


def _bar(items: Sequence[Any], run: _Run, unit: str) -> Any:
    return progress_bar(items, of=f"evaluate {type(run.editor).__name__}", unit=unit)


def _compatible(cases: Sequence[Case], good: Sequence[int], size: int) -> list[list[int]]:
    """Batches of up to `size` cases, no two of which ask different things of one prompt, and none of
    which answers a step of another's right path differently (`contaminated`); a conflicting case
    waits for the next batch."""
    waiting, chunks = list(good), []
    while waiting:
        chunk: list[int] = []
        for i in waiting:
            if len(chunk) == size:
                break
            # alone it goes ahead, and the edit says what is wrong
            if not chunk or _joins(cases[i], [cases[j] for j in chunk]):
                chunk.append(i)
        chunks.append(chunk)
        waiting = [i for i in waiting if i not in set(chunk)]
    return chunks


def _joins(case: Case, others: Sequence[Case]) -> bool:
    """Whether a case can be edited together with others."""
    try:
        check_requests([request for each in (*others, case) for request in each.requests])
    except EditError:
        return False
    return not contaminated([*others, case])


def total(patches: Sequence[Patch]) -> Patch:
    """Several patches of one model as one. Sums that would hold more factors than the weight has
    rows become dense."""

    def short(sums: Deltas) -> Deltas:
        return {
            key: Delta(d.dense()) if d.right is not None and d.left.shape[1] > min(d.shape) else d
            for key, d in sums.items()
        }

    deltas, kept = short(summed(p.deltas for p in patches)), short(summed(p.kept for p in patches))
    return Patch(deltas, patches[0].fingerprint, patches[-1].info, kept)


def largest(lens: Lens, patches: Sequence[Patch], applied: bool = False) -> float:
    """The largest ||dW|| / ||W|| of all that the patches write together, W the weights without them
    (`applied`: they are in the weights now)."""
    if not patches:
        return 0.0
    both = total(patches)
    sizes = []
    for key, delta in both.deltas.items():
        weight = lens.parameter(*key).double()
        sizes.append(
            (
                delta.norm(),
                float((weight - delta.dense().to(weight.device) if applied else weight).norm()),
            )
        )
    # a matrix of zeros (a bias that a fresh model has) has no size to compare with
    return max((a / b for a, b in sizes if a and b), default=0.0)
