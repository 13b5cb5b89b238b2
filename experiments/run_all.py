"""Every table and figure of the ledger but the comparison of editors, on the models measured
here.

    python -m experiments.run_all runs                     # killed at any moment, the same command goes on where it stopped
    python -m experiments.run_all runs experiments/editors.py      # or single files: the comparison of editors (hours)
    python -m experiments.ledger --collect runs            # then: the rows into experiments/results/, the ledger and the comparison

Each model gets its share of the cores. What a file prints is in runs/NAME-MODEL.log; its seconds
are printed."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments import editors
from experiments.ledger import experiments, results_of
from experiments.models import STUDIED


def files() -> list[Path]:
    """One file for each of the results that the comparison of editors does not give."""
    by_results: dict[str, Path] = {}
    for module in experiments():
        by_results.setdefault(results_of(module), Path(module.__file__ or ""))
    return [file for name, file in by_results.items() if name not in editors.RESULTS.values()]


def run(model: str, chosen: Sequence[Path], out: Path) -> bool:
    """Run one model's files one after another; whether all went well."""
    threads = max(1, (os.cpu_count() or 1) // len(STUDIED))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = Path(sys.executable).with_name("qv-lens")
    all_well = True
    for file in chosen:
        name = f"{file.resolve().parent.name}-{file.stem}-{model}"
        begin = time.perf_counter()
        with (out / f"{name}.log").open("a") as log:
            words = [command, "run", file, "--model", model, "--out", out / name]
            code = subprocess.run(words, env=environment, stdout=log, stderr=log).returncode
        all_well &= code == 0
        print(
            f"{name}: {time.perf_counter() - begin:.0f} s"
            + (f", failed ({log.name})" if code else ""),
            flush=True,
        )
    return all_well


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="*", type=Path, help="experiments' files")
    args = parser.parse_args()
    if missing := [str(file) for file in args.files if not file.exists()]:
        parser.error(f"no such file: {', '.join(missing)}")
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = args.files or files()
    with ThreadPoolExecutor(len(STUDIED)) as pool:
        succeeded = list(pool.map(lambda model: run(model, chosen, args.out), STUDIED))
    sys.exit(0 if all(succeeded) else 1)


if __name__ == "__main__":
    main()
