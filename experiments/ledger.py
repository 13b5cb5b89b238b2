"""The ledger: every claim of the three papers against what was measured here; and the comparison of
editors.

    python -m experiments.ledger                     # experiments/results/*.parquet -> LEDGER.md and COMPARISON.md
    python -m experiments.ledger --collect runs      # first gather the run folders' rows into experiments/results/
    python -m experiments.ledger --check             # fail if the committed ledger is not what this writes

1. An experiment's claims are its `CLAIMS`; they read the results named by its `RESULTS` (or after
   its file).
2. A run folder says which experiment it is of; its rows join that experiment's results and replace
   those of the same cells: of the same settings, whatever number of cases they had. A real model's
   column is filled once its rows are among the results.
3. A claim on several data sets is decided on each."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pandas as pd

from experiments import compare, editors, sequence, single
from experiments.comparison import comparison, head, line
from experiments.decide import FAILS, HOLDS, NOT_MEASURED, OPEN, Claim, together
from experiments.models import ACES, COLUMNS
from qv_lens.runs.experiment import parts_of
from qv_lens.runs.store import load_run

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LEDGER = HERE / "LEDGER.md"
COMPARISON = HERE / "COMPARISON.md"
PAPERS = ("ace", "kne", "ctp")
#: columns that results do not keep
DROPPED = (
    "task",
    "subject",
    "text",
    "metrics",
    "blocks",
    "documents",
    "preset",
    "written",
    "skipped",
)
#: how much of a cell was measured: a cell of other sizes is the same cell, unless they are varied
SIZES = ("count", "prompts", "samples", "sample", "batch_size")
#: what makes a row another row
KEY = (
    "model",
    "method",
    "protocol",
    "data",
    "count",
    "seed",
    "layers",
    "skip",
    "edited",
    "case",
    "step",
    "group",
    "metric",
)


def experiments() -> list[ModuleType]:
    """Every table and figure of the papers, by paper and name."""
    files = [file for paper in PAPERS for file in sorted((HERE / paper).glob("*.py"))]
    modules = [
        import_module(f"experiments.{file.parent.name}.{file.stem}")
        for file in files
        if file.stem != "__init__"
    ]
    return [module for module in modules if hasattr(module, "GRID")]


def results_of(module: ModuleType) -> str:
    """The name of an experiment's results: what it says itself, or after its file."""
    named = getattr(module, "RESULTS", None)
    if named is None:
        _, paper, name = module.__name__.split(".")
        named = f"{paper}_{name.replace('_', '')}"
    return named


TITLE = (
    "# The ledger",
    "",
    "Claims of ACE, CTP and KNE that can be put as a number, against what was measured, on real "
    "models: **SmolLM2-135M** here (2 CPU cores, float32, weights as pip brings them, dequantised "
    "from 4 bits), and for some claims Qwen2.5-Coder-0.5B; empty cells wait for their runs. "
    "Written by `python -m experiments.ledger` from `experiments/results/`.",
    "",
)
#: what a reader should know before the table
IN_SHORT = (
    "In short, of what was measured so far:",
    "",
    "1. One value neuron in a hundred carries everything: without the best 461 of SmolLM2's 46,080 "
    "neurons every answer is lost, and with as many at random fewer are (24 to 28%, the mean of five "
    "draws, of which one lost 65% of the capitals and another none of the nationalities).",
    "2. But not a category alone: the same neurons also lose nearly all answers of other "
    "categories. What a category has for itself does not show in sets of this size.",
    "3. In the best layer alone (15 neurons) capitals are lost, with most other answers; "
    "nationalities stay. Counted over the prompts of both, more is lost than of other categories, "
    "and Figure 2 holds there; it is the capitals' doing.",
    "4. The ranking by effect on log p (ours) does the same here as Eq. 9: at one in a hundred both "
    "reach the floor. They differ at ten neurons (docs/results.md). Eq. 9's best are common to facts "
    "and do not say the answer: of the ten best for each of 43 sports, 1 of 430 has it among its "
    "tokens, and 2 of 430 by effect. Zeroing the 27 best by effect loses all of 90 "
    "answers, 27 at random one.",
    "5. Editors that locate and solve (MEMIT, AlphaEdit, PRUNE, RECT, EMMET, ROME) give the new "
    "answer to 98 or 99 of 100 facts, on a model a fiftieth of GPT-J's size as well.",
    "6. ACE reaches 84 of the 100 and is behind ROME and MEMIT, although its layers and settings "
    "were tuned in the same way. Leaving out three of its six query layers makes no difference that "
    "19 two-hop prompts could show (Table 4).",
    "7. KNE and CTP give 98 to 100 of 100 new answers, and more than half of the neighbours that were "
    "right lose theirs, at the learning rates that tune best. But what else the model says of the "
    "edited subject stays in 80% with KNE, and in 26 and 31% with MEMIT and ROME (19 facts of the "
    "atlas, counted in tokens). With half of the parameters trained KNE takes all of 20 facts, with a "
    "thousandth 13% (Figure B.4); of 100 facts in one batch 20 or 21%, located on 25 of them or on "
    "all (B.3). Trained in gate, up or queries it keeps 13 ± 11 points more of the subject than in "
    "other weights, as the paper says (Figure 2).",
    "8. Zeroing ten query neurons of a peak layer costs 1 and 15 of 40 two-hop answers, ten neurons "
    "of the same layers by effect 6 and 19; the value neurons of later layers stay active. With more "
    "nodes CTP gives more paraphrases and keeps less of what should stay (Figure 5); what lambda "
    "does is too little for 20 facts (Figure 6); an edit by CTP takes 37 s of one core, MEMIT's 12.5. "
    "After worked examples the model answers 10 of 34 two-hop questions before the edit, and 3 "
    "(ACE) to 9 (ROME) as the edit wants after it (Table 2): PMET is ahead of ACE, more cannot be "
    "told. In one batch of 50 CTP's score is 69%, behind PRUNE and AlphaEdit (78), before FT-L (58) and "
    "ROME (24), which writes one fact over another. Cells are empty where nothing was run on a real "
    "model yet: KNE's sweeps, CTP's consecutive edits. Of 20 draws of random "
    "layers 7 are as good for ACE as those that it locates (20 facts); at nine layers MEMIT is ahead of ACE "
    "on the six two-hop questions that the model answers, too few to tell.",
    "9. A claim about 6 billion parameters that fails at 0.1 may hold there, and the other way "
    "round; no trend over sizes can be told from two models, most claims from one.",
    "10. Every row is a test of its own, at 95%; one in twenty of those with "
    "an interval would hold or fail by chance. Rows marked as ours are no claims of the papers.",
    "",
    "A cell has its verdict, then the numbers. Editors are run as the model's presets say. Empty "
    "cells wait for the row's file (its first lines have the command) and `python -m "
    "experiments.ledger --collect runs`. Intervals are 95% ones over cases (± half of it where both "
    "sides are as long): Wilson's of shares of 0 and 1, Student's t of paired differences, "
    "Newcombe's way of putting two together where there are no pairs; the cases of one batch and of "
    "one row of consecutive edits share one edit, so there it is too narrow.",
    "",
)


