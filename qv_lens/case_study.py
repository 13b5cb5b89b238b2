"""study(): one fact from attribution to edit, as one object.

1. Attribute: top value neurons (Eq. 9), top query neurons (Eq. 10) and the neurons that the answer
   loses most without (gradient), each with what they promote; every token, head and layer; what
   the model would say at each layer; the pathway, with query neurons at every token.
2. Remove: log p of the answer with the best k neurons zeroed at the prompt's last token, by Eq. 9,
   by the gradient and at random; the same neurons taken from another fact of the kind, and from one
   of another (`faithfulness`).
3. Ablate: the top 1% of the model's neurons, ranked on one half of the facts of that kind, zeroed
   at all positions, against 1% at random; accuracy on the other half and on facts of other kinds
   (ACE, Figure 2).
4. Suppress: the top query neurons of the two layers where they score highest, by `Zero` and
   `Suppress`; two-hop accuracy (ACE, section 4.2).
5. Edit: layers are located where an edit is written, at the subject's last token, by the effect of
   their neurons there on the answer (`locate(by="effects")`); ACE at these layers, MEMIT at its
   own, and ACE at random layers of the same number.
6. What the model says before and after the edit of the study's own fact, and whether the weights
   came back.

What the study asks about is a `material.Material`. A step for which the material holds nothing is
left out: its frame is empty."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pandas as pd

from qv_lens.attribution.edges import Graph, edge_effects, qv_graph
from qv_lens.attribution.effects import neuron_effects
from qv_lens.attribution.layers import by_token, layer_scores
from qv_lens.attribution.locate import Layers, layer_counts, locate, positive_by_layer
from qv_lens.attribution.projection import logit_lens, vocabulary
from qv_lens.attribution.query import query_neurons
from qv_lens.attribution.setting import Kind
from qv_lens.attribution.value import for_every_neuron, value_neurons
from qv_lens.editing.closed_form import ACE, MEMIT
from qv_lens.editing.edit import edit
from qv_lens.editing.kept_statistics import kept_covariance
from qv_lens.editing.keys import contexts
from qv_lens.editing.layer_by_layer import search_ahead
from qv_lens.editing.presets import Preset, has_presets, presets
from qv_lens.editing.statistics import Module, Statistics
from qv_lens.errors import ConfigError, FactError
from qv_lens.evaluation.ablation import DROP, ablate, answers, suppress
from qv_lens.evaluation.answers import correct, first_sentences, greedy_answers
from qv_lens.evaluation.faithfulness import faithfulness, lost_at
from qv_lens.evaluation.protocols import evaluate
from qv_lens.evaluation.selection import fitting
from qv_lens.evaluation.summary import summary
from qv_lens.facts.records import EditRequest, Fact, Probe
from qv_lens.facts.spans import Positions
from qv_lens.material import Material, atlas_material
from qv_lens.models.interventions import Zero
from qv_lens.models.lens import Lens, check_lens
from qv_lens.models.units import random_neurons
from qv_lens.models.zoo import BUNDLED
from qv_lens.neurons import NeuronSet
from qv_lens.trace import Trace
from qv_lens.tuning.grids import LLAMA

logger = logging.getLogger(__name__)

RANDOM_SEEDS = 5
SHARE = 0.01
#: numbers of neurons taken out, for the curve
CURVE = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100)
#: how many neurons of the largest effect a study keeps
BEST = 300
#: shares of all neurons that are kept alone
KEPT = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.6)
#: in how many passes the curve's hundred neurons are found, and what that ranking is called
ROUNDS, IN_ROUNDS = 20, "gradient, in rounds of 5"
#: tokens that are read without the neurons
WORDS = 10
#: value and query neurons in the pathway
DRAWN = 14
#: facts of the kind over which layers are located
LOCATED = 16
METRICS = (
    "efficacy_gen", "paraphrase_gen", "specificity_gen", "efficacy_acc", "efficacy_success",
    "paraphrase_acc", "specificity_acc", "multihop_acc",
)  # fmt: skip
LOCATED_VARIANT = "ACE, located layers"
#: the layers' effects, by the token whose neurons they are
LAST, SUBJECT = "effects at the last token", "effects at the subject"
#: facts that the curve is asked of
WHOSE = ("this fact", "another of its kind", "one of another kind")


@dataclass(frozen=True)
class Study:
    """Everything measured about one fact, as frames; `settings` reproduce it."""

    request: EditRequest
    """The fact, and the edit that was made of it."""
    logprob: float
    """log p of the answer before anything was done (natural log)."""
    answered: str
    """The likeliest next token."""
    known: bool
    """Whether the model gives the whole answer."""
    material: pd.DataFrame
    """Of how many of the other facts and prompts the model gives the answer: `kind, asked,
    known`."""
    value: NeuronSet
    """The best neurons by Eq. 9."""
    query: NeuronSet
    """The best neurons by Eq. 10."""
    effects: NeuronSet
    """The neurons that the answer loses most without, by the gradient."""
    value_tokens: pd.DataFrame
    """What the ten best value neurons promote, and `alone`: the change of log p without each."""
    query_tokens: pd.DataFrame
    """What the ten best query neurons promote."""
    effect_tokens: pd.DataFrame
    """What the ten neurons of the largest effect promote."""
    removal: pd.DataFrame
    """`faithfulness` of the rankings, on the facts named in `whose` and `text`."""
    without: pd.DataFrame
    """How the model goes on without the neurons: `ranking, k, said`, greedy text with the best k zero
    at every token, at the k that loses the first token, of the rounds also at the largest."""
    kept: pd.DataFrame
    """The same of this fact when nothing but the best neurons of each ranking is left."""
    profile: pd.DataFrame
    """Layers by importance and by effect: `kind, layer, score`."""
    layers: Layers
    """Layers located for the edit."""
    ablation: pd.DataFrame
    """Accuracy without 1% of the neurons."""
    suppression: pd.DataFrame
    """Two-hop accuracy without query neurons."""
    edits: pd.DataFrame
    """Summaries of the edits by `variant` and `layers`."""
    tokens: pd.DataFrame
    """Importance by token, before the edit."""
    beliefs: pd.DataFrame
    """What the model would say at each layer and token (`logit_lens`)."""
    heads: pd.DataFrame
    """Importance of attention heads."""
    attention: pd.DataFrame
    """Where each head looks from the last token: `layer, head, position, token, weight`."""
    nodes: pd.DataFrame
    """Neurons of the pathway, with what they promote, their scores by other methods, and what
    zeroing each alone does."""
    edges: pd.DataFrame
    """Who feeds whom."""
    states: pd.DataFrame
    """Importance of layers before and after the edit."""
    probes: pd.DataFrame
    """What the model says, in words: `kind, prompt, wanted, before`, and a column for each edit."""
    tokens_after: pd.DataFrame
    """Importance by token for the new answer, after the edit."""
    value_tokens_after: pd.DataFrame
    """What the best value neurons of the new answer promote."""
    restored: bool
    """Whether the weights were, at the end, bit for bit what they had been."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What reproduces it."""


