"""What value neurons read, as keys: the vectors by which Eq. 10 (ACE) scores all that is written
below them.

1. Of each prompt the K best value neurons j are asked, with importance I_j and coefficient m_j, at
   the row at which they are read.
2. A key of j says what a vector v, added to the stream, does to m_j, times I_j / m_j. `grad` takes
   the gradient of m_j, `share` and `inner_product` a subkey (see `query`).
3. Through the stream (`StreamReader`): v is written at j's own token, and j's FFN or head reads the
   stream there. One key for each j.
4. Through attention too (`PatternReader`): v may be written at any token. Its key is the gradient
   of m_j with respect to what a sublayer writes there, in a pass whose attention patterns and FFN
   outputs are constants: of all that v does, what reaches j through the stream and the values of
   heads, and through no other neuron. At j's own token it adds to the stream's path the heads that
   look at that token. Source: the linear attribution of Ameisen et al. (2025), for neurons."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from qv_lens.errors import ConfigError, check_count, unknown
from qv_lens.facts.spans import Positions
from qv_lens.models.hooks import Hook, keeper
from qv_lens.models.interventions import (
    check_attention_as_made,
    check_ffn,
    check_not_suppressed,
    check_targets_as_made,
)
from qv_lens.models.lens import Facts, Lens
from qv_lens.models.norms import at_least_float32
from qv_lens.neurons import NeuronSet, check_set
from qv_lens.trace import Trace

Method = Literal["grad", "share", "inner_product"]
METHODS: tuple[Method, ...] = ("grad", "share", "inner_product")
Subkey = Literal["linear", "gate", "up"]
SUBKEYS: tuple[Subkey, ...] = ("linear", "gate", "up")
Through = Literal["stream", "attention"]
THROUGH: tuple[Through, ...] = ("stream", "attention")
#: what writes into the stream
Writer = Literal["ffn", "attn", "embed"]
#: (layer, neurons) -> a vector each
KeyOf = Callable[[int, Tensor], Tensor]
#: a value neuron whose coefficient, or whose share's denominator, is smaller than this has no
#: defined weight
SMALL = 1e-6
#: targets asked in one pass, each in its own copy of the prompt
TOGETHER = 32


@dataclass(frozen=True)
class QueryOptions:
    """How value neurons are asked for what activates them (see `query_neurons`).

    Raises `ConfigError` for options that do not exist or do not go together."""

    method: Method = "grad"
    """Which of the three readings of Eq. 10."""
    targets: int = 30
    """How many value neurons of a prompt are asked."""
    subkey: Subkey | None = None
    """Which row of a gated FFN is a value neuron's key."""
    positions: Positions = "last"
    """The tokens at which the value neurons lie."""
    through: Through = "stream"
    """How what is written reaches them."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("Query method", self.method, METHODS)
        if self.through not in THROUGH:
            raise unknown("through", self.through, THROUGH)
        if self.through == "attention" and self.method != "grad":
            raise ConfigError(
                "through='attention' follows the gradient of a value neuron's coefficient: use "
                f"method='grad', not {self.method!r}."
            )
        check_count("targets (how many value neurons of a prompt are asked)", self.targets)
        if self.subkey not in (None, *SUBKEYS):
            raise unknown("Subkey", self.subkey, SUBKEYS)
        if self.method == "grad" and self.subkey is not None:
            raise ConfigError(
                "method='grad' goes through gate and up as they are: subkey= is for 'share' and "
                "'inner_product'."
            )

    @property
    def key(self) -> Subkey:
        """The row of a gated FFN that is asked for, or the method's own."""
        return self.subkey or ("gate" if self.method == "inner_product" else "linear")

    def check_fits(self, lens: Lens, value: NeuronSet) -> None:
        """Raise `ConfigError` for a row of a gate that these value neurons do not have, or neurons
        that are not asked through attention."""
        of_attention = value.unit == "attn_neuron"
        if self.subkey in ("gate", "up") and (of_attention or not lens.backend_adapter.gated):
            neurons = "attention neurons have" if of_attention else f"the FFNs of {lens.name} have"
            raise ConfigError(f"subkey={self.subkey!r} is a row of a gated FFN; {neurons} none.")
        if self.through == "attention" and of_attention:
            raise ConfigError("through='attention' asks FFN neurons; the targets are attention's.")


class Written(NamedTuple):
    """What FFN neurons write into the stream, each at a layer and a row of the pass."""

    layers: Int[Tensor, " vector"]
    rows: Int[Tensor, " vector"]
    vectors: Float[Tensor, "vector d_model"]


