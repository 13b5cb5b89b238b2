"""What one task, one run or one file does must not reach the rows of another."""

from __future__ import annotations

import warnings
from pathlib import Path

import pandas as pd
import pytest

import qv_lens as qv
from qv_lens.runs.comparing import compare_runs
from qv_lens.runs.config import RunConfig, read_config
from qv_lens.runs.rows import load_run
from qv_lens.runs.run import Shelf, estimate, run
from qv_lens.runs.store import Store

TRIVIAL = str(Path(__file__).with_name("trivial.py"))
HEAD = """
from dataclasses import dataclass, field
from pathlib import Path
import pandas as pd
import qv_lens as qv
MEASURES = ("x",)
"""


def experiment(folder: Path, fields: str, body: str, name: str = "tried.py") -> str:
    """A file with an experiment."""
    lines = "\n".join(f"    {line}" for line in fields.split("; "))
    path = folder / name
    path.write_text(
        f"{HEAD}\n@dataclass(frozen=True)\nclass Task:\n{lines}\n\n\ndef rows(task, lens):\n{body}\n"
    )
    return str(path)


LEAK = """
    fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    before = lens.logprob(fact)
    if task.how == "patch":
        for layer in (2, 3):
            lens.apply(qv.edit(lens, fact.to("golf"), qv.FT(layer=layer, steps=2)))
    if task.how == "write":
        lens.w_out(3).zero_()
    if task.how == "raise":
        lens.apply(qv.edit(lens, fact.to("golf"), qv.FT(layer=3, steps=2)))
        raise ValueError
    return pd.DataFrame({"x": [before]})
"""


@pytest.mark.parametrize(
    ("how", "fails"), [("patch", ""), ("write", "wrote into the weights"), ("raise", "ValueError")]
)
def test_a_task_finds_the_model_as_it_was(tmp_path, how, fails):
    """An experiment that leaves its edits behind: the next task's rows are those of a fresh model."""
    path = experiment(tmp_path, "how: str; n: int; model: str = 'toy-gptj'", LEAK)
    done = run(RunConfig(path, {"how": how}, {"n": (0, 1)}), tmp_path / "out", device="cpu")
    fresh = qv.load("toy-gptj", device="cpu").logprob(
        qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    )
    frame = load_run(done)
    if fails:
        assert list(frame["status"]) == ["failed", "failed"]
        assert frame["error"].str.contains(fails).all()
    else:
        assert frame["x"].tolist() == pytest.approx([fresh, fresh], abs=1e-6)


def test_once_tells_types_apart():
    shelf = Shelf()
    assert [shelf.once(repr, value) for value in (1, True, 1.0)] == ["1", "True", "1.0"]


DATA = '    return pd.DataFrame({"x": [float(Path(task.data[0]).read_text())]})'


def test_other_data_within_a_list_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = experiment(tmp_path, "n: int; data: tuple = ('d.txt',)", DATA)
    config = RunConfig(path, {}, {"n": (0, 1)})
    run(config, "out")  # the file is absent: both tasks fail
    Path("d.txt").write_text("1")
    run(config, "out")
    assert load_run("out")["x"].tolist() == [1.0, 1.0]
    Path("d.txt").write_text("7")
    with pytest.raises(qv.QVLensError, match=r"begun when d.txt held something else"):
        run(config, "out")


def test_other_files_within_a_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/a.txt").write_text("1")
    body = '    return pd.DataFrame({"x": [float(Path(task.data, "a.txt").read_text())]})'
    config = RunConfig(experiment(tmp_path, "n: int; data: str = 'data'", body), {}, {"n": (0,)})
    run(config, "out")
    Path("data/a.txt").write_text("7")
    with pytest.raises(qv.QVLensError, match="begun when data held something else"):
        run(config, "out")


def test_the_runs_own_columns_are_refused(tmp_path):
    named = experiment(tmp_path, "status: str", '    return pd.DataFrame({"x": [1.0]})', "a.py")
    with pytest.raises(qv.QVLensError, match="has a field 'status'"):
        run(RunConfig(named, {}, {"status": ("refused", "made")}), tmp_path / "a")
    body = '    return pd.DataFrame({"x": [1.0], "error": ["none"]})'
    column = experiment(tmp_path, "n: int", body, "b.py")
    failed = load_run(run(RunConfig(column, {}, {"n": (0,)}), tmp_path / "b"))
    assert "own column 'error'" in failed["error"].item()


