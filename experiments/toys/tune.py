"""Every editor on a bundled model: settings chosen on some facts, reported on others, single edits.

    python -m experiments.toys.tune toy-gptj --tune 8 --test 50 --threads 1 \\
        --out experiments/results
    python -m experiments.toys.tune toy-qwen3 --tune 8 --test 50 --threads 1 \\
        --out experiments/results

For each method and position (subject's last token; prompt's last token where a method has a
position) every setting of the grid is tried on `--tune` facts; the one with the best sum of
efficacy, paraphrase and specificity is run on `--test` others."""

from __future__ import annotations

import argparse
import itertools
import random
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import qv_lens as qv
from qv_lens.editing.statistics import covariance
from qv_lens.evaluation.protocols import evaluate
from qv_lens.evaluation.summary import summary
from qv_lens.world import cases as world_cases
from qv_lens.world import generator

SEARCH: dict[str, Any] = {"steps": 40, "lr": 1.0, "weight_decay": 0.1, "clamp": 2.0}
# z* at one FFN's output needs room
WIDE: dict[str, Any] = {"steps": 60, "lr": 2.0, "weight_decay": 0.01, "clamp": 30.0}
LAM = 5.0  # k C0^-1 k is about 1,000 for these models' keys


def at_the_subject() -> dict[str, list]:
    """Settings tried at the subject's last token, and of the methods without a position."""
    return {
        "ROME": [qv.ROME(layer=layer, **WIDE) for layer in (3, 4, 5)],
        "RROME": [qv.RROME(layer=layer, **WIDE) for layer in (3, 4, 5)],
        "EMMET": [
            qv.EMMET(layers=(layer,), **{**SEARCH, "clamp": clamp})
            for layer in (2, 3, 4)
            for clamp in (2.0, 4.0, 8.0)
        ],
        "MEMIT": [qv.MEMIT(layers=layers, lam=LAM, **SEARCH) for layers in ((2, 3), (3, 4, 5))],
        "PMET": [  # as its paper writes: the FFN alone
            qv.PMET(layers=layers, lam=LAM, **{**SEARCH, "clamp": clamp})
            for layers in ((3, 4, 5), (2, 3, 4, 5))
            for clamp in (2.0, 4.0)
        ],
        "AlphaEdit": [
            qv.AlphaEdit(layers=(3, 4, 5), threshold=t, L2=1e-3, **SEARCH) for t in (1e-2, 1e-1)
        ],
        "IFMET": [
            qv.IFMET(layers=layers, deep_layers=deep, lam=LAM, **{**SEARCH, "clamp": 5.0})
            for layers, deep in (((2, 3, 4), (6, 7)), ((3, 4, 5), (8, 9)))
        ],
        "ACE": [
            qv.ACE(value_layers=v, query_layers=q, lam=LAM, attention=attention, **SEARCH)
            for v, q, attention in (
                ((4, 5), (2, 3), False),
                ((3, 4), (1, 2), False),
                ((4, 5), (2, 3), True),
            )
        ]
        + [
            qv.ACE(value_layers=(4, 5), query_layers=(2, 3), lam=lam, **{**SEARCH, "clamp": 4.0})
            for lam in (LAM, 1.0)
        ],
        "FTL": [
            *(
                qv.FTL(layer=layer, lr=2e-2, clamp=clamp)
                for layer in (2, 3)
                for clamp in (0.06, 0.1)
            ),
            *(
                qv.FTL(layer=layer, lr=1e-2, clamp=clamp, steps=60)
                for layer in (3, 4)
                for clamp in (0.12, 0.2)
            ),
            *(
                qv.FTL(layer=layer, lr=5e-3, clamp=0.1, steps=150, objective="target_new")
                for layer in (2, 3)
            ),
            qv.FTL(layer=2, lr=2e-2, clamp=0.08, steps=150),
        ],
        "KNE": [
            *(
                qv.KNE(lr=lr, share=share, steps=50, together=True)
                for lr, share in ((3e-2, 0.02), (1e-2, 0.1), (3e-2, 0.1))
            ),
            qv.KNE(lr=3e-2, share=0.02, steps=50, together=True, axis="row"),
        ],
        "CTP": [
            qv.CTP(alone=(lr, 50, stop)) for lr, stop in ((3e-3, 0.1), (3e-3, 0.4), (1e-3, 0.1))
        ],
        "LoRA": [
            qv.LoRA(layers=layers, steps=30, lr=lr, dropout=0.0, stop=stop)
            for layers, lr, stop in (
                ((2, 3, 4), 5e-3, 0.3),
                ((2, 3, 4), 2e-3, 0.3),
                (tuple(range(1, 7)), 2e-3, 0.3),
                ((2, 3, 4), 1e-3, 0.1),
            )
        ],
        "AdaLoRA": [
            qv.AdaLoRA(layers=(2, 3, 4), steps=steps, lr=lr, dropout=0.0)
            for steps, lr in ((30, 1e-2), (50, 1e-2), (50, 3e-2), (30, 5e-3))
        ],
        "FT": [qv.FT(layer=layer, lr=1e-2) for layer in (2, 3)],
        "RECT": [qv.RECT(layers=(3, 4, 5), lam=LAM, **SEARCH)],
        "PRUNE": [qv.PRUNE(layers=(3, 4, 5), lam=LAM, **SEARCH)],
        "KN": [qv.KN(threshold=threshold) for threshold in (0.1, 0.5)],
        "KN.easyedit": [qv.KN(rule="easyedit", threshold=threshold) for threshold in (0.1, 0.5)],
    }


