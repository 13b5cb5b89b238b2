"""What a sweep costs beside its tasks, and what a second worker gains.

    OMP_NUM_THREADS=1 python benchmarks/runs.py

1. 2,000 tasks that do nothing, inline: milliseconds per task (rows to Parquet, synced, renamed).
2. The ablation sweep on toy-gptj (96 tasks), one torch thread per worker: 1 Ray worker against 2,
   start-up left out (each worker first runs a task of another run).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import ray

import qv_lens as qv
from qv_lens.runs.config import RunConfig
from qv_lens.runs.run import run

REAL = {"prompts": 40, "model": "toy-gptj"}


def sweep(folder: Path, workers: int, seeds: range) -> float:
    """Seconds between the first and the last shard of a run, that is without starting workers and
    loading models."""
    config = RunConfig(
        "experiments/ablation.py",
        REAL,
        {
            "neurons": ("top", "random"),
            "layer": (1, 2, 3, 4, 5, 6),
            "fraction": (0.01, 0.1),
            "seed": tuple(seeds),
        },
    )
    run(config, folder, engine="ray", workers=workers)
    written = sorted(path.stat().st_mtime for path in (folder / "shards").iterdir())
    count = len(written)
    return (written[-1] - written[workers - 1]) * count / (count - workers)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        start = time.perf_counter()
        run(
            RunConfig("tests/runs/trivial.py", {}, {"n": tuple(range(2000))}),
            Path(name) / "trivial",
        )
        each = (time.perf_counter() - start) / 2000
        start = time.perf_counter()
        rows = len(qv.load_run(Path(name) / "trivial"))
        print(
            f"2,000 trivial tasks inline: {1000 * each:.2f} ms a task; reading {rows} rows back: "
            f"{time.perf_counter() - start:.1f} s"
        )
        for attempt in range(3):
            seconds = {}
            for workers in (1, 2):
                ray.init(
                    num_cpus=workers,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="error",
                )
                seconds[workers] = sweep(Path(name) / f"{attempt}-{workers}", workers, range(4))
                ray.shutdown()
            print(
                f"ablation, 96 tasks: 1 worker {seconds[1]:.1f} s, 2 workers {seconds[2]:.1f} s, "
                f"ratio {seconds[1] / seconds[2]:.2f}"
            )


if __name__ == "__main__":
    main()
