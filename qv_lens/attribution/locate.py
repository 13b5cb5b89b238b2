"""Layer rankings over a set of cases: which layers hold value neurons, which hold query neurons.

1. Value layers: I summed over the FFN neurons of a layer (Eq. 9) and over the prompts. Or
   (`by='effects'`) what the answer loses without neurons: the positive gradient scores of each
   prompt's best neurons, summed over a layer.
2. Query layers: the query functional (Eq. 10) on the layer's whole FFN output, for the top value
   neurons of each prompt, summed over the prompts; layers above which no such neuron lies come
   last.
3. Eq. 9 reads a neuron out where it is written, so at the subject's token it tells little about the
   answer, which is read at the prompt's end. The effects are those of the neurons at the subject's
   token on that answer, so they can be computed where an edit is written.
Source: ACE, section 5, stage 1. The prompts are multi-hop questions there; facts work as well, and
(`prompts='single_hop'`) the questions of the chains' hops, which the release's own ranking file
holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd

from qv_lens.attribution.effects import neuron_effects
from qv_lens.attribution.projection import NormMode
from qv_lens.attribution.query import Method, query_layers
from qv_lens.attribution.setting import Base, setting
from qv_lens.attribution.value import best_of, every_score
from qv_lens.errors import ConfigError, one_or_more, unknown
from qv_lens.facts.records import Fact, MultiHopCase
from qv_lens.facts.spans import FactToken
from qv_lens.models.lens import Lens, check_lens
from qv_lens.neurons import NeuronSet

By = Literal["importance", "effects"]


@dataclass(frozen=True)
class Layers:
    """`value` and `query`: layers, best first; `frame`: `kind ('value', 'query'), layer, score`."""

    value: tuple[int, ...]
    """Value layers, best first."""
    query: tuple[int, ...]
    """Query layers, best first."""
    frame: pd.DataFrame = field(repr=False)
    """`kind ('value', 'query'), layer, score`."""

    @property
    def raising(self) -> tuple[int, ...]:
        """Query layers with a positive score, best first: their whole output raises the value
        neurons (it may be none)."""
        rows = self.frame[(self.frame["kind"] == "query") & (self.frame["score"] > 0)]
        return tuple(layer for layer in self.query if layer in set(rows["layer"]))

    def editable(
        self, values: int, queries: int, first: int = 0
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The best layers for an edit at the subject's last token: (value layers, query layers),
        each ascending.

        Value layers lie below the model's last layer, after whose attention nothing reads the
        subject. Query layers lie below the highest value layer and are not value layers themselves.
        None lies below `first`."""
        top = max(self.value)
        value = sorted([layer for layer in self.value if first < layer < top][:values])
        if not value:
            raise ConfigError(f"No value layer lies between layer {first} and the last one, {top}.")
        query = [layer for layer in self.query if first <= layer < value[-1] and layer not in value]
        return tuple(value), tuple(sorted(query[:queries]))


