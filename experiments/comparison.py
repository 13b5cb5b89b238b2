"""The comparison of editors as text: a table for every protocol, model and data that have rows, and
one of edits in a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from experiments import compare, sequence
from experiments.models import COLUMNS, DATA
from qv_lens.evaluation.intervals import bounds, interval

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
    "edit_success",
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
    ("batch", "Edits in one batch", OF_FACTS),
    (
        "consecutive",
        "Edits one after another, all asked at the end",
        ("efficacy_acc@25", "efficacy_acc@50", "efficacy_acc@75", *OF_FACTS),
    ),
    ("multihop", "Chains of facts, chain of thought", OF_CHAINS),
    ("multihop_batch", "The chains' edits in one batch", OF_CHAINS),
    ("multihop_consecutive", "The chains' edits one after another", OF_CHAINS),
)


PREFACE = (
    "Written by `python -m experiments.ledger` from `experiments/results/` (runs of "
    "`experiments/single.py` and `experiments/editors.py`). Settings are the model's presets, by "
    "`qv-lens tune`, on facts of the atlas of which at most three are among those asked here. C0 is "
    "of the reference text that comes with Python, not of Wikitext as in the papers: on SmolLM2 it "
    "costs ACE 9 to 13 points of specificity, MEMIT and ROME 1 to 5 (`benchmarks/RESULTS.md`). "
    "Methods stand by their first metric. Editors that were not run are left out.",
    "",
    "Cells are percent: the mean, and in square brackets its 95% interval over the cases (Wilson's "
    "of shares of 0 and 1, Student's t of other values). In round brackets: of how many cases "
    "(after a metric: for every method), where not all have such prompts. ‖dW‖/‖W‖ is the largest "
    "of any case; s the median of seconds per fact, on one CPU thread beside other jobs.",
    "",
    "- `_gen`: what the model says, greedy, begins with the answer.",
    "- `_acc`: every token of the answer is the argmax; of `specificity_acc` the old one of "
    "neighbours, so what was wrong before the edit counts as lost.",
    "- `_success`: the new answer is likelier than the old one; of neighbours the old one than the "
    "new.",
    "- `edit_success`, `portability`: the share of the answer's tokens that are the argmax, of the "
    "edit and of what follows from it; `locality`: the share of tokens of other answers about the "
    "subject whose argmax is what it was (KnowEdit).",
    "- `multihop_cot`: the chain's new answer, after worked examples, to any of its questions; "
    "`_1` to `_4` by the number of edits, `_2h` to `_4h` by that of hops; `instance_wise`: every "
    "edit of the chain is recalled.",
    "- `fluency`: n-gram entropy, times 100.",
)


def comparison(results: Path) -> str:
    """Every editor on every model that has rows in the folder of results, as text."""
    lines = ["# The comparison of editors", "", *PREFACE]
    for name, title, metrics in TABLES:
        for (model, data), frame in by_columns(results / f"{name}.parquet", ["model", "data"]):
            heading = f"## {title}: {COLUMNS.get(model, model)}, {DATA.get(data, data)}"
            lines += ["", heading, "", *_comparison_of(frame, metrics)]
    for (model,), frame in by_columns(results / f"{sequence.RESULTS}.parquet", ["model"]):
        heading = f"## Edits in a row: {COLUMNS.get(model, model)}"
        lines += ["", heading, "", OF_A_ROW, "", *in_a_row(frame)]
    return "\n".join([*lines, ""])


def _comparison_of(frame: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    """The table of one protocol, model and data: a line for each method."""
    frame = pd.concat([frame, *compare.by_chain(frame)])
    steps = frame.groupby(["method", "seed", "case"])["step"]
    at_the_end = frame["step"] == steps.transform("max")
    ends = frame[at_the_end].drop_duplicates(["method", "seed", "case"])
    cases = ends.groupby("method").size()
    along_the_way = frame.loc[~at_the_end, "step"].astype(str)
    frame.loc[~at_the_end, "metric"] += "@" + along_the_way
    present = set(frame.dropna(subset="after")["metric"])
    shown = [metric for metric in metrics if metric in present]
    sizes = frame.dropna(subset="after").groupby(["metric", "method"]).size()
    same = {}  # metrics that the same number of cases hold prompts for, fewer than there are
    for metric in shown:
        counts = sizes[metric]
        if counts.nunique() == 1 and counts.iloc[0] < cases.min():
            same[metric] = int(counts.iloc[0])
    titles = [f"{metric} ({same[metric]})" if metric in same else metric for metric in shown]
    lines = head("method", "cases", *titles, "‖dW‖/‖W‖", "s")
    by_method = dict(list(frame.groupby("method")))
    firsts = frame[frame["metric"].isin(shown[:1])].groupby("method")["after"].mean()
    firsts = firsts.reindex(list(by_method))
    for method in firsts.sort_values(ascending=False, kind="stable", na_position="last").index:
        rows = by_method[method]
        count = int(cases[method])
        cells = [_cell(rows, metric, count if metric not in same else 0) for metric in shown]
        norm = rows["relative_norm"].max()
        seconds = rows.groupby(["seed", "case"])["seconds"].first().median()
        lines.append(line(method, count, *cells, f"{norm:.1f}", f"{seconds:.2f}"))
    return lines


def _cell(rows: pd.DataFrame, metric: str, cases: int) -> str:
    """A metric's mean and interval, with the number of cases where that is smaller than `cases`."""
    values = rows.loc[rows["metric"] == metric, "after"].dropna()
    if not len(values):
        return ""
    ends = interval(values, bounds(metric))
    known = ends.low == ends.low
    between = f" [{100 * ends.low:.0f}, {100 * ends.high:.0f}]" if known else ""
    few = f" ({len(values)})" if len(values) < cases else ""
    return f"{100 * values.mean():.0f}{between}{few}"


