"""Runs that are legal and unusual: columns of several types, names of libraries, long texts,
clusters with less than was asked for."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pandas as pd
import pytest

import qv_lens as qv
from qv_lens.reporting.runs import run_page, runs_page
from qv_lens.runs.config import RunConfig, read_config, tasks_of
from qv_lens.runs.experiment import find_experiment
from qv_lens.runs.run import Shelf, _shares, all_tasks, estimate, run
from qv_lens.runs.store import Store

HEAD = """
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
import pandas as pd
MEASURES = ("x",)

@dataclass(frozen=True)
class Task:
"""


def written(folder: Path, fields: str, body: str = "return pd.DataFrame({'x': [1.0]})") -> str:
    """An experiment's file with these fields and this body of `rows`."""
    lines = [*(f"    {field}" for field in fields.split("; ")), "", "def rows(task, lens):"]
    folder.mkdir(exist_ok=True)
    file = folder / "mine.py"
    file.write_text(HEAD + "\n".join([*lines, *(f"    {line}" for line in body.splitlines())]))
    return str(file)


def test_layers_beside_a_word_are_joined_where_one_of_them_failed(tmp_path):
    """A failed task's layer is of the type of the others."""
    body = "if str(task.layer) == Path('fails').read_text():\n    1 / 0\nreturn pd.DataFrame({'x': [1.0]})"
    grid = {"layer": (2, 10, "all")}
    file = written(tmp_path, "layer: int | Literal['all'] = 0", body.replace("fails", str(tmp_path / "fails")))  # fmt: skip
    runs = {}
    for failing in ("10", "all"):
        (tmp_path / "fails").write_text(failing)
        runs[failing] = run(RunConfig(file, {}, grid), tmp_path / failing)
        assert qv.load_run(runs[failing])["layer"].tolist() == ["2", "10", "all"]
    joined = qv.compare_runs(*runs.values()).set_index("layer")
    assert joined.index.tolist() == ["10", "2", "all"]
    assert joined.loc["2", ["x_first", "x_second"]].tolist() == [1.0, 1.0]
    assert joined["x_difference"].notna().sum() == 1
    assert "1 of 1 combinations" in " ".join(
        runs_page({n: qv.load_run(f) for n, f in runs.items()}).split()
    )


def test_layers_are_sorted_as_numbers_beside_a_word(tmp_path):
    file = written(tmp_path, "layer: int | Literal['all'] = 0")
    folder = run(RunConfig(file, {}, {"layer": (1, 2, 10, "all")}), tmp_path / "run")
    page = run_page("mine", qv.load_run(folder), None)
    places = [page.index(f">{layer}</") for layer in ("1", "2", "10", "all")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        ("[1, 2]", ["[1, 2]", "a"]),
        ("{'k': 'v'}", ['{"k": "v"}', "a"]),
        ("pd.Timestamp('2026-01-02').date()", ["2026-01-02", "a"]),
        ("True", ["true", "a"]),
    ],
)
def test_a_column_of_several_types_reads_as_text(tmp_path, odd, expected):
    body = f"return pd.DataFrame({{'x': [1.0], 'y': [{odd} if task.n == 1 else 'a']}})"
    folder = run(
        RunConfig(written(tmp_path, "n: int = 0", body), {}, {"n": (1, 2)}), tmp_path / "r"
    )
    assert qv.load_run(folder)["y"].tolist() == expected


def test_a_run_killed_in_its_first_task_is_a_run_without_rows(tmp_path):
    config = RunConfig(written(tmp_path, "n: int = 0"), {}, {"n": (1, 2)})
    Store.open(tmp_path / "run", config, all_tasks(config))
    frame = qv.load_run(tmp_path / "run")
    assert frame.columns.tolist() == ["task", "status"]
    assert "0 tasks, 0 failed, 0 rows; unfinished" in run_page("mine", frame, None)


@pytest.mark.parametrize("value", ["法" * 100, "b" * 300, "a/" * 5 + "c" * 300])
def test_a_long_text_is_no_file(tmp_path, value):
    config = RunConfig(
        written(tmp_path, "text: str = ''; n: int = 0"), {"text": value}, {"n": (1,)}
    )
    assert qv.load_run(run(config, tmp_path / "run"))["text"].tolist() == [value]


def test_a_file_named_by_a_long_path_is_one(tmp_path):
    """More letters than a name may have, in several folders."""
    deep = tmp_path.joinpath(*("d" * 100 for _ in range(4)))
    deep.mkdir(parents=True)
    (deep / "data.json").write_text("[1]")
    config = RunConfig(
        written(tmp_path, "text: str = ''; n: int = 0"),
        {"text": str(deep / "data.json")},
        {"n": (1,)},
    )
    run(config, tmp_path / "run")
    (deep / "data.json").write_text("[2]")
    with pytest.raises(qv.QVLensError, match="held something else"):
        run(config, tmp_path / "run")


