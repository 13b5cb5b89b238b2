"""Configs, the run folder, both engines: what is finished stays, what fails is told, and the rows
do not depend on who ran."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import qv_lens as qv
from qv_lens.models.zoo import weight_gigabytes
from qv_lens.plots import sweep_heatmap
from qv_lens.runs import rows as rows_module
from qv_lens.runs import run as run_module
from qv_lens.runs import store as store_module
from qv_lens.runs.config import RunConfig, read_config, tasks_of
from qv_lens.runs.run import estimate, run

TRIVIAL = str(Path(__file__).with_name("trivial.py"))
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FIGURE_2 = str(EXPERIMENTS / "ace" / "figure_2.py")


def trivial(n: int = 6, **settings) -> RunConfig:
    return RunConfig(TRIVIAL, settings, {"n": tuple(range(n)), "seed": (0, 1)})


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_a_file_becomes_tasks(tmp_path):
    path = write(
        tmp_path,
        f'experiment = "{TRIVIAL}"\n[settings]\neditor.lam = 1\n[grid]\nn = [1, 2]\neditor.clamp = [0.5, 2.0]\n',
    )
    config = read_config(path, ["seed=[3, 4]", "wait=0.5"])
    tasks = tasks_of(config)
    assert len(tasks) == 8
    assert [t.fields.n for t in tasks] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert tasks[0].fields.editor == {"lam": 1, "clamp": 0.5}
    assert {t.fields.seed for t in tasks} == {3, 4}
    assert tasks[0].fields.wait == 0.5
    assert len({t.id for t in tasks}) == 8
    again = tasks_of(read_config(path, ["seed=[4, 3]", "wait=0.5"]))
    # an id belongs to the fields, not to the order
    assert {t.id for t in again} == {t.id for t in tasks}
    layers = tasks_of(
        RunConfig(FIGURE_2, {"neurons": "top", "model": "toy-gptj"}, {"layer": "layers"}),
        lambda name: 12,
    )
    assert [t.fields.layer for t in layers] == list(range(12))


@pytest.mark.parametrize(
    ("text", "changes", "says"),
    [
        ("experiment = ", [], "not valid TOML"),
        ('experiment = "nothing.py"', [], "There is no experiment .*nothing.py"),
        ("x = 1", [], "unknown key 'x'"),
        (f'experiment = "{TRIVIAL}"\n[grid]\nn = []', [], "at least one value"),
        (f'experiment = "{TRIVIAL}"\n[grid]\nn = [1, 1]', [], "twice"),
        (f'experiment = "{TRIVIAL}"\n[grid]\nn = ["one"]', [], "must be int"),
        (f'experiment = "{TRIVIAL}"\n[grid]\nm = [1]', [], "'m'"),
        (f'experiment = "{TRIVIAL}"\n[settings]\nwait = 1.0', [], "needs a value for 'n'"),
        (f'experiment = "{TRIVIAL}"\n[settings]\nn = 1\n[grid]\nn = [1]', [], "keep one"),
        (f'experiment = "{TRIVIAL}"\n[grid]\nn = [1]', ["n"], "key=value"),
        ('experiment = "broken.py"', [], "broken.py cannot be imported: ModuleNotFoundError"),
        ('experiment = "empty.py"', [], "empty.py is not an experiment: it has no Task"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, changes, says):
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(qv.QVLensError, match=says):
        tasks_of(read_config(write(tmp_path, text), changes))


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        (
            "ace/figure_2.py",
            ["neurons=bottom"],
            "neurons 'bottom' not found. Available: top, effects, random, query",
        ),
        ("ace/figure_2.py", ['neurons=["top", "best"]'], "neurons 'best' not found"),
        (
            "ace/figure_2.py",
            ["neurons=top", "layer=last"],
            "layer 'last' not found. Available: top, all, any int",
        ),
        ("ace/figure_2.py", ["neurons=top", "layer=true"], "layer True not found"),
        ("ace/figure_2.py", ["neurons=top", "fraction=1.5"], "fraction must be above 0"),
        ("ace/figure_2.py", ["neurons=top", "prompts=0"], "prompts must be at least 1, got 0"),
        ("ace/figure_2.py", ["neurons=top", "category=weather"], "Category 'weather' not found"),
        (
            "ace/figure_2.py",
            ["neurons=top", "facts=none.json"],
            "facts: there is no file none.json",
        ),
        (
            "ace/table_1.py",
            ["category=weather"],
            "Category 'weather' not found. Available: all, author",
        ),
        ("ace/table_1.py", ["category=sport", "hops=0"], "hops must be at least 1"),
        ("ctp/figure_4.py", ["score=size"], "score 'size' not found. Available: "),
        ("ace/section_4_2.py", ["top=-1"], "top must be at least 0"),
        ("ace/neurons_27.py", ["samples=0"], "samples must be at least 1"),
        (
            "editors.py",
            ["protocol=twice"],
            "protocol 'twice' not found. Available: single, batch, consecutive, none",
        ),
        ("editors.py", ['method=["ROME", "MEMITT"]'], "Method 'MEMITT' not found"),
        ("editors.py", ["metrics=efficacy"], "Metric 'efficacy' not found"),
        ("editors.py", ['metrics=[["efficacy_acc", "fluent"]]'], "Metric 'fluent' not found"),
        ("scores/layers.py", ["layers=best"], "Layers 'best' not found"),
        ("editors.py", ["skip=x"], "skip is a letter for each layer left out"),
        ("ace/table_4.py", ["editor.lamm=3"], "Setting of ACE: 'lamm' not found"),
        ("editors.py", ["batch_size=0"], "batch_size must be at least 1"),
        ("editors.py", ["seed=-1"], "seed must be at least 0"),
        ("editors.py", ["preset=gpt2"], "no presets for the model 'gpt2'"),
        ("editors.py", ["blocks=none.txt"], "blocks: there is no file none.txt"),
    ],
)
def test_wrong_values_are_refused_before_any_task(tmp_path, file, changes, says):
    with pytest.raises(qv.QVLensError) as caught:
        run(read_config(EXPERIMENTS / file, changes, ["toy-gptj"]), tmp_path / "run")
    assert says in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_right_values_are_taken(tmp_path):
    path = write(
        tmp_path,
        f'experiment = "{FIGURE_2}"\n[settings]\nseed = 0\n[grid]\nneurons = ["top"]\nmodel = ["toy-gptj"]\n',
    )
    once = ["held_out=true", "category=sport"]
    tasks = tasks_of(read_config(path, [*once, 'layer=[0, "top", "all"]', "fraction=1"]))
    assert [task.fields.layer for task in tasks] == [0, "top", "all"]
    assert {task.fields.prompts for task in tasks} == {200}  # what the experiment itself says
    # what some editors on Windows put in front
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(tasks_of(read_config(path, [*once, "layer=all"]))) == 1
    unedited = read_config(
        EXPERIMENTS / "editors.py",
        ["data=facts", "protocol=none", "seed=0", "method=FT"],
        ["a/folder"],
    )
    assert len(tasks_of(unedited)) == 1  # without an edit no preset is needed


def test_a_task_of_parts_is_set_by_the_names_of_their_fields():
    """`count` is a field of the task's cases, `lam` one of the editor that it changes; both are
    columns of the rows."""
    config = read_config(
        EXPERIMENTS / "ace" / "table_4.py",
        ["count=7", "editor.lam=[3, 5]", "seed=0", "skip=q"],
        ["toy-gptj"],
    )
    tasks = tasks_of(config)
    assert [(task.fields.cases.count, task.fields.choice.editor) for task in tasks] == [
        (7, {"lam": 3}),
        (7, {"lam": 5}),
    ]
    assert tasks[0].values["count"] == 7
    assert tasks[0].values["editor"] == '{"lam": 3}'
    with pytest.raises(qv.QVLensError, match="'counts' not found"):
        read_and_make = read_config(EXPERIMENTS / "ace" / "table_4.py", ["counts=7"])
        tasks_of(read_and_make)


def test_what_one_model_has_besides():
    """CTP's *: all nodes of a layer but the one of T-; a gate where there is one. A value of the
    user's takes its place."""
    figure_5 = EXPERIMENTS / "ctp" / "figure_5.py"
    gates = EXPERIMENTS / "kne" / "figure_2.py"
    for model in ("toy-gptj", "toy-qwen3"):
        lens = qv.load(model)
        tops = [
            task.fields.choice.editor["top"]
            for task in tasks_of(read_config(figure_5, (), [model]))
        ]
        assert tops == [1, 5, 15, 50, 150, lens.d_mlp - 1]
        parameters = {
            task.fields.choice.editor["parameters"][0]
            for task in tasks_of(read_config(gates, (), [model]))
        }
        assert ("W_gate" in parameters) == (model == "toy-qwen3")
    assert lens.parameter(0, "W_gate").shape[1] == lens.d_mlp
    assert len(tasks_of(read_config(figure_5, ["editor.top=[2, 3]"], ["toy-gptj"]))) == 2