def study(
    lens: Lens,
    fact: Fact,
    new: str,
    *,
    material: Material | None = None,
    editor: ACE | None = None,
    rival: MEMIT | None = None,
    edits: int = 4,
    seed: int = 0,
) -> Study:
    """Run the whole walk for one fact, whose answer the edit makes `new`.

    `material`: what else to ask; None takes it from the atlas, or from the bundled world for its
    own models.
    `editor`: ACE's settings; its layers are replaced by those found here.
    `rival`: MEMIT's settings. Where `editor` or `rival` is None, the model's preset is taken, or
    untuned settings scaled to the model.
    `edits`: how many cases are edited.
    `seed`: of everything drawn.
    Raises `FactError` for a fact that the bundled world does not hold, where that is asked.
    """
    check_lens(lens)
    if not isinstance(fact, Fact) or not isinstance(new, str):
        raise FactError(
            f"study takes a fact and the text of its new answer, got {type(fact).__name__} and "
            f"{type(new).__name__}."
        )
    for name, chosen, kind in (("editor", editor, ACE), ("rival", rival, MEMIT)):
        if chosen is not None and not isinstance(chosen, kind):
            raise ConfigError(
                f"study compares ACE with MEMIT: {name} takes a qv.{kind.__name__}, got "
                f"{chosen!r:.60}."
            )
    weights = lens.state()
    about = material or _material(lens, fact, new, seed)
    tuned = ace_and_memit(lens)
    ace, memit = editor or tuned["ACE"].editor, rival or tuned["MEMIT"].editor
    assert isinstance(ace, ACE)
    assert isinstance(memit, MEMIT)
    trace = lens.trace(fact)
    logger.info("neurons of the fact, by Eq. 9, Eq. 10, gradient and RelP")
    value = value_neurons(lens, trace)
    query = query_neurons(lens, trace, value)
    every = {
        "Eq. 9": value_neurons(lens, trace, None, method=for_every_neuron(lens)),
        "gradient": neuron_effects(lens, trace, None),
        "RelP": neuron_effects(lens, trace, None, method="relp"),
    }
    effects = every["gradient"].top(BEST)
    kind = [fact, *about.same[:LOCATED]]
    logger.info("layers to edit, asked of facts of this kind: %d", len(kind))
    layers = locate(lens, kind, "subject_last", by="effects")
    edited = edit_variants(lens, about, layers, ace, memit, edits, seed)
    logger.info("the pathway, each edge tested; then what is left without the neurons")
    drawn = query_neurons(lens, trace, value, DRAWN, targets=DRAWN, through="attention")
    nodes, edges = pathway(lens, trace, value, drawn, DRAWN)
    rankings = {
        "Eq. 9": value,
        "gradient": effects,
        "RelP": every["RelP"].top(CURVE[-1]),
        IN_ROUNDS: neuron_effects(lens, trace, CURVE[-1], rounds=ROUNDS),
    }
    lost = removal(lens, fact, about, rankings, seed)
    return Study(
        request=fact.to(new),
        logprob=lens.logprob(fact),
        answered=lens.token_label(int(trace.logits[0].argmax())),
        known=correct(lens, [fact])[0],
        material=knowledge(lens, about),
        value=value,
        query=query,
        effects=effects,
        value_tokens=alone(lens, fact, vocabulary(lens, value.top(10))),
        query_tokens=alone(lens, fact, vocabulary(lens, query.top(10))),
        effect_tokens=alone(lens, fact, vocabulary(lens, effects.top(10))),
        removal=lost,
        without=without(lens, fact, rankings, lost),
        kept=kept_alone(lens, fact, every, seed),
        profile=profile(lens, kind),
        layers=layers,
        ablation=without_the_best(lens, about, seed),
        suppression=suppress(lens, about.chains, counted=False)[0],
        edits=edited.table,
        tokens=by_token(lens, fact),
        beliefs=logit_lens(lens, fact),
        heads=layer_scores(lens, trace, "head", "layer_vector"),
        attention=attention(lens, fact),
        nodes=other_scores(lens, trace, nodes),
        edges=edges,
        states=edited.states,
        probes=edited.probes,
        tokens_after=edited.tokens,
        value_tokens_after=edited.value_tokens,
        restored=lens.state() == weights,
        settings={
            **value.settings,
            "seed": seed,
            "ACE": "given" if editor else tuned["ACE"].source,
            "MEMIT": "given" if rival else tuned["MEMIT"].source,
            "neurons": lens.n_layers * lens.d_mlp,
        },
    )