@dataclass(frozen=True)
class Reader(ABC):
    """The value neurons that queries are scored by."""

    lens: Lens
    """The model."""
    trace: Trace
    """The pass whose outputs are scored."""
    table: pd.DataFrame
    """`prompt, row, layer, neuron, score, coefficient` of every target."""
    by_position: bool
    """Whether what is scored lies at every token, not at the targets' own alone."""

    @abstractmethod
    def below(self, writer: Writer) -> Float[Tensor, "layer row d_model"]:
        """What an output of each layer is scored by: the keys of all targets that it reaches, added
        up (of the embedding, one layer)."""

    @abstractmethod
    def weights(self, written: Written) -> Float[Tensor, "vector target"]:
        """What the vectors add to the score of each target; 0 for one that they do not reach."""


@dataclass(frozen=True)
class StreamReader(Reader):
    """Targets that read the stream at their own row: a weighted key each, and its sum by layer, row
    and sublayer."""

    keys: Float[Tensor, "target d_model"]
    """The weighted key of every target."""
    own: dict[str, Float[Tensor, "layer row d_model"]]
    """The sum of the keys, by sublayer that reads."""

    def below(self, writer: Writer) -> Float[Tensor, "layer row d_model"]:
        # all targets in the layers above and, for attention in front of a sequential FFN, its own
        # layer's FFN targets
        written = self.own["ffn"] + self.own["attn"]
        if writer == "embed":
            return written.sum(0, keepdim=True)
        above = written.flip(0).cumsum(0).flip(0) - written
        same = writer == "attn" and not self.lens.backend_adapter.parallel
        return above + self.own["ffn"] if same else above

    def weights(self, written: Written) -> Float[Tensor, "vector target"]:
        layer, row = (_column(self.table, name, self.keys.device) for name in ("layer", "row"))
        reached = (layer > written.layers[:, None]) & (row == written.rows[:, None])
        return (written.vectors @ self.keys.T).masked_fill(~reached, 0.0)


@dataclass(frozen=True)
class PatternReader(Reader):
    """Targets whose keys are gradients, at every token of their prompt."""

    positions: Int[Tensor, " target"]
    """At which token each target is read."""

    def below(self, writer: Writer) -> Float[Tensor, "layer row d_model"]:
        return self._sums[writer]

    @cached_property
    def _sums(self) -> dict[str, Float[Tensor, "layer row d_model"]]:
        resid = self.trace.resid
        whole = torch.zeros_like(resid[:-1], dtype=at_least_float32(resid).dtype)
        sums = {"ffn": whole, "attn": whole.clone(), "embed": whole[:1].clone()}
        for targets, gradients in self._gradients():
            for place, target in enumerate(targets):
                rows = self._rows(target)
                for writer, of in gradients.items():
                    terms = of[:, place, self.trace.positions[rows]]
                    sums[writer][: len(terms), rows] += terms
        return sums

    def weights(self, written: Written) -> Float[Tensor, "vector target"]:
        out = written.vectors.new_zeros(len(written.vectors), len(self.table))
        prompt = self.trace.prompt[written.rows]
        position = self.trace.positions[written.rows]
        for targets, gradients in self._gradients():
            keys = gradients["ffn"]
            if not len(keys):  # targets of the first layer
                continue
            # what lies above these targets, or in a longer prompt, reaches none of them
            layer = written.layers.clamp_max(len(keys) - 1)
            token = position.clamp_max(keys.shape[2] - 1)
            products = einsum(written.vectors, keys[layer, :, token], "v d, v t d -> v t")
            own = _column(self.table.iloc[targets], "prompt", out.device)
            reached = (own == prompt[:, None]) & (written.layers[:, None] < len(keys))
            out[:, targets] = products.masked_fill(~reached, 0.0)
        return out

    def _rows(self, target: int) -> Int[Tensor, " row"]:
        """The rows of a target's prompt."""
        return (self.trace.prompt == int(self.table["prompt"].iloc[target])).nonzero()[:, 0]

    def _gradients(self) -> Iterator[tuple[list[int], dict[str, Float[Tensor, ...]]]]:
        """Some targets at a time, and their keys [layer, target, position, d_model] by writer; no
        layer above the highest target is among them."""
        for begin in range(0, len(self.table), TOGETHER):
            targets = list(range(begin, min(begin + TOGETHER, len(self.table))))
            yield targets, self._pass(targets)

    def _pass(self, targets: list[int]) -> dict[str, Float[Tensor, "layer target seq d_model"]]:
        """The keys of some targets, each asked in its own copy of its prompt."""
        lens, backend, some = self.lens, self.lens.backend_adapter, self.table.iloc[targets]
        ids = [self.trace.prompts[prompt].ids for prompt in some["prompt"]]
        shape = len(ids), max(map(len, ids)), lens.d_model
        dtype = at_least_float32(self.trace.resid).dtype
        top = int(some["layer"].max())
        leaves: dict[str, list[Tensor]] = {"ffn": [], "attn": [], "embed": []}

        def leaf(writer: Writer) -> Tensor:
            made = torch.zeros(shape, dtype=dtype, device=lens.device, requires_grad=True)
            leaves[writer].append(made)
            return made

        hooks: list[Hook] = [(backend.resid_pre(0), _added(leaf("embed")))]
        for layer in range(top):
            hooks.append((backend.mlp_out(layer), _added(leaf("ffn"), constant=True)))
        for layer in range(top if backend.parallel else top + 1):
            hooks.append((backend.attn_out(layer), _added(leaf("attn"))))
        read: dict[int, Tensor] = {}
        hooks += [
            (backend.coefficient(layer), keeper(read, layer)) for layer in some["layer"].unique()
        ]
        constant = [hook for layer in range(top + 1) for hook in backend.constant_pattern(layer)]
        with torch.enable_grad():
            last = [len(row) - 1 for row in ids]
            lens.stream(ids, top + 1, hooks, last=last, under=constant)
            total = torch.zeros((), dtype=dtype, device=lens.device)
            I = torch.tensor(some["score"].to_numpy(), dtype=dtype, device=lens.device)
            for place, row in enumerate(some.itertuples()):
                position = self.positions[targets[place]]
                m = read[row.layer][place, position, row.neuron].to(dtype)
                total = total + _safe(I[place], m.detach()) * m
            flat = [each for of in leaves.values() for each in of]
            gradients = iter(torch.autograd.grad(total, flat, allow_unused=True))
        return {
            writer: torch.stack([_or_zero(next(gradients), each) for each in of])
            if of
            else torch.zeros(0, *shape, dtype=dtype, device=lens.device)
            for writer, of in leaves.items()
        }


