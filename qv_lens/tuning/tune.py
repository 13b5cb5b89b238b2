"""tune(): an editor's settings for a model, by successive halving.

1. Edits: facts that the model knows, each to a false answer of its kind, with phrasings and
   neighbours that it knows too (`known_cases`). Some choose the settings, others are held apart.
2. Every setting of the editor's grid (`grids`) is tried on the first 4 edits; the better half goes
   on to 8, the better half of those to 16, with those that are as good as the last of them.
3. Where the best one (or one as good) lies at the grid's edge in a number such as lr or lam, the next
   one beyond is tried, and so on while the score rises (`beyond`).
4. The two best are tried on the edits held apart; the better one is the result, with its figures
   there: a little high, since they chose between two.
5. Score: the harmonic mean of efficacy, paraphrase and specificity, each the mean of its two forms
   (every token of the answer is the argmax; the answer is likelier than the other one). Of equal
   scores (0 where one part is) the better one has the higher mean.

Results are kept in the folder, a line per setting and edit, and are not measured again: after a
kill at any moment, the same call resumes. Searches of z* are kept there too; editors share them.
Source: successive halving (Jamieson & Talwalkar 2016)."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from math import inf
from pathlib import Path
from typing import Any

import pandas as pd

from qv_lens.editing.job import Editor, Factored
from qv_lens.editing.presets import editor_of
from qv_lens.editing.statistics import Statistics
from qv_lens.errors import ConfigError, EditError
from qv_lens.evaluation.answers import correct
from qv_lens.evaluation.known_cases import knows
from qv_lens.evaluation.metrics import harmonic
from qv_lens.evaluation.protocols import evaluate
from qv_lens.evaluation.questions import questions, rivals
from qv_lens.facts.atlas import atlas, edit_case, neighbours
from qv_lens.facts.records import EditCase, Fact
from qv_lens.models.lens import Lens
from qv_lens.models.norms import dtype_name
from qv_lens.progress import progress_bar
from qv_lens.tuning.grids import Shape, beyond, grid

logger = logging.getLogger(__name__)

#: how many edits the settings still in the race are tried on
RUNGS = (4, 8, 16)
#: how many settings are tried on the edits held apart
FINALISTS = 2
PARTS = ("efficacy", "paraphrase", "specificity")
METRICS = tuple(f"{part}_{kind}" for part in PARTS for kind in ("acc", "success"))
TRIALS = "trials.jsonl"
#: changes when trials are made differently
FORMAT = 3

Values = dict[str, float]


@dataclass(frozen=True)
class Tuned:
    """An editor's best setting, its score and figures on the edits held apart, and every setting
    that was tried."""

    editor: Editor
    """The best setting."""
    score: float
    """Its score on the edits held apart."""
    figures: Values
    """Its figures there."""
    edits: int
    """How many edits those are."""
    table: pd.DataFrame
    """Every setting that was tried."""

    @property
    def score_in_words(self) -> str:
        """The score in words."""
        return f"score {self.score:.3f}, the better of two on {self.edits} edits held apart"

    @property
    def figures_in_words(self) -> str:
        """The figures in words."""
        return ", ".join(f"{metric} {value:.2f}" for metric, value in self.figures.items())

    def source(self, lens: Lens) -> str:
        """What a preset says of where it comes from."""
        return (
            f"qv-lens tune, {date.today()}, {dtype_name(lens.dtype)}: of "
            f"{self.table['editor'].nunique()} settings, {self.score_in_words} ({self.figures_in_words})"
        )


def tune(
    lens: Lens,
    method: str,
    shape: Shape,
    cases: Sequence[EditCase],
    held: Sequence[EditCase],
    statistics: Statistics | None,
    folder: str | Path,
    *,
    rungs: Sequence[int] = RUNGS,
) -> Tuned:
    """The best settings of an editor, by its name.

    `cases` choose two, `held` between these and tell how good the choice is. `table`: `editor,
    rung, edits, score` and the six metrics.
    Raises `ConfigError` for an editor without a grid, too few cases, or a folder of another model,
    `EditError` where no setting can be applied."""
    if len(cases) < rungs[-1] or not held:
        raise ConfigError(
            f"Tuning takes {rungs[-1]} edits to choose by and some held apart; got {len(cases)} and "
            f"{len(held)}."
        )
    for case in (*cases, *held):
        if not (case.paraphrases and rivals(case)):
            raise ConfigError(
                f"The edit of {case.request.fact.text!r:.200} has no paraphrases, or no neighbours with "
                "another answer than the new one, by which its settings are scored: give it both, or "
                "leave it out."
            )
    log = _Log.open(Path(folder), lens, statistics)
    with progress_bar(of=f"tuning {method}", unit="setting") as bar:
        race = _Race(lens, log, bar)
        left = grid(method, shape)
        *earlier, last = rungs
        for rung, count in enumerate(earlier):
            left = race.run(left, rung, cases[:count])
            left = race.best(left, -(-len(left) // 2), cases[:count])
        left = race.run(left, len(earlier), cases[:last])
        left = race.carry_on(left, len(earlier), cases[:last])
        best, *_ = race.run(left, len(rungs), held)
    figures = log.means(lens, best, held)
    if not figures:
        raise EditError(f"No setting of {method} could be applied to {lens.name}: {log.reason}")
    return Tuned(best, score(figures), figures, len(held), pd.DataFrame(race.rows))


class _Race:
    """The settings of an editor that were tried so far, and how they did."""

    def __init__(self, lens: Lens, log: _Log, bar: Any) -> None:
        self.lens = lens
        self.log = log
        self.bar = bar
        self.tried: set[Editor] = set()
        self.rows: list[dict] = []

    def run(self, race: Sequence[Editor], rung: int, cases: Sequence[EditCase]) -> list[Editor]:
        """Try settings on some edits; the best first."""
        self.bar.total = (self.bar.total or 0) + len(race)
        for editor in race:
            values = self.log.means(self.lens, editor, cases)
            record = {"editor": repr(editor), "rung": rung, "edits": len(cases)}
            self.rows.append({**record, "score": score(values), **values})
            logger.info("%d edits, score %.3f: %r", len(cases), score(values), editor)
            self.bar.update()
        self.tried |= set(race)
        return self._best_first(race, cases)

    def best(self, ranked: Sequence[Editor], count: int, cases: Sequence[EditCase]) -> list[Editor]:
        """The first so many, and those that are as good as the last of them."""
        least = self._standing(ranked[count - 1], cases)
        return [editor for editor in ranked if self._standing(editor, cases) >= least]

    def carry_on(
        self, ranked: Sequence[Editor], rung: int, cases: Sequence[EditCase]
    ) -> list[Editor]:
        """The finalists, once what lies beyond the grid's edges was tried too: of all that are as
        good as the best, so that a level grid is left on both sides."""
        ranked, before = list(ranked), None
        while before is None or self._standing(ranked[0], cases) > before:
            before = self._standing(ranked[0], cases)
            leaders = self.best(ranked, 1, cases)
            candidates = (each for leader in leaders for each in beyond(leader, self.tried))
            further = list(dict.fromkeys(candidates))
            self.run(further, rung, cases)
            ranked = self._best_first([*ranked, *further], cases)
        return ranked[:FINALISTS]

    def _best_first(self, race: Sequence[Editor], cases: Sequence[EditCase]) -> list[Editor]:
        return sorted(race, key=lambda editor: self._standing(editor, cases), reverse=True)

    def _standing(self, editor: Editor, cases: Sequence[EditCase]) -> tuple[float, float]:
        """The score, and of equal scores the mean of all metrics."""
        values = self.log.means(self.lens, editor, cases)
        return score(values), sum(values.values())


def score(values: Mapping[str, float]) -> float:
    """The harmonic mean of efficacy, paraphrase and specificity, each the mean of its two forms;
    minus infinity where an edit was refused."""
    if not values:
        return -inf
    return harmonic([(values[f"{part}_acc"] + values[f"{part}_success"]) / 2 for part in PARTS])


def known_cases(
    lens: Lens, count: int, seed: int = 0, facts: Sequence[Fact] | None = None
) -> list[EditCase]:
    """Edits of atlas facts that the model knows, of as many relations as there are, with the
    phrasings and neighbours it knows.

    The relations take turns, one fact each; a fact is left out if the model knows no other phrasing
    or no neighbour of it. Raises `ConfigError` where the model knows too few."""
    pool = atlas() if facts is None else facts
    # one fact twice would choose the settings and be held apart as well
    drawn = list({(fact.text, fact.subject): fact for fact in pool}.values())
    random.Random(f"tune:{seed}").shuffle(drawn)
    known = [fact for fact, right in zip(drawn, knows(lens, drawn), strict=True) if right]
    cases = []
    for fact in _in_turns(known):
        if len(cases) == count:
            break
        case = edit_case(fact, seed)
        right = correct(lens, case.paraphrases)
        paraphrases = tuple(
            probe for probe, hit in zip(case.paraphrases, right, strict=True) if hit
        )
        alike = [other for other in known if other.relation == fact.relation]
        near = neighbours(case.request, alike, random.Random(f"{seed} {fact.text}"))
        if paraphrases and near:
            cases.append(replace(case, paraphrases=paraphrases, neighbours=near))
    if len(cases) < count:
        raise ConfigError(
            f"{lens.name} knows {len(cases)} of the atlas's facts in two phrasings, and {count} are "
            "needed."
        )
    return cases


def _in_turns(facts: Sequence[Fact]) -> list[Fact]:
    """One fact of each relation, then the next of each."""
    by_relation: dict[str | None, list[Fact]] = {}
    for fact in facts:
        by_relation.setdefault(fact.relation, []).append(fact)
    ranked = [(place, fact) for group in by_relation.values() for place, fact in enumerate(group)]
    return [fact for _, fact in sorted(ranked, key=lambda pair: pair[0])]


class _Log:
    """The lines of the folder: what each setting made of each edit."""

    def __init__(
        self,
        folder: Path,
        statistics: Statistics | None,
        known: dict[tuple[str, str | None, str], Values],
    ) -> None:
        self.folder = folder
        self.statistics = statistics
        self.factored = Factored(statistics)  # the settings of an editor share what is made of C0
        self.known = known
        self.reason = ""

    @classmethod
    def open(cls, folder: Path, lens: Lens, statistics: Statistics | None) -> _Log:
        """Raises `ConfigError` for a folder that cannot be used, or that holds another model's
        trials."""
        header = {"format": FORMAT, "state": lens.state(), "metrics": list(METRICS)}
        file = folder / TRIALS
        known = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = file.read_text().splitlines() if file.exists() else []
            records = [record for record in map(_read, lines) if record is not None]
            if records and records[0] != header:
                raise ConfigError(
                    f"{folder} holds trials of another model or version ({records[0]}). Name "
                    "another folder."
                )
            if not records:
                file.write_text(json.dumps(header) + "\n")
        except OSError as error:
            raise ConfigError(f"Cannot keep the trials in {folder}: {error}.") from error
        for record in records[1:]:
            known[record["editor"], record["statistics"], record["edit"]] = record["values"]
        return cls(folder, statistics, known)

    def _key(self, lens: Lens, editor: Editor, case: EditCase) -> tuple[str, str | None, str]:
        source = None if self.statistics is None else self.statistics.source
        # a preset that SimIE names may be another one next time
        return repr(editor_of(lens, editor)), source, _name(case)

    def means(self, lens: Lens, editor: Editor, cases: Sequence[EditCase]) -> Values:
        """The metrics' means over the cases; those that were not measured yet are. {} where an edit
        is refused."""
        keys = [self._key(lens, editor, case) for case in cases]
        missing = [case for case, key in zip(cases, keys, strict=True) if key not in self.known]
        if missing:
            self._measure(lens, editor, missing)
        values = [self.known[key] for key in keys]
        if not all(values):
            return {}
        return pd.DataFrame(values).mean().to_dict()

    def _measure(self, lens: Lens, editor: Editor, cases: Sequence[EditCase]) -> None:
        frame = evaluate(
            lens, cases, METRICS, editor, statistics=self.statistics, cache=self.folder / "kept",
            factored=self.factored,
        )  # fmt: skip
        skipped = frame.attrs["skipped"]
        self.reason = next(iter(skipped.values()), self.reason)
        table = frame.pivot_table(index="case", columns="metric", values="after")
        lines = []
        for i, case in enumerate(cases):
            values = (
                {} if str(i) in skipped else {name: float(table.loc[i, name]) for name in METRICS}
            )
            key = self._key(lens, editor, case)
            self.known[key] = values
            names = dict(zip(("editor", "statistics", "edit"), key, strict=True))
            lines.append(json.dumps({**names, "values": values}))
        with (self.folder / TRIALS).open("a") as file:
            file.write("\n".join(["", *lines, ""]))


def _name(case: EditCase) -> str:
    """The key that identifies an edit: its words, and a hash of every question asked about it."""
    digest = hashlib.blake2b(
        repr((case.request, questions(case))).encode(), digest_size=8
    ).hexdigest()
    return f"{case.request.fact.text} -> {case.request.new} ({digest})"


def _read(line: str) -> dict | None:
    """A line's record; None for one that a kill cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return None