def _material(lens: Lens, fact: Fact, new: str, seed: int) -> Material:
    """The atlas's; for the bundled models the world's that they were trained on."""
    if lens.name not in BUNDLED:
        return atlas_material(lens, fact, new, seed)
    from qv_lens.world.material import world_material

    return world_material(lens, fact, new, seed)


def knowledge(lens: Lens, material: Material) -> pd.DataFrame:
    """The number of facts and prompts whose answer the unedited model gives: `kind, asked, known`.
    Where the material was chosen by what the model knows, the counts are of the facts and prompts
    that it was chosen from."""
    groups = (material.same, material.other, material.chains)
    counts = material.asked or tuple(map(len, groups))
    known = material.known or tuple(sum(correct(lens, facts)) for facts in groups)
    return pd.DataFrame(
        {
            "kind": ["facts of its kind", "facts of other kinds", "two-hop prompts"],
            "asked": counts,
            "known": known,
        }
    )


# ------------------------------------------------------------------ the causal tests


def removal(
    lens: Lens, fact: Fact, material: Material, rankings: Mapping[str, NeuronSet], seed: int = 0
) -> pd.DataFrame:
    """The fact's own best neurons taken out of it, of another fact of its kind and of one of
    another kind: `faithfulness`'s columns, `whose` and `text`."""
    facts = [fact, *material.same[:1], *material.other[:1]]
    whose = [WHOSE[0], *WHOSE[1:2][: len(material.same)], *WHOSE[2:][: len(material.other)]]
    union = {name: neurons.union() for name, neurons in rankings.items()}
    frame = faithfulness(lens, facts, union, CURVE, seeds=RANDOM_SEEDS, seed=seed)
    texts = [_in_words(each) for each in facts]
    return frame.assign(
        whose=[whose[i] for i in frame["prompt"]],
        text=[texts[i] for i in frame["prompt"]],
        went=[_went(union.get(row.ranking), row.k) for row in frame.itertuples()],
    )


