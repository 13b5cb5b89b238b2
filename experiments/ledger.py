"""The ledger: every claim of the three papers against what was measured here; and the comparison of
editors.

    python -m experiments.ledger                     # experiments/results/*.parquet -> LEDGER.md and COMPARISON.md
    python -m experiments.ledger --collect runs      # first gather the run folders' rows into experiments/results/
    python -m experiments.ledger --check             # fail if the committed ledger is not what this writes

1. An experiment's claims are its `CLAIMS`; they read the results named by its `RESULTS` (or after
   its file).
2. A run folder says which experiment it is of; its rows join that experiment's results and replace
   those of the same models. A real model's column is filled once its rows are among the results."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pandas as pd

from experiments import compare, editors, smollm2
from experiments.decide import FAILS, HOLDS, NOT_MEASURED, OPEN, Claim
from experiments.models import ACES, COLUMNS
from qv_lens.evaluation.intervals import bounds, interval
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
    "editor",
    "written",
    "skipped",
)
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
    _, paper, name = module.__name__.split(".")
    return getattr(module, "RESULTS", f"{paper}_{name.replace('_', '')}")


TITLE = (
    "# The ledger",
    "",
    "Claims of ACE, CTP and KNE that can be put as a number, against what was measured, on real "
    "models: **SmolLM2-135M** here (2 CPU cores, float32, weights as pip brings them, dequantised "
    "from 4 bits); the other columns wait for their runs. Written by `python -m "
    "experiments.ledger` from `experiments/results/`.",
    "",
)
#: what a reader should know before the table
IN_SHORT = (
    "In short, of what was measured so far:",
    "",
    "1. One value neuron in a hundred carries everything: without the best 461 of SmolLM2's 46,080 "
    "neurons every answer is lost, and with as many at random few are.",
    "2. But not a category alone: the same neurons also lose nearly all answers of other "
    "categories. What a category has for itself does not show in sets of this size.",
    "3. In the best layer alone (15 neurons) capitals are lost, with most other answers; "
    "nationalities stay.",
    "4. The ranking by effect on log p (ours) does the same here as Eq. 9: at one in a hundred both "
    "reach the floor. They differ at ten neurons (docs/results.md). Eq. 9's best are common to facts "
    "and do not say the answer: of 20 sports none of the ten best holds it among its tokens.",
    "5. Editors that locate and solve (MEMIT, AlphaEdit, PRUNE, RECT, EMMET, ROME) give the new "
    "answer to 98 or 99 of 100 facts, on a model a fiftieth of GPT-J's size as well.",
    "6. ACE reaches 84 of the 100 and is behind ROME and MEMIT, although its layers and settings were "
    "tuned in the same way.",
    "7. KNE and CTP give every new answer, and give it to most neighbours too.",
    "8. Zeroing ten query neurons of a peak layer costs 1 and 6 of 19 two-hop answers, and the value "
    "neurons of later layers stay active. Cells are empty where nothing was run on a real model yet: "
    "multi-hop answers after an edit, sweeps over layers and sizes, batches.",
    "9. A claim about 6 billion parameters that fails at 0.1 may hold there, and the other way "
    "round; no trend over sizes can be told from one model.",
    "10. Every row is a test of its own, at 95%; of sixty such tests three would hold or fail by "
    "chance.",
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
    """Gather the rows of the run folders in a folder. Rows of models, and of editors, that are not
    among them stay."""
    parts: dict[str, list[pd.DataFrame]] = {}
    unused = []
    for folder in sorted(path for path in runs.iterdir() if (path / "config.json").exists()):
        frame = load_run(folder)
        results = list(belonging(frame))
        if not results:
            unused.append(folder.name)
        for name, rows in results:
            parts.setdefault(name, []).append(rows)
    for name, frames in parts.items():
        _join(name, pd.concat(frames, ignore_index=True))
    if unused:
        print(f"of no result, left alone: {', '.join(unused)}")


def belonging(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The results that a run's rows belong to, with the finished ones among them."""
    module = {each.__name__: each for each in (*experiments(), editors, smollm2)}.get(
        frame.attrs["experiment"]
    )
    if module is None:
        return
    if failed := int((frame["status"] != "finished").sum()):
        print(f"{module.__name__}: {failed} failed tasks left out")
    rows = frame[frame["status"] == "finished"].infer_objects()
    if rows.empty:
        return
    of_editors = module in (editors, smollm2)
    parts = editors.results_of(rows) if of_editors else {results_of(module): rows}
    yield from ((name, part) for name, part in parts.items() if len(part))


