"""What comes together in one run folder and must not be mixed: two processes, two versions of the
code, two runs side by side."""

from __future__ import annotations

import warnings

import pytest

import qv_lens as qv
from qv_lens.errors import ConfigError
from qv_lens.runs.config import RunConfig, read_config, tasks_of
from qv_lens.runs.run import all_tasks, estimate, run
from qv_lens.runs.store import Store
from tests.runs.test_odd_runs import written

ONE = "x: float = 0.0; seed: int = 0"


def test_of_two_runs_begun_at_once_in_one_folder_one_is_refused(tmp_path, monkeypatch):
    """The other process comes between the look for a config and its writing."""
    file, out = written(tmp_path / "code", ONE), tmp_path / "out"
    mine, other = (RunConfig(file, {"x": x}, {"seed": (0, 1)}) for x in (2.0, 3.0))
    make = Store._make_folders

    def between(self, *names):
        monkeypatch.setattr(Store, "_make_folders", make)
        run(other, out)
        return make(self, *names)

    monkeypatch.setattr(Store, "_make_folders", between)
    with pytest.raises(ConfigError, match=r"another config \(different: settings\)"):
        run(mine, out)
    assert qv.load_run(out)["x"].tolist() == [3.0, 3.0]
    monkeypatch.setattr(Store, "_make_folders", between)
    run(other, out)  # the same config: they share the work
    assert qv.load_run(out).attrs["complete"]


def test_the_same_run_begun_twice_at_once_is_one_run(tmp_path, monkeypatch):
    """The other process's files are there when this one looks whether the folder is free."""
    config, out = RunConfig(written(tmp_path / "code", ONE), {}, {"seed": (0, 1)}), tmp_path / "out"
    look = Store._check_free

    def meanwhile(self):
        monkeypatch.setattr(Store, "_check_free", look)
        run(config, out)
        look(self)

    monkeypatch.setattr(Store, "_check_free", meanwhile)
    assert len(qv.load_run(run(config, out))) == 2


def test_failures_of_another_run_are_not_counted(tmp_path):
    file = written(
        tmp_path / "code", "seed: int = 0", "1 / task.seed\nreturn pd.DataFrame({'x': [1.0]})"
    )
    out = run(RunConfig(file, {}, {"seed": (0, 1)}), tmp_path / "out")
    (own,) = (out / "failed").iterdir()
    (out / "failed" / "0123456789abcdef.json").write_text(own.read_text())
    assert (qv.load_run(out)["status"] == "failed").sum() == 1
    own.write_text("")
    with pytest.raises(ConfigError, match=rf"{own.name} is damaged"):
        qv.load_run(out)


def test_rows_of_two_versions_of_the_code_are_told_of(tmp_path):
    """Also where the first version is put back before anybody looks."""
    body = "return pd.DataFrame({'x': [float(task.seed)]})"
    file = written(tmp_path / "code", "seed: int = 0", body)
    config = RunConfig(file, {}, {"seed": (0, 1)})
    out = run(config, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qv.load_run(out)
    first, _ = [out / "shards" / f"{task.id}.parquet" for task in all_tasks(config)]
    first.unlink()
    written(tmp_path / "code", "seed: int = 0", body.replace("task.seed", "task.seed + 1000"))
    with pytest.warns(UserWarning, match="changed since"):
        run(config, out)
    written(tmp_path / "code", "seed: int = 0", body)
    with pytest.warns(UserWarning, match="made by 2 versions of its code"):
        assert qv.load_run(out)["x"].tolist() == [1000.0, 1.0]


def test_a_file_beside_the_experiment_is_imported_and_watched(tmp_path):
    folder = tmp_path / "code"
    file = written(folder, "seed: int = 0", "return pd.DataFrame({'x': [float(qv_helper.K)]})")
    (folder / "qv_helper.py").write_text("K = 1\n")
    text = (folder / "mine.py").read_text()
    (folder / "mine.py").write_text(f"import qv_helper\n{text}")
    config = RunConfig(file, {}, {"seed": (0, 1)})
    out = run(config, tmp_path / "out")
    (folder / "qv_helper.py").write_text("K = 2\n")
    with pytest.warns(UserWarning, match=r"code/qv_helper\.py has changed since"):
        run(config, out)


def test_a_file_beside_another_experiment_is_not_taken_for_it(tmp_path):
    for name, value in (("one", 1), ("two", 2)):
        written(tmp_path / name, "seed: int = 0", "return pd.DataFrame({'x': [float(V)]})")
        (tmp_path / name / "qv_beside.py").write_text(f"V = {value}\n")
        file = tmp_path / name / "mine.py"
        file.write_text(f"from qv_beside import V\n{file.read_text()}")
    config = RunConfig(str(tmp_path / "one" / "mine.py"), {}, {"seed": (0,)})
    assert qv.load_run(run(config, tmp_path / "out"))["x"].tolist() == [1.0]
    with pytest.raises(ConfigError, match=r"imports qv_beside, which is .*one"):
        all_tasks(RunConfig(str(tmp_path / "two" / "mine.py"), {}, {"seed": (0,)}))


def test_what_the_file_says_by_itself_is_named_where_it_changed(tmp_path):
    file = written(tmp_path / "code", ONE)
    config = RunConfig(file, {}, {"seed": (0,)})
    out = run(config, tmp_path / "out")
    written(tmp_path / "code", ONE.replace("0.0", "1.0"))
    with pytest.raises(ConfigError, match="or a value that its Task has by itself"):
        run(config, out)


def test_a_result_that_is_no_measure_does_not_keep_runs_apart(tmp_path):
    """Seconds, or a text: the rows are joined by what both runs share."""
    body = "import time\nreturn pd.DataFrame({'x': [1.0, 2.0], 'part': ['a', 'b'], 'at': time.time_ns()})"
    file = written(tmp_path / "code", "seed: int = 0", body)
    config = RunConfig(file, {}, {"seed": (0, 1)})
    runs = [run(config, tmp_path / name) for name in ("one", "two")]
    with pytest.warns(UserWarning, match="^at holds other values in the two runs"):
        joined = qv.compare_runs(*runs)
    assert joined["x_difference"].tolist() == [0.0] * 4
    assert set(joined["part"]) == {"a", "b"}
    other = run(RunConfig(file, {}, {"seed": (7,)}), tmp_path / "three")
    with pytest.warns(UserWarning, match="nothing is compared"):  # no seed of one is the other's
        joined = qv.compare_runs(runs[0], other)
    assert len(joined) == 6


def test_rows_of_other_facts_are_not_joined_by_their_order(tmp_path):
    """Two runs that know other facts: neither's are all among the other's."""
    (tmp_path / "known").write_text("0 1 2 3")
    body = (
        f"known = Path({str(tmp_path / 'known')!r}).read_text().split()\n"
        "return pd.DataFrame({'x': [10.0 * int(k) for k in known], 'fact': known})"
    )
    config = RunConfig(written(tmp_path / "code", "seed: int = 0", body), {}, {"seed": (0,)})
    one = run(config, tmp_path / "one")
    (tmp_path / "known").write_text("0 2 3 4")
    joined = qv.compare_runs(one, run(config, tmp_path / "two")).set_index("fact")
    assert joined["x_difference"].dropna().to_dict() == {"0": 0.0, "2": 0.0, "3": 0.0}
    assert len(joined) == 5


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return pd.DataFrame({'x': []})", "This task gave no rows"),
        ("return {'x': 1.0}", "returns a pandas DataFrame, got dict"),
        ("return None", "returns a pandas DataFrame, got NoneType"),
    ],
)
def test_a_task_that_gives_nothing_has_failed(tmp_path, body, said):
    file = written(tmp_path / "code", "seed: int = 0", body)
    frame = qv.load_run(run(RunConfig(file, {}, {"seed": (0,)}), tmp_path / "out"))
    assert frame["status"].tolist() == ["failed"]
    assert said in frame["error"][0]


