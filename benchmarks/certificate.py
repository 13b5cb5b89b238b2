"""The certificate of `topk`: is it the exact top k, and how many neurons were scored?

    python benchmarks/certificate.py       # 200 prompts, both bundled models, frozen and full, k = 10, 100, 300

For every prompt the set found by `topk` is compared with the one found by scoring every neuron; a
neuron that differs counts only if its score differs from the one it displaced by more than rounding
(1e-5): all else is a tie."""

from __future__ import annotations

import argparse
import random

import numpy as np

import qv_lens as qv
from qv_lens.world import cases as world_cases
from qv_lens.world import generator


def compare(lens: qv.Lens, facts: list[qv.Fact], norm: str, k: int) -> tuple[int, float, list[int]]:
    """Prompts whose sets differ beyond ties, the largest difference of ranked scores, neurons
    scored per prompt."""
    trace = lens.trace(facts)
    full = qv.value_neurons(lens, trace, k, norm=norm)
    short = qv.value_neurons(lens, trace, k, norm=norm, method="topk")
    by_prompt = [
        np.stack(list(s.frame.groupby("prompt")["score"].apply(np.array))) for s in (full, short)
    ]
    gap = np.abs(by_prompt[0] - by_prompt[1]).max(1)
    return int((gap > 1e-5).sum()), float(gap.max()), short.settings["scored"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=200)
    arguments = parser.parse_args()
    world = generator.build(0)
    facts = random.Random(0).sample(
        [world_cases.as_fact(world, chain) for chain in world.facts()], arguments.prompts
    )
    print("model      norm      k    differ  largest gap   scored of 6,144: median, most")
    for name in ("toy-gptj", "toy-qwen3"):
        lens = qv.load(name)
        for norm in ("frozen", "full"):
            for k in (10, 100, 300):
                parts = [
                    compare(lens, facts[i : i + 20], norm, k) for i in range(0, len(facts), 20)
                ]
                scored = [n for part in parts for n in part[2]]
                differ, gap = sum(part[0] for part in parts), max(part[1] for part in parts)
                print(
                    f"{name:<10} {norm:<7} {k:>4} {differ:>7}   {gap:>10.1e}   "
                    f"{int(np.median(scored)):>8} {max(scored):>8}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
