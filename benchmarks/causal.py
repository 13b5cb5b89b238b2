"""Causal truth: how well each score predicts what log p of the answer really loses when a neuron is
zeroed.

    python benchmarks/causal.py            # both bundled models, 12 prompts each, every neuron of every layer

1. Zero each FFN neuron alone, at the last token, in a real forward pass: truth = log p(clean) - log
   p(zeroed).
2. Rank the neurons of each prompt by each score; Spearman's rho over all neurons and overlap of the
   100 best, averaged over the prompts.
3. `Suppress`: take each of the 200 best query neurons (and 200 others) out of what the 30 best
   value neurons read, alone, and compare the loss of log p with its query score.
"""

from __future__ import annotations

import argparse
import random

import pandas as pd
import torch

import qv_lens as qv
from qv_lens.world import cases as world_cases
from qv_lens.world import generator

TOP = 100


def zeroed(lens: qv.Lens, fact: qv.Fact) -> torch.Tensor:
    """log p lost by zeroing each neuron at the last token, [layer * d_mlp]."""
    prompt = lens.tokenize(fact)[0]
    clean, token, lost = lens.logprob(fact), prompt.answer[0], []
    rows = [prompt.ids] * lens.d_mlp
    each = torch.arange(lens.d_mlp)

    def zero(m: torch.Tensor) -> torch.Tensor:
        out = m.clone()
        out[each, prompt.last, each] = 0
        return out

    for layer in range(lens.n_layers):
        with torch.no_grad():
            logits = lens.logits(rows, [(lens.backend_adapter.coefficient(layer), zero)])[
                :, prompt.last
            ]
        lost.append(clean - logits.log_softmax(-1)[:, token])
    return torch.cat(lost)


def scores(lens: qv.Lens, fact: qv.Fact) -> dict[str, pd.Series]:
    """Every score of every neuron of one prompt, in order of (layer, neuron)."""
    trace = lens.trace(fact)
    value = qv.value_neurons(lens, trace)
    found = {
        "frozen": qv.value_neurons(lens, trace, None),
        "full": qv.value_neurons(lens, trace, None, norm="full"),
        "first_order": qv.value_neurons(lens, trace, None, method="first_order"),
        "leave-one-out": qv.value_neurons(lens, trace, None, norm="full", base="loo_final"),
        "query grad": qv.query_neurons(lens, trace, value, None),
        "integrated gradients": qv.integrated_gradients(lens, fact, None),
    }
    ordered = {
        name: neurons.frame.sort_values(["layer", "neuron"])["score"].reset_index(drop=True)
        for name, neurons in found.items()
    }
    shuffled = list(range(lens.n_layers * lens.d_mlp))
    random.Random(fact.text).shuffle(shuffled)
    return {**ordered, "random": pd.Series(shuffled)}


def suppressed(lens: qv.Lens, fact: qv.Fact) -> float:
    """Spearman's rho of query score against the loss of log p when Suppress takes the neuron from
    the value neurons."""
    trace = lens.trace(fact)
    value = qv.value_neurons(lens, trace, 30)
    frame = qv.query_neurons(lens, trace, value, None).frame
    below = frame[frame["layer"] < value.frame["layer"].max()].reset_index(drop=True)
    chosen = [*range(200), *random.Random(fact.text).sample(range(200, len(below)), 200)]
    clean, lost = lens.logprob(fact), []
    for layer, neuron in below.loc[chosen, ["layer", "neuron"]].itertuples(index=False):
        with lens.intervene(
            qv.Suppress(qv.NeuronSet.of([(layer, neuron)]), value, positions="last")
        ):
            lost.append(clean - lens.logprob(fact))
    return float(
        below.loc[chosen, "score"].reset_index(drop=True).rank().corr(pd.Series(lost).rank())
    )


def table(name: str, prompts: int, seed: int = 0) -> pd.DataFrame:
    lens, world = qv.load(name), generator.build(0)
    pool = [world_cases.as_fact(world, chain) for chain in world.facts()]
    rows, rhos = [], []
    for fact in random.Random(seed).sample(pool, prompts):
        truth = pd.Series(zeroed(lens, fact).numpy())
        best = set(truth.nlargest(TOP).index)
        for score, values in scores(lens, fact).items():
            overlap = len(best & set(values.nlargest(TOP).index)) / TOP
            rows.append((score, values.rank().corr(truth.rank()), overlap))
        rhos.append(suppressed(lens, fact))
    frame = pd.DataFrame(rows, columns=["score", "spearman", "top-100 overlap"])
    frame = frame.groupby("score", sort=False).agg(["mean", "sem"])
    print(
        f"\n{name}, {prompts} prompts: every neuron zeroed alone at the last token\n{frame.round(3).to_string()}"
    )
    rho = pd.Series(rhos)
    print(
        f"Suppress against the query score: Spearman {rho.mean():.3f} ± {rho.sem():.3f} (400 "
        "neurons per prompt)",
        flush=True,
    )
    return frame


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--models", nargs="+", default=["toy-gptj", "toy-qwen3"])
    arguments = parser.parse_args()
    for name in arguments.models:
        table(name, arguments.prompts)


if __name__ == "__main__":
    main()