def collect(runs: Path) -> None:
    """Gather the rows of the run folders in a folder, in the order of their names. Rows of cells
    that are not among them stay."""
    unused = []
    for folder in sorted(path for path in runs.iterdir() if (path / "config.json").exists()):
        frame = load_run(folder)
        results = list(belonging(frame))
        if not results:
            unused.append(folder.name)
        for name, rows, cell in results:
            _join(name, rows, cell)
    if unused:
        print(f"of no result, left alone: {', '.join(unused)}")


def belonging(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, list[str]]]:
    """The results that a run's rows belong to, with the finished ones among them and the columns
    that say of which cell they are."""
    module = {each.__name__: each for each in (*experiments(), editors, single, sequence)}.get(
        frame.attrs["experiment"]
    )
    if module is None:
        return
    if failed := int((frame["status"] != "finished").sum()):
        print(f"{module.__name__}: {failed} failed tasks left out")
    rows = _of_no_machine(frame[frame["status"] == "finished"].infer_objects(), module)
    if rows.empty:
        return
    of_editors = module in (editors, single)
    parts = editors.results_of(rows) if of_editors else {results_of(module): rows}
    for name, part in parts.items():
        if len(part):
            yield name, part, cell_of(module)


def _of_no_machine(rows: pd.DataFrame, module: ModuleType) -> pd.DataFrame:
    """The rows with the names of a task's files in the place of their paths on one machine."""

    def named(value: object) -> object:
        if isinstance(value, str) and Path(value).is_absolute():
            return Path(value).name
        return value

    fields = [name for name in _names(module.Task) if name in rows]
    return rows.assign(**{name: rows[name].map(named) for name in fields})


def cell_of(module: ModuleType) -> list[str]:
    """The columns that tell an experiment's cells apart: the fields of its tasks, and the metric,
    which is asked of a cell by itself."""
    return [
        *(name for name in _names(module.Task) if name not in SIZES or name in module.GRID),
        "metric",
    ]


def _names(task: type) -> Iterator[str]:
    """The names of a task's fields, those of its parts among them."""
    parts = parts_of(task)
    for field in fields(task):
        yield from _names(parts[field.name]) if field.name in parts else (field.name,)


def _join(name: str, rows: pd.DataFrame, cell: Sequence[str]) -> None:
    """Put rows among the results, in the place of those of the same cells."""
    frame, settings = plain(rows.reset_index(drop=True))
    path, replaced = RESULTS / f"{name}.parquet", 0
    if path.exists():
        old = pd.read_parquet(path)
        whose = [name for name in cell if name in old and name in frame] + settings
        stays = ~_cells(old, whose).isin(_cells(frame, whose))
        replaced = int((~stays).sum())
        frame = pd.concat([old[stays], frame], ignore_index=True)
    RESULTS.mkdir(exist_ok=True)
    frame.to_parquet(path, compression="zstd", index=False)
    models = ", ".join(sorted(set(rows["model"])))
    print(f"{name}: {len(frame)} rows, those of {models} new, in the place of {replaced}")


