"""The table of edits in a row, on made-up rows of which every cell is known."""

from __future__ import annotations

import pandas as pd

from experiments import compare, ledger, single
from experiments.comparison import comparison, in_a_row


def made(method: str, said: dict[int, float], perplexity: float | None) -> pd.DataFrame:
    """A row of edits: at each step the newest are all said, the first none, the drawn `said`;
    perplexity grows by as much with every edit."""
    rows = []
    for step, share in said.items():
        for group, value in (("newest", 1.0), ("first", 0.0), ("drawn", share)):
            rows += [
                (step, group, "efficacy_gen", 0.0, value),
                (step, group, "paraphrase_gen", 0.02, value / 2),
                (step, group, "specificity_gen", 0.3, 0.28),
            ]
        rows += [
            (step, "model", "relative_norm", 0.0, 0.25),
            (step, "model", "seconds", float("nan"), 3.14),
            (step, "model", "refused", 0.0, 2.0),
        ]
        if perplexity is not None:
            grown = 40 + (perplexity - 40) * step / max(said)
            rows.append((step, "model", "perplexity", 40.0, grown))
    frame = pd.DataFrame(rows, columns=["step", "group", "metric", "before", "after"])
    return frame.assign(model="some-model", method=method, batch=10, count=max(said), seed=0)


def test_a_line_for_each_method_and_which_of_them_last():
    """The drawn ones at every checkpoint from 100 on; 90% of them and a perplexity of at most 44
    last, one without a perplexity does not."""
    whole = made("Whole", {1: 1.0, 100: 0.98, 1000: 0.9}, 44.0)
    less = made("Less", {1: 1.0, 100: 0.98, 1000: 0.88}, 40.0)
    worse = made("Worse", {100: 1.0}, 4044.5)
    unread = made("Unread", {30: 1.0}, None)
    head, rule, *lines, _, told = in_a_row(pd.concat([whole, less, worse, unread]))
    assert head.count("|") == rule.count("|") == lines[0].count("|")
    assert lines == [
        "| Whole | 100 / 1,000 | 10 | 100 | 0 | 98 / 90 | 2 → 45 | 30 → 28 | 40 → 40 / 44 | 0.2 | 2 | 3.1 |",
        "| Less | 100 / 1,000 | 10 | 100 | 0 | 98 / 88 | 2 → 44 | 30 → 28 | 40 → 40 / 40 | 0.2 | 2 | 3.1 |",
        "| Worse | 100 | 10 | 100 | 0 | 100 | 2 → 50 | 30 → 28 | 40 → 4,044 | 0.2 | 2 | 3.1 |",
        "| Unread | 30 | 10 | 100 | 0 | 100 | 2 → 50 | 30 → 28 |  | 0.2 | 2 | 3.1 |",
    ]
    assert told.endswith("10% higher: Whole.")
    assert in_a_row(worse)[-1].endswith("10% higher: none.")
    # a method in other batches, and to another number of edits, is another line
    longer = made("Whole", {100: 0.98, 2000: 0.5}, 60.0)
    rows = in_a_row(pd.concat([whole, whole.assign(batch=1), longer]))
    assert [line.split(" | ")[1:3] for line in rows[2:5]] == [
        ["100 / 1,000", "10"], ["100 / 1,000", "1"], ["100 / 2,000", "10"],
    ]  # fmt: skip
    assert rows[-1].startswith("Of these 3,")


def test_it_stands_in_the_comparison_once_a_run_has_been_collected(tmp_path):
    assert "Edits in a row" not in comparison(tmp_path)
    made("FT", {100: 0.5}, 50.0).to_parquet(tmp_path / "sequences.parquet")
    text = comparison(tmp_path)
    assert "## Edits in a row: some-model" in text
    assert "| FT | 100 | 10 |" in text


def test_what_an_editor_costs_and_at_how_many_edits_it_was_asked(tmp_path):
    """The largest norm of any case, and the median over the cases, not over the rows, of the
    seconds; of consecutive edits the last step, and what was asked on the way under its step."""
    rows = [  # case, step, metric, after, norm, seconds
        (0, 50, "efficacy_acc", 0.75, 0.2, 1.0), (0, 100, "efficacy_acc", 0.25, 0.2, 1.0),
        (1, 100, "efficacy_acc", 0.25, 0.9, 2.0), (2, 100, "efficacy_acc", 1.0, 0.4, 9.0),
        (2, 100, "paraphrase_acc", 1.0, 0.4, 9.0), (2, 100, "specificity_acc", 0.5, 0.4, 9.0),
    ]  # fmt: skip
    frame = pd.DataFrame(
        rows, columns=["case", "step", "metric", "after", "relative_norm", "seconds"]
    )
    ft = frame.assign(model="m", data="d", method="FT", seed=0)
    # ROME's paraphrases were asked in two of three cases, FT's in one: each says so by itself
    rome = ft.assign(
        method="ROME", metric=ft["metric"].replace("specificity_acc", "paraphrase_acc")
    )
    rome.loc[5, "case"] = 1
    pd.concat([ft, rome]).to_parquet(tmp_path / "consecutive.parquet")
    head, _, *lines = comparison(tmp_path).strip().splitlines()[-4:]
    names = head.strip("| ").split(" | ")
    assert names[:5] == [
        "method", "cases", "efficacy_acc@50 (1)", "efficacy_acc", "paraphrase_acc",
    ]  # fmt: skip
    cells = [dict(zip(names, line.strip("| ").split(" | "), strict=True)) for line in lines]
    assert [cell["cases"] for cell in cells] == ["3", "3"]
    assert [cell["efficacy_acc@50 (1)"][:3] for cell in cells] == ["75 ", "75 "]
    assert [cell["efficacy_acc"][:3] for cell in cells] == ["50 ", "50 "]
    assert cells[0]["paraphrase_acc"].endswith("(1)")
    assert cells[1]["paraphrase_acc"].endswith("(2)")
    assert [(cell["‖dW‖/‖W‖"], cell["s"]) for cell in cells] == [("0.9", "2.00")] * 2


def test_the_figure_of_single_edits_is_of_facts_that_it_knew():
    """ZsRE's, which the model did not know, stand in the same results."""
    frame = pd.read_parquet(ledger.RESULTS / "single.parquet")
    frame = frame[frame["model"] == "smollm2-135m"]
    said = next(line for line in single.figure(frame).data if "says" in line.name)
    shown = dict(zip(said.y, said.x, strict=True))
    known = frame[(frame["data"] == "counterfact-edit-10k.json") & (frame["method"] == "MEMIT")]
    assert shown["MEMIT"] == known.loc[known["metric"] == "efficacy_gen", "after"].mean()
    bars = compare.figure(frame, ("model", "method"))
    names = {name for line in bars.data for name in line.x}
    assert {"MEMIT · CounterFact", "MEMIT · ZsRE", "MEMIT · atlas"} <= names