def locate(
    lens: Lens,
    cases: Sequence[Fact | MultiHopCase] | Fact | MultiHopCase,
    position: FactToken = "last",
    *,
    norm: NormMode = "frozen",
    base: Base = "mid",
    method: Method = "grad",
    by: By | NeuronSet = "importance",
    top: int = 300,
    prompts: Literal["multi_hop", "single_hop"] = "multi_hop",
) -> Layers:
    """Rank the layers over the cases; a `MultiHopCase` counts with its first question and its old
    answer, or with those of each of its hops before the edit.

    `by`: 'importance' (Eq. 9 of every neuron, read out at `position`) or 'effects' (the gradient
    score of neurons at `position` on the answer at the prompt's end; `norm` and `base` then play no
    part), or a set of FFN neurons of the same prompts, scored in any other way (`neuron_effects` by
    RelP, in rounds, against a mean). `top`: how many value neurons the query layers are asked for,
    by `method` (as `query_neurons`); by effects also how many count for their layers; of a set all.
    `prompts`: of a chain its question ('multi_hop') or those of its hops ('single_hop').
    Raises `ConfigError` for no cases, an unknown `by`, or a set of other units or of other prompts.

    >>> import qv_lens as qv
    >>> lens = qv.load("toy-gptj")
    >>> fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    >>> qv.locate(lens, fact).value[:2]  # value layers, best first
    (2, 3)
    """
    check_lens(lens)
    if not isinstance(by, NeuronSet) and by not in ("importance", "effects"):
        raise unknown("by", by, ("importance", "effects"))
    if prompts not in ("multi_hop", "single_hop"):
        raise unknown("Prompts", prompts, ("multi_hop", "single_hop"))
    facts = [fact for record in one_or_more(cases) for fact in _as_facts(record, prompts)]
    if not facts:
        raise ConfigError("No cases were given: pass at least one Fact or MultiHopCase.")
    trace = lens.trace(facts, position)
    if isinstance(by, NeuronSet):
        value, by_layer = by, positive_by_layer(lens, by)
        if by.unit != "ffn" or not by_layer.any():
            raise ConfigError(
                "locate takes a set of FFN neurons with scores, some of them above 0 "
                f"(qv.neuron_effects(lens, facts, method='relp')); got {by!r:.100}."
            )
        texts = [prompt.text for prompt in trace.prompts]
        if by.frame["prompt"].ge(0).any() and by.settings.get("texts", texts) != texts:
            raise ConfigError(
                f"These neurons were scored on {by.settings['texts']!r:.100}, and layers are asked "
                f"for {texts!r:.100}: give both the same facts, or ask for one set everywhere "
                "(by.union())."
            )
    elif by == "effects":
        value = neuron_effects(lens, trace, top, positions=position)
        by_layer = positive_by_layer(lens, value)
    else:
        task = setting(lens, trace, norm=norm, base=base)
        scores, settings = every_score(task)
        value = best_of(task, scores, top, "ffn", "prompt", settings)
        by_layer = pd.Series(scores.double().sum((1, 2)).tolist(), name="score")
    queries = query_layers(lens, trace, value, method=method)
    by_query = queries[queries["kind"] == "ffn"].groupby("layer")["score"].sum()
    frame = pd.concat(
        [
            pd.DataFrame({"kind": kind, "layer": s.index, "score": s.to_numpy()})
            for kind, s in (("value", by_layer), ("query", by_query))
        ],
        ignore_index=True,
    )
    scored = "neurons" if isinstance(by, NeuronSet) else by
    settings = {**value.settings, "scored_by": value.settings.get("method"), "method": method}
    frame.attrs.update({**settings, "position": position, "by": scored, "prompts": len(facts)})
    # from this layer on, a 0 says that nothing reads the layer, not that it feeds as much as it
    # takes
    reach = int(value.frame["layer"].max())
    return Layers(
        _order(by_layer), _order(by_query.where(by_query.index < reach, float("-inf"))), frame
    )


def positive_by_layer(lens: Lens, neurons: NeuronSet) -> pd.Series:
    """The positive scores of each layer, summed; 0 for a layer without any."""
    positive = neurons.frame[neurons.frame["score"] > 0]
    return positive.groupby("layer")["score"].sum().reindex(range(lens.n_layers), fill_value=0.0)


def _order(scores: pd.Series) -> tuple[int, ...]:
    return tuple(int(layer) for layer in scores.sort_values(ascending=False, kind="stable").index)


def _as_facts(record: Fact | MultiHopCase, prompts: str) -> list[Fact]:
    if isinstance(record, MultiHopCase):
        if prompts == "single_hop":
            return [Fact("{}", hop.question, hop.answer) for hop in record.hops]
        return [Fact("{}", record.questions[0], record.answer)]
    if not isinstance(record, Fact):
        raise ConfigError(
            f"Layers are located over facts and chains, got {type(record).__name__}: take a case's "
            "or a request's fact."
        )
    return [record]


def layer_counts(lens: Lens) -> tuple[int, int]:
    """Value and query layers to edit: ACE's 3 and 6 of GPT-J's 28, 5 and 3 of Qwen3-8B's 36, scaled
    to the model."""
    of = lens.backend_adapter.ace_layers
    return max(1, round(of[0] * lens.n_layers / of[2])), max(
        1, round(of[1] * lens.n_layers / of[2])
    )
