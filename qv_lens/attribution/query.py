"""Query importance (ACE, Eq. 10): which lower units activate the value neurons, and the graph of
who feeds whom.

1. Take the top K value neurons j of each prompt, with importance I_j and coefficient m_j: FFN
   neurons, read at the prompt's last token, or attention neurons (head, channel, position p), read
   at p with the attention weight held.
2. A query unit q of a lower layer writes v_q (m_q fc2_q, a channel, a head) into the stream h that j reads. Its score
   adds up, over j, what v_q does to m_j, weighted by I_j. Three readings:
   `grad`           sum_j (I_j / m_j) v_q . grad m_j(h): first order through the norm and the gate (default),
   `share`          sum_j I_j (v_q . key_j) / (h . key_j), key_j = gain * subkey_j (Yu & Ananiadou 2024),
   `inner_product`  sum_j v_q . subkey_j: Eq. 10 literally.
   subkey_j is row j of fc1; of a gated FFN its linearisation s'(z_g) z_u g_j + s(z_g) u_j for `share`, its gate row
   for `inner_product`; of an attention neuron the row of W_V.
   All are linear in v_q, so one vector per layer and row, summed over the layers above, scores everything below.
3. h is the stream after attention for an FFN (in GPT-J the stream before it, which its FFN reads),
   the stream before attention for an attention neuron.
4. Layers: the same functional on whole outputs A^l and F^l (`query_layers`), the embedding apart
   (layer -1).
5. Graph: the terms of the sum, one edge per pair (`qv_graph`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from qv_lens.attribution.setting import Over, TraceRows, check_over
from qv_lens.attribution.value import AT_POSITIONS, Unit, check_top, grouped, ranked, units_of
from qv_lens.errors import ConfigError, unknown
from qv_lens.facts.spans import Positions
from qv_lens.models.interventions import check_ffn
from qv_lens.models.lens import Facts, Lens, at_least_float32
from qv_lens.neurons import NeuronSet
from qv_lens.trace import Trace

Method = Literal["grad", "share", "inner_product"]
METHODS: tuple[Method, ...] = ("grad", "share", "inner_product")
Subkey = Literal["linear", "gate", "up"]
#: (layer, neurons) -> a vector each
KeyOf = Callable[[int, Tensor], Tensor]
#: a value neuron whose coefficient, or whose share's denominator, is smaller than this has no
#: defined weight
SMALL = 1e-6


@torch.no_grad()
def query_neurons(
    lens: Lens,
    facts: Facts | Trace,
    value: NeuronSet,
    top: int | None = 300,
    *,
    unit: Unit = "ffn",
    over: Over = "prompt",
    method: Method = "grad",
    targets: int = 30,
    subkey: Subkey | None = None,
    positions: Positions = "last",
) -> NeuronSet:
    """The `top` query units for the `targets` best value neurons of each prompt; `top=None` keeps
    all.

    `value` is what `value_neurons` gave for the same facts (rows of prompt -1 count for every
    prompt): FFN neurons, or attention neurons (`unit='attn_neuron'`), whose query units have a
    `position`, that which they read. `unit`: what may be a query, 'ffn', 'attn_channel' or 'head'
    (FFN targets also take 'attn_neuron', 'head_position'). `over` ranks by the sum over a set or
    category. `subkey`: for a gated FFN, 'linear' (share's default), 'gate' (inner_product's) or
    'up'. Scores are in nats for `grad` and `share`.
    Raises `ConfigError` if a prompt has no value neurons, or for an unknown option.

    >>> import qv_lens as qv
    >>> lens = qv.load("toy-gptj")
    >>> fact = qv.Fact("{} plays the sport of", "Elena Morefeld", "fencing")
    >>> value = qv.value_neurons(lens, fact, 30)
    >>> qv.query_neurons(lens, fact, value, 3).units
    [(2, 91), (1, 385), (1, 37)]
    """
    check_over(over)
    check_top(top)
    reader = targets_of(
        lens, facts, value, method, targets, subkey, positions, attention=unit in AT_POSITIONS
    )
    settings = {**_settings(lens, method, targets, value), "over": over, "unit": unit}
    return queries_of(lens, reader, unit, top, over, settings)


def queries_of(
    lens: Lens, reader: Reader, unit: Unit, top: int | None, over: Over, settings: dict[str, Any]
) -> NeuronSet:
    """The units below the reader's targets, scored by its keys and ranked."""
    trace, below = reader.trace, reader.below("ffn" if unit == "ffn" else "attn")
    scores, m = [], []
    for layer in range(lens.n_layers):
        units = units_of(lens, trace, unit, layer)
        if units.kind == "head":
            scores.append(einsum(units.vectors, below[layer], "r u d, r d -> r u"))
        else:
            reach = (below[layer] @ at_least_float32(units.vectors).T).repeat(1, units.keys)
            scores.append(units.m * reach)
        m.append(units.coefficients)
    if reader.attention:
        if over != "prompt" or unit in AT_POSITIONS:
            raise ConfigError(
                "Queries of attention neurons have a position: use over='prompt' and unit 'ffn', "
                "'attn_channel' or 'head'."
            )
        last = [prompt.last for prompt in trace.prompts]
        return ranked(
            TraceRows(lens, trace),
            unit,
            _by_prompt(trace, scores),
            _by_prompt(trace, m),
            top,
            settings,
            last=last,
        )
    groups = TraceRows(lens, trace).groups(over)
    sizes = torch.bincount(groups)[:, None].to(m[0])
    totals, means = (torch.stack([grouped(x, groups) for x in parts]) for parts in (scores, m))
    last = trace.positions.tolist() if unit in AT_POSITIONS else None
    return ranked(TraceRows(lens, trace), unit, totals, means / sizes, top, settings, over, last)