@pytest.mark.parametrize(
    "field",
    ["data: Path = Path('x')", "data: tuple = (Path('x'),)", "data: object = frozenset((1,))"],
)
def test_a_field_that_no_run_folder_holds_is_refused_before_any_task(tmp_path, field):
    config = RunConfig(written(tmp_path, f"{field}; n: int = 0"), {}, {"n": (1, 2)})
    with pytest.raises(qv.QVLensError, match=r"data holds .*which a run folder cannot hold"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_called_as_a_library_does_not_take_its_place(tmp_path):
    file = Path(written(tmp_path, "n: int = 0")).rename(tmp_path / "statistics.py")
    frame = qv.load_run(run(RunConfig(str(file), {}, {"n": (1,)}), tmp_path / "run"))
    assert frame.attrs["experiment"] == "statistics"
    assert sys.modules["statistics"] is statistics
    assert statistics.mean([1, 3]) == 2


def test_the_same_experiment_in_two_folders_is_compared(tmp_path):
    frames = {}
    for name in ("a", "b"):
        config = RunConfig(written(tmp_path / name, "n: int = 0"), {}, {"n": (1, 2)})
        frames[name] = qv.load_run(run(config, tmp_path / f"run {name}"))
    assert "2 of 2 combinations" in " ".join(runs_page(frames).split())


def test_whole_numbers_of_a_field_of_floats_are_floats(tmp_path):
    """5 and 5.0 are one task, with one id."""
    file = written(tmp_path, "lam: float = 0.0; often: float | None = None; n: int | float = 0")
    ids = {tasks_of(RunConfig(file, {"lam": lam}, {"n": (1,)}))[0].id for lam in (5, 5.0)}
    assert len(ids) == 1
    (task,) = tasks_of(RunConfig(file, {"lam": 5, "often": 2}, {"n": (1,)}))
    assert [type(v) for v in vars(task.fields).values()] == [float, float, int]
    with pytest.raises(qv.QVLensError, match="names one thing twice"):
        tasks_of(RunConfig(file, {}, {"lam": (5, 5.0)}))


@pytest.mark.parametrize("form", ["editor.lam = 5", '"editor.lam" = 5', "editor = {lam = 5}"])
def test_a_part_of_a_table_leaves_the_rest_of_it(tmp_path, form):
    file = Path(written(tmp_path, "editor: dict; n: int = 0"))
    file.write_text(file.read_text() + "\nSETTINGS = {'editor': {'lam': 1, 'steps': 7}}\n")
    (tmp_path / "my.toml").write_text(
        f'experiment = "mine.py"\n[settings]\n{form}\n[grid]\nn = [1]\n'
    )
    (task,) = tasks_of(read_config(tmp_path / "my.toml"))
    assert task.fields.editor == {"lam": 5, "steps": 7}


def test_failed_tasks_of_a_varied_part_are_told_apart(tmp_path):
    config = RunConfig(
        written(tmp_path, "editor: dict; n: int = 0", "1 / 0"), {"n": 1}, {"editor.lam": (1, 2)}
    )
    page = run_page("mine", qv.load_run(run(config, tmp_path / "run")), None)
    for lam in (1, 2):
        assert json.dumps({"lam": lam}).replace('"', "&#34;") in page


def test_what_is_computed_once_tells_types_apart_within_tuples():
    shelf = Shelf()
    values = [(1,), (True,), (1.0,), ((1, 2.0),), ((1.0, 2),)]
    assert [shelf.once(repr, value) for value in values] == list(map(repr, values))


@pytest.mark.parametrize(
    ("gpus", "cpus", "workers", "tasks", "count", "share"),
    [
        (3, 8, None, 2, 2, {"num_gpus": 1}),  # 1.5 of a GPU is refused by Ray
        (4, 8, None, 9, 4, {"num_gpus": 1}),
        (4, 8, 2, 9, 2, {"num_gpus": 2}),
        (2, 8, 4, 9, 4, {"num_gpus": 0.5}),
        (4, 8, 5, 9, 5, {"num_gpus": 0.5}),  # at 0.8 the fifth would wait for ever
        (0, 2, None, 9, 2, {"num_cpus": 1}),
        (0, 0, None, 9, 1, {"num_cpus": 1}),
    ],
)
def test_workers_take_what_the_cluster_has(gpus, cpus, workers, tasks, count, share):
    assert _shares(gpus, cpus, workers, tasks) == (count, share)


def test_more_workers_than_cores_are_not_waited_for():
    with pytest.warns(UserWarning, match="1 CPU cores"):
        assert _shares(0, 1, 2, 9) == (1, {"num_cpus": 1})


def test_runs_with_several_rows_of_a_missing_key_join_one_to_one(tmp_path):
    body = "return pd.DataFrame({'who': [None, None, 'a'], 'x': [1.0, 2.0, 3.0]})"
    file = written(tmp_path, "n: int = 0", body)
    runs = [run(RunConfig(file, {}, {"n": (1,)}), tmp_path / name) for name in "ab"]
    joined = qv.compare_runs(*runs)
    assert len(joined) == 3
    assert joined["x_difference"].eq(0).all()


def test_the_difference_of_two_runs_is_the_second_minus_the_first(tmp_path):
    value = tmp_path / "value"
    body = f"return pd.DataFrame({{'x': [float(Path({str(value)!r}).read_text())]}})"
    file, frames = written(tmp_path, "n: int = 0", body), []
    for text in ("1", "4"):
        value.write_text(text)
        frames.append(run(RunConfig(file, {}, {"n": (1,)}), tmp_path / f"run {text}"))
    assert qv.compare_runs(*frames)["x_difference"].tolist() == [3.0]


def test_a_failed_task_in_the_middle_stands_in_its_place(tmp_path):
    body = "if task.n == 2:\n    1 / 0\nreturn pd.DataFrame({'x': [1.0]})"
    folder = run(
        RunConfig(written(tmp_path, "n: int = 0", body), {}, {"n": (1, 2, 3)}), tmp_path / "r"
    )
    frame = qv.load_run(folder)
    assert frame["n"].tolist() == [1, 2, 3]
    assert frame["status"].tolist() == ["finished", "failed", "finished"]


def test_another_version_is_other_tasks(tmp_path):
    file = Path(written(tmp_path, "n: int = 0"))
    (before,) = tasks_of(RunConfig(str(file), {}, {"n": (1,)}))
    file.write_text(file.read_text() + "\nVERSION = 2\n")
    (after,) = tasks_of(RunConfig(str(file), {}, {"n": (1,)}))
    assert before.id != after.id


def test_a_part_in_the_settings_goes_into_each_table_of_the_grid(tmp_path):
    file = written(tmp_path, "editor: dict; n: int = 0")
    config = RunConfig(file, {"editor.lam": 5}, {"editor": ({"steps": 1}, {"steps": 2})})
    assert [task.fields.editor for task in tasks_of(config)] == [
        {"steps": 1, "lam": 5}, {"steps": 2, "lam": 5},
    ]  # fmt: skip


def test_what_is_left_takes_its_share_of_the_time(tmp_path):
    """Of four tasks two are done, one of which does not say how long it took."""
    config = RunConfig(written(tmp_path, "n: int = 0"), {}, {"n": (1, 2, 3, 4)})
    tasks = all_tasks(config)
    store = Store.open(tmp_path / "run", config, tasks)
    for task, seconds in zip(tasks, (10.0, float("nan")), strict=False):
        store.save(task, pd.DataFrame({"x": [1.0]}), seconds)
    cost = estimate(config, tmp_path / "run")
    assert (cost.todo, cost.seconds) == (2, 20.0)


def test_runs_that_know_other_numbers_of_prompts_are_joined(tmp_path):
    count = tmp_path / "count"
    body = (
        f"known = int(Path({str(count)!r}).read_text())\n"
        "return pd.DataFrame({'x': [1.0], 'prompts_asked': [9], 'prompts_known': [known]})"
    )
    file, runs = written(tmp_path, "n: int = 0", body), []
    for text in ("3", "4"):
        count.write_text(text)
        runs.append(run(RunConfig(file, {}, {"n": (1, 2)}), tmp_path / f"run {text}"))
    assert qv.compare_runs(*runs)["x_difference"].tolist() == [0.0, 0.0]


def test_what_the_files_of_a_package_import_is_watched_too(tmp_path):
    """The experiment imports `near`, and that `far`."""
    package = tmp_path / "watched"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "far.py").write_text("def far():\n    return 1.0\n")
    (package / "near.py").write_text(
        "from watched.far import far\n\ndef near():\n    return far()\n"
    )
    file = Path(written(package, "n: int = 0", "return pd.DataFrame({'x': [near()]})"))
    file.write_text(file.read_text().replace("import pandas", "from watched.near import near\nimport pandas", 1))  # fmt: skip
    assert {f.name for f in find_experiment(file).shared} >= {"near.py", "far.py"}


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (("2**60 + 1", "float('nan')"), [float(2**60), None]),
        (("np.uint64(2**63)", "-1"), [float(2**63), -1.0]),
        (("2**60 + 1", "3"), [2**60 + 1, 3]),
    ],
)
def test_a_large_count_beside_a_missing_one_is_read(tmp_path, counts, expected):
    body = f"import numpy as np\nreturn pd.DataFrame({{'x': [1.0], 'y': [{counts[0]} if task.n == 1 else {counts[1]}]}})"
    folder = run(
        RunConfig(written(tmp_path, "n: int = 0", body), {}, {"n": (1, 2)}), tmp_path / "r"
    )
    found = qv.load_run(folder)["y"].tolist()
    assert [None if one != one else one for one in found] == expected