def test_an_estimate_names_a_damaged_file(tmp_path):
    config = RunConfig(written(tmp_path / "code", "seed: int = 0"), {}, {"seed": (0,)})
    out = run(config, tmp_path / "out")
    (shard,) = (out / "shards").iterdir()
    shard.write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=rf"{shard.name} is damaged"):
        estimate(config, out)


FIELDS = (
    "name: str = 'n'; editor: dict = field(default_factory=lambda: {'name': 'MEMIT', 'lam': 1}); "
    "maybe: str | None = 'x'; many: tuple[int, ...] = (); layer: int | Literal['all'] = 0; "
    "model: str = 'toy-gptj'; kind: Literal['layers', 'all'] = 'all'; "
    "made: dict = field(default_factory=dict, init=False)"
)


@pytest.fixture
def fields(tmp_path):
    file = written(tmp_path, FIELDS)
    text = (tmp_path / "mine.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace("import dataclass", "import dataclass, field"))
    return file


def test_settings_reach_what_a_task_has_by_itself(fields):
    def tasks(*changes, models=()):
        made = tasks_of(read_config(fields, changes, models), lambda name: 3)
        return [task.fields for task in made]

    (task,) = tasks("editor.lam=5", "maybe=null", "many=[[1, 2]]")
    assert task.editor == {"name": "MEMIT", "lam": 5}
    assert task.maybe is None
    assert task.many == (1, 2)
    assert [task.layer for task in tasks("layer=layers")] == [0, 1, 2]
    assert [task.name for task in tasks("name=layers")] == ["layers"]
    assert [task.kind for task in tasks("kind=layers")] == ["layers"]
    assert [task.editor["name"] for task in tasks("editor.name=layers")] == ["layers"]
    for text in ("{} is the capital of", "{} of {}", "[MASK] is"):
        assert [task.name for task in tasks(f"name={text}")] == [text]


@pytest.mark.parametrize(
    ("changes", "models", "said"),
    [
        (["name=[a,b]"], (), "texts within are quoted"),
        (['many=[["a"],["b"]]'], (), r"many must be tuple\[int, ...\], got \('a',\)"),
        (["model=toy-qwen3"], ("toy-gptj",), "named twice"),
    ],
)
def test_settings_that_would_be_something_else_are_refused(fields, changes, models, said):
    with pytest.raises(ConfigError, match=said):
        tasks_of(read_config(fields, changes, models), lambda name: 3)


def test_a_figure_that_fails_costs_no_rows_and_no_page(tmp_path, capsys):
    from qv_lens.cli.experiments import report
    from qv_lens.cli.experiments import run as command

    written(tmp_path, "seed: int = 0")
    (tmp_path / "mine.py").write_text(
        (tmp_path / "mine.py").read_text() + "\n\ndef figure(frame):\n    return frame.nothing\n"
    )
    with pytest.raises(ConfigError, match=r"rows are kept, and the figure of .*mine\.py"):
        command(tmp_path / "mine.py", out=tmp_path / "out")
    assert len(qv.load_run(tmp_path / "out")) == 1
    report([tmp_path / "out"])
    assert "cannot be drawn" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").exists()