def line(*cells: object) -> str:
    """A table's line."""
    return f"| {' | '.join(map(str, cells))} |"


def head(*names: str) -> list[str]:
    """A table's first two lines."""
    return [line(*names), "|" + "---|" * len(names)]


def by_columns(path: Path, columns: list[str]) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """A result's rows, by the values of some columns."""
    if path.exists():
        for values, frame in pd.read_parquet(path).groupby(columns):
            yield tuple(map(str, values)), frame


#: from how many edits on a checkpoint has a place in the curve
LONG = 100
#: a row of edits lasts if this share of them is still said, and perplexity has grown at most by this
#: factor
SAID, SURPRISED = 0.9, 1.1
#: what the cells of its table are
OF_A_ROW = (
    "CounterFact's facts one after another (runs of `experiments/sequence.py`), `batch` of them "
    "edited together. Said: what the model says, greedy, begins with the new answer; of 50 edits "
    "each: the newest, the first, and some drawn from all so far, these at every checkpoint from "
    "100 edits on. Paraphrases and neighbours are those of the drawn ones, before any edit and "
    "after all. Perplexity is that of held-out text, before any edit and at those checkpoints."
)
#: the columns of edits in a row
IN_A_ROW = (
    "method",
    "edits",
    "batch",
    "newest said",
    "first said",
    "drawn said",
    "their paraphrases",
    "their neighbours",
    "perplexity",
    "‖dW‖/‖W‖",
    "refused",
    "s",
)


def in_a_row(frame: pd.DataFrame) -> list[str]:
    """The table of one model's edits in a row, a line for each row, and which of them last."""
    lines, lasting = head(*IN_A_ROW), []
    edits = frame.groupby(["method", "count", "batch", "seed"], sort=False)
    for (method, *_), rows in edits:
        after = rows.set_index(["step", "group", "metric"])[["before", "after"]].sort_index()
        last = int(rows["step"].max())
        steps = sorted({int(step) for step in rows["step"] if step >= LONG} | {last})
        shares = [after.loc[(step, "drawn", "efficacy_gen"), "after"] for step in steps]
        text = after.reindex([(step, "model", "perplexity") for step in steps])
        end = after.loc[last]  # by group and metric
        lines.append(
            line(
                method,
                " / ".join(f"{step:,}" for step in steps),
                rows["batch"].iloc[0],
                f"{100 * end.loc[('newest', 'efficacy_gen'), 'after']:.0f}",
                f"{100 * end.loc[('first', 'efficacy_gen'), 'after']:.0f}",
                " / ".join(f"{100 * share:.0f}" for share in shares),
                _curve(100 * after.loc[[(last, "drawn", "paraphrase_gen")]]),
                _curve(100 * after.loc[[(last, "drawn", "specificity_gen")]]),
                _curve(text),
                f"{end.loc[('model', 'relative_norm'), 'after']:.1f}",
                f"{end.loc[('model', 'refused'), 'after']:.0f}",
                f"{end.loc[('model', 'seconds'), 'after']:.1f}",
            )
        )
        if shares[-1] >= SAID and text["after"].iloc[-1] <= SURPRISED * text["before"].iloc[-1]:
            lasting.append(str(method))
    kept = ", ".join(lasting) or "none"
    return [
        *lines,
        "",
        f"Of these {edits.ngroups}, with {SAID:.0%} of the drawn edits said and a "
        f"perplexity at most {SURPRISED - 1:.0%} higher: {kept}.",
    ]


def _curve(values: pd.DataFrame) -> str:
    """A value before any edit and at each checkpoint given; nothing where it was not measured."""
    if values.isna().any(axis=None):
        return ""
    after = " / ".join(f"{value:,.0f}" for value in values["after"])
    return f"{values['before'].iloc[0]:,.0f} → {after}"