@pytest.mark.parametrize(
    "changes", [["table.a.b=1"], ["table={a={b=1}}"], ["table={a={b=0}}", "table.a.b=1"]]
)
def test_one_table_however_it_is_written(tmp_path, changes):
    file = written(tmp_path, "n: int = 0; table: dict = None")
    (tmp_path / "deep.toml").write_text(
        'experiment = "mine.py"\n[settings]\ntable = {a = {b = 1}}\n[grid]\nn = [0]\n'
    )
    (task,) = tasks_of(read_config(tmp_path / "deep.toml"))
    assert task.fields.table == {"a": {"b": 1}}
    (same,) = tasks_of(read_config(file, [*changes, "n=[0]"]))
    assert (same.fields.table, same.id) == (task.fields.table, task.id)
    with pytest.raises(qv.QVLensError, match=r"'a\.b' reaches into 'a', which is 3"):
        tasks_of(read_config(file, ["table.a=3", "table.a.b=1", "n=[0]"]))


def test_a_field_of_several_numbers(tmp_path):
    """A list varies: one value of several numbers stands in a list of its own."""
    file = written(tmp_path, "layers: tuple[int, ...] = (1, 2)")
    found = {
        said: [task.fields.layers for task in tasks_of(read_config(file, [f"layers={said}"]))]
        for said in ("[[3, 4]]", "[3, 4]", "3")
    }
    assert found == {"[[3, 4]]": [(3, 4)], "[3, 4]": [(3,), (4,)], "3": [(3,)]}
    for wrong in ("all", "true", '[3, "all"]'):
        with pytest.raises(qv.QVLensError, match=r"layers must be tuple\[int, ...\], got"):
            tasks_of(read_config(file, [f"layers={wrong}"]))


