"""The Q-V graph: which query neuron feeds which value neuron, and whether that is so.

1. An edge is a term of Eq. 10's sum (ACE): what the query neuron's vector v_q adds, to first order,
   to the value neuron's coefficient m_j, times I_j / m_j. With value neurons and scores of
   `neuron_effects`, whose I_j is m_j dy/dm_j, the weight is the loss of the answer's log p along
   that edge, to first order.
2. Queries found with `through="attention"` lie at any token of the prompt; their edges go through
   the values of heads (see `readers`).
3. An edge is tested by taking it out (`edge_effects`): m_j is computed again without v_q, while all
   else that j reads stays as it was (through the stream: `Suppress` of this query for this target;
   through attention: FFN outputs and attention patterns held). Then m_j, and nothing else, is set
   to that value in a real pass, and the answer's log p read.
4. Pearson's r and Spearman's rho over a prompt's edges, of the predicted and the real loss of m_j,
   and of the weight and the real loss of log p, say what the graph is worth (`agreement`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.attribution.query import settings_of
from qv_lens.attribution.readers import (
    METHODS,
    Method,
    PatternReader,
    QueryOptions,
    Reader,
    Subkey,
    Through,
    Written,
    check_same_texts,
    once,
    targets_of,
)
from qv_lens.attribution.units import units_of
from qv_lens.attribution.wanted import Target, wanted_at, where_read
from qv_lens.errors import ConfigError
from qv_lens.facts.spans import Positions
from qv_lens.models.hooks import keeper
from qv_lens.models.interventions import (
    check_ffn,
    check_not_suppressed,
    check_targets_as_made,
    ffn_coefficients,
)
from qv_lens.models.lens import Facts, Lens, check_lens, log_probs
from qv_lens.models.norms import at_least_float32
from qv_lens.models.one_neuron import logp_with_each
from qv_lens.neurons import NeuronSet
from qv_lens.trace import Trace

COLUMNS = ("prompt", "source", "target", "source_layer", "target_layer", "weight")
#: of what `agreement` gives
MEASURES = ("pearson_m", "spearman_m", "pearson_logprob", "spearman_logprob")
#: copies of a prompt in one pass, each without another query neuron
TOGETHER = 32


class Graph(NamedTuple):
    """The Q-V graph. `nodes`: prompt, id, layer, neuron, position, role ('value', 'query',
    'shared'), value_score, query_score, coefficient (in the prompt). `edges`: prompt, source,
    target, source_layer, target_layer, weight (nats; with `method='inner_product'` in units of m_j
    before its non-linearity); tested ones also predicted_m, lost_m (in units of m_j), lost_logprob
    (nats)."""

    nodes: pd.DataFrame
    edges: pd.DataFrame


@torch.no_grad()
def qv_graph(
    lens: Lens,
    facts: Facts | Trace,
    value: NeuronSet,
    query: NeuronSet,
    *,
    method: Method = "grad",
    targets: int = 30,
    subkey: Subkey | None = None,
    positions: Positions = "last",
) -> Graph:
    """Which query FFN neuron feeds which value FFN neuron: the terms of Eq. 10's sum, prompt by
    prompt.

    An edge weight is what query_neurons adds up over the targets; `method`, `targets`, `subkey` and
    `positions` are those with which the queries were found. Queries that were found with
    `through='attention'` are drawn at the tokens at which they lie. `edges` is what networkx takes:
    `nx.from_pandas_edgelist(edges, "source", "target", "weight", create_using=nx.DiGraph)`.

    Raises `ConfigError` for neurons of other prompts, queries that were found by another method, and
    what `query_neurons` refuses.
    """
    check_lens(lens)
    check_ffn(lens, value)
    check_ffn(lens, query)
    through: Through = query.settings.get("through", "stream")
    options = QueryOptions(method, targets, subkey, positions, through)
    reader = targets_of(lens, facts, value, options)
    _check_queries(query, reader, options)
    if through == "stream" and len(reader.trace.prompt) != len(reader.trace.prompts):
        raise ConfigError(
            "The graph is drawn for one position of each prompt: trace at one, not at several."
        )
    named = _ids if reader.by_position else _short_ids
    below = [_below(reader, query, prompt) for prompt in range(len(reader.trace.prompts))]
    targets_at, sources = _at_tokens(reader), pd.concat(below, ignore_index=True)
    targets_at, sources = (
        frame.assign(id=named(frame), coefficient=_coefficients(reader, frame))
        for frame in (targets_at, sources)
    )
    nodes = [
        _nodes(*(frame[frame["prompt"] == prompt] for frame in (targets_at, sources)))
        for prompt in range(len(below))
    ]
    edges = _edges(reader, targets_at, sources)
    graph = Graph(pd.concat(nodes, ignore_index=True), edges)
    settings = settings_of(lens, reader, options, value)
    prompts = [_about(lens, reader.trace, value, prompt) for prompt in range(len(below))]
    for frame in graph:
        frame.attrs.update(settings, prompts=prompts, n_layers=lens.n_layers)
    return graph


def _check_queries(query: NeuronSet, reader: Reader, options: QueryOptions) -> None:
    """Raise `ConfigError` for queries of other prompts, found by another method or other keys, or
    without a token where they need one."""
    check_same_texts("query", query, [prompt.text for prompt in reader.trace.prompts])
    settings = query.settings
    for name, wanted in (("method", options.method), ("subkey", options.key)):
        theirs = settings.get(name, wanted)
        if settings.get("method") in METHODS and theirs != wanted:
            raise ConfigError(
                f"The queries were found with {name}={theirs!r}, the graph is asked for with "
                f"{wanted!r}: give both the same."
            )
    if not reader.by_position:
        return
    if "position" not in query.frame or query.frame["position"].isna().any():
        raise ConfigError(
            "Queries through attention lie at tokens, and some of these have no position: a set made "
            "by hand goes with queries through='stream'."
        )


def _about(lens: Lens, trace: Trace, value: NeuronSet, number: int) -> dict[str, Any]:
    """The prompt as tokens; what its value neurons were scored by: a token (the answer's first, or
    the model's own, where they do not say), its probability at the token where it is read, and the
    other one of a contrast."""
    prompt, settings = trace.prompts[number], value.settings
    by_prompt = len(settings.get("target_ids", ())) == len(trace.prompts)
    at = settings["read_at"][number] if by_prompt else prompt.last
    row = trace.rows_of(number).get(at)
    read = lens.trace(trace.facts[number]).logits[0] if row is None else trace.logits[row]
    logits = at_least_float32(read)
    own = prompt.answer[0] if prompt.answer else int(logits.argmax())
    answer = settings["target_ids"][number] if by_prompt else own
    about = {
        "text": prompt.text,
        "ids": list(prompt.ids),
        "tokens": [lens.token_label(token) for token in prompt.ids],
        "answer_id": answer,
        "answer": lens.token_label(answer),
        "position": at,
        "probability": float(logits.softmax(-1)[answer]),
    }
    if not by_prompt or "against_ids" not in settings:
        return about
    other = settings["against_ids"][number]
    return {**about, "against_id": other, "against": lens.token_label(other)}


def _at_tokens(reader: Reader) -> pd.DataFrame:
    """The targets, and the token at which each is read."""
    rows = torch.tensor(reader.table["row"].to_numpy())
    at = reader.positions if isinstance(reader, PatternReader) else reader.trace.positions[rows]
    return reader.table.assign(position=at.tolist())


def _coefficients(reader: Reader, frame: pd.DataFrame) -> list[float]:
    """m of FFN neurons in their prompts: a set's own may be a mean over prompts, or none."""
    trace = reader.trace
    places = [trace.rows_of(prompt) for prompt in range(len(trace.prompts))]
    rows = [places[at.prompt][at.position] for at in frame.itertuples()]
    layers, neurons = (torch.tensor(frame[name].to_numpy()) for name in ("layer", "neuron"))
    return trace.m[layers, torch.tensor(rows, dtype=torch.long), neurons].tolist()


def _below(reader: Reader, query: NeuronSet, prompt: int) -> pd.DataFrame:
    """The query neurons of one prompt, the tokens at which they lie, and their rows of the
    trace."""
    at = reader.trace.rows_of(prompt)
    frame = once(query.about(reader.trace.facts[prompt], prompt).frame).assign(prompt=prompt)
    if not reader.by_position:
        frame = frame.assign(position=next(iter(at)))
    placed = frame.assign(row=[at[position] for position in frame["position"]])
    # pandas takes the columns of no rows for floats
    return placed.astype(dict.fromkeys(("layer", "neuron", "position", "row"), "int64"))


def _edges(reader: Reader, targets: pd.DataFrame, sources: pd.DataFrame) -> pd.DataFrame:
    """The edges from every query neuron to every target above it."""
    weights = reader.weights(written_by(reader.lens, reader.trace, sources)).cpu()
    edges = []
    for a in sources.itertuples():
        above = targets[(targets["layer"] > a.layer) & (targets["prompt"] == a.prompt)]
        edges += [
            (a.prompt, a.id, b.id, a.layer, b.layer, weights[a.Index, b.Index].item())
            for b in above.itertuples()
        ]
    frame = pd.DataFrame(edges, columns=list(COLUMNS))
    if reader.by_position:  # FFNs that read before attention hear of another token a layer later
        frame = frame[frame["weight"] != 0]
    return frame.sort_values(["prompt", "source_layer"], kind="stable", ignore_index=True)


def written_by(lens: Lens, trace: Trace, sources: pd.DataFrame) -> Written:
    """What FFN neurons (columns `layer, neuron, row`) write into the stream."""
    like = at_least_float32(trace.resid)
    out = like.new_zeros(len(sources), lens.d_model)
    layers = sources["layer"].to_numpy()
    for layer in sorted(set(layers.tolist())):
        here = torch.tensor((layers == layer).nonzero()[0])
        q, rows = (torch.tensor(sources[name].to_numpy())[here] for name in ("neuron", "row"))
        units = units_of(lens, trace, "ffn", layer)
        out[here] = units.m[rows, q][:, None] * at_least_float32(units.vectors[q])
    where = sources[["layer", "row"]].to_numpy().T
    at_layers, at_rows = torch.tensor(where, device=out.device)
    return Written(at_layers, at_rows, out)


def _short_ids(nodes: pd.DataFrame) -> list[str]:
    return [f"f{node.layer}-{node.neuron}" for node in nodes.itertuples()]


def _ids(nodes: pd.DataFrame) -> list[str]:
    """The same neuron at two tokens is two nodes."""
    return [f"f{node.layer}-{node.neuron}@{node.position}" for node in nodes.itertuples()]


def _nodes(value: pd.DataFrame, query: pd.DataFrame) -> pd.DataFrame:
    keys = ["prompt", "id", "layer", "neuron", "position"]
    value = value[[*keys, "score", "coefficient"]].rename(columns={"score": "value_score"})
    query = query[[*keys, "score", "coefficient"]].rename(columns={"score": "query_score"})
    merged = value.merge(query, on=keys, how="outer", suffixes=("", "_query"))
    merged["coefficient"] = merged["coefficient"].fillna(merged.pop("coefficient_query"))
    role = merged["query_score"].isna().map({True: "value", False: "shared"})
    return merged.assign(role=role.where(merged["value_score"].notna(), "query"))


# ------------------------------------------------------------------ tested


@torch.no_grad()
def edge_effects(
    lens: Lens, facts: Facts | Trace, graph: Graph, *, target: Target | None = None
) -> Graph:
    """The graph with every edge taken out in turn: `predicted_m`, what the edge's weight says of
    m_j's loss; `lost_m`, what m_j really loses without the edge; `lost_logprob`, what the token
    that the value neurons were scored by (or another `target`, as for `value_neurons`) then loses
    at the prompt's end, in nats. Both losses are positive where the edge supports.

    `facts`: those of the graph. The edges' attribute `agreement` holds `agreement(edges)`, `tested`
    says so in words, and `qv.plots.pathway` prints it.
    Raises `ConfigError` for other facts, under a `Suppress`, and while a `Scale` or `Replace` is in
    force on value neurons of the graph.
    """
    check_lens(lens)
    check_not_suppressed(lens, "Tests of edges")
    values = graph.nodes.loc[graph.nodes["role"] != "query", ["layer", "neuron"]]
    check_targets_as_made(lens, values.itertuples(index=False, name=None), "Tests of edges")
    # whatever a trace holds, an answer is read at the prompt's end
    rows = lens.rows(lens.traced(facts).facts if isinstance(facts, Trace) else facts)
    texts = [prompt.text for prompt in rows.prompts]
    if texts != graph.edges.attrs.get("texts"):
        raise ConfigError(
            f"This graph was drawn for {graph.edges.attrs.get('texts')!r:.100}, asked is "
            f"{texts!r:.100}: give both the same facts."
        )
    if target is not None and where_read(target) == "answer":
        raise ConfigError("Edges are tested on the next token: use another target than 'sequence'.")
    answers = [(each["answer_id"], each.get("against_id")) for each in graph.edges.attrs["prompts"]]
    if target is not None:
        wanted = wanted_at(lens, rows, target)
        against = [None] * len(texts) if wanted.against is None else wanted.against.tolist()
        answers = list(zip(wanted.token.tolist(), against, strict=True))
    every = lens.trace(rows.facts, "all")
    parts = []
    for prompt in range(len(texts)):
        edges = graph.edges[graph.edges["prompt"] == prompt]
        test = _Test(lens, every, prompt, graph.nodes[graph.nodes["prompt"] == prompt], edges)
        without = test.coefficients(graph.edges.attrs["through"])
        parts.append(test.measured(without, *answers[prompt]))
    edges = pd.concat(parts)
    edges.attrs.update(graph.edges.attrs)
    measures = agreement(edges)
    edges.attrs.update(agreement=measures.to_dict(), tested=_in_words(len(edges), measures))
    return Graph(graph.nodes, edges)


def agreement(edges: pd.DataFrame) -> pd.Series:
    """How tested edges agree with their weights: Pearson's r and Spearman's rho of the predicted
    and the real loss of m_j (`pearson_m`, `spearman_m`), and of the weight and the real loss of
    log p (`pearson_logprob`, `spearman_logprob`); means over the prompts."""
    correlations = []
    for _, some in edges.groupby("prompt"):
        pairs = {"m": ("predicted_m", "lost_m"), "logprob": ("weight", "lost_logprob")}
        correlations.append(
            {
                f"{method}_{name}": some[predicted].corr(some[real], method=method)
                for name, (predicted, real) in pairs.items()
                for method in ("pearson", "spearman")
            }
        )
    return pd.DataFrame(correlations, columns=list(MEASURES)).mean()


def _in_words(edges: int, measures: pd.Series) -> str:
    if not edges:
        return "No edge leads from these query neurons to these value neurons."
    if measures.isna().any():
        return f"Each of the {edges} edges was taken out; too few of a prompt for a correlation."
    return (
        f"Each of the {edges} edges was taken out: its weight agrees with what the value neuron's "
        f"coefficient lost with Spearman's rho {measures['spearman_m']:.2f}, and with what the "
        f"answer's log p lost with {measures['spearman_logprob']:.2f}."
    )


@dataclass(frozen=True)
class _Test:
    """The edges of one prompt, and what a pass over it computed at every token."""

    lens: Lens
    trace: Trace
    prompt: int
    nodes: pd.DataFrame
    edges: pd.DataFrame

    @cached_property
    def rows(self) -> list[int]:
        """The prompt's rows of the trace, by position."""
        return (self.trace.prompt == self.prompt).nonzero()[:, 0].tolist()

    @cached_property
    def sources(self) -> pd.DataFrame:
        """The query neuron of every edge, and its row of the trace."""
        return self._ends("source")

    @cached_property
    def targets(self) -> pd.DataFrame:
        """The value neuron of every edge, and its row of the trace."""
        return self._ends("target")

    def _ends(self, side: str) -> pd.DataFrame:
        nodes = self.nodes.set_index("id").loc[self.edges[side]].reset_index()
        return nodes.assign(row=[self.rows[position] for position in nodes["position"]])

    def coefficients(self, through: Through) -> Float[Tensor, " edge"]:
        """m of every edge's target without the edge."""
        if through == "stream":
            return self._without_in_stream()
        return self._without_through_attention()

    def _without_in_stream(self) -> Float[Tensor, " edge"]:
        lens = self.lens
        v = written_by(lens, self.trace, self.sources).vectors
        out = v.new_zeros(len(self.edges))
        for (layer, row), group in self.targets.groupby(["layer", "row"]):
            index = torch.tensor(group.index.to_numpy())
            x = at_least_float32(self.trace.resid[int(layer), int(row)])
            if not lens.backend_adapter.parallel:
                x = x + at_least_float32(self.trace.attn[int(layer), int(row)])
            neurons = torch.tensor(group["neuron"].to_numpy())
            m = ffn_coefficients(lens, int(layer), x - v[index], neurons)
            out[index] = m.diagonal()
        return out

    def _without_through_attention(self) -> Float[Tensor, " edge"]:
        """One copy of the prompt for each query neuron: its output lacks v_q, all FFNs write what
        they wrote, heads look where they looked."""
        sources = self.sources.drop_duplicates("id").reset_index(drop=True)
        v = written_by(self.lens, self.trace, sources).vectors
        place = {name: number for number, name in enumerate(sources["id"])}
        copy = torch.tensor([place[name] for name in self.sources["id"]])
        out = v.new_zeros(len(self.edges))
        for first in range(0, len(sources), TOGETHER):
            some = slice(first, first + TOGETHER)
            rows = ((copy >= first) & (copy < first + TOGETHER)).nonzero()[:, 0]
            m = self._held(sources.iloc[some], v[some])
            for edge in rows.tolist():
                target = self.targets.iloc[edge]
                where = int(copy[edge] - first), int(target["position"]), int(target["neuron"])
                out[edge] = m[int(target["layer"])][where]
        return out

    def _held(
        self, sources: pd.DataFrame, v: Float[Tensor, "source d_model"]
    ) -> dict[int, Float[Tensor, "source seq d_mlp"]]:
        """m by layer, in a copy for each query neuron without what it writes."""
        lens, backend = self.lens, self.lens.backend_adapter
        ids, top = self.trace.prompts[self.prompt].ids, int(self.edges["target_layer"].max())
        seen: dict[str, Tensor] = {}
        looked = [backend.qkv(layer, which) for layer in range(top + 1) for which in "QK"]
        lens.stream([ids], top + 1, [(name, keeper(seen, name)) for name in looked])
        layers = torch.tensor(sources["layer"].to_numpy())
        position = torch.tensor(sources["position"].to_numpy())

        def again(name: str):
            clean = seen[name]
            return lambda x: clean.expand_as(x).clone()

        def without(layer: int):
            wrote = self.trace.ffn[layer][self.rows]
            here = (layers == layer).nonzero()[:, 0]

            def hook(x: Tensor) -> Tensor:
                out = wrote.to(x.dtype).expand_as(x).clone()
                out[here, position[here]] -= v[here].to(x.dtype)
                return out

            return hook

        m: dict[int, Tensor] = {}
        hooks = [(name, again(name)) for name in looked]
        hooks += [(backend.mlp_out(layer), without(layer)) for layer in range(top)]
        hooks += [
            (backend.coefficient(layer), keeper(m, layer))
            for layer in sorted(self.edges["target_layer"].unique())
        ]
        lens.stream([ids] * len(sources), top + 1, hooks)
        return m

    def measured(
        self, without: Float[Tensor, " edge"], token: int, against: int | None
    ) -> pd.DataFrame:
        """The edges with their losses."""
        lens, prompt = self.lens, self.trace.prompts[self.prompt]
        tokens = torch.tensor([token] if against is None else [token, against]).to(lens.device)
        clean = log_probs(self.trace.logits[self.rows[prompt.last]])[tokens]
        lost = torch.zeros(len(self.edges), dtype=clean.dtype)
        m = torch.zeros_like(lost)
        for (layer, position), group in self.targets.groupby(["layer", "position"]):
            index = torch.tensor(group.index.to_numpy())
            neurons = torch.tensor(group["neuron"].to_numpy())
            m[index] = self.trace.m[int(layer), self.rows[int(position)], neurons].to(m)
            now = logp_with_each(
                lens, prompt, int(layer), int(position), neurons, without[index], tokens
            )
            fell = clean - now
            lost[index] = (fell[:, 0] if against is None else fell[:, 0] - fell[:, 1]).to(lost)
        weight, score = self.edges["weight"].to_numpy(), self.targets["value_score"].to_numpy()
        literal = self.edges.attrs.get("method") == "inner_product"
        predicted = weight if literal else weight * m.numpy() / score
        return self.edges.assign(
            predicted_m=predicted,
            lost_m=(m - without.cpu().to(m)).numpy(),
            lost_logprob=lost.numpy(),
        )
