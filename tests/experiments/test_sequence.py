"""The experiment of edits in a row, through `qv-lens run`'s own engine."""

from __future__ import annotations

from pathlib import Path

import pytest

import qv_lens as qv
from qv_lens.runs.config import read_config, tasks_of
from qv_lens.runs.experiment import find_experiment
from qv_lens.runs.run import run

FILE = Path(__file__).parents[2] / "experiments" / "sequence.py"


def test_a_row_of_edits_runs_keeps_its_place_and_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("QV_LENS_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("Elena Morefeld plays the sport of fencing.\n" * 3)
    changes = ['method=["FT"]', "count=3", "sample=2", f"held_out={text}"]
    config = read_config(FILE, changes, ["toy-gptj"])
    run(config, tmp_path / "run")
    frame = qv.load_run(tmp_path / "run")
    assert frame["status"].eq("finished").all()
    assert set(frame["step"]) == {0, 1, 3}
    assert set(frame["group"]) == {"newest", "first", "drawn", "model"}
    assert frame.loc[frame["metric"] == "efficacy_acc", "after"].between(0, 1).all()
    assert (tmp_path / "cache" / "sequences").exists()
    assert len(find_experiment(config.experiment).figure(frame).data) == 4


def test_an_editor_without_a_preset_is_refused_before_anything_runs(tmp_path):
    config = read_config(FILE, ['method=["FT", "ROMEO"]'], ["toy-gptj"])
    with pytest.raises(qv.QVLensError, match="'ROMEO' not found"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_experiment_plans_by_its_own_grid():
    """Nothing that a file names by itself is missing: no preset, no model, no field."""
    for file in sorted(FILE.parent.glob("**/*.py")):
        if "\nGRID = " in file.read_text(encoding="utf-8"):
            assert tasks_of(read_config(file), lambda name: 30), file