SLIPS = {
    "GRID = {'n': 3}": r"GRID\['n'\] must be a list of values, got 3",
    "GRID = None": "GRID must be a table",
    "GRID = {'n': [Path('a')]}": "must be int",
    "SETTINGS = ('n',)": "SETTINGS must be a table",
    "MEASURES = ('x')": "MEASURES must be a tuple of columns",
    "raise ValueError('broken')": "cannot be imported: ValueError: broken",
    "{}['n']": "cannot be imported: KeyError",
    "Task.__init__ = lambda task, n=0: int('n')": "mine: invalid literal",
    "SETTINGS = {'n': 2**64}": "a number beyond 64 bits",
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_in_a_file_are_told(tmp_path, slip):
    file = written(tmp_path, "n: int = 0")
    with Path(file).open("a") as code:
        code.write(f"\n\n{slip}\n")
    with pytest.raises(qv.QVLensError, match=SLIPS[slip]):
        tasks_of(read_config(file))


def test_an_array_is_a_grid(tmp_path):
    file = written(tmp_path, "n: int = 0")
    with Path(file).open("a") as code:
        code.write("\n\nimport numpy as np\nGRID = {'n': np.arange(3)}\n")
    assert [task.fields.n for task in tasks_of(read_config(file))] == [0, 1, 2]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return pd.DataFrame({'z': [1.0]})", "none of the MEASURES (x); their columns: z"),
        ("import sys\nsys.exit(3)", "SystemExit"),
    ],
)
def test_a_task_without_a_result_has_failed(tmp_path, body, said):
    file = written(tmp_path, "n: int = 0", f"if task.n == 1:\n    {body.replace(chr(10), chr(10) + '    ')}\nreturn pd.DataFrame({{'x': [1.0]}})")  # fmt: skip
    frame = qv.load_run(run(RunConfig(file, {}, {"n": (0, 1, 2)}), tmp_path / "run"))
    assert frame["status"].tolist() == ["finished", "failed", "finished"]
    assert said in frame["error"][1]


def test_what_a_task_changes_is_its_own():
    shelf = Shelf()
    for made in (dict, list, pd.DataFrame):
        first = shelf.once(made)
        if isinstance(first, list):
            first.append(1)
        else:
            first["n"] = [1]
        assert len(shelf.once(made)) == 0