def _went(ranking: NeuronSet | None, k: int) -> str:
    """The neurons that a curve's step to k takes out and the step before it leaves; of a random
    order nothing is told."""
    if ranking is None:
        return ""
    before = max((size for size in CURVE if size < k), default=0)
    new = ranking.frame.iloc[before:k]
    return ", ".join(f"f{row.layer}-{row.neuron}" for row in new.itertuples())


def without(
    lens: Lens, fact: Fact, rankings: Mapping[str, NeuronSet], lost: pd.DataFrame
) -> pd.DataFrame:
    """Whether the fact is gone or only its first token: what the model says with a ranking's best
    neurons zero at every token."""
    own, rows = lost_at(lost[lost["prompt"] == 0]).set_index("ranking")["k"], []
    for name, neurons in rankings.items():
        counts = {CURVE[-1]} if name == IN_ROUNDS else set()
        counts |= {int(own[name])} if own[name] == own[name] else set()
        for k in sorted(counts):
            with lens.intervene(Zero(neurons.union().top(k))):
                rows.append((name, k, *greedy_answers(lens, [fact], least=WORDS)))
    return pd.DataFrame(rows, columns=["ranking", "k", "said"])


def alone(lens: Lens, fact: Fact | str, neurons: pd.DataFrame) -> pd.DataFrame:
    """A frame of neurons with `alone`, what zeroing each at every token does to log p of the answer
    (nats)."""
    clean, effects = lens.logprob(fact), []
    for layer, neuron in neurons[["layer", "neuron"]].itertuples(index=False):
        with lens.intervene(Zero(NeuronSet.of([(int(layer), int(neuron))]))):
            effects.append(lens.logprob(fact) - clean)
    return neurons.assign(alone=effects)


def kept_alone(
    lens: Lens, fact: Fact, every: Mapping[str, NeuronSet], seed: int = 0
) -> pd.DataFrame:
    """`faithfulness` of one fact with `keep`: growing shares of all neurons, best first by each
    ranking, and nothing else at the last token."""
    units = lens.n_layers * lens.d_mlp
    sizes = sorted({max(1, round(share * units)) for share in KEPT})
    frame = faithfulness(lens, fact, every, sizes, keep=True, seeds=RANDOM_SEEDS, seed=seed)
    return frame.assign(text=_in_words(fact))


def _in_words(fact: Fact) -> str:
    return f"{fact.text} {fact.answer}"


def profile(lens: Lens, facts: Sequence[Fact]) -> pd.DataFrame:
    """Layers, a mean per fact (nats): `kind, layer, score`, of whole outputs by Eq. 9, and of the
    FFN neurons' positive effects on the answer, at the prompt's last token and at the subject's."""
    trace = lens.trace(list(facts))
    frames = []
    outputs: tuple[tuple[Kind, str], ...] = (
        ("ffn", "FFN, whole output (Eq. 9)"),
        ("attn", "attention, whole output (Eq. 9)"),
    )
    for kind, name in outputs:
        scores = layer_scores(lens, trace, kind, "layer_vector").groupby("layer")["score"].mean()
        frames.append(scores.reset_index().assign(kind=name))
    effects: tuple[tuple[Positions, str], ...] = (("last", LAST), ("subject_last", SUBJECT))
    for position, name in effects:
        positive = positive_by_layer(lens, neuron_effects(lens, trace, None, positions=position))
        frames.append((positive / len(facts)).reset_index().assign(kind=name))
    return pd.concat(frames, ignore_index=True)[["kind", "layer", "score"]]