@torch.no_grad()
def query_layers(
    lens: Lens,
    facts: Facts | Trace,
    value: NeuronSet,
    *,
    method: Method = "grad",
    targets: int = 30,
    subkey: Subkey | None = None,
    positions: Positions = "last",
) -> pd.DataFrame:
    """Query scores of whole outputs: `prompt, kind ('ffn', 'attn', 'embed'), layer, score`; the
    embedding is layer -1.

    For attention neurons as targets the positions that they read are added up.
    """
    frame = layers_of(lens, targets_of(lens, facts, value, method, targets, subkey, positions))
    frame.attrs.update(_settings(lens, method, targets, value))
    return frame


def layers_of(lens: Lens, reader: Reader) -> pd.DataFrame:
    """The functional on whole outputs, per prompt."""
    trace, rows = reader.trace, []
    outputs = [
        (kind, output, reader.below(kind))
        for kind, output in (("ffn", trace.ffn), ("attn", trace.attn))
    ]
    for layer in range(lens.n_layers):
        for kind, output, below in outputs:
            scores = (at_least_float32(output[layer]) * below[layer]).sum(1, keepdim=True)
            rows += [
                (p, kind, layer, s)
                for p, s in enumerate(grouped(scores, trace.prompt)[:, 0].tolist())
            ]
    whole = reader.own["ffn"].sum(0) + reader.own["attn"].sum(0)
    embedding = grouped(
        (at_least_float32(trace.resid[0]) * whole).sum(1, keepdim=True), trace.prompt
    )[:, 0]
    rows += [(p, "embed", -1, s) for p, s in enumerate(embedding.tolist())]
    return pd.DataFrame(rows, columns=["prompt", "kind", "layer", "score"])