def _join(name: str, rows: pd.DataFrame) -> None:
    """Put rows among the results, in the place of those of the same models and, where editors are
    compared, of the same editors."""
    frame = plain(rows.reset_index(drop=True))
    path = RESULTS / f"{name}.parquet"
    if path.exists():
        old = pd.read_parquet(path)
        whose = [column for column in ("model", "method") if column in old and column in frame]
        new = pd.MultiIndex.from_frame(frame[whose])
        stays = ~pd.MultiIndex.from_frame(old[whose]).isin(new)
        frame = pd.concat([old[stays], frame], ignore_index=True)
    RESULTS.mkdir(exist_ok=True)
    frame.to_parquet(path, compression="zstd", index=False)
    print(f"{name}: {len(frame)} rows, those of {', '.join(sorted(set(rows['model'])))} new")


def plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows as results keep them: an editor's changed settings as columns, no long texts, no row
    twice."""
    if "editor" in frame:
        told = [
            {} if value in (None, "null") or value != value else json.loads(value)
            for value in frame["editor"]
        ]
        varied = pd.json_normalize(told)
        frame = pd.concat([frame, varied.map(str) if "parameters" in varied else varied], axis=1)
        frame = frame.drop_duplicates(
            [name for name in (*KEY, *varied, "batch_size") if name in frame and name != "editor"]
        )
        frame = frame.astype(
            {name: int for name in ("edits", "hops", "case", "step") if name in frame}
        )
    if "layer" in frame and frame["layer"].dtype == object:
        frame["layer"] = frame["layer"].astype(str)
    return frame.drop(columns=[name for name in DROPPED if name in frame])


def written() -> str:
    """The ledger as text."""
    head = ("source", "claim", "statistic", *COLUMNS.values(), "release and set-up", "file")
    lines = [*TITLE, *IN_SHORT, "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    count = {model: {HOLDS: 0, FAILS: 0, OPEN: 0} for model in COLUMNS}
    claims = 0
    for module in experiments():
        path = RESULTS / f"{results_of(module)}.parquet"
        frame = pd.read_parquet(path) if path.exists() else pd.DataFrame({"model": []})
        for claim in getattr(module, "CLAIMS", ()):
            claims += 1
            cells = []
            for model in COLUMNS:
                statistic, verdict = decided_on(claim, frame, model)
                if verdict:
                    count[model][verdict] += 1
                cells.append(f"**{verdict}**<br>{statistic}" if verdict else statistic)
            file = module.__name__.replace("experiments.", "").replace(".", "/") + ".py"
            named = [claim.source, claim.words, claim.statistic]
            row = [*named, *cells, claim.release, f"[{file}]({file})"]
            lines.append("| " + " | ".join(row) + " |")
    for model, verdicts in count.items():
        if total := sum(verdicts.values()):
            lines += [
                "",
                f"{COLUMNS[model]}: of {claims} claims {total} were decided on it: "
                f"{verdicts[HOLDS]} held, {verdicts[FAILS]} failed, {verdicts[OPEN]} stayed undecided.",
            ]
    return "\n".join([*lines, ""])


def decided_on(claim: Claim, frame: pd.DataFrame, model: str) -> tuple[str, str]:
    """What was measured of a claim on a model, and the verdict: both empty where nothing was. A
    claim that compares ACE's two models stands in the second one's column."""
    asked = ACES if claim.both else (model,)
    if claim.both and model != ACES[-1]:
        return ("against the next column" if model == ACES[0] else "—"), ""
    rows = frame[frame["model"].isin(asked)]
    if rows["model"].nunique() < len(asked):
        return "", ""
    try:
        statistic, verdict = claim.decide(rows)
    except KeyError:  # rows of a run that was stopped, or varied something else
        return "", ""
    return ("", "") if (statistic, verdict) == NOT_MEASURED else (statistic, verdict)


#: the comparison's tables: results, heading, metrics (`@50`: when 50 facts had been edited)
OF_FACTS = (
    "efficacy_gen",
    "paraphrase_gen",
    "specificity_gen",
    "efficacy_acc",
    "paraphrase_acc",
    "specificity_acc",
    "efficacy_success",
    "paraphrase_success",
    "specificity_success",
    "portability",
    "locality",
    "multihop_acc",
    "fluency",
)
OF_CHAINS = (
    "efficacy_acc",
    "instance_wise",
    "multihop_cot",
    "multihop_cot_1",
    "multihop_cot_2",
    "multihop_cot_3",
    "multihop_cot_4",
    "multihop_cot_2h",
    "multihop_cot_3h",
    "multihop_cot_4h",
)
TABLES = (
    ("single", "Single edits, each taken back", OF_FACTS),
    ("batch", "One batch of 32", OF_FACTS),
    (
        "consecutive",
        "100 consecutive edits, all asked at the end",
        ("efficacy_acc@25", "efficacy_acc@50", "efficacy_acc@75", *OF_FACTS),
    ),
    ("multihop", "MQuAKE's chains of 2 to 4 hops, chain of thought", OF_CHAINS),
    ("multihop_batch", "The chains' edits in one batch of 32 chains", OF_CHAINS),
    ("multihop_consecutive", "The chains' edits of 100 chains one after another", OF_CHAINS),
)


def comparison() -> str:
    """Every editor on every model that has rows, as text."""
    lines = [
        "# The comparison of editors",
        "",
        "Written by `python -m experiments.ledger` from `experiments/results/` (runs of "
        "`experiments/smollm2.py` and `experiments/editors.py`; settings: the model's presets, by "
        "`qv-lens tune` on other facts). Percent, mean and in square brackets its 95% interval over "
        "the cases (Wilson's of shares of 0 and 1, Student's t of other values). `_gen`: what the "
        "model says, greedy, begins with the answer; `_acc`: every token of the answer is the "
        "argmax; `_success`: the new answer is likelier than the old one. Fluency is n-gram entropy "
        "times 100; ‖dW‖/‖W‖ the largest of any case; median seconds per fact on one CPU thread "
        "with another job beside it. In round brackets: of how many cases (after a metric: for "
        "every method), where not all have such prompts. Only what is printed here was run.",
    ]
    for name, title, metrics in TABLES:
        path = RESULTS / f"{name}.parquet"
        if path.exists():
            for model, frame in pd.read_parquet(path).groupby("model"):
                lines += ["", f"## {title}: {model}", "", *_comparison_of(frame, metrics)]
    return "\n".join([*lines, ""])


def _comparison_of(frame: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """The table of one model and protocol: a line for each method."""
    frame = pd.concat([frame, *compare.by_chain(frame)])
    steps = frame.groupby(["method", "seed", "case"])["step"]
    at_the_end = frame["step"] == steps.transform("max")
    ends = frame[at_the_end].drop_duplicates(["method", "seed", "case"])
    cases = ends.groupby("method").size()
    along_the_way = frame.loc[~at_the_end, "step"].astype(str)
    frame.loc[~at_the_end, "metric"] += "@" + along_the_way
    told = set(frame.dropna(subset="after")["metric"])
    shown = [metric for metric in metrics if metric in told]
    asked = frame.dropna(subset="after").groupby(["metric", "method"]).size()
    same = {}  # metrics that the same number of cases hold prompts for, fewer than there are
    for metric in shown:
        counts = asked[metric]
        if counts.nunique() == 1 and counts.iloc[0] < cases.min():
            same[metric] = int(counts.iloc[0])
    titles = [f"{metric} ({same[metric]})" if metric in same else metric for metric in shown]
    lines = [
        f"| method | cases | {' | '.join(titles)} | ‖dW‖/‖W‖ | s |",
        "|" + "---|" * (len(shown) + 4),
    ]
    for method, rows in frame.groupby("method", sort=False):
        count = int(cases[method])
        cells = [_cell(rows, metric, count if metric not in same else 0) for metric in shown]
        norm = rows["relative_norm"].max()
        seconds = rows.groupby(["seed", "case"])["seconds"].first().median()
        lines.append(f"| {method} | {count} | {' | '.join(cells)} | {norm:.1f} | {seconds:.2f} |")
    return lines


def _cell(rows: pd.DataFrame, metric: str, cases: int) -> str:
    """A metric's mean and interval, with the number of cases where that is smaller than `cases`."""
    values = rows.loc[rows["metric"] == metric, "after"].dropna()
    if not len(values):
        return ""
    ends = interval(values, bounds(metric.partition("@")[0]))
    known = ends.low == ends.low
    between = f" [{100 * ends.low:.0f}, {100 * ends.high:.0f}]" if known else ""
    few = f" ({len(values)})" if len(values) < cases else ""
    return f"{100 * values.mean():.0f}{between}{few}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collect", type=Path, metavar="RUNS")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.collect:
        collect(args.collect)
    for path, text in ((LEDGER, written()), (COMPARISON, comparison())):
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