def without_the_best(lens: Lens, material: Material, seed: int = 0) -> pd.DataFrame:
    """Accuracy when 1% of the model's neurons are zeroed, ranked on one half of the facts of the
    kind: `neurons, seed, count` and `ablate`'s columns."""
    ranking = material.same[::2]
    groups = {"same kind": material.same[1::2], "other kinds": material.other}
    groups = {name: facts for name, facts in groups.items() if facts}
    if not ranking or not groups:
        return pd.DataFrame(columns=["neurons", "seed", "count", "group", *DROP])
    count = max(1, round(SHARE * lens.n_layers * lens.d_mlp))
    best = value_neurons(lens, list(ranking), count, over="set")
    sets = [("top 1%", 0, best)]
    for draw in range(RANDOM_SEEDS):
        sets.append(
            ("random 1%", draw, random_neurons(lens, count, random.Random(f"{seed}:{draw}")))
        )
    clean = {name: answers(lens, facts) for name, facts in groups.items()}
    tables = []
    for name, draw, neurons in sets:
        table = ablate(lens, neurons, groups, clean)
        for place, (column, value) in enumerate(
            {"neurons": name, "seed": draw, "count": count}.items()
        ):
            table.insert(place, column, value)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


# ------------------------------------------------------------------ the edit


@dataclass(frozen=True)
class Edited:
    """What the edits did."""

    table: pd.DataFrame
    """Summaries by `variant` and `layers`."""
    probes: pd.DataFrame
    """What the model says before and after each."""
    states: pd.DataFrame
    """Importance of layers for the answer given in each state, before and after ACE's edit."""
    tokens: pd.DataFrame
    """Importance by token for the new answer, after ACE's."""
    value_tokens: pd.DataFrame
    """What the best value neurons of the new answer promote."""