def at_the_end() -> dict[str, list]:
    """Settings tried at the prompt's last token."""
    last: dict[str, Any] = {**SEARCH, "fact_token": "last"}
    wide: dict[str, Any] = {**WIDE, "fact_token": "last"}
    return {
        "ROME": [qv.ROME(layer=9, **wide)],
        "RROME": [qv.RROME(layer=9, **wide)],
        "EMMET": [qv.EMMET(layers=(9,), **last)],
        "MEMIT": [qv.MEMIT(layers=(8, 9, 10), lam=lam, **last) for lam in (LAM, 30.0)],
        "PMET": [qv.PMET(layers=(8, 9, 10), lam=LAM, **last)],
        "AlphaEdit": [qv.AlphaEdit(layers=(8, 9, 10), threshold=1e-1, L2=1e-3, **last)],
        "ACE": [
            qv.ACE(value_layers=(8, 9), query_layers=(5, 6), lam=lam, **last) for lam in (LAM, 30.0)
        ],
    }


def keep(path: Path, new: pd.DataFrame, keys: list[str]) -> None:
    """Write the new rows in the place of those with the same keys."""
    if path.exists():
        old = pd.read_csv(path)
        replaced = pd.MultiIndex.from_frame(old[keys]).isin(pd.MultiIndex.from_frame(new[keys]))
        new = pd.concat([old[~replaced], new], ignore_index=True)
    new.to_csv(path, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=("toy-gptj", "toy-qwen3"))
    parser.add_argument("--tune", type=int, default=8)
    parser.add_argument("--test", type=int, default=50)
    parser.add_argument(
        "--methods", nargs="+", help="only these; their rows of an earlier result are replaced"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    lens, world = qv.load(args.model), generator.build(0)
    texts = [
        generator.text(d)
        for d in itertools.islice(generator.documents(world, random.Random("statistics")), 3000)
    ]
    statistics = covariance(lens, texts, range(1, lens.n_layers), modules=("ffn", "attn"))
    cases = world_cases.edit_cases(world, args.tune + args.test)
    tune, test = cases[: args.tune], cases[args.tune :]
    tuned, results = [], []
    for position, grids in (("subject_last", at_the_subject()), ("last", at_the_end())):
        for name, grid in grids.items():
            if args.methods and name not in args.methods:
                continue
            scored = []
            for editor in grid:
                start = time.monotonic()
                table = summary(
                    evaluate(lens, tune, editor=editor, statistics=statistics)
                ).set_index("metric")["after"]
                score = table["efficacy_acc"] + table["paraphrase_acc"] + table["specificity_acc"]
                scored.append((score, editor))
                seconds = (time.monotonic() - start) / len(tune)
                tuned.append(
                    {
                        "model": args.model,
                        "editor": repr(editor),
                        **table.round(3),
                        "seconds": seconds,
                    }
                )
                print(name, position, editor, table.round(3).to_dict(), flush=True)
            best = max(scored, key=lambda pair: pair[0])[1]
            start = time.monotonic()
            table = summary(evaluate(lens, test, editor=best, statistics=statistics))
            seconds = (time.monotonic() - start) / len(test)
            results.append(
                table.assign(
                    model=args.model,
                    method=name,
                    position=position,
                    editor=repr(best),
                    seconds=seconds,
                )
            )
            print(
                "TEST",
                name,
                position,
                table.set_index("metric")["after"].round(3).to_dict(),
                flush=True,
            )
            keep(args.out / f"edit_{args.model}.csv", pd.concat(results), ["position", "method"])
            keep(args.out / f"edit_{args.model}_grid.csv", pd.DataFrame(tuned), ["editor"])


if __name__ == "__main__":
    main()
