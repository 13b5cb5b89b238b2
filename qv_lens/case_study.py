"""study(): one fact from attribution to edit, as one object.

1. Attribute: top value neurons (Eq. 9) with what they promote, top query neurons (Eq. 10), layers ranked over
   multi-hop prompts on the fact's relation (ACE, section 5, stage 1).
2. Ablate: zero the top 1% of neurons, ranked on one half of the facts of that kind, of the top layer and of the whole
   model, against 1% at random; accuracy on the other half and on facts of other kinds.
3. Suppress: the top query neurons of the two layers where they score highest, by `Zero` and `Suppress`; two-hop accuracy and
   activated value neurons per layer (those above the K-th largest clean score of their prompt).
4. Edit: ACE with the layers just found, with the value layers alone, and with random layers of the same number.

What the study asks about is a `Material`; the bundled world provides one, files of the user's own do (`file_material`).
A step that its material says nothing about is left out: its frame is empty.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qv_lens.attribution.layers import layer_scores
from qv_lens.attribution.locate import Layers, locate
from qv_lens.attribution.projection import vocabulary
from qv_lens.attribution.query import query_neurons, qv_graph
from qv_lens.attribution.value import value_neurons
from qv_lens.editing.closed_form import ACE
from qv_lens.editing.edit import edit
from qv_lens.editing.kept import kept_covariance
from qv_lens.editing.presets import presets
from qv_lens.editing.statistics import Statistics
from qv_lens.errors import ConfigError, FactError
from qv_lens.evaluation.intervals import student
from qv_lens.evaluation.probes import tell
from qv_lens.evaluation.protocols import evaluate, fitting, summary
from qv_lens.facts import miniworld, worldrecords
from qv_lens.facts.benchmarks import plain_facts
from qv_lens.facts.corpora import corpus
from qv_lens.facts.records import EditCase, EditRequest, Fact
from qv_lens.interventions import Suppress, Zero
from qv_lens.models.lens import Lens
from qv_lens.models.zoo import BUNDLED
from qv_lens.neurons import NeuronSet
from qv_lens.trace import Trace

RANDOM_SEEDS = 5
ACTIVATED = 300  # K: the neurons counted as activated on the clean model
QUERY_LAYERS = 2
SHARE = 0.01
METRICS = ("efficacy_acc", "efficacy_success", "paraphrase_acc", "specificity_acc", "multihop_acc")
DROP = ("clean", "accuracy", "drop_points", "drop_relative", "logprob_change")


@dataclass(frozen=True)
class Material:
    """What a study asks besides its fact: `same` facts of its kind, `other` kinds, `chains` over it, `cases` to edit
    (the fact's own first), and `texts` for the statistics."""

    same: tuple[Fact, ...]
    other: tuple[Fact, ...]
    chains: tuple[Fact, ...]
    cases: tuple[EditCase, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """Everything measured about one fact, as frames; `settings` reproduce it."""

    request: EditRequest
    logprob: float
    answered: str
    value: NeuronSet
    query: NeuronSet
    value_tokens: pd.DataFrame
    query_tokens: pd.DataFrame
    heat: pd.DataFrame
    layers: Layers
    ablation: pd.DataFrame
    suppression: pd.DataFrame
    activated: pd.DataFrame
    edits: pd.DataFrame
    tokens: pd.DataFrame
    heads: pd.DataFrame
    nodes: pd.DataFrame
    edges: pd.DataFrame
    states: pd.DataFrame
    probes: pd.DataFrame
    tokens_after: pd.DataFrame
    value_tokens_after: pd.DataFrame
    settings: dict[str, Any] = field(default_factory=dict)


def study(
    lens: Lens,
    fact: Fact,
    new: str,
    *,
    material: Material | None = None,
    editor: ACE | None = None,
    edits: int = 8,
    seed: int = 0,
) -> Study:
    """Run the whole walk for one fact.

    `material`: what else to ask; None takes it from the bundled world, which must know the fact.
    `editor`: ACE's settings; its layers are replaced by those found here. `edits`: how many cases are edited.
    Raises `FactError` for a fact that the bundled world does not hold and no material is given for.
    """
    asked = material or world_material(lens, fact, new, seed)
    ace = editor or presets(lens.name)["ACE"].editor
    assert isinstance(ace, ACE)
    trace = lens.trace(fact)
    value = value_neurons(lens, trace)
    query = query_neurons(lens, trace, value)
    ranking, held_out = asked.same[::2], asked.same[1::2]
    located = list(asked.chains) or [fact, *ranking]
    chained = lens.trace(located)
    layers = locate(lens, located)
    heat = pd.concat([layer_scores(lens, chained, kind) for kind in ("ffn", "attn")], ignore_index=True)
    strongest = layer_scores(lens, [fact, *ranking]).groupby("layer")["score"].sum().idxmax()
    suppression, activated = suppress(lens, asked.chains)
    answered = lens.token_label(int(trace.logits[0].argmax()))
    return Study(
        fact.to(new), lens.logprob(fact), answered, value, query, vocabulary(lens, value.top(10)), vocabulary(lens, query.top(10)),
        heat, layers, ablate(lens, ranking, held_out, asked.other, int(strongest), seed), suppression, activated,
        edit_variants(lens, asked, layers, ace, edits, seed), by_token(lens, fact), layer_scores(lens, trace, "head", "layer_vector"),
        *pathway(lens, trace, value, query), *side_by_side(lens, asked, located_editor(lens, layers, ace), seed),
        {**value.settings, "seed": seed},
    )  # fmt: skip


def world_material(lens: Lens, fact: Fact, new: str, seed: int = 0) -> Material:
    """The bundled world's facts, chains and text around one of its own facts."""
    world, rng = miniworld.build(0), random.Random(f"study:{seed}")
    chain = next((c for c in world.facts() if c.subject == fact.subject and fact.prompt in c.relations[0].phrasings), None)
    if chain is None or lens.name not in BUNDLED:
        raise FactError(
            f"The bundled world does not hold {fact.text!r} as one of its phrasings, or {lens.name} was not trained on it. "
            "Pass material= with facts of your own (qv-lens study: --facts and --text)."
        )
    relation = chain.relations[0]
    if fact.answer != chain.answer:
        raise FactError(f"The bundled world says {chain.answer!r} of {fact.text!r}, not {fact.answer!r}.")
    if new == fact.answer:
        raise FactError(f"The new answer of {fact.text!r} is the old one, {new!r}: there is nothing to edit.")
    if new not in worldrecords.objects(world, relation):
        raise FactError(
            f"{new!r} is no object of {relation.label!r}. Some: {', '.join(worldrecords.objects(world, relation)[:12])}."
        )
    same = [f for f in worldrecords.facts(world, relation.id) if f.subject != fact.subject]
    other = [f for f in worldrecords.facts(world) if f.relation != relation.id]
    onward = [c for c in world.chains(2) if c.relations[0].id == relation.id]
    cases = [worldrecords.edit_case(world, chain, new, rng)]
    cases += [c for c in worldrecords.edit_cases(world, 24, seed, relation.id) if c.request.fact.subject != fact.subject]
    texts = list(itertools.islice(corpus("world"), 2000))
    return Material(
        tuple(rng.sample(same, min(60, len(same)))), tuple(rng.sample(other, 60)),
        tuple(worldrecords.as_fact(world, c) for c in rng.sample(onward, min(40, len(onward)))), tuple(cases), tuple(texts),
    )  # fmt: skip


def file_material(fact: Fact, new: str, facts: str | Path, text: str | Path) -> Material:
    """Material from files: `facts`, a JSON list of {"prompt" with {}, "subject", "answer"}, and `text`, plain paragraphs.

    Facts with the fact's own prompt are of its kind (and its neighbours), all others are of other kinds.
    Raises `ConfigError` for a file that cannot be read, `FactError` for a record that is no fact.
    """
    read = plain_facts(facts)
    try:
        paragraphs = [line for line in Path(text).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read the text for the statistics from {text}: {error}.") from error
    same = tuple(f for f in read if f.prompt == fact.prompt and f.subject != fact.subject)
    other = tuple(f for f in read if f.prompt != fact.prompt)
    return Material(same, other, (), (EditCase(fact.to(new), (), same[:8]),), tuple(paragraphs))


# ------------------------------------------------------------------ the causal tests


def ablate(
    lens: Lens, ranking: Sequence[Fact], held_out: Sequence[Fact], other: Sequence[Fact], top_layer: int, seed: int = 0
) -> pd.DataFrame:
    """Accuracy when 1% of neurons are zeroed: `scope, neurons, seed, count, group, clean, accuracy, drop_points,
    drop_relative` (the share of the prompts right on the clean model that are lost) and `logprob_change` (mean, nats)."""
    groups = {name: list(facts) for name, facts in (("same kind", held_out), ("other kinds", other)) if facts}
    columns = ["scope", "neurons", "seed", "count", "group", *DROP]
    if not ranking or not groups:
        return pd.DataFrame(columns=columns)
    ranked = value_neurons(lens, ranking, None, over="set")
    scopes = {f"layer {top_layer}": ranked.layer(top_layer), "whole model": ranked}
    clean = {name: answers(lens, facts) for name, facts in groups.items()}
    rows = []
    for scope, pool in scopes.items():
        count = max(1, round(SHARE * len(pool)))
        chosen = [("top 1%", 0, pool.top(count))]
        for s in range(RANDOM_SEEDS):
            index = random.Random(f"{seed}:{scope}:{s}").sample(range(len(pool)), count)
            chosen.append(("random 1%", s, replace(pool, frame=pool.frame.iloc[index])))
        for name, s, neurons in chosen:
            with lens.intervene(Zero(neurons)):
                hits = {group: answers(lens, facts) for group, facts in groups.items()}
            for group in groups:
                rows.append((scope, name, s, count, group, *drop(clean[group], hits[group])))
    return pd.DataFrame(rows, columns=columns)


def suppress(lens: Lens, chains: Sequence[Fact], top: int | None = None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two-hop accuracy with the top query neurons of the two layers where these score highest, one layer at a time, zeroed
    for every reader or suppressed for the value neurons alone; and activated value neurons per layer under each condition.

    `top`: query neurons per layer; by default 100 scaled from GPT-J's 16,384 (at least 10). A layer's sum over all its
    neurons does not serve: where most are negative, layers that hardly any target lies above come first.
    """
    columns = ["intervention", "layer", "count", *DROP]
    if not chains:
        return pd.DataFrame(columns=columns), pd.DataFrame(columns=["condition", "layer", "count", "interval", "original"])
    count = top or max(10, round(100 * lens.d_mlp / 16384))
    trace = lens.trace(list(chains))
    value = value_neurons(lens, trace, ACTIVATED)
    every = query_neurons(lens, trace, value, None, over="set")
    tau = value.frame.groupby("prompt")["score"].min().to_numpy()
    clean = answers(lens, chains)
    targets = value.top(30).union()
    rows, counts = [], [_count(lens, value, chains, tau, "clean")]
    best = [every.layer(layer).top(count) for layer in range(lens.n_layers)]
    peaks = pd.Series([float(neurons.frame["score"].clip(lower=0).sum()) for neurons in best])
    for layer in (int(layer) for layer in peaks[peaks > 0].nlargest(QUERY_LAYERS).index):
        neurons = best[layer]
        above = targets.where(lambda frame, layer=layer: frame["layer"] > layer)
        conditions: list[tuple[str, Any]] = [("Zero", Zero(neurons))]
        if len(above):
            conditions.append(("Suppress", Suppress(neurons, above)))
        for name, intervention in conditions:
            with lens.intervene(intervention):
                hits = answers(lens, chains)
                counts.append(_count(lens, value, chains, tau, f"{name} layer {layer}"))
            rows.append((name, layer, count, *drop(clean, hits)))
    return pd.DataFrame(rows, columns=columns), pd.concat(counts, ignore_index=True)


def _count(lens: Lens, value: NeuronSet, chains: Sequence[Fact], tau: np.ndarray, condition: str) -> pd.DataFrame:
    """How many neurons' scores reach the prompt's clean threshold, by layer: mean over the prompts and half its 95% interval
    (NaN where all prompts have as many); and how many of them did so before (`original`)."""
    frame = value_neurons(lens, list(chains), None).frame
    frame = frame[frame["score"].to_numpy() >= tau[frame["prompt"].to_numpy()]]
    same = frame.merge(value.frame[["prompt", "layer", "neuron"]])
    each, before = (
        pd.crosstab(of["prompt"], of["layer"]).reindex(range(len(chains)), columns=range(lens.n_layers), fill_value=0)
        for of in (frame, same)
    )
    half = student(each.sem(), len(chains))
    counted = {"count": each.mean(), "interval": half, "original": before.mean()}
    return pd.DataFrame({"condition": condition, "layer": each.columns, **counted})


def answers(lens: Lens, facts: Sequence[Fact]) -> tuple[list[bool], list[float]]:
    """Which prompts are answered right, and the mean log-probability of each answer."""
    told = tell(lens, facts)
    return [t.right for t in told], [t.logprob for t in told]


def drop(clean: tuple[list[bool], list[float]], now: tuple[list[bool], list[float]]) -> tuple[float, ...]:
    """The columns `DROP`: clean accuracy, accuracy, their difference in points, the share lost of the prompts that were
    right, and the mean change of the answers' log-probability."""
    was, hits = clean[0], now[0]
    before, after = sum(was) / len(was), sum(hits) / len(hits)
    kept = sum(hit for hit, right in zip(hits, was, strict=True) if right) / sum(was) if any(was) else float("nan")
    return before, after, 100 * (before - after), 1 - kept, (sum(now[1]) - sum(clean[1])) / len(was)


# ------------------------------------------------------------------ the edit


def edit_variants(lens: Lens, material: Material, layers: Layers, ace: ACE, count: int, seed: int) -> pd.DataFrame:
    """ACE with located layers, with the value layers alone, and with random layers: summaries by `variant` and `layers`."""
    best = located_editor(lens, layers, ace)
    value, query = best.value_layers, best.query_layers
    pool = list(range(1, lens.n_layers - 1))
    drawn = sorted(random.Random(f"layers:{seed}").sample(pool, len(value) + len(query)))
    variants = {
        "ACE, located layers": (value, query),
        "value layers alone": (value, ()),
        "random layers": (tuple(drawn[len(query) :]), tuple(drawn[: len(query)])),
    }
    wanted = sorted({layer for v, q in variants.values() for layer in (*v, *q)})
    statistics = kept_covariance(lens, material.texts, wanted)
    cases = material.cases[:count]
    tables = []
    for name, (v, q) in variants.items():
        editor = replace(ace, value_layers=v, query_layers=q)
        table = summary(evaluate(lens, cases, fitting(cases, METRICS), editor, statistics=statistics, seed=seed))
        label = f"value {list(v)}" + (f", query {list(q)}" if q else "")
        tables.append(table.assign(variant=name, layers=label, editor=repr(editor)))
    return pd.concat(tables, ignore_index=True)


def located_editor(lens: Lens, layers: Layers, ace: ACE) -> ACE:
    """ACE at the layers just found."""
    value, query = layers.editable(*layer_counts(lens), first=lens.backend_adapter.first_editable)
    return replace(ace, value_layers=value, query_layers=query)


def side_by_side(
    lens: Lens, material: Material, editor: ACE, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The study's own fact before and after its edit: `state, layer, score` (FFN importance for the answer given then); what
    the model says: `kind, prompt, before, after, wanted`; and, for the new answer after the edit, `by_token` and the
    vocabulary of the ten best value neurons."""
    case = material.cases[0]
    statistics = kept_covariance(lens, material.texts, sorted({*editor.value_layers, *editor.query_layers}))
    asked = [("the fact", case.request.target), *(("in other words", p) for p in case.paraphrases[:2])]
    asked += [("follows from it", after) for _, after in case.onward[:3]] + [("must stay", near) for near in case.neighbours[:3]]
    patch = edit(lens, case.request, editor, statistics=statistics, seed=seed)
    texts, fact = [probe.text for _, probe in asked], case.request.fact
    before, told = _layer_line(lens, fact, "before"), said(lens, texts)
    with lens.patched(patch):
        after, now = _layer_line(lens, case.request.target, "after"), said(lens, texts)
        tokens, neurons = by_token(lens, case.request.target), vocabulary(lens, value_neurons(lens, case.request.target).top(10))
    columns = ["kind", "prompt", "before", "after", "wanted"]
    rows = [(kind, p.text, b, a, p.answer) for (kind, p), b, a in zip(asked, told, now, strict=True)]
    return pd.concat([before, after], ignore_index=True), pd.DataFrame(rows, columns=columns), tokens, neurons


def _layer_line(lens: Lens, fact: Fact, state: str) -> pd.DataFrame:
    return layer_scores(lens, fact)[["layer", "score"]].assign(state=f"{state} ({fact.answer})")


def said(lens: Lens, texts: Sequence[str], tokens: int = 4) -> list[str]:
    """The greedy continuations, up to their first full stop or line."""
    return [text.strip().split("\n")[0].split(".")[0].strip() for text in lens.generate(list(texts), tokens)]


def by_token(lens: Lens, fact: Fact) -> pd.DataFrame:
    """`position, token, ffn, attn` (nats: I of the layer whose output adds most there; ACE, Table 5) and the likeliest next
    tokens. All layers' numbers, and sums over neurons: `layer_scores(..., positions="all")`."""
    rows = pd.concat([layer_scores(lens, fact, kind, "layer_vector", positions="all") for kind in ("ffn", "attn")])
    frame = rows.pivot_table(index=["position", "token"], columns="kind", values="score", aggfunc="max").reset_index()
    best = lens.trace(fact, "all").logits.topk(8).indices.tolist()
    return frame[["position", "token", "ffn", "attn"]].assign(promoted=[[lens.token_label(i) for i in row] for row in best])


def pathway(lens: Lens, trace: Trace, value: NeuronSet, query: NeuronSet, count: int = 18) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The Q-V graph of the best neurons; nodes with the tokens they promote and `effect`, what zeroing one alone does to
    the answer's log-probability."""
    graph = qv_graph(lens, trace, value.top(count), query.top(count), targets=count)
    nodes = graph.nodes.reset_index(drop=True)
    units = NeuronSet(nodes[["layer", "neuron", "coefficient"]].assign(prompt=0, unit="ffn", score=0.0))
    promoted = vocabulary(lens, units, 8)["promoted"].tolist()
    fact = trace.facts[0]
    clean, effects = lens.logprob(fact), []
    for layer, neuron in nodes[["layer", "neuron"]].itertuples(index=False):
        with lens.intervene(Zero(NeuronSet.of([(int(layer), int(neuron))]))):
            effects.append(lens.logprob(fact) - clean)
    return nodes.assign(promoted=promoted, effect=effects), graph.edges


def layer_counts(lens: Lens) -> tuple[int, int]:
    """Value and query layers to edit: ACE's 3 and 6 of GPT-J's 28, 5 and 3 of Qwen3-8B's 36, scaled to the model."""
    of = lens.backend_adapter.ace_layers
    return max(1, round(of[0] * lens.n_layers / of[2])), max(1, round(of[1] * lens.n_layers / of[2]))


def statistics_of_world(lens: Lens, layers: Sequence[int], documents: int = 2000, attention: bool = False) -> Statistics:
    """C0 of the bundled world's own text; `attention` also that of what W_O reads. Kept in the user's cache."""
    modules = ("ffn", "attn") if attention else ("ffn",)
    return kept_covariance(lens, list(itertools.islice(corpus("world"), documents)), layers, modules=modules)