def test_how_much_a_model_knows_is_added_up():
    rows = [
        ("a", 0, "in", 4, 3),
        ("a", 0, "in", 4, 3),
        ("a", 0, "off", 4, 0),
        ("a", 1, "in", 4, 0),
        ("b", 2, "in", 2, 2),
    ]
    frame = pd.DataFrame(rows, columns=["model", "task", "group", "prompts_asked", "prompts_known"])
    assert rows_module.knowledge(frame).to_numpy().tolist() == [
        ["a", 2, 12, 3, 1],
        ["b", 1, 2, 2, 0],
    ]
    assert rows_module.knowledge(frame.drop(columns="prompts_known")).empty
    assert [rows_module.knows_nothing(rows) for _, rows in frame.groupby("task")] == [
        False,
        True,
        False,
    ]


def test_a_run_resumes_and_reads_back(tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    config = trivial(log=str(log))
    run(config, out)
    frame = qv.load_run(out)
    assert len(frame) == 24
    assert frame.attrs["complete"]
    assert frame.attrs["measures"] == ["draw"]
    assert set(frame.attrs["seconds"]) == set(frame["task"])
    assert all(0 < seconds < 60 for seconds in frame.attrs["seconds"].values())
    assert frame.columns[:3].tolist() == ["task", "n", "seed"]
    for name in ("versions", "machine", "command", "seeds", "models"):
        assert name in frame.attrs
    shards = sorted((out / "shards").iterdir())
    for shard in shards[:5]:
        shard.unlink()
    (out / "shards" / ".half.parquet.1.partial").write_bytes(b"PAR1")  # what a kill leaves behind
    assert len(qv.load_run(out)) == 14
    run(config, out)
    pd.testing.assert_frame_equal(qv.load_run(out), frame)
    # nothing that was finished ran again
    assert len(log.with_suffix(".txt").read_text().split()) == 12 + 5


def test_failed_tasks_are_marked_and_the_rest_goes_on(tmp_path):
    run(trivial(4, do="raise"), tmp_path / "run")
    frame = qv.load_run(tmp_path / "run")
    failed = frame[frame["status"] == "failed"]
    assert failed["n"].tolist() == [1, 1]
    assert "ValueError: task one is broken" in failed["error"].iloc[0]
    assert (frame["status"] == "finished").sum() == 12
    assert len(frame.attrs["failed"]) == 2


def test_ctrl_c_leaves_a_run_that_resumes(tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    with pytest.raises(KeyboardInterrupt):
        run(trivial(5, do="stop", log=str(log)), out)
    frame = qv.load_run(out)
    assert len(frame) == 12
    assert not frame.attrs["complete"]


def test_another_config_and_foreign_folders_are_refused(tmp_path):
    run(trivial(2), tmp_path / "run")
    before = qv.load_run(tmp_path / "run")
    with pytest.raises(qv.QVLensError, match="another config"):
        run(trivial(3), tmp_path / "run")
    pd.testing.assert_frame_equal(qv.load_run(tmp_path / "run"), before)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(qv.QVLensError, match="not a run"):
        run(trivial(2), tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(qv.QVLensError, match="Cannot write"):
        run(trivial(2), tmp_path / "file" / "run")
    with pytest.raises(qv.QVLensError, match="not a run folder"):
        qv.load_run(tmp_path / "mine")


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    out, written = tmp_path / "run", []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qv_lens.files.os.fsync", full)
    with pytest.raises(qv.QVLensError, match="No space left on device"):
        run(trivial(), out)
    kept = len(qv.load_run(out)) // 2
    assert kept == 4  # config.json came first
    assert not list(out.rglob("*.partial"))
    monkeypatch.undo()
    run(trivial(), out)
    assert len(qv.load_run(out)) == 24


@pytest.mark.parametrize("left", ["nothing", "a mark of failure"])
def test_a_kill_between_two_writes_leaves_a_run_that_resumes(tmp_path, monkeypatch, left):
    """Before config.json is there; and between a task's rows and the mark of its earlier
    failure."""
    out = tmp_path / "run"
    if left == "nothing":
        monkeypatch.setattr(
            store_module.Store, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            run(trivial(2), out)
        monkeypatch.undo()
        run(trivial(2), out)
    else:
        run(trivial(2), out)
        tasks = tasks_of(trivial(2))
        store_module.Store(out).fail(tasks[0], "an old failure")
        run(trivial(2), out)
    frame = qv.load_run(out)
    assert frame["status"].eq("finished").all()
    assert len(frame) == 8
    assert frame.attrs["complete"]


def test_rows_of_changed_files_are_not_mixed(tmp_path):
    data = tmp_path / "data.json"
    data.write_text("[1]")
    config = trivial(2, editor={}, log=str(data))
    store_module.Store.open(tmp_path / "run", config, tasks_of(config))
    store_module.Store.open(tmp_path / "run", config, tasks_of(config))
    data.write_text("[2]")
    with pytest.raises(qv.QVLensError, match="held something else"):
        store_module.Store.open(tmp_path / "run", config, tasks_of(config))


@pytest.mark.parametrize("do", ["mixed", "list"])
def test_rows_that_cannot_be_stored_are_a_failed_task(tmp_path, do):
    run(trivial(3, do=do), tmp_path / "run")
    frame = qv.load_run(tmp_path / "run")
    assert frame[frame["status"] == "failed"]["n"].tolist() == [1, 1]
    assert frame.attrs["complete"]


def test_what_is_damaged_or_missing_is_said(tmp_path):
    run(trivial(2), tmp_path / "run")
    shards = sorted((tmp_path / "run" / "shards").iterdir())
    whole = shards[0].read_bytes()
    shards[0].unlink()
    assert not qv.load_run(tmp_path / "run").attrs["complete"]
    shards[0].write_bytes(whole[:50])
    with pytest.raises(qv.QVLensError, match="is damaged"):
        qv.load_run(tmp_path / "run")
    run(RunConfig(TRIVIAL, {"n": 1, "do": "raise"}, {"seed": (0,)}), tmp_path / "failed")
    with pytest.raises(qv.QVLensError, match="no task is finished"):
        qv.compare_runs(tmp_path / "failed", tmp_path / "failed")


def test_settings_of_tuples_resume(tmp_path):
    config = RunConfig(TRIVIAL, {"editor": {"layers": (1, 2)}}, {"n": (1, 2)})
    run(config, tmp_path / "run")
    shards = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "shards").iterdir()}
    run(config, tmp_path / "run")
    assert len(shards) == 2
    again = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "shards").iterdir()}
    assert again == shards  # no task was done again


