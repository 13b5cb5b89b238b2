"""Every file of the ledger but the comparison of editors, on both bundled models side by side.

    python experiments/run_all.py runs               # killed at any moment, the same command goes on where it stopped
    python experiments/run_all.py runs editors       # or files by name: the comparison of editors (hours)
    python experiments/ledger.py --collect runs      # then: the rows into experiments/results/, the ledger and the comparison

Each model gets its share of the cores. A file's output is in runs/FILE-MODEL.log; its seconds are printed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from claims import CLAIMS
from ledger import HERE, PARTS, TOYS

#: a file's values that one model alone has: W_gate is a weight of a gated FFN; CTP's * is all nodes of a layer but the one of T-
OF_ONE = {
    ("kne_figure2", "toy-qwen3"): 'editor.parameters=[["W_gate"]]',
    ("ctp_figure5", "toy-gptj"): "editor.top=[511]",
    ("ctp_figure5", "toy-qwen3"): "editor.top=[383]",
}


def runs(model: str, files: Sequence[str] = ()) -> list[tuple[str, list[str]]]:
    """One model's run folders, as `ledger.py --collect` knows them, and what follows `qv-lens run` for each."""
    found = []
    for file in files or sorted({claim.data for claim in CLAIMS} - set(PARTS)):
        asked = [str(HERE / f"{file}.toml"), "--model", model]
        found.append((f"{file}-{model}", asked))
        if (file, model) in OF_ONE:
            found.append((f"{file}-{model}-more", [*asked, "--set", OF_ONE[file, model]]))
    return found


def run(model: str, files: Sequence[str], out: Path) -> bool:
    """Run one model's files one after another; whether all went well."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(TOYS)))}
    command, failed = [str(Path(sys.executable).with_name("qv-lens")), "run"], False
    for name, asked in runs(model, files):
        begin = time.perf_counter()
        with (out / f"{name}.log").open("a") as log:
            code = subprocess.run([*command, *asked, "--out", out / name], env=environment, stdout=log, stderr=log).returncode
        failed |= code != 0
        print(f"{name}: {time.perf_counter() - begin:.0f} s" + (f", failed ({log.name})" if code else ""), flush=True)
    return not failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="*", help="names of files in experiments/, without .toml")
    args = parser.parse_args()
    if unknown := [file for file in args.files if not (HERE / f"{file}.toml").exists()]:
        parser.error(f"no such file in {HERE}: {', '.join(unknown)}")
    args.out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(TOYS)) as pool:
        went = list(pool.map(lambda model: run(model, args.files, args.out), TOYS))
    sys.exit(0 if all(went) else 1)


if __name__ == "__main__":
    main()