def _cells(frame: pd.DataFrame, whose: list[str]) -> pd.MultiIndex:
    """The cell of each row; a setting that was not varied is ''."""
    named = frame.reindex(columns=whose).astype(object)
    return pd.MultiIndex.from_frame(named.where(named.notna(), ""))


def plain(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Rows as results keep them: an editor's changed settings as columns, no long texts, no row
    twice; and the names of these columns."""
    settings: list[str] = []
    if "editor" in frame:
        frame, settings = compare.by_setting(frame)
        frame = frame.drop_duplicates(
            [name for name in (*KEY, *settings, "batch_size") if name in frame]
        )
        frame = frame.astype(
            {name: int for name in ("edits", "hops", "case", "step") if name in frame}
        )
    if "layer" in frame and frame["layer"].dtype == object:
        frame["layer"] = frame["layer"].astype(str)
    return frame.drop(columns=[name for name in DROPPED if name in frame]), settings


def written() -> str:
    """The ledger as text."""
    columns = ("source", "claim", "statistic", *COLUMNS.values(), "release and set-up", "file")
    lines = [*TITLE, *IN_SHORT, *head(*columns)]
    verdicts: dict[tuple[str, bool], list[str]] = {}  # by model, and whether the row is ours
    asked = {False: 0, True: 0}
    for module in experiments():
        path = RESULTS / f"{results_of(module)}.parquet"
        frame = pd.read_parquet(path) if path.exists() else pd.DataFrame({"model": []})
        for claim in getattr(module, "CLAIMS", ()):
            asked[claim.ours] += 1
            cells = []
            for model in COLUMNS:
                statistic, verdict = decided_on(claim, frame, model)
                if verdict:
                    verdicts.setdefault((model, claim.ours), []).append(verdict)
                cells.append(f"**{verdict}**<br>{statistic}" if verdict else statistic)
            file = module.__name__.replace("experiments.", "").replace(".", "/") + ".py"
            named = [claim.source, claim.words, claim.statistic]
            lines.append(line(*named, *cells, claim.release, f"[{file}]({file})"))
    for model, called in COLUMNS.items():
        papers, ours = verdicts.get((model, False), []), verdicts.get((model, True), [])
        if papers or ours:
            lines += [
                "",
                f"{called}: of the papers' {asked[False]} claims {_counted(papers)}. Of {asked[True]} "
                f"rows of ours {_counted(ours)}.",
            ]
    return "\n".join([*lines, ""])


def _counted(verdicts: list[str]) -> str:
    return (
        f"{len(verdicts)} were tested on it: {verdicts.count(HOLDS)} held, "
        f"{verdicts.count(FAILS)} failed, {verdicts.count(OPEN)} could not be decided"
    )


def decided_on(claim: Claim, frame: pd.DataFrame, model: str) -> tuple[str, str]:
    """What was measured of a claim on a model, and the verdict: both empty where nothing was. A
    claim that compares ACE's two models stands in the second one's column."""
    asked = ACES if claim.both else (model,)
    if claim.both and model != ACES[-1]:
        return ("against the next column" if model == ACES[0] else "—"), ""
    rows = frame[frame["model"].isin(asked)]
    if rows["model"].nunique() < len(asked):
        return "", ""
    found = {}
    for data, part in _by_data(rows):
        try:
            found[data] = claim.decide(part)
        except KeyError:  # rows of a run that was stopped, or varied something else
            continue
    found = {data: verdict for data, verdict in found.items() if verdict != NOT_MEASURED}
    if not found:
        return "", ""
    statistics = [
        f"{data}: {told}" if len(found) > 1 else told for data, (told, _) in found.items()
    ]
    return "<br>".join(statistics), together([verdict for _, verdict in found.values()])


def _by_data(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each data set by its name; all of them where no other data were asked."""
    if "data" not in rows:
        return [("", rows)]
    return [(str(data), part) for data, part in rows.groupby("data", sort=False)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collect", type=Path, metavar="RUNS")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.collect:
        collect(args.collect)
    for path, text in ((LEDGER, written()), (COMPARISON, comparison(RESULTS))):
        if args.check and path.read_text() != text:
            raise SystemExit(f"{path} is out of date: {_first_difference(path.read_text(), text)}")
        if not args.check:
            path.write_text(text)
            print(path)


def _first_difference(old: str, new: str) -> str:
    """The first line that differs, and what to do about it."""
    lines = itertools.zip_longest(old.splitlines(), new.splitlines(), fillvalue="")
    was, now = next(pair for pair in lines if pair[0] != pair[1])
    return f"{was[:120]!r} is now {now[:120]!r}. Run python -m experiments.ledger and commit it."


if __name__ == "__main__":
    main()