class Graph(NamedTuple):
    """The Q-V graph. `nodes`: prompt, id, layer, neuron, role ('value', 'query', 'shared'),
    value_score, query_score, coefficient. `edges`: prompt, source, target, source_layer,
    target_layer, weight (nats)."""

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

    An edge weight is what query_neurons adds up over the targets. `edges` is what networkx takes:
    `nx.from_pandas_edgelist(edges, "source", "target", "weight", create_using=nx.DiGraph)`.
    """
    check_ffn(lens, value)
    check_ffn(lens, query)
    reader = targets_of(lens, facts, value, method, targets, subkey, positions)
    if len(reader.trace.prompt) != len(reader.trace.prompts):
        raise ConfigError(
            "The graph is drawn for one position of each prompt: trace at one, not at several."
        )
    nodes, edges = [], []
    for prompt in range(len(reader.trace.prompts)):
        here = reader.table[reader.table["prompt"] == prompt]
        sources = _rows_of(query, reader.trace, prompt)
        nodes.append(_nodes(here, sources).assign(prompt=prompt))
        row = int((reader.trace.prompt == prompt).nonzero()[0])
        for layer, group in sources.groupby("layer"):
            above = here[here["layer"] > layer]
            q = torch.tensor(group["neuron"].to_numpy())
            units = units_of(lens, reader.trace, "ffn", int(layer))
            v = units.m[row, q][:, None] * at_least_float32(units.vectors[q])
            weights = v @ reader.keys[torch.tensor(above.index.to_numpy(), dtype=torch.long)].T
            edges += [
                (
                    prompt,
                    f"f{layer}-{n}",
                    f"f{j.layer}-{j.neuron}",
                    layer,
                    j.layer,
                    weights[a, b].item(),
                )
                for a, n in enumerate(group["neuron"])
                for b, j in enumerate(above.itertuples())
            ]
    columns = ["prompt", "source", "target", "source_layer", "target_layer", "weight"]
    graph = Graph(pd.concat(nodes, ignore_index=True), pd.DataFrame(edges, columns=columns))
    for frame in graph:
        frame.attrs.update(_settings(lens, method, targets, value))
    return graph


def _nodes(value: pd.DataFrame, query: pd.DataFrame) -> pd.DataFrame:
    keys = ["layer", "neuron"]
    value = value[[*keys, "score", "coefficient"]].rename(columns={"score": "value_score"})
    query = query[[*keys, "score", "coefficient"]].rename(columns={"score": "query_score"})
    merged = value.merge(query, on=keys, how="outer", suffixes=("", "_query"))
    merged["coefficient"] = merged["coefficient"].fillna(merged.pop("coefficient_query"))
    role = merged["query_score"].isna().map({True: "value", False: "shared"})
    merged["role"] = role.where(merged["value_score"].notna(), "query")
    return merged.assign(id=[f"f{row.layer}-{row.neuron}" for row in merged.itertuples()])


# ------------------------------------------------------------------ what the targets read


@dataclass(frozen=True)
class Reader:
    """The value neurons that queries are scored by: a weighted key each, and its sum by layer, row
    and sublayer."""

    trace: Trace
    """The pass."""
    table: pd.DataFrame
    """`prompt, row, layer, neuron, score, coefficient` of every target."""
    keys: Float[Tensor, "target d_model"]
    """The weighted key of every target."""
    own: dict[str, Float[Tensor, "layer row d_model"]]
    """The sum of the keys, by sublayer that reads."""
    parallel: bool
    """Whether attention and FFN read the same stream."""
    attention: bool
    """Whether the targets are attention neurons."""

    def below(self, writer: str) -> Float[Tensor, "layer row d_model"]:
        """What an output of each layer is scored by: all targets in the layers above and, for
        attention in front of a sequential FFN, its own layer's FFN targets."""
        written = self.own["ffn"] + self.own["attn"]
        above = written.flip(0).cumsum(0).flip(0) - written
        return above + self.own["ffn"] if writer == "attn" and not self.parallel else above


def targets_of(
    lens: Lens,
    facts: Facts | Trace,
    value: NeuronSet,
    method: Method,
    targets: int,
    subkey: Subkey | None = None,
    positions: Positions = "last",
    attention: bool = False,
    key_of: KeyOf | None = None,
) -> Reader:
    """The weighted keys of the best value neurons of each prompt; `key_of` puts other vectors in
    the place of subkeys.

    Raises `ConfigError` for an unknown method, a prompt without value neurons, or value neurons
    that were computed elsewhere in the prompt."""
    if method not in METHODS:
        raise unknown("Query method", method, METHODS)
    if targets < 1:
        raise ConfigError(
            f"targets is how many value neurons of a prompt are asked, at least 1; got {targets}."
        )
    if subkey not in (None, "linear", "gate", "up"):
        raise unknown("Subkey", subkey, ("linear", "gate", "up"))
    if method == "grad" and subkey is not None:
        raise ConfigError(
            "method='grad' goes through gate and up as they are: subkey= is for 'share' and "
            "'inner_product'."
        )
    reads_attention = value.unit == "attn_neuron"
    if not reads_attention:
        check_ffn(lens, value)
    trace = _traced(lens, facts, positions, attention, reads_attention)
    _check_same_prompts(value, trace, reads_attention)
    best = [_best(value, trace, p, targets) for p in range(len(trace.prompts))]
    table = pd.concat(best, ignore_index=True)
    dtype = at_least_float32(trace.resid).dtype
    keys = torch.zeros(len(table), lens.d_model, dtype=dtype, device=trace.resid.device)
    own = {name: torch.zeros_like(trace.resid[:-1], dtype=dtype) for name in ("ffn", "attn")}
    written_by = own["attn" if reads_attention else "ffn"]
    for layer, group in table.groupby("layer"):
        index = torch.tensor(group.index.to_numpy(), device=keys.device)
        rows = torch.tensor(group["row"].to_numpy(), device=keys.device)
        keys[index] = _keys(
            lens, trace, int(layer), rows, group, method, subkey, reads_attention, key_of
        )
        written_by[int(layer)].index_add_(0, rows, keys[index])
    return Reader(trace, table, keys, own, lens.backend_adapter.parallel, reads_attention)