def ace_and_memit(lens: Lens) -> dict[str, Preset]:
    """The model's presets of both, or settings scaled to it: lam in units of d_mlp
    (`tuning.grids`), EasyEdit's search."""
    table = presets(lens.name) if has_presets(lens.name) else {}
    low = tuple(range(max(1, lens.n_layers // 10), max(2, round(lens.n_layers * 0.28))))
    scaled = {
        "ACE": ACE(lam=5.0 * lens.d_mlp, **LLAMA),
        "MEMIT": MEMIT(layers=low, lam=float(lens.d_mlp), **LLAMA),
    }
    untuned = "scaled to the model, untuned"
    return {name: table.get(name, Preset(editor, untuned)) for name, editor in scaled.items()}


def edit_variants(
    lens: Lens, material: Material, layers: Layers, ace: ACE, memit: MEMIT, count: int, seed: int
) -> Edited:
    """ACE with located layers, MEMIT with its own, ACE with random layers: the first `count` cases
    one at a time, and the words of the first."""
    located = located_editor(lens, layers, ace)
    pool = list(range(lens.backend_adapter.first_editable, lens.n_layers - 1))
    number = len(located.value_layers) + len(located.query_layers)
    drawn = sorted(random.Random(f"layers:{seed}").sample(pool, min(number, len(pool))))
    split = len(located.query_layers)
    by_chance = replace(ace, value_layers=tuple(drawn[split:]), query_layers=tuple(drawn[:split]))
    variants: dict[str, ACE | MEMIT] = {
        LOCATED_VARIANT: located,
        "MEMIT": memit,
        "ACE, random layers": by_chance,
    }
    written = [editor.written(lens) for editor in variants.values()]
    wanted = {layer for layers, _ in written for layer in layers}
    modules: dict[Module, None] = dict.fromkeys(
        module for _, several in written for module in several
    )
    logger.info("C0 of layers %s, where it is not kept", sorted(wanted))
    statistics = kept_covariance(lens, material.texts, wanted, modules=tuple(modules))
    cases = material.cases[:count]
    tables = []
    prefixes = contexts(lens, seed)
    with TemporaryDirectory() as folder:
        shared: dict[str, Any] = {
            "statistics": statistics,
            "templates": prefixes,
            "seed": seed,
            "cache": folder,
        }
        for name, editor in variants.items():
            logger.info("%s: facts edited, one at a time: %d", name, len(cases))
            frame = evaluate(lens, cases, fitting(cases, METRICS), editor, **shared)
            tables.append(
                summary(frame).assign(variant=name, layers=_label(editor), editor=repr(editor))
            )
        words = _words(lens, material, variants, statistics, prefixes, Path(folder))
    return Edited(pd.concat(tables, ignore_index=True), *words)


def located_editor(lens: Lens, layers: Layers, ace: ACE) -> ACE:
    """ACE at the layers just found."""
    value, query = layers.editable(*layer_counts(lens), first=lens.backend_adapter.first_editable)
    return replace(ace, value_layers=value, query_layers=query)


def _label(editor: ACE | MEMIT) -> str:
    if isinstance(editor, MEMIT):
        return str(list(editor.layers))
    query = f", query {list(editor.query_layers)}" if editor.query_layers else ""
    return f"value {list(editor.value_layers)}{query}"


def _words(
    lens: Lens,
    material: Material,
    variants: Mapping[str, ACE | MEMIT],
    statistics: Statistics,
    templates: Sequence[str],
    folder: Path,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """What the model says about the first case before and after each edit: `kind, prompt, wanted,
    before` and a column for each; and of the first editor the layers before and after, and
    `by_token` and the vocabulary of the new answer."""
    case = material.cases[0]
    new = case.request.new
    probes_asked = [
        ("the fact", case.request.target),
        *(("in other words", Probe(p.text, new)) for p in case.paraphrases[:2]),
    ]
    probes_asked += [("follows from it", after) for _, after in case.onward[:3]] + [
        ("must stay", near) for near in case.neighbours[:3]
    ]
    probe_list = [probe for _, probe in probes_asked]
    names = (case.request.fact.answer, new)
    probes = pd.DataFrame(
        {
            "kind": [kind for kind, _ in probes_asked],
            "prompt": [probe.text for probe in probe_list],
            "wanted": [probe.answer for probe in probe_list],
            "before": first_sentences(lens, probe_list, *names),
        }
    )
    states = [_layer_line(lens, case.request.fact, "before")]
    after: list[pd.DataFrame] = []
    for name, editor in variants.items():
        ahead = search_ahead(lens, [case.request], editor, templates=templates, folder=folder)
        patch = edit(lens, case.request, editor, statistics=statistics, ahead=ahead)
        with lens.patched(patch):
            probes[name] = first_sentences(lens, probe_list, *names)
            if not after:
                target = case.request.target
                states.append(_layer_line(lens, target, "after"))
                best = value_neurons(lens, target, 10)
                after = [by_token(lens, target), vocabulary(lens, best)]
    return probes, pd.concat(states, ignore_index=True), after[0], after[1]


def _layer_line(lens: Lens, fact: Fact, state: str) -> pd.DataFrame:
    scores = layer_scores(lens, fact, how="layer_vector")[["layer", "score"]]
    return scores.assign(state=f"{state} ({fact.answer})")


def attention(lens: Lens, fact: Fact) -> pd.DataFrame:
    """Where each head looks from the prompt's last token: `layer, head, position, token,
    weight`."""
    pattern = lens.trace(fact, attention=True).pattern
    assert pattern is not None
    layers, _, heads, keys = pattern.shape
    index = pd.MultiIndex.from_product(
        [range(layers), range(heads), range(keys)], names=["layer", "head", "position"]
    )
    weights = pattern[:, 0].flatten().float().tolist()
    frame = pd.DataFrame({"weight": weights}, index=index).reset_index()
    tokens = lens.str_tokens(fact)
    return frame.assign(token=[tokens[position] for position in frame["position"]])


def other_scores(lens: Lens, trace: Trace, nodes: pd.DataFrame) -> pd.DataFrame:
    """The pathway's nodes with `gradient` and `relp`: each neuron's effect at its own token, by
    both methods (nats)."""
    places = pd.MultiIndex.from_frame(nodes[["layer", "neuron", "position"]])
    methods: tuple[Literal["gradient", "relp"], ...] = ("gradient", "relp")
    for method in methods:
        every = neuron_effects(lens, trace, None, method=method, positions="all").frame
        scores = every.set_index(["layer", "neuron", "position"])["score"]
        nodes = nodes.assign(**{method: scores.reindex(places).to_numpy()})
    return nodes


def pathway(
    lens: Lens, trace: Trace, value: NeuronSet, query: NeuronSet, count: int = DRAWN
) -> Graph:
    """The Q-V graph of one fact's best neurons, its edges tested; nodes with the tokens they
    promote and suppress, and `effect`, what zeroing one alone at every token does to the answer's
    log-probability."""
    drawn = qv_graph(lens, trace, value.top(count), query.top(count), targets=count)
    graph = edge_effects(lens, trace, drawn)
    nodes = graph.nodes
    units = NeuronSet(
        nodes[["layer", "neuron", "coefficient"]].assign(prompt=0, unit="ffn", score=0.0)
    )
    words = vocabulary(lens, units, 8)[["promoted", "suppressed"]]
    effects = alone(lens, trace.facts[0], nodes)["alone"].tolist()
    columns = {name: words[name].tolist() for name in words}
    return Graph(nodes.assign(**columns, effect=effects), graph.edges)
