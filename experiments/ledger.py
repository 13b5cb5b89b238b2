"""The ledger: every claim of the three papers against what was measured here; the comparison of
editors; and that of scores.

    python -m experiments.ledger                     # experiments/results/*.parquet -> LEDGER.md, COMPARISON.md, SCORES.md
    python -m experiments.ledger --collect runs      # first gather the run folders' rows into experiments/results/
    python -m experiments.ledger --check             # fail if the committed ledger is not what this writes

1. An experiment's claims are its `CLAIMS`; they read the results named by its `RESULTS` (or after
   its file).
2. A run folder says which experiment it is of; its rows join that experiment's results and replace
   those of the same cells: of the same settings, whatever number of cases they had. A real model's
   column is filled once its rows are among the results. What its tasks took is kept by its name.
3. A claim on several data sets is decided on each."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pandas as pd

from experiments import compare, editors, sequence, single
from experiments.comparison import comparison, head, line
from experiments.decide import FAILS, HOLDS, NOT_MEASURED, OPEN, Claim, Verdict, together
from experiments.models import ACES, COLUMNS, DATA
from experiments.score_tables import tables
from qv_lens.reporting.tables import finished_rows
from qv_lens.runs.experiment import parts_of
from qv_lens.runs.rows import load_run

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LEDGER = HERE / "LEDGER.md"
COMPARISON = HERE / "COMPARISON.md"
SCORES = HERE / "SCORES.md"
#: the folders of the papers' tables and figures, and of our own questions
FOLDERS = ("ace", "kne", "ctp", "scores")
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
    "skip",
    "edited",
    "case",
    "step",
    "group",
    "metric",
)


#: a list of one name, as a run's column has it
ONE_NAME = re.compile(r"\['(\w+)'\]")


def experiments() -> list[ModuleType]:
    """Every table and figure of the papers, and what is asked of the scores, by folder and name."""
    files = [file for folder in FOLDERS for file in sorted((HERE / folder).glob("*.py"))]
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
        _, folder, name = module.__name__.split(".")
        named = f"{folder}_{name.replace('_', '')}"
    return named


TITLE = (
    "# The ledger",
    "",
    "Claims of ACE, CTP and KNE that can be put as a number, against what was measured, on real "
    "models: **SmolLM2-135M** here (2 CPU cores, float32, weights as pip brings them, dequantised "
    "from 4 bits), and for some claims Qwen2.5-Coder-0.5B and Gemma 3 270M. "
    "Written by `python -m experiments.ledger` from `experiments/results/`.",
    "",
)
#: what a reader should know before the table
IN_SHORT = (
    "In short, of what was measured so far:",
    "",
    "1. One value neuron in a hundred carries everything: without the best 461 of SmolLM2's 46,080 "
    "neurons every answer of its category is lost, and nearly every one of others. With as many at "
    "random a quarter is (mean of five draws, which differ much). What a category has for itself does not show in "
    "sets of this size.",
    "2. In its best layer alone (15 neurons), which Figure 2 is about, nearly all capitals are lost, with "
    "two thirds of the other answers; of the nationalities none. So it holds for capitals, fails for "
    "nationalities, and fails as a whole.",
    "3. Eq. 9's best neurons are common to facts and do not say the answer: of the ten best for each "
    "of 43 sports, 1 of 430 has it among its tokens, by effect 2. On Gemma 3 270M they do: 22% of the "
    "value neurons, 4% of the query neurons, 13% of those that are both (50 sports), so that Tables 6 and "
    "7 hold there. Without the 27 best by effect all of 240 answers are lost, on all three models, without 27 "
    "at random 1 to 2% of them.",
    "4. Table 5 fails on all three models: the token after the subject adds less than those between it "
    "and the last one. The last one adds more on Qwen2.5-Coder and Gemma 3, and less on SmolLM2. Each "
    "prompt's first token, a sink that scores four (SmolLM2) and ten times (Qwen) as much as the others on "
    "average, is left out.",
    "5. Without ten query neurons of a peak layer 1 and 15 of 40 two-hop answers are lost; hidden "
    "from the value neurons alone they cost 19 and 16; ten neurons of the same layers by effect 6 "
    "and 19. The value neurons of later layers stay active.",
    "6. Editors that locate and solve (MEMIT, AlphaEdit, PRUNE, RECT, EMMET, ROME) give the new "
    "answer to 98 or 99 of 100 facts. ACE reaches 84, although its layers and settings were tuned in "
    "the same way. Of 50 questions that the model does not answer (ZsRE, the same settings) MEMIT's "
    "new answer is right in 44, ROME's in 42, ACE's in 6, PMET's in none. At layers located by effects "
    "MEMIT is as good as at the best of 20 random draws, at those located by Eq. 9 as bad as at the worst; "
    "other facts may decide it otherwise.",
    "7. Two hops after an edit could not tell editors apart: SmolLM2 answers 10 of 34 such questions "
    "before it, 3 (ACE) to 9 (ROME) as the edit wants after it.",
    "8. KNE and CTP give 98 to 100 of 100 new answers; more than half of the neighbours that were "
    "right lose theirs. But of what else the model says of the subject KNE keeps 80%, MEMIT and ROME "
    "26 and 31 (19 facts). Trained in gate, up or queries KNE keeps more of it than in other weights, "
    "as the paper says. CTP, with more nodes, keeps less of what should stay (of one batch); one edit "
    "took 37 s beside other jobs, MEMIT's 12.5.",
    "9. A claim about 6 billion parameters that fails at 0.1 may hold there, and the other way "
    "round. Most rows rest on SmolLM2 alone, and one seed.",
    "10. Every row is a test of its own, at 95%: one in twenty of those with an interval would hold "
    "or fail by chance, and more of those in several parts, which fail if any part does. Rows marked "
    "as ours are no claims of the papers.",
    "",
    "A cell has its verdict, then the data set and the numbers. Where it holds an option, nothing "
    "that decides it was run yet: the row's file opens with the command (`qv-lens run "
    "experiments/ace/table_1.py`), which takes this option; `python -m experiments.ledger --collect runs` then fills the cell. "
    "A number without a verdict describes a model of which the paper claims nothing.",
    "",
    "Facts are those whose answer the model gives before the edit, by generation; of their exact "
    "prompts, whose first token must be the argmax, it knows 70 to 100% (columns `prompts_known` of "
    '`prompts_asked` of the results; of nationalities, which it begins with "the", a tenth to '
    "three quarters). Editors "
    "are run as the model's presets say, with C0 of the reference text that comes with Python: with "
    "Wikitext, the papers' text, ACE keeps 9 to 13 points more of the neighbours, MEMIT and ROME 1 to "
    "5 (`benchmarks/RESULTS.md`).",
    "",
    "Intervals are 95% ones over cases (± half of it where both sides are as long): Wilson's of "
    "shares of 0 and 1, Student's t of paired differences, Newcombe's way of putting two together "
    "where there are no pairs. Where at most 13 pairs differ, Fisher's exact test must agree, or the "
    "interval is widened to hold 0. The cases of one row of consecutive edits share one edit, so there it is "
    "too narrow; those of one batch decide nothing.",
    "",
)
#: among the results: what the collected runs took
COSTS = "costs.csv"
#: what is said of the seconds of the runs
COST = (
    "What the runs took that were collected since 2026-12-01, of one worker on one core, most of them "
    "beside other work (`qv-lens run FILE --dry-run` says it beforehand, from two trial tasks):",
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
        if results:
            _note_cost(folder.name, frame)
    if unused:
        print(f"of no result, left alone: {', '.join(unused)}")


def _note_cost(run: str, frame: pd.DataFrame) -> None:
    """Keep what the tasks of a run took, in the place of an earlier run of its name."""
    module = frame.attrs["experiment"].removeprefix("experiments.")
    tasks = finished_rows(frame).drop_duplicates("task")
    seconds = tasks["task"].map(frame.attrs["seconds"])
    cost = seconds.groupby(tasks["model"]).agg(["size", "sum"]).round(0).astype(int)
    cost.columns = ["tasks", "seconds"]
    cost = cost.reset_index().assign(run=run, file=module.replace(".", "/") + ".py")
    kept = RESULTS / COSTS
    if kept.exists():
        old = pd.read_csv(kept)
        cost = pd.concat([old[old["run"] != run], cost])
    cost = cost[["file", "run", "model", "tasks", "seconds"]].sort_values(["file", "run", "model"])
    cost.to_csv(kept, index=False)


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
    rows = _of_no_machine(finished_rows(frame), module)
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
    counts = {False: 0, True: 0}
    for module in experiments():
        path = RESULTS / f"{results_of(module)}.parquet"
        frame = pd.read_parquet(path) if path.exists() else pd.DataFrame({"model": []})
        for claim in getattr(module, "CLAIMS", ()):
            counts[claim.ours] += 1
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
                f"{called}: of the papers' {counts[False]} claims {_counted(papers)}. Of {counts[True]} "
                f"rows of ours {_counted(ours)}.",
            ]
    return "\n".join([*lines, *_costs(), ""])


def _costs() -> list[str]:
    """What each file took, by model."""
    kept = RESULTS / COSTS
    if not kept.exists():
        return []
    by_file = pd.read_csv(kept).groupby(["file", "model"])[["tasks", "seconds"]].sum()
    lines = ["", *COST, "", *head("file", "model", "tasks", "minutes")]
    for (file, model), (tasks, seconds) in by_file.iterrows():
        lines.append(
            line(f"[{file}]({file})", COLUMNS.get(model, model), tasks, round(seconds / 60))
        )
    return lines


def _counted(verdicts: list[str]) -> str:
    return (
        f"{len(verdicts)} were tested on it: {verdicts.count(HOLDS)} held, "
        f"{verdicts.count(FAILS)} failed, {verdicts.count(OPEN)} could not be decided"
    )


def decided_on(claim: Claim, frame: pd.DataFrame, model: str) -> tuple[str, str]:
    """What was measured of a claim on a model, and the verdict. Where nothing that decides it was,
    the option that its command takes, and no verdict. A claim that compares ACE's two models stands in the second
    one's column."""
    models = ACES if claim.both else (model,)
    if claim.both and model != ACES[-1]:
        return ("against the next column" if model == ACES[0] else "—"), ""
    waiting = f"`--model {model}`"
    rows = frame[frame["model"].isin(models)]
    if rows["model"].nunique() < len(models):
        return waiting, ""
    verdicts = {}
    for data, part in _by_data(rows):
        try:
            verdicts[data] = of_one_edit(part, claim.decide(part))
        except KeyError:  # rows of a run that was stopped, or varied something else
            continue
    verdicts = {data: verdict for data, verdict in verdicts.items() if verdict != NOT_MEASURED}
    if not verdicts:
        return waiting, ""
    statistics = [
        f"{DATA.get(data, data)}: {statistic}" if data else statistic
        for data, (statistic, _) in verdicts.items()
    ]
    text = ONE_NAME.sub(r"\1", "<br>".join(statistics))
    return text, together([verdict for _, verdict in verdicts.values()])


def of_one_edit(rows: pd.DataFrame, verdict: Verdict) -> Verdict:
    """A verdict over cases that one edit together changed is none: another batch would be another
    edit."""
    statistic, called = verdict
    if not {"protocol", "batch_size"} <= set(rows) or called not in (HOLDS, FAILS):
        return verdict
    cells = rows[rows["protocol"] == "batch"].drop_duplicates(["seed", "case"])
    batches = (cells["case"] // cells["batch_size"] + cells["seed"] * len(rows)).nunique()
    if len(cells) < len(rows.drop_duplicates(["seed", "case"])) or batches > 1:
        return verdict
    return f"{statistic}; of one batch", OPEN


def _by_data(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each data set by its name; all of them where no other data were asked."""
    if "data" not in rows:
        return [("", rows)]
    return [(str(data), part) for data, part in rows.groupby("data", sort=False)]


def pages() -> dict[Path, str]:
    """What is written of the committed results, by file."""
    return {LEDGER: written(), COMPARISON: comparison(RESULTS), SCORES: tables(RESULTS)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collect", type=Path, metavar="RUNS")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.collect:
        collect(args.collect)
    for path, text in pages().items():
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