def _traced(
    lens: Lens, facts: Facts | Trace, positions: Positions, attention: bool, reads_attention: bool
) -> Trace:
    """The pass; for attention neurons at every position, since they may read at any of them."""
    if not reads_attention:
        return lens.traced(facts, positions, attention=attention)
    given = lens.traced(facts, "all", attention=attention)
    every = [place for prompt in given.prompts for place in prompt.positions("all")]
    return given if given.positions.tolist() == every else lens.trace(list(given.facts), "all")


def _check_same_prompts(value: NeuronSet, trace: Trace, reads_attention: bool) -> None:
    """Raise `ConfigError` for value neurons of other prompts, or of other positions in them."""
    texts = [prompt.text for prompt in trace.prompts]
    theirs: list[str] = value.settings.get("texts") or []
    # sets summed over prompts fit any prompts
    ranked_apart = {int(p) for p in value.frame["prompt"].unique() if p >= 0}
    for p, text in enumerate(texts):
        if p in ranked_apart and p < len(theirs) and theirs[p] != text:
            raise ConfigError(
                f"The value neurons of prompt {p} were computed for {theirs[p]!r}, asked is "
                f"{text!r}: give both the same facts, or ask for one set everywhere "
                "(value.union())."
            )
    if reads_attention:
        return
    here = trace.positions.tolist()
    computed = value.settings.get("positions")
    same_prompts = theirs[: len(texts)] == texts
    if computed is not None and same_prompts and computed[: len(here)] != here:
        raise ConfigError(
            f"The value neurons were computed at positions {computed}, the queries are asked for at "
            f"{here}: give both the same trace, or the same positions=."
        )
    several = len(trace.prompt) != len(trace.prompts)
    if several and value.settings.get("ranked") != "positions":
        raise ConfigError(
            "The trace holds several positions of a prompt, the value neurons belong to none of "
            "them (a whole answer, a set): trace at one position, or rank the value neurons with "
            "positions='all'."
        )


def _best(value: NeuronSet, trace: Trace, prompt: int, targets: int) -> pd.DataFrame:
    """The best value neurons of one prompt, with the row of the trace at which each is read."""
    frame = _rows_of(value, trace, prompt)
    if frame.empty:
        raise ConfigError(
            f"The value neurons hold no row for prompt {prompt}: compute them for the same facts."
        )
    if frame["score"].isna().any():
        raise ConfigError(
            "Value neurons without a score (a set made by hand) have no weight here: give them "
            "scores, or use value_neurons."
        )
    rows = (trace.prompt == prompt).nonzero()[:, 0].tolist()
    if value.unit != "attn_neuron" and len(rows) == 1:
        return frame.nlargest(targets, "score").assign(prompt=prompt, row=rows[0])
    ordered = frame.sort_values("score", ascending=False, kind="stable")
    best = (
        ordered.head(targets)
        if value.unit == "attn_neuron"
        else ordered.groupby("position", sort=False).head(targets)
    )
    by_position = {int(trace.positions[row]): row for row in rows}
    return best.assign(prompt=prompt, row=[by_position[p] for p in best["position"]])


def _rows_of(neurons: NeuronSet, trace: Trace, prompt: int) -> pd.DataFrame:
    """The rows of a set that are about one prompt: its own, those summed over the set, or over its
    fact's category."""
    frame = neurons.frame[neurons.frame["prompt"].isin((prompt, -1))]
    if "category" in frame:
        frame = frame[frame["category"] == getattr(trace.facts[prompt], "category", None)]
    return frame