def targets_of(
    lens: Lens,
    facts: Facts | Trace,
    value: NeuronSet,
    options: QueryOptions,
    attention: bool = False,
    key_of: KeyOf | None = None,
) -> Reader:
    """The weighted keys of the best value neurons of each prompt; `attention`: whether the trace
    holds attention's own values, `key_of` puts other vectors in the place of subkeys.

    Raises `ConfigError` for a prompt without value neurons, value neurons that were computed
    elsewhere in the prompt, that have no such key, or that an intervention in force changes."""
    check_not_suppressed(lens, "Query scores")
    check_set(value)
    options.check_fits(lens, value)
    reads_attention = value.unit == "attn_neuron"
    if not reads_attention:
        check_ffn(lens, value)
    trace = _traced(lens, facts, options.positions, attention, reads_attention)
    _check_same_prompts(value, trace, reads_attention)
    best = [_best(value, trace, p, options.targets) for p in range(len(trace.prompts))]
    table = pd.concat(best, ignore_index=True)
    if options.through == "attention":
        return _through_attention(lens, trace, table)
    if reads_attention:
        check_attention_as_made(lens, table["layer"], "Query scores of attention's neurons")
    else:
        units = table[["layer", "neuron"]].itertuples(index=False, name=None)
        check_targets_as_made(lens, units, "Query scores")
    dtype = at_least_float32(trace.resid).dtype
    keys = torch.zeros(len(table), lens.d_model, dtype=dtype, device=trace.resid.device)
    own = {name: torch.zeros_like(trace.resid[:-1], dtype=dtype) for name in ("ffn", "attn")}
    written_by = own["attn" if reads_attention else "ffn"]
    for layer, group in table.groupby("layer"):
        index = torch.tensor(group.index.to_numpy(), device=keys.device)
        rows = torch.tensor(group["row"].to_numpy(), device=keys.device)
        keys[index] = _keys(lens, trace, int(layer), rows, group, options, reads_attention, key_of)
        written_by[int(layer)].index_add_(0, rows, keys[index])
    return StreamReader(lens, trace, table, reads_attention, keys, own)


def _through_attention(lens: Lens, trace: Trace, table: pd.DataFrame) -> PatternReader:
    """The targets asked at every token of their prompts."""
    at = trace.positions[torch.tensor(table["row"].to_numpy())]
    ends = torch.tensor([trace.prompts[prompt].last for prompt in table["prompt"]])
    if (at.cpu() > ends).any():
        raise ConfigError(
            "through='attention' follows the tokens of the prompt; these value neurons are read in "
            "the answer."
        )
    return PatternReader(lens, lens.trace(list(trace.facts), "all"), table, True, at)


def _column(table: pd.DataFrame, name: str, device: torch.device) -> Int[Tensor, " target"]:
    return torch.tensor(table[name].to_numpy(), device=device)