def test_other_weights_under_the_same_name_are_refused(tmp_path):
    store = store_module.Store.open(tmp_path, trivial(1), tasks_of(trivial(1)))
    store.check_model("org/model", "aaaa", "float32")
    store.check_model("org/model", "aaaa", "float32")
    with pytest.raises(qv.QVLensError, match="other weights"):
        store.check_model("org/model", "bbbb", "float32")


def test_two_runs_side_by_side(tmp_path):
    run(trivial(3), tmp_path / "a")
    run(trivial(4), tmp_path / "b")
    frame = qv.compare_runs(tmp_path / "a", tmp_path / "b")
    assert len(frame) == 16
    assert (frame["draw_difference"].dropna() == 0).all()
    assert frame["draw_difference"].isna().sum() == 4


def test_estimates_write_nothing(tmp_path):
    cost = estimate(trivial(3, wait=0.01), tmp_path / "run")
    assert (len(cost.tasks), cost.todo) == (6, 6)
    assert 0.05 < cost.seconds < 5
    assert not (tmp_path / "run").exists()
    run(trivial(3, wait=0.01), tmp_path / "run")
    assert estimate(trivial(3, wait=0.01), tmp_path / "run").todo == 0
    done = subprocess.run(
        [sys.executable, "-m", "qv_lens", "run", str(write(tmp_path, f'experiment = "{TRIVIAL}"\n[grid]\nn = [1, 2]')), "--dry-run"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "2 tasks, 2 to do" in done.stdout, done.stderr


ABLATION = RunConfig(
    FIGURE_2,
    {"prompts": 8, "model": "toy-gptj"},
    {"neurons": ("top", "random", "query"), "fraction": (0.1,), "layer": (1, 3), "seed": (0, 1)},
)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_figure_2_against_an_ablation_by_hand(tmp_path, one_thread):
    """The same accuracy from zeroed rows of W_out, without hooks."""
    run(ABLATION, tmp_path / "run")
    frame = qv.load_run(tmp_path / "run")
    assert len(frame) == 24
    assert (frame["status"] == "finished").all()
    assert frame.attrs["models"][0]["name"] == "toy-gptj"
    from experiments.ace.figure_2 import Task, choose, draw

    lens, task = qv.load("toy-gptj"), Task("toy-gptj", "top", 3, 0.1, prompts=8)
    drawn = draw(lens, task)
    neurons = choose(lens, task)
    assert len(neurons) == round(0.1 * lens.d_mlp)
    lens.w_out(3)[torch.tensor([n for _, n in neurons])] = 0
    for group, facts in drawn.groups.items():
        logits = lens.next_token_logits(facts)
        hits = [
            int(row.argmax()) == lens.answer_ids(fact)[0]
            for row, fact in zip(logits, facts, strict=True)
        ]
        row = frame[
            (frame["neurons"] == "top")
            & (frame["layer"] == 3)
            & (frame["seed"] == 0)
            & (frame["group"] == group)
        ]
        assert row["accuracy"].item() == pytest.approx(sum(hits) / len(hits))
    figure = qv.plots.sweep_heatmap(
        frame, ["group", "neurons"], "layer", "drop_points", "t", "points"
    )
    assert figure.data[0].z.shape == (6, 2)


@pytest.fixture(scope="module")
def ray():
    """Two CPUs of Ray for this file's tests."""
    module = pytest.importorskip("ray", reason="Ray is not installed")
    module.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield module
    module.shutdown()


def test_ray_gives_the_same_rows(tmp_path, ray, one_thread):
    run(ABLATION, tmp_path / "inline")
    run(ABLATION, tmp_path / "ray", engine="ray", workers=2)
    inline, other = (qv.load_run(tmp_path / name) for name in ("inline", "ray"))
    pd.testing.assert_frame_equal(inline, other)


def test_a_killed_worker_changes_no_row(tmp_path, ray):
    run(trivial(8), tmp_path / "inline")
    log = tmp_path / "log"
    run(
        trivial(8, do="die once", log=str(log), wait=0.01),
        tmp_path / "ray",
        engine="ray",
        workers=2,
    )
    columns = ["n", "seed", "part", "draw", "status"]
    inline, other = (qv.load_run(tmp_path / name)[columns] for name in ("inline", "ray"))
    pd.testing.assert_frame_equal(inline, other, check_like=True)
    # it did die, and was tried again
    assert log.with_suffix(".txt").read_text().split().count("1") > 2


def test_a_task_that_takes_its_worker_along_is_marked(tmp_path, ray):
    run(trivial(5, do="die"), tmp_path / "run", engine="ray", workers=2)
    frame = qv.load_run(tmp_path / "run")
    assert frame[frame["status"] == "failed"]["n"].unique().tolist() == [1]
    assert "worker died" in frame[frame["status"] == "failed"]["error"].iloc[0]
    assert (frame["status"] == "finished").sum() == 2 * 2 * 4
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["failed"]


def test_an_experiment_of_ones_own_and_what_failed(tmp_path):
    """A file beside a TOML file; the page names the task that failed, and draws values as names,
    not on a scale."""
    shutil.copy(Path(__file__).with_name("trivial.py"), tmp_path / "mine.py")
    (tmp_path / "my.toml").write_text(
        'experiment = "mine.py"\n[settings]\ndo = "raise"\n[grid]\nn = [0, 1]\n'
    )
    command = Path(sys.executable).with_name("qv-lens")
    for words, code in ((("run", "my.toml", "--out", "out"), 1), (("report", "out"), 0)):
        done = subprocess.run(
            [command, *words], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Failed</h2>" in page
    assert "ValueError: task one is broken" in page


def test_an_experiment_on_ray_that_belongs_to_no_package(tmp_path, ray):
    shutil.copy(Path(__file__).with_name("trivial.py"), tmp_path / "mine.py")
    config = read_config(tmp_path / "mine.py", ["n=[0, 1, 2]"])
    run(config, tmp_path / "run", engine="ray", workers=2)
    assert qv.load_run(tmp_path / "run")["status"].eq("finished").all()


def test_what_is_computed_once_is_known_by_its_arguments():
    """Another argument is another key, and another model clears the shelf."""
    from qv_lens.runs.run import Shelf

    shelf, asked = Shelf(), []

    def double(number: int) -> int:
        asked.append(number)
        return 2 * number

    assert [shelf.once(double, n) for n in (1, 2, 1, 2)] == [2, 4, 2, 4]
    assert asked == [1, 2]
    shelf.lens("toy-gptj")
    assert shelf.once(double, 1) == 2
    assert asked == [1, 2, 1]


def test_once_refuses_what_it_would_remember_wrongly():
    """A value asked first under an intervention would be the changed model's; a list is not a key."""
    from qv_lens.runs.run import Shelf

    shelf = Shelf()
    lens = shelf.lens("toy-gptj")
    fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    with (
        lens.intervene(qv.Zero(qv.NeuronSet.of([(2, 297)]))),
        pytest.raises(qv.QVLensError, match="ask it before the block"),
    ):
        shelf.once(lens.logprob, fact)
    clean = shelf.once(lens.logprob, fact)
    with lens.intervene(qv.Zero(qv.NeuronSet.of([(2, 297)]))):
        assert shelf.once(lens.logprob, fact) == clean
    with pytest.raises(qv.QVLensError, match="a tuple instead of a list"):
        shelf.once(lens.logprob, [fact])


def test_changed_code_is_told(tmp_path):
    """Finished rows are kept, and it is said that the file has changed since."""
    shutil.copy(Path(__file__).with_name("trivial.py"), tmp_path / "mine.py")
    config = read_config(tmp_path / "mine.py", ["n=[0, 1]"])
    run(config, tmp_path / "run")
    before = qv.load_run(tmp_path / "run")
    with (tmp_path / "mine.py").open("a") as file:
        file.write("# another thought\n")
    with pytest.warns(UserWarning, match=r"mine.py has changed since .*raise VERSION"):
        run(config, tmp_path / "run")
    pd.testing.assert_frame_equal(qv.load_run(tmp_path / "run"), before)


def test_what_was_varied_is_no_scale():
    frame = pd.DataFrame({"layer": [0, 5], "group": "a", "value": [1.0, 2.0]})
    figure = sweep_heatmap(frame, ["group"], "layer", "value", "title", "points")
    assert figure.layout.xaxis.type == "category"
    assert list(figure.data[0].x) == ["0", "5"]


def test_the_size_of_weights_is_that_of_what_is_loaded(tmp_path):
    """In GB of 10^9 bytes, at the type asked for: by name, of a folder, of a GGUF file."""
    gguf = pytest.importorskip("gguf")
    lens = qv.load("toy-qwen3")
    held = sum(weight.numel() * weight.element_size() for weight in lens.hf.parameters()) / 1e9
    folder = lens.save(tmp_path / "saved")
    for name in ("toy-qwen3", str(folder)):
        for dtype, times in ((None, 1), ("bfloat16", 0.5), ("float64", 2), (torch.float16, 0.5)):
            assert weight_gigabytes(name, dtype) == pytest.approx(held * times)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("x", np.zeros((30, 50), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert weight_gigabytes(str(tmp_path / "a.gguf")) == pytest.approx(6e-6)  # taken as float32
    assert weight_gigabytes(str(tmp_path / "a.gguf"), "bfloat16") == pytest.approx(3e-6)
    assert weight_gigabytes("some/model") == 0.0  # not here
    (tmp_path / "torn.safetensors").write_bytes(b"0" * 1500)
    with pytest.raises(qv.QVLensError, match="Cannot read the weights"):
        weight_gigabytes(str(tmp_path))


def test_the_estimate_is_of_the_weights_at_the_type_that_is_asked(monkeypatch):
    monkeypatch.setattr(run_module, "run_task", lambda *_: SimpleNamespace(error="", seconds=1.0))
    config = read_config(EXPERIMENTS / "ablation.py", ["model=toy-qwen3"])
    held = [estimate(config, dtype=dtype).gigabytes for dtype in (None, "bfloat16", "float64")]
    assert held == pytest.approx([2_756_480 * size / 1e9 for size in (4, 2, 8)])
