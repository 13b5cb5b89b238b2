"""The page of a run, and of several: what is averaged, in which order, and what is left out."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from qv_lens.errors import ConfigError
from qv_lens.reporting.runs import run_page, runs_page


def run(drop, seeds=(0, 1), **settings):
    """A run as `load_run` gives it: layers 2 and 10, in the order in which they finished."""
    rows = [
        {"task": i, "status": "finished", "layer": layer, "zeroed_layer": layer, "seed": seed,
         "drop": drop(layer, seed), "nothing": 0.0, "error": None}
        for i, (layer, seed) in enumerate((layer, seed) for layer in (10, 2) for seed in seeds)
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.attrs.update(
        measures=["drop", "nothing"], complete=True, grid={"layer": [10, 2]}, file="e.py",
        settings=settings, experiment="e", models={}, versions={}, machine={}, command="",
    )  # fmt: skip
    return frame


def cells(page, name):
    """The rows of a table as text."""
    table = re.search(rf'<table data-name="{name}".*?</table>', page, re.S).group(0)
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.S)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]


def test_what_was_varied_is_sorted_and_never_averaged():
    page = run_page("e", run(lambda layer, seed: layer + seed), None)
    rows = cells(page, "results")
    assert rows[0] == ["layer", "drop"]  # the layer that was zeroed says the same, once is enough
    assert rows[1:] == [["2", "2.500"], ["10", "10.500"]]  # means over the seeds
    assert "left out: nothing (0)" in " ".join(page.split())


def test_one_row_is_no_reason_to_leave_a_measure_out():
    page = run_page("e", run(lambda layer, seed: 0.0, seeds=(0,)).head(1), None)
    assert cells(page, "results")[0] == ["drop", "nothing"]


def test_a_failed_task_shows_what_was_varied_and_its_last_line():
    frame = run(lambda layer, seed: 1.0)
    frame.loc[0, ["status", "error"]] = ["failed", "Traceback\n  deep\nValueError: <b>no</b>"]
    frame["layer"] = frame["layer"].astype(float)  # as where other rows have none
    page = run_page("e", frame, None)
    assert cells(page, "failed")[1:] == [["10", "ValueError: &lt;b&gt;no&lt;/b&gt;"]]
    assert "1 failed" in page


def test_runs_stand_side_by_side():
    frames = {
        "small": run(lambda layer, seed: layer, lam=1),
        "large": run(lambda layer, seed: 2 * layer, lam=5),
    }
    page = runs_page(frames)
    rows = cells(page, "comparison")
    assert rows[0] == ["layer", "drop · small", "drop · large"]  # "nothing" is 0 in both
    assert rows[1] == ["2", "2.000", "4.000"]
    assert cells(page, "settings")[1:] == [["lam", "1", "5"]]


def test_what_the_runs_give_one_model_alone_is_a_difference():
    a, b = run(lambda layer, seed: 1.0), run(lambda layer, seed: 1.0)
    a.attrs["more"], b.attrs["more"] = {"m": {"share": [1]}}, {"m": {"share": [2]}}
    page = runs_page({"a": a, "b": b})
    assert cells(page, "settings")[1:] == [["share (m)", "[1]", "[2]"]]
    assert "settings are the same" in " ".join(runs_page({"a": a, "c": a.copy()}).split())


def test_a_run_of_which_everything_failed_has_no_results():
    frame = run(lambda layer, seed: 1.0)
    frame[["status", "error"]] = ["failed", "ValueError: no"]
    page = run_page("e", frame, None)
    assert "<h2>Failed</h2>" in page
    assert "<h2>Results</h2>" not in page


def test_layers_are_never_averaged_however_many_there_are():
    frame = run(lambda layer, seed: 1.0)
    rows = pd.concat([frame.head(2)] * 48, ignore_index=True)
    rows["layer"] = rows["zeroed_layer"] = [i // 2 for i in range(96)]
    rows.attrs.update(frame.attrs, grid={"seed": [0, 1]})
    table = cells(run_page("e", rows, None), "results")
    assert table[0][0] == "layer"
    assert len(table) == 49


def test_of_many_combinations_the_first_are_shown_and_means_are_means():
    frame = run(lambda layer, seed: 9.0 * (seed == 2), seeds=(0, 1, 2))
    assert cells(run_page("e", frame, None), "results")[1:] == [["2", "3.000"], ["10", "3.000"]]
    many = pd.concat([frame.head(1)] * 401, ignore_index=True)
    many["layer"] = many["zeroed_layer"] = range(401)
    many["drop"] = [float(layer) for layer in range(401)]
    many.attrs.update(frame.attrs, grid={"layer": list(range(401))})
    page = run_page("e", many, None)
    assert "400 of 401 combinations" in page
    assert cells(page, "results")[1] == ["0", "0.000"]


def test_runs_that_asked_another_number_of_prompts_are_compared():
    frames = {
        str(count): run(lambda layer, seed: layer + seed).assign(
            prompts_asked=[count, count, count + 1, count + 1]
        )
        for count in (10, 20)
    }
    assert cells(runs_page(frames), "comparison")[1:] == [
        ["2", "2.500", "2.500"], ["10", "10.500", "10.500"],
    ]  # fmt: skip


def test_runs_without_a_combination_in_common_are_not_compared():
    deep = run(lambda layer, seed: 1.0)
    deep["layer"] += 20
    deep["zeroed_layer"] += 20
    with pytest.raises(ConfigError, match="no combination of what was varied in common"):
        runs_page({"a": run(lambda layer, seed: 1.0), "b": deep})


def test_seeds_are_told_apart_where_nothing_else_was_varied():
    frame = run(lambda layer, seed: seed)
    page = run_page("e", frame[frame["layer"] == 2], None)
    assert [row[0] for row in cells(page, "results")] == ["seed", "0", "1"]


def test_runs_of_different_experiments_are_not_compared():
    other = run(lambda layer, seed: 1.0)
    other.attrs["experiment"] = "f"
    with pytest.raises(ConfigError, match=r"different experiments: e, f"):
        runs_page({"a": run(lambda layer, seed: 1.0), "b": other})


def test_a_killed_run_beside_a_whole_one_is_told():
    whole, killed = run(lambda layer, seed: 1.0), run(lambda layer, seed: 1.0)
    killed.loc[0, ["status", "error"]] = ["failed", "ValueError: no"]
    killed.attrs["complete"] = False
    page = " ".join(runs_page({"a": whole, "b": killed}).split())
    assert "<li>a: 4 tasks, 0 failed, 4 rows</li>" in page
    assert "<li>b: 4 tasks, 1 failed, 3 rows; unfinished</li>" in page
    assert "2 of 2 combinations" in page


def test_runs_in_which_nothing_was_varied_are_compared():
    frames = {
        name: run(lambda layer, seed, drop=drop: drop, seeds=(0,)).head(1)
        for name, drop in (("a", 0.5), ("b", 0.6))
    }
    assert cells(runs_page(frames), "comparison") == [["drop · a", "drop · b"], ["0.500", "0.600"]]


def test_a_measure_that_most_rows_lack_is_not_the_same_in_all():
    frame = run(lambda layer, seed: 1.0 if layer == 2 else float("nan"))
    page = run_page("e", frame, None)
    assert cells(page, "results")[0] == ["layer", "drop"]


def test_a_value_that_is_missing_is_one_of_those_varied():
    frame = run(lambda layer, seed: layer + seed).drop(columns="zeroed_layer")
    frame["layer"] = [None if layer == 2 else "ten" for layer in frame["layer"]]
    page = run_page("e", frame, None)
    assert cells(page, "results")[1:] == [["none", "2.500"], ["ten", "10.500"]]


def test_what_one_model_has_besides_is_a_column_however_many_values_it_has():
    rows = pd.concat([run(lambda layer, seed: 1.0).head(1)] * 50, ignore_index=True)
    rows["layer"], rows["zeroed_layer"], rows["share"] = 2, 2, range(50)
    rows.attrs.update(
        run(lambda layer, seed: 1.0).attrs, grid={}, more={"m": {"share": list(range(50))}}
    )
    assert cells(run_page("e", rows, None), "results")[0][0] == "share"


def test_a_measure_that_one_of_three_lacks_is_left_out():
    frames = {name: run(lambda layer, seed: layer) for name in "abc"}
    for name in "abc":
        frames[name] = frames[name].assign(other=1.0)
        frames[name].attrs["measures"] = ["drop", "nothing", "other"]
    frames["c"] = frames["c"].drop(columns="other")
    assert cells(runs_page(frames), "comparison")[0] == [
        "layer",
        "drop · a",
        "drop · b",
        "drop · c",
    ]


def test_a_column_of_lists_is_told_apart_by_what_it_holds():
    frame = run(lambda layer, seed: layer + seed).drop(columns=["zeroed_layer", "layer"])
    frame["tokens"] = [["a", "b"], ["a", "b"], ["c"], None]
    page = run_page("e", frame, None)
    assert cells(page, "results")[1:] == [
        ["[&#39;a&#39;, &#39;b&#39;]", "10.500"], ["[&#39;c&#39;]", "2.000"], ["none", "3.000"],
    ]  # fmt: skip
