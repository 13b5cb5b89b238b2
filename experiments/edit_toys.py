"""MEMIT, PMET and ACE on a bundled model: settings chosen on some facts, reported on others, single edits.

    python experiments/edit_toys.py toy-gptj --tune 16 --test 50 --threads 1 --out experiments/results
    python experiments/edit_toys.py toy-qwen3 --tune 16 --test 50 --threads 1 --out experiments/results

For each method and position (subject's last token, prompt's last token) every setting of the grid is tried on
`--tune` facts; the one with the best sum of efficacy, paraphrase and specificity is run on `--test` other facts.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from pathlib import Path

import pandas as pd
import torch

import qv_lens as qv
from qv_lens.editing.statistics import covariance
from qv_lens.evaluation.protocols import evaluate, summary
from qv_lens.facts import miniworld, worldrecords

LAYERS = {"subject_last": ((2, 3), (1, 2, 3), (3, 4, 5)), "last": ((7, 8), (8, 9, 10))}
GROUPS = {  # (value layers, query layers)
    "subject_last": (((4, 5), (2, 3)), ((3, 4), (1, 2)), ((3,), (1, 2))),
    "last": (((8, 9), (5, 6)), ((9, 10), (7, 8))),
}
LAMBDAS = {"subject_last": (5.0,), "last": (5.0, 30.0)}  # k C0^-1 k is about 1,000 for these models' keys


def grid(position: str) -> list:
    """Every setting tried."""
    common = {"steps": 40, "lr": 1.0, "weight_decay": 0.1, "clamp": 2.0, "fact_token": position}
    return [
        editor
        for lam in LAMBDAS[position]
        for editor in (
            *(qv.MEMIT(layers=layers, lam=lam, **common) for layers in LAYERS[position]),
            *(qv.PMET(layers=layers, lam=lam, **common) for layers in LAYERS[position]),
            *(qv.ACE(value_layers=v, query_layers=q, lam=lam, **common) for v, q in GROUPS[position]),
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("toy-gptj", "toy-qwen3"))
    parser.add_argument("--tune", type=int, default=16)
    parser.add_argument("--test", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    lens, world = qv.load(args.model), miniworld.build(0)
    texts = [miniworld.text(d) for d in itertools.islice(miniworld.documents(world, random.Random("statistics")), 3000)]
    statistics = covariance(lens, texts, range(1, lens.n_layers))
    cases = worldrecords.edit_cases(world, args.tune + args.test)
    tune, test = cases[: args.tune], cases[args.tune :]
    tuned, results = [], []
    for position in ("subject_last", "last"):
        best: dict[str, tuple[float, object]] = {}
        for editor in grid(position):
            start, name = time.monotonic(), type(editor).__name__
            table = summary(evaluate(lens, tune, editor, statistics=statistics)).set_index("metric")["after"]
            score = table["efficacy_acc"] + table["paraphrase_acc"] + table["specificity_acc"]
            tuned.append({"model": args.model, "editor": repr(editor), **table.round(3), "seconds": time.monotonic() - start})
            print(name, position, editor, table.round(3).to_dict(), flush=True)
            if name not in best or score > best[name][0]:
                best[name] = (score, editor)
        for name, (_, editor) in best.items():
            start = time.monotonic()
            table = summary(evaluate(lens, test, editor, statistics=statistics))
            seconds = (time.monotonic() - start) / len(test)
            results.append(table.assign(model=args.model, method=name, position=position, editor=repr(editor), seconds=seconds))
            print("TEST", name, position, table.set_index("metric")["after"].round(3).to_dict(), flush=True)
            pd.concat(results).to_csv(args.out / f"edit_{args.model}.csv", index=False)
            pd.DataFrame(tuned).to_csv(args.out / f"edit_{args.model}_grid.csv", index=False)


if __name__ == "__main__":
    main()