def _keys(
    lens: Lens,
    trace: Trace,
    layer: int,
    rows: Int[Tensor, " target"],
    group: pd.DataFrame,
    method: Method,
    subkey: Subkey | None,
    attention: bool,
    key_of: KeyOf | None,
) -> Float[Tensor, "target d_model"]:
    """The weighted key of each target in one layer."""
    backend = lens.backend_adapter
    pre = attention or backend.parallel
    h = at_least_float32(
        trace.resid[layer][rows] if pre else trace.resid[layer][rows] + trace.attn[layer][rows]
    )
    j = torch.tensor(group["neuron"].to_numpy(), device=h.device)
    I = torch.tensor(group["score"].to_numpy(), dtype=h.dtype, device=h.device)
    norm = backend.norm(layer, "attn" if attention else "ffn")
    if attention:
        channels, per_kv = (
            trace.z.shape[2] // backend.cfg.n_heads,
            backend.cfg.n_heads // backend.n_kv_heads,
        )
        key = at_least_float32(
            backend.w_qkv(layer, "V").T[j // channels // per_kv * channels + j % channels]
        )
        # the attention weight cancels in grad m_j / m_j: both are a times that of val
        m = torch.ones_like(I)
        linear = key
        if method == "grad":
            m = (norm(h) * key).sum(1)
    else:
        m = at_least_float32(trace.m[layer][rows, j])
        linear, key = _subkeys(
            lens, layer, norm(h), j, subkey or ("gate" if method == "inner_product" else "linear")
        )
    key = key if key_of is None else at_least_float32(key_of(layer, j))
    if method == "inner_product":
        return key
    if method == "grad":
        return _safe(I, m)[:, None] * norm.gradient(h, linear)
    keys = norm.gain.to(h.dtype) * key
    return _safe(I, (h * keys).sum(1))[:, None] * keys


def _subkeys(
    lens: Lens,
    layer: int,
    n: Float[Tensor, "target d_model"],
    j: Int[Tensor, " target"],
    subkey: Subkey,
) -> tuple[Float[Tensor, "target d_model"], Float[Tensor, "target d_model"]]:
    """grad of m_j with respect to the normed stream n, and the key asked for (fc1's row where there
    is no gate)."""
    backend = lens.backend_adapter
    up = at_least_float32(backend.w_in(layer).T[j])
    bias, weight = backend.b_in(layer), backend.w_gate(layer)
    z_u = (n * up).sum(1) + (0 if bias is None else at_least_float32(bias[j]))
    if weight is None:
        return _slope(lens, z_u)[:, None] * up, up
    gate = at_least_float32(weight.T[j])
    z_g = (n * gate).sum(1)
    linear = (_slope(lens, z_g) * z_u)[:, None] * gate + lens.backend_adapter.activation(z_g)[
        :, None
    ] * up
    return linear, {"linear": linear, "gate": gate, "up": up}[subkey]


def _slope(lens: Lens, z: Tensor) -> Tensor:
    """s'(z) of the FFN's non-linearity."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        return torch.autograd.grad(lens.backend_adapter.activation(leaf).sum(), leaf)[0]


def _safe(I: Tensor, divisor: Tensor) -> Tensor:
    """I / divisor; 0 where the divisor vanishes and the weight has no meaning."""
    vanishes = divisor.abs() < SMALL
    return torch.where(vanishes, 0.0, I / torch.where(vanishes, 1.0, divisor))


def _by_prompt(
    trace: Trace, parts: list[Float[Tensor, "row unit"]]
) -> Float[Tensor, "layer prompt key_unit"]:
    """Rows of all positions as one (position, unit) axis per prompt, padded with zeros."""
    longest = int(trace.positions.max()) + 1
    stacked = torch.stack(parts)
    out = stacked.new_zeros(len(parts), len(trace.prompts), longest, stacked.shape[2])
    out[:, trace.prompt, trace.positions] = stacked
    return rearrange(out, "l p k u -> l p (k u)")


def _settings(lens: Lens, method: str, targets: int, value: NeuronSet) -> dict[str, Any]:
    # of the value neurons' weights
    read = {name: value.settings[name] for name in ("norm", "base") if name in value.settings}
    return {**lens.label, **read, "method": method, "targets": targets}
