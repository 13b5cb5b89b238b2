"""Causal truth: which score predicts what a model really loses, of one neuron and of sets.

    python benchmarks/causal.py smollm2-135m               # 50 known facts: hours on one core
    python benchmarks/causal.py toy-gptj --facts 12        # and any other model, name or folder
    python benchmarks/causal.py smollm2-135m --part sets --chains --folder found    # to be resumed

Facts: of the atlas (bundled models: of their world), those that the model knows, drawn by a seed;
`--chains`: its two-hop prompts instead.

single  Every FFN neuron of three layers, and 1,000 others, zeroed alone at the last token in a real
        pass: truth = log p(clean) - log p(zeroed). Spearman's rho, Pearson's r and the overlap of
        the 100 best, of every score over these neurons; mean and standard error over the facts.
sets    `qv.faithfulness`: the best 1, 3, ... of each ranking taken out together; mean change of
        log p, and the share of facts whose answer is lost. And what is left when only the best are
        kept.
edges   `qv.qv_graph` of 30 value and 30 query neurons, each edge taken out alone: how its weight
        agrees with what the value neuron's coefficient, and the answer, then really lose; value
        neurons by Eq. 9 and by the gradient, queries at the last token and at any.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch

import qv_lens as qv
from qv_lens.evaluation.faithfulness import areas
from qv_lens.evaluation.known_cases import first_known
from qv_lens.facts.atlas import chains
from qv_lens.models.one_neuron import logp_with_each
from qv_lens.models.zoo import BUNDLED
from qv_lens.world import cases as world_cases
from qv_lens.world import generator

TOP, OTHERS = 100, 1000
#: value and query neurons of a graph whose edges are tested
DRAWN = 30
SIZES = (1, 3, 10, 30, 100)
KEPT = (100, 1000, 5000, 20000)
RANDOM_SEEDS = 2
Ranking = Callable[[qv.Lens, qv.Fact], qv.NeuronSet]


def known(lens: qv.Lens, count: int, two_hop: bool, seed: int) -> list[qv.Fact]:
    """Facts whose answer the model gives."""
    if lens.name in BUNDLED:
        world = generator.build(0)
        pool = [world_cases.as_fact(world, chain) for chain in world.facts()]
    elif two_hop:
        pool = [qv.Fact("{}", chain.cloze, chain.second.answer) for chain in chains()]
    else:
        pool = list(qv.atlas())
    random.Random(seed).shuffle(pool)
    return first_known(lens, pool, count)


def neurons_asked(lens: qv.Lens, fact: qv.Fact) -> dict[int, list[int]]:
    """Every neuron of three layers, and others at random, by layer."""
    whole = [round(share * (lens.n_layers - 1)) for share in (0.25, 0.5, 1.0)]
    units = [(layer, neuron) for layer in whole for neuron in range(lens.d_mlp)]
    rest = [
        (layer, neuron)
        for layer in range(lens.n_layers)
        if layer not in whole
        for neuron in range(lens.d_mlp)
    ]
    units += random.Random(fact.text).sample(rest, min(OTHERS, len(rest)))
    return qv.NeuronSet.of(units).by_layer()


def zeroed(lens: qv.Lens, fact: qv.Fact, neurons_of: dict[int, list[int]]) -> pd.Series:
    """log p lost without each neuron at the last token, by (layer, neuron)."""
    prompt, token = lens.tokenize(fact)[0], torch.tensor(lens.answer_ids(fact)[:1])
    clean, lost = lens.logprob(fact), {}
    for layer, neurons in neurons_of.items():
        some = torch.tensor(neurons)
        zero = torch.zeros(len(some))
        now = logp_with_each(lens, prompt, layer, prompt.last, some, zero, token)[:, 0].tolist()
        lost |= {(layer, k): clean - value for k, value in zip(neurons, now, strict=True)}
    return pd.Series(lost)


def scores(lens: qv.Lens, fact: qv.Fact) -> dict[str, pd.Series]:
    """Every score of every neuron of one fact, by (layer, neuron)."""
    trace = lens.trace(fact)
    value = qv.value_neurons(lens, trace, None, method="moments")
    best = value.top(300)
    sets = {
        "Eq. 9": value,
        "its first order J": qv.value_neurons(lens, trace, None, method="first_order"),
        "Eq. 10": qv.query_neurons(lens, trace, best, None),
        "gradient": qv.neuron_effects(lens, fact, None),
        "RelP": qv.neuron_effects(lens, fact, None, method="relp"),
        "integrated, 8 steps": qv.neuron_effects(lens, fact, None, method="integrated", steps=8),
    }
    return {
        name: neurons.frame.set_index(["layer", "neuron"])["score"]
        for name, neurons in sets.items()
    }


def agreement(lens: qv.Lens, fact: qv.Fact) -> pd.DataFrame:
    """How each score agrees with single zeroing, for one fact."""
    rows = []
    truth = zeroed(lens, fact, neurons_asked(lens, fact))
    best = set(truth.nlargest(TOP).index)
    scores_of = scores(lens, fact)
    shuffled = truth.index.to_list()
    random.Random(fact.text).shuffle(shuffled)
    scores_of["random"] = pd.Series(range(len(shuffled)), pd.MultiIndex.from_tuples(shuffled))
    for name, values in scores_of.items():
        values = values.reindex(truth.index).fillna(0.0)
        overlap = len(best & set(values.nlargest(TOP).index)) / TOP
        rows.append((name, values.rank().corr(truth.rank()), values.corr(truth), overlap))
    return pd.DataFrame(rows, columns=["score", "Spearman", "Pearson", "top-100 overlap"])


def single(lens: qv.Lens, facts: Sequence[qv.Fact], folder: Path | None) -> pd.DataFrame:
    """How each score agrees with single zeroing: mean and standard error over the facts."""
    parts = [
        _kept(folder, (lens.name, fact, "single", OTHERS), partial(agreement, lens, fact))
        for fact in facts
    ]
    return pd.concat(parts).groupby("score", sort=False).agg(["mean", "sem"])


RANKINGS: dict[str, Ranking] = {
    "Eq. 9": lambda lens, fact: qv.value_neurons(lens, fact, 100, method="topk"),
    "Eq. 9, norm full": lambda lens, fact: qv.value_neurons(
        lens, fact, 100, norm="full", method="topk"
    ),
    "Eq. 10": lambda lens, fact: qv.query_neurons(
        lens, fact, qv.value_neurons(lens, fact, 300, method="topk"), 100
    ),
    "gradient": lambda lens, fact: qv.neuron_effects(lens, fact, 100),
    "RelP": lambda lens, fact: qv.neuron_effects(lens, fact, 100, method="relp"),
    "integrated, 8 steps": lambda lens, fact: qv.neuron_effects(
        lens, fact, 100, method="integrated", steps=8
    ),
    "gradient, rounds of 10": lambda lens, fact: qv.neuron_effects(lens, fact, 100, rounds=10),
    "gradient, rounds of 1": lambda lens, fact: qv.neuron_effects(lens, fact, 30, rounds=30),
    "RelP, rounds of 10": lambda lens, fact: qv.neuron_effects(
        lens, fact, 100, method="relp", rounds=10
    ),
    "RelP, rounds of 1": lambda lens, fact: qv.neuron_effects(
        lens, fact, 30, method="relp", rounds=30
    ),
    "integrated, rounds of 10": lambda lens, fact: qv.neuron_effects(
        lens, fact, 30, method="integrated", steps=4, rounds=3
    ),
    "integrated, rounds of 3, 16 candidates": lambda lens, fact: qv.neuron_effects(
        lens, fact, 30, method="integrated", steps=2, rounds=10, candidates=16
    ),
    "gradient, rounds of 1, 16 candidates": lambda lens, fact: qv.neuron_effects(
        lens, fact, 30, rounds=30, candidates=16
    ),
}


#: a ranking of every neuron, for what is kept alone
EVERY: dict[str, Ranking] = {
    "Eq. 9": lambda lens, fact: qv.value_neurons(lens, fact, None, method="moments"),
    "gradient": lambda lens, fact: qv.neuron_effects(lens, fact, None),
    "RelP": lambda lens, fact: qv.neuron_effects(lens, fact, None, method="relp"),
}


def curves(
    lens: qv.Lens, fact: qv.Fact, rankings: dict[str, Ranking], every: dict[str, Ranking]
) -> pd.DataFrame:
    """Removal curves of the rankings, and keep curves of those of every neuron, for one fact, with
    the seconds of each ranking."""
    sets_of, seconds = {}, {}
    for name, rank in rankings.items():
        start = time.perf_counter()
        sets_of[name] = rank(lens, fact)
        seconds[name] = time.perf_counter() - start
    removed = qv.faithfulness(lens, fact, sets_of, SIZES, seeds=RANDOM_SEEDS)
    removed["seconds"] = removed["ranking"].map(seconds)
    if not every:
        return removed
    ranked = {name: rank(lens, fact) for name, rank in every.items()}
    kept = qv.faithfulness(lens, fact, ranked, KEPT, keep=True, seeds=RANDOM_SEEDS)
    return pd.concat([removed, kept], ignore_index=True)


def sets(
    lens: qv.Lens,
    facts: Sequence[qv.Fact],
    rankings: dict[str, Ranking],
    every: dict[str, Ranking],
    folder: Path | None,
) -> pd.DataFrame:
    """Curves of every fact."""
    parts = []
    for number, fact in enumerate(facts):
        key = (lens.name, fact, list(rankings), list(every), SIZES, KEPT, RANDOM_SEEDS)
        part = _kept(folder, key, partial(curves, lens, fact, rankings, every))
        parts.append(part.assign(prompt=number))
    return pd.concat(parts, ignore_index=True)


def _kept(
    folder: Path | None, key: tuple[object, ...], compute: Callable[[], pd.DataFrame]
) -> pd.DataFrame:
    """The frame that the folder holds under the key, or a new one, which is put there."""
    if folder is None:
        return compute()
    file = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.parquet"
    if file.exists():
        return pd.read_parquet(file)
    frame = compute()
    frame.to_parquet(file)
    return frame


def show(lens: qv.Lens, table: pd.DataFrame) -> None:
    """Print the means of the curves, their areas and the seconds."""
    table.attrs["units"] = lens.n_layers * lens.d_mlp
    table["change"] = table["logprob"] - table["clean"]
    table["lost"] = table["known"] & ~table["right"]
    removed, kept = table[~table["kept"]], table[table["kept"]]
    print("\nTaken out: mean change of log p (nats)")
    print(_by_size(removed, "change"))
    print("\nTaken out: share of the facts whose answer is lost")
    print(_by_size(removed, "lost"))
    if len(kept):
        print("\nKept alone: mean change of log p (nats)")
        print(_by_size(kept, "change"))
    print("\nAreas")
    print(areas(table).round(3).to_string(index=False))
    print("\nSeconds a fact")
    print(removed.groupby("ranking", sort=False)["seconds"].mean().round(1).to_string(), flush=True)


def edges(lens: qv.Lens, facts: Sequence[qv.Fact]) -> pd.DataFrame:
    """How the weights of edges agree with what is lost without them."""
    rows = []
    for fact in facts:
        trace = lens.trace(fact)
        graphs = {
            "Eq. 9": qv.value_neurons(lens, trace, DRAWN, method="topk"),
            "gradient": qv.neuron_effects(lens, trace, DRAWN),
        }
        for name, value in graphs.items():
            for through in ("stream", "attention"):
                query = qv.query_neurons(lens, trace, value, DRAWN, through=through)
                graph = qv.edge_effects(lens, trace, qv.qv_graph(lens, trace, value, query))
                elsewhere = (graph.nodes["position"] < graph.nodes["position"].max()).mean()
                rows.append(
                    {
                        "value neurons by": name,
                        "through": through,
                        **graph.edges.attrs["agreement"],
                        "edges": len(graph.edges),
                        "neurons elsewhere": elsewhere,
                    }
                )
    frame = pd.DataFrame(rows).groupby(["value neurons by", "through"], sort=False)
    return frame.agg(["mean", "sem"])


def _by_size(table: pd.DataFrame, column: str) -> str:
    wide = table.pivot_table(index="ranking", columns="k", values=column, sort=False)
    return wide.round(2).to_string()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--facts", type=int, default=50)
    parser.add_argument("--chains", action="store_true")
    parser.add_argument("--part", choices=("single", "sets", "edges", "all"), default="all")
    parser.add_argument("--skip", nargs="*", default=(), help="rankings whose name begins so")
    parser.add_argument("--removed", action="store_true", help="no curves of what is kept alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where what was found of each fact is kept")
    arguments = parser.parse_args()
    lens = qv.load(arguments.model)
    facts = known(lens, arguments.facts, arguments.chains, arguments.seed)
    kind = "two-hop prompts" if arguments.chains else "facts"
    print(f"{arguments.model}: {len(facts)} {kind} that it knows", flush=True)
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.part in ("single", "all"):
        table = single(lens, facts, arguments.folder).round(3).to_string()
        print(f"\nEach neuron zeroed alone\n{table}", flush=True)
    if arguments.part in ("edges", "all"):
        print(f"\nEdges taken out alone\n{edges(lens, facts).round(3).T.to_string()}", flush=True)
    if arguments.part in ("sets", "all"):
        rankings = {k: v for k, v in RANKINGS.items() if not k.startswith(tuple(arguments.skip))}
        every = {} if arguments.removed else EVERY
        show(lens, sets(lens, facts, rankings, every, arguments.folder))


if __name__ == "__main__":
    main()