def _added(leaf: Tensor, constant: bool = False) -> Callable[[Tensor], Tensor]:
    """A hook that adds a leaf of zeros to an output, which `constant` takes out of the graph."""

    def hook(output: Tensor) -> Tensor:
        return (output.detach() if constant else output) + leaf.to(output.dtype)

    return hook


def _or_zero(gradient: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if gradient is None else gradient


def _traced(
    lens: Lens, facts: Facts | Trace, positions: Positions, attention: bool, reads_attention: bool
) -> Trace:
    """The pass; for attention neurons at every position, since they may read at any of them."""
    if not reads_attention:
        return lens.traced(facts, positions, attention=attention)
    trace = lens.traced(facts, "all", attention=attention)
    every = [place for prompt in trace.prompts for place in prompt.positions("all")]
    return trace if trace.positions.tolist() == every else lens.trace(list(trace.facts), "all")


def _check_same_prompts(value: NeuronSet, trace: Trace, reads_attention: bool) -> None:
    """Raise `ConfigError` for value neurons of other prompts, or of other positions in them."""
    texts = [prompt.text for prompt in trace.prompts]
    check_same_texts("value", value, texts)
    if reads_attention:
        return
    here = trace.positions.tolist()
    computed = value.settings.get("positions")
    same_prompts = (value.settings.get("texts") or [])[: len(texts)] == texts
    if computed is not None and same_prompts and computed[: len(here)] != here:
        raise ConfigError(
            f"The value neurons were computed at positions {computed}, the queries are asked for at "
            f"{here}: give both the same trace, or the same positions= (position= of qv.locate)."
        )
    several = len(trace.prompt) != len(trace.prompts)
    if several and value.settings.get("ranked") != "positions":
        raise ConfigError(
            "The trace holds several positions of a prompt, the value neurons belong to none of "
            "them (a whole answer, a set): trace at one position, or rank the value neurons with "
            "positions='all'."
        )


def check_same_texts(role: str, neurons: NeuronSet, texts: Sequence[str]) -> None:
    """Raise `ConfigError` for neurons that were ranked for other prompts; sets summed over prompts
    fit any."""
    theirs: list[str] = neurons.settings.get("texts") or []
    ranked_apart = {int(p) for p in neurons.frame["prompt"].unique() if p >= 0}
    for p, text in enumerate(texts):
        if p in ranked_apart and p < len(theirs) and theirs[p] != text:
            raise ConfigError(
                f"The {role} neurons of prompt {p} were computed for {theirs[p]!r}, asked is "
                f"{text!r:.200}: give both the same facts, or ask for one set everywhere "
                f"({role}.union())."
            )


def once(frame: pd.DataFrame) -> pd.DataFrame:
    """Each unit once, by its first row: a set may hold it of a prompt and of the set."""
    return frame.drop_duplicates([c for c in ("layer", "neuron", "position") if c in frame])


def _best(value: NeuronSet, trace: Trace, prompt: int, targets: int) -> pd.DataFrame:
    """The best value neurons of one prompt, with the row of the trace at which each is read."""
    own = value.about(trace.facts[prompt], prompt)
    if own.frame.empty:
        raise ConfigError(
            f"The value neurons hold no row for prompt {prompt}: compute them for the same facts."
        )
    if own.frame["score"].isna().any():
        raise ConfigError(
            "Value neurons without a score (a set made by hand) have no weight here: give them "
            "scores, or use value_neurons."
        )
    rows = trace.rows_of(prompt)
    ordered = once(own.best_first())
    if value.unit != "attn_neuron" and len(rows) == 1:
        return ordered.head(targets).assign(prompt=prompt, row=next(iter(rows.values())))
    best = (
        ordered.head(targets)
        if value.unit == "attn_neuron"
        else ordered.groupby("position", sort=False).head(targets)
    )
    return best.assign(prompt=prompt, row=[rows[position] for position in best["position"]])


def _keys(
    lens: Lens,
    trace: Trace,
    layer: int,
    rows: Int[Tensor, " target"],
    group: pd.DataFrame,
    options: QueryOptions,
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
        if options.method == "grad":
            m = (norm(h) * key).sum(1)
    else:
        m = at_least_float32(trace.m[layer][rows, j])
        linear, key = _subkeys(lens, layer, norm(h), j, options.key)
    key = key if key_of is None else at_least_float32(key_of(layer, j))
    if options.method == "inner_product":
        return key
    if options.method == "grad":
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
    b_gate = backend.b_gate(layer)
    z_g = (n * gate).sum(1) + (0 if b_gate is None else at_least_float32(b_gate[j]))
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
