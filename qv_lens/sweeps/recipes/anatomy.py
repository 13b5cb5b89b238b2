"""Where importance lies: layers, heads, tokens, neurons, nodes. Measured, nothing intervened on.

layers   ACE's Table 1 and Figure 5 (FFN and attention layers, sum of the neurons' I over the prompts), Figure 6
         (heads), Figure 3 (query layers, Eq. 10, and how many of the 300 best value neurons lie in each layer)
tokens   ACE's Table 5: FFN's and attention's I at every token of each prompt, and what the model would say there
neurons  ACE's Tables 6 and 7: the best query, value and shared neurons of each prompt with the tokens they promote
nodes    CTP's Figure 4: mean node score of T+ by layer, key and value nodes
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pandas as pd

from qv_lens.attribution.gradients import NodeScore, transmission_paths
from qv_lens.attribution.layers import layer_scores
from qv_lens.attribution.projection import interpretable, vocabulary
from qv_lens.attribution.query import query_layers, query_neurons
from qv_lens.attribution.value import value_neurons
from qv_lens.case_study import by_token
from qv_lens.errors import ConfigError
from qv_lens.evaluation.intervals import student
from qv_lens.facts.records import EditRequest, Fact
from qv_lens.facts.spans import Prompt
from qv_lens.plots import category_heatmap, node_lines, token_bars, vocabulary_table
from qv_lens.sweeps.config import Recipe
from qv_lens.sweeps.engine import Context
from qv_lens.sweeps.recipes.material import asked, at_least, check_asked, knowledge, pool

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

    def __post_init__(self) -> None:
        check_asked(self)
        at_least(self, hops=1)


def layers(task: Layers, context: Context) -> pd.DataFrame:
    """`part, layer, head, score` (mean over the prompts), `interval` (half of its 95% interval, NaN where all prompts are alike) and `rank` among layers.
    Parts: 'ffn', 'attn' (sums over neurons: Table 1), 'ffn_vector', 'attn_vector' (whole outputs: Figure 5), 'head' (Figure
    6), 'query', 'count' (Figure 3)."""
    lens = context.lens(task.model)
    facts = asked(lens, task, task.hops)
    trace = lens.trace(list(facts))
    value = value_neurons(lens, trace, TOP)
    parts = [layer_scores(lens, trace, kind).assign(part=kind) for kind in ("ffn", "attn")]
    parts += [each.assign(part=each["part"] + "_vector", score=each["whole"]) for each in parts]
    heads = layer_scores(lens, trace, "head", "layer_vector").assign(part="head")
    query = query_layers(lens, trace, value)
    counted = pd.crosstab(value.frame["prompt"], value.frame["layer"]).reindex(columns=range(lens.n_layers), fill_value=0)
    count = counted.stack().rename("score").reset_index()
    each = pd.concat([*parts, heads, query[query["kind"] == "ffn"].assign(part="query"), count.assign(part="count")])
    found = each.groupby(["part", "layer", "head"], sort=False, dropna=False)["score"].agg(["mean", "sem", "count"])
    found = found.reset_index().rename(columns={"mean": "score"})
    found = found.assign(interval=student(found["sem"], found["count"]), **knowledge(lens, facts))
    found["rank"] = found.groupby("part")["score"].rank(ascending=False, method="first").astype(int)
    return found[["part", "layer", "head", "score", "interval", "rank", "prompts_asked", "prompts_known"]]


@dataclass(frozen=True)
class Prompts:
    """Prompts of a category, each by itself. `top`: neurons of each role."""

    model: str
    category: str = "sport"
    prompts: int = 100
    top: int = 10
    seed: int = 0
    facts: str = ""

    def __post_init__(self) -> None:
        check_asked(self)
        at_least(self, top=1)


def tokens(task: Prompts, context: Context) -> pd.DataFrame:
    """Per `prompt`: `position, token, ffn, attn` (nats; I of the answer's first token, by the layer whose output
    adds most), `promoted`: the likeliest next tokens there, `place` ('subject', 'first behind it', 'last', 'other')."""
    lens, parts = context.lens(task.model), []
    facts = asked(lens, task)
    for i, fact in enumerate(facts):
        frame = by_token(lens, fact)
        said = [", ".join(repr(token.strip()) for token in row) for row in frame["promoted"]]
        places = _places(lens.tokenize(fact)[0])
        parts.append(frame.assign(promoted=said, place=places, prompt=i, text=fact.text, answer=fact.answer))
    return pd.concat(parts, ignore_index=True).assign(**knowledge(lens, facts))


def _places(prompt: Prompt) -> list[str]:
    first, last = prompt.subject or (0, -1)
    named = {last + 1: "first behind it"} if prompt.subject else {}
    named |= dict.fromkeys(range(first, last + 1), "subject") | {prompt.last: "last"}
    return [named.get(at, "other") for at in range(len(prompt.ids))]


def neurons(task: Prompts, context: Context) -> pd.DataFrame:
    """Per `prompt`, the best `top` neurons per `role` ('query', 'value', 'shared': among the 300 best of both): `layer,
    neuron, coefficient, score, promoted, interpretable` (the answer is among the ten promoted tokens)."""
    lens, parts = context.lens(task.model), []
    facts = asked(lens, task)
    for i, fact in enumerate(facts):
        trace = lens.trace(fact)
        value = value_neurons(lens, trace, TOP)
        query = query_neurons(lens, trace, value, TOP)
        for role, found in (("query", query), ("value", value), ("shared", value & query)):
            best = found.top(task.top)
            shown = vocabulary(lens, best)
            said = [", ".join(repr(t.strip()) for t in row) for row in shown["promoted"]]
            parts.append(shown[["layer", "neuron", "coefficient", "score"]].assign(
                role=role, promoted=said, interpretable=interpretable(lens, best, fact.answer).to_numpy(), found=len(found),
                prompt=i, text=fact.text, answer=fact.answer,
            ))  # fmt: skip
    return pd.concat(parts, ignore_index=True).assign(**knowledge(lens, facts))


@dataclass(frozen=True)
class Nodes:
    """CTP's nodes for edits of `prompts` facts, each to the answer of another fact of its relation. `score`: as
    `transmission_paths` takes it; 'mean_abs_z' (CTP's code) is scaled within each layer, so layers compare by 'norm'."""

    model: str
    category: str = "all"
    prompts: int = 100
    top: int = 15
    score: NodeScore = "mean_abs_z"
    seed: int = 0
    facts: str = ""

    def __post_init__(self) -> None:
        check_asked(self)
        at_least(self, top=1)


def edits_of(facts: list[Fact], task: Nodes) -> list[EditRequest]:
    """Each fact to another object of its relation, drawn by the seed; without those whose relation has one object alone."""
    answers, rng = {(f.relation, f.answer) for f in pool(task.facts)}, random.Random(f"nodes:{task.seed}")
    others = [sorted({a for r, a in answers if r == fact.relation} - {fact.answer}) for fact in facts]
    found = [fact.to(rng.choice(other)) for fact, other in zip(facts, others, strict=True) if other]
    if not found:
        raise ConfigError("No two of the facts share a relation and differ in their answers: there is nothing to edit them to.")
    return found


def nodes(task: Nodes, context: Context) -> pd.DataFrame:
    """`layer, kind ('key', 'value'), path ('T+', 'T-', ''), importance` (mean score of the nodes) and their `count`."""
    lens = context.lens(task.model)
    edits = edits_of(asked(lens, task), task)
    frame = transmission_paths(lens, edits, task.top, score=task.score)
    found = frame.groupby(["layer", "kind", "path"])["score"].agg(["mean", "size"]).reset_index()
    return found.rename(columns={"mean": "importance", "size": "count"}).assign(**knowledge(lens, [edit.fact for edit in edits]))


LAYERS = Recipe("layers", Layers, layers, ("score", "interval", "rank"), category_heatmap)
TOKENS = Recipe("tokens", Prompts, tokens, ("ffn", "attn"), token_bars)
NEURONS = Recipe("neurons", Prompts, neurons, ("coefficient", "score", "interpretable"), vocabulary_table)
NODES = Recipe("nodes", Nodes, nodes, ("importance",), node_lines)
