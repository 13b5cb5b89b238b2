"""Where importance lies: layers, heads, tokens, neurons, nodes. Measured, nothing intervened on.

layers   ACE's Table 1 and Figure 5 (FFN and attention layers, sum of the neurons' I over the prompts), Figure 6
         (heads), Figure 3 (query layers, Eq. 10, and how many of the 300 best value neurons lie in each layer)
tokens   ACE's Table 5: FFN's and attention's I at every token of one prompt, and what the model would say there
neurons  ACE's Tables 6 and 7: the best query, value and shared neurons of one prompt with the tokens they promote
nodes    CTP's Figure 4: mean node score of T+ by layer, key and value nodes
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from qv_lens.attribution.gradients import transmission_paths
from qv_lens.attribution.layers import layer_scores
from qv_lens.attribution.projection import interpretable, vocabulary
from qv_lens.attribution.query import query_layers, query_neurons
from qv_lens.attribution.value import value_neurons
from qv_lens.case_study import by_token
from qv_lens.plots import category_heatmap, node_lines, token_bars, vocabulary_table
from qv_lens.sweeps.config import Recipe
from qv_lens.sweeps.engine import Context
from qv_lens.sweeps.recipes.material import of_category

TOP = 300  # value neurons per prompt that count (ACE's notebooks)


@dataclass(frozen=True)
class Layers:
    """One category. `hops`: 1 for single facts (Table 1), 2 for two-hop prompts (Figure 3)."""

    model: str
    category: str
    hops: int = 1
    prompts: int = 100
    seed: int = 0
    facts: str = ""


def layers(task: Layers, context: Context) -> pd.DataFrame:
    """`part ('ffn', 'attn', 'head', 'query', 'count'), layer, head, score` (means per prompt) and `rank` among layers."""
    lens = context.lens(task.model)
    facts = of_category(task.category, task.prompts, task.seed, task.facts, task.hops)
    trace = lens.trace(list(facts))
    value = value_neurons(lens, trace, TOP)
    parts = [layer_scores(lens, trace, kind, over="set").assign(part=kind) for kind in ("ffn", "attn")]
    heads = layer_scores(lens, trace, "head", "layer_vector", over="set").assign(part="head")
    query = query_layers(lens, trace, value)
    query = query[query["kind"] == "ffn"].groupby("layer", as_index=False)["score"].sum().assign(part="query")
    count = value.frame.groupby("layer").size().reindex(range(lens.n_layers), fill_value=0).rename("score")
    frame = pd.concat([*parts, heads, query, count.reset_index().assign(part="count")], ignore_index=True)
    frame["score"] = frame["score"].astype(float) / len(facts)
    frame["rank"] = frame.groupby("part")["score"].rank(ascending=False, method="first").astype(int)
    if "head" not in frame:
        frame["head"] = float("nan")
    return frame[["part", "layer", "head", "score", "rank"]].assign(prompts_asked=len(facts))


@dataclass(frozen=True)
class OnePrompt:
    """One prompt by its place among those that the seed draws from a category. `top`: neurons and tokens shown."""

    model: str
    category: str = "sport"
    index: int = 0
    top: int = 10
    seed: int = 0
    facts: str = ""


def tokens(task: OnePrompt, context: Context) -> pd.DataFrame:
    """`position, token, ffn, attn` (nats; I of the answer's first token, summed over layers), `promoted`: the likeliest
    next tokens there."""
    lens = context.lens(task.model)
    fact = of_category(task.category, task.index + 1, task.seed, task.facts)[task.index]
    frame = by_token(lens, fact)
    told = [", ".join(repr(token.strip()) for token in row) for row in frame["promoted"]]
    return frame.assign(promoted=told, prompt=fact.text, answer=fact.answer)


def neurons(task: OnePrompt, context: Context) -> pd.DataFrame:
    """The best `top` neurons per `role` ('query', 'value', 'shared': among the 300 best of both): `layer, neuron,
    coefficient, score, promoted, interpretable` (the answer is among the ten promoted tokens)."""
    lens = context.lens(task.model)
    fact = of_category(task.category, task.index + 1, task.seed, task.facts)[task.index]
    trace = lens.trace(fact)
    value = value_neurons(lens, trace, TOP)
    query = query_neurons(lens, trace, value, TOP)
    parts = []
    for role, found in (("query", query), ("value", value), ("shared", value & query)):
        best = found.top(task.top)
        shown = vocabulary(lens, best)
        said = [", ".join(repr(t.strip()) for t in row) for row in shown["promoted"]]
        parts.append(shown[["layer", "neuron", "coefficient", "score"]].assign(
            role=role, promoted=said, interpretable=interpretable(lens, best, fact.answer).to_numpy(), found=len(found)
        ))  # fmt: skip
    return pd.concat(parts, ignore_index=True).assign(prompt=fact.text, answer=fact.answer)


@dataclass(frozen=True)
class Nodes:
    """CTP's nodes for the answers of `prompts` facts."""

    model: str
    category: str = "all"
    prompts: int = 100
    top: int = 15
    seed: int = 0
    facts: str = ""


def nodes(task: Nodes, context: Context) -> pd.DataFrame:
    """`layer, kind ('key', 'value'), path ('T+', 'T-', ''), score` (mean over nodes) and their number."""
    lens = context.lens(task.model)
    facts = of_category(task.category, task.prompts, task.seed, task.facts)
    frame = transmission_paths(lens, facts, task.top)
    found = frame.groupby(["layer", "kind", "path"])["score"].agg(["mean", "size"]).reset_index()
    return found.rename(columns={"mean": "score", "size": "count"})


LAYERS = Recipe("layers", Layers, layers, ("score", "rank"), category_heatmap)
TOKENS = Recipe("tokens", OnePrompt, tokens, ("ffn", "attn"), token_bars)
NEURONS = Recipe("neurons", OnePrompt, neurons, ("coefficient", "score", "interpretable"), vocabulary_table)
NODES = Recipe("nodes", Nodes, nodes, ("score",), node_lines)