def test_a_named_index_is_kept_and_rows_are_compared_one_to_one(tmp_path):
    body = (
        '    frame = pd.DataFrame({"layer": [1, 1, 2], "x": [1.0, 2.0, 3.5]})\n'
        '    return frame.groupby("layer").mean() if task.mean else frame[["x"]]'
    )
    path = experiment(tmp_path, "n: int; mean: bool = True", body)
    frame = load_run(run(RunConfig(path, {}, {"n": (0,)}), tmp_path / "a"))
    assert frame[["layer", "x"]].to_numpy().tolist() == [[1.0, 1.5], [2.0, 3.5]]
    for name in ("b", "c"):
        run(RunConfig(path, {"mean": False}, {"n": (0,)}), tmp_path / name)
    both = compare_runs(tmp_path / "b", tmp_path / "c")
    assert both["x_difference"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("failed", [("b",), ("a",), ("a", "b")])
def test_a_failed_task_leaves_the_others_rows_joined_by_their_fields(tmp_path, failed):
    """Its row has no neuron, which makes the numbers of all others floats."""
    body = f"""    name = open({str(tmp_path / "name")!r}).read()
    if task.n == 2 and name in {failed!r}:
        raise ValueError("no memory")
    x = {{12: 3.5, 11: 2.0, 10: 1.0}} if name == "b" else {{10: 1.0, 11: 2.0, 12: 3.0}}
    return pd.DataFrame({{"neuron": list(x), "x": list(x.values()), "right": [name == "a"] * 3}})
"""
    path = Path(experiment(tmp_path, "n: int", body))
    path.write_text(path.read_text().replace('MEASURES = ("x",)', 'MEASURES = ("x", "right")'))
    for name in ("a", "b"):
        (tmp_path / "name").write_text(name)
        run(RunConfig(str(path), {}, {"n": (0, 1, 2)}), tmp_path / name)
    both = compare_runs(tmp_path / "a", tmp_path / "b")
    made = both[both["n"] < 2].sort_values(["n", "neuron"])
    assert made["neuron"].tolist() == [10, 11, 12] * 2
    assert made["x_difference"].tolist() == [0.0, 0.0, 0.5] * 2
    assert made["right_difference"].tolist() == [-1.0] * 6
    assert both.loc[both["n"] == 2, "x_difference"].isna().all()


def test_a_truth_that_is_missing_once_is_a_number(tmp_path):
    body = '    return pd.DataFrame({"x": [True if task.n else float("nan")]})'
    path = experiment(tmp_path, "n: int", body)
    frame = load_run(run(RunConfig(path, {}, {"n": (0, 1)}), tmp_path / "a"))
    assert frame["x"].isna().tolist() == [True, False]
    assert frame["x"].iloc[1] == 1.0


def test_runs_over_numbers_and_over_text_are_compared(tmp_path):
    path = experiment(
        tmp_path, "layer: int | str", '    return pd.DataFrame({"x": [len(str(task.layer))]})'
    )
    for name, layers in (("a", (1, 2)), ("b", (1, 2, "all"))):
        run(RunConfig(path, {}, {"layer": layers}), tmp_path / name)
    both = compare_runs(tmp_path / "a", tmp_path / "b")
    assert both["x_difference"].dropna().tolist() == [0.0, 0.0]
    assert set(both["layer"]) == {"1", "2", "all"}


def test_names_that_look_alike_are_two_models(tmp_path):
    store = Store(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("甲", "乙", "a b", "a_b"):
        store.check_model(name, f"print of {name}", "float32")
        store.check_model(name, f"print of {name}", "float32")
    with pytest.raises(qv.QVLensError, match="other weights of '甲'"):
        store.check_model("甲", "another", "float32")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"engine": "ray", "device": "cpu"}, "device has no effect with engine='ray'"),
        ({"workers": 3}, "workers has no effect with engine='inline'"),
        ({"address": "auto"}, "address has no effect"),
    ],
)
def test_an_option_without_effect_is_refused(tmp_path, options, says):
    with pytest.raises(qv.QVLensError, match=says):
        run(RunConfig(TRIVIAL, {}, {"n": (0,)}), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_whole_table_takes_the_place_of_its_parts(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(f'experiment = "{TRIVIAL}"\n[grid]\nn = [1]\neditor.lam = [5, 10]\n')
    config = read_config(path, ["editor={lam=1, L2=3}"])
    assert config.settings["editor"] == {"lam": 1, "L2": 3}
    assert "editor.lam" not in config.grid
    config = read_config(path, ["editor={L2=3}", "editor.lam=[7]"])
    assert config.grid["editor.lam"] == (7,)


def test_an_estimate_refuses_what_the_run_would(tmp_path):
    """Another config, and a folder that is no run; a folder that is not there is none of them."""
    own, other = (RunConfig(TRIVIAL, {}, {"n": n}) for n in ((0, 1), (5, 6)))
    run(own, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for config, folder in ((other, "out"), (own, "full")):
        with pytest.raises(qv.QVLensError) as of_run:
            run(config, tmp_path / folder)
        with pytest.raises(qv.QVLensError) as of_estimate:
            estimate(config, tmp_path / folder)
        assert str(of_run.value) == str(of_estimate.value)
    assert estimate(own, tmp_path / "out").todo == 0
    assert estimate(other, tmp_path / "new").source == "a probe of two tasks"
    assert not (tmp_path / "new").exists()


def test_every_value_of_a_grid_is_a_row_of_the_page(tmp_path):
    """Also of more than forty values, and of a field called text."""
    from qv_lens.reporting.runs import run_page
    from tests.reporting.test_runs_page import cells

    path = experiment(
        tmp_path, "n: int; text: str; seed: int = 0", '    return pd.DataFrame({"x": [task.n]})'
    )
    grid = {"n": tuple(range(41)), "text": ("world", "python")}
    frame = load_run(run(RunConfig(path, {}, grid), tmp_path / "out"))
    rows = cells(run_page("e", frame, None), "results")
    assert rows[0] == ["n", "text", "x"]
    assert len(rows) == 1 + 82
    failed = pd.DataFrame(
        [{"task": 99, "n": 1, "text": "world", "status": "failed", "error": "no"}]
    )
    whole = pd.concat([frame.assign(x=frame["x"] > 3), failed], ignore_index=True)
    whole.attrs.update(frame.attrs)
    assert cells(run_page("e", whole, None), "results")[0] == ["n", "text", "x"]


def test_changed_presets_and_shared_code_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("QV_LENS_CACHE", str(tmp_path / "cache"))
    package = tmp_path / "tried_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("FACTOR = 1\n\ndef scaled(n):\n    return FACTOR * n\n")
    body = '    return pd.DataFrame({"x": [float(scaled(task.n))]})'
    path = experiment(package, "n: int; model: str = 'toy-gptj'", body)
    text = Path(path).read_text()
    Path(path).write_text(
        text.replace("MEASURES", "from tried_package.parts import scaled\nMEASURES")
    )
    config = RunConfig(path, {}, {"n": (0, 1)})
    run(config, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(config, tmp_path / "out")
    presets = tmp_path / "cache" / "presets" / "toy-gptj.toml"
    presets.parent.mkdir(parents=True)
    presets.write_text("")
    with pytest.warns(UserWarning, match="the presets of toy-gptj has changed since"):
        run(config, tmp_path / "out")
    (package / "parts.py").write_text("FACTOR = 100\n\ndef scaled(n):\n    return FACTOR * n\n")
    with pytest.warns(UserWarning, match=r"parts.py and the presets of toy-gptj have changed"):
        run(config, tmp_path / "out")


def test_a_finished_run_answers_only_for_its_own_dtype(tmp_path):
    """Asked again in another dtype, a finished run would give the rows of the first."""
    body = '    return pd.DataFrame({"x": [float(lens.w_out(1).double().norm())]})'
    path = experiment(tmp_path, "n: int; model: str = 'toy-gptj'", body)
    config = RunConfig(path, {}, {"n": (0,)})
    folder = run(config, tmp_path / "out", device="cpu", dtype="bfloat16")
    assert load_run(folder).attrs["models"][0]["dtype"] == "bfloat16"
    run(config, folder, device="cpu", dtype="bfloat16")
    for again in (run, estimate):
        with pytest.raises(qv.QVLensError, match="holds rows of 'toy-gptj' in bfloat16"):
            again(config, folder, device="cpu", dtype="float32")
