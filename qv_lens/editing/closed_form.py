"""ROME, R-ROME, EMMET, MEMIT, PMET, AlphaEdit, RECT, PRUNE, IFMET and ACE: one loop, composed.

1. A `Pass` searches z* per fact at the last layer of its last group (`targets.search`): ROME at the FFN's output of its
   one layer, MEMIT at the stream behind the block, PMET and ACE at the FFN's output with a second delta at attention's.
2. It writes its groups' layers in ascending order, on the weights as written so far: keys K of the fact's token, cur =
   the site's value at the z layer on the bare prompt, R = (z* - cur) / share, dW = solve(metric, K, R, eps). With r
   layers left in the layer's group, share is r for MEMIT's family and sqrt(r) for PMET's.
3. Methods are choices of passes, metric and eps:

   ROME       one layer, eps 0, K averaged over contexts, K_read of the bare prompt (R-ROME: one averaged key for both)
   EMMET      eps 0.1 (0 for one fact): equality constraints         MEMIT  metric C0^-1, eps lambda
   AlphaEdit  metric (P Kp Kp^T P + L2 I)^-1 P, eps 1, P the null space of C0, Kp the keys of earlier batches
   PMET       one group; attention written by option                 RECT, PRUNE  MEMIT's delta, then trimmed
   IFMET      two passes: shallow layers on the request, then deep ones on multi-hop prompts at the last token
   ACE        two groups, query layers and value layers, in one pass (official release, Algorithm 1), or two passes (section 5)

Sources: `editing.md` sections 1 to 3 in the design; the papers named at each class.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from qv_lens.editing.edit import Deltas, Job
from qv_lens.editing.keys import Average, Prompts, Rows, clean_values, contexts, mean_over_contexts, read, rows_of
from qv_lens.editing.solve import Metric, identity, inverse_of, null_space, null_space_metric, prune, rect, solve
from qv_lens.editing.targets import Ahead, Search, Targets, search
from qv_lens.errors import EditError, unknown
from qv_lens.facts.records import EditRequest
from qv_lens.facts.spans import FACT_TOKENS, FactToken
from qv_lens.models.lens import Lens
from qv_lens.patch import Delta

Group = tuple[int, ...]


@dataclass(frozen=True)
class Pass:
    """One search of z* and one sweep. `modules`: what is written, 'ffn' and, before it, 'attn'. `read_clean`: ROME's
    separate key of the bare prompt; `mean_value`: R-ROME's value averaged as its key is."""

    groups: tuple[Group, ...]
    search: Search
    share: Literal["linear", "sqrt"]
    fact_token: FactToken = "subject_last"
    prompts: Prompts = "rewrite"
    modules: tuple[Literal["ffn", "attn"], ...] = ("ffn",)
    average: Average = "halves"
    read_clean: bool = False
    mean_value: bool = False

    @property
    def z_layer(self) -> int:
        return self.groups[-1][-1]


@dataclass(frozen=True)
class Solver:
    """The metric of each written (layer, module), and eps for a batch of n facts. `learn` takes in a batch's keys."""

    metric: Callable[[int, str], Metric]
    eps: Callable[[int], float]
    learn: Callable[[dict[int, list[Tensor]]], None] = lambda keys: None


@dataclass(frozen=True, kw_only=True)
class ClosedForm:
    """A method is its plan (passes) and its solver. Fields: the search of z*, shared by all; defaults are MEMIT's for GPT-J."""

    steps: int = 25
    lr: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 0.75
    kl: float = 0.0625
    fact_token: FactToken = "subject_last"
    batch = None  # how many requests are edited together where `edit` does not say (None: all)
    style = "memit"  # of the sampled contexts
    prefix = ""

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        """The passes. Raises `EditError` for layers that the model does not have."""
        raise NotImplementedError

    def solver(self, job: Job) -> Solver:
        raise NotImplementedError

    def deltas(self, job: Job) -> Deltas:
        return sweep(job, self, self.plan(job.lens), self.solver(job))

    def at(self, *sites: str, drop: bool = False) -> Search:
        if self.fact_token not in FACT_TOKENS:
            raise unknown("Fact token", self.fact_token, FACT_TOKENS, error=EditError)
        return Search(sites, self.steps, self.lr, self.weight_decay, self.clamp, self.kl, drop)

    def spread(self, lens: Lens, layers: Group) -> Pass:
        """MEMIT's pass: z* in the stream, the residual shared out linearly."""
        groups = _groups(lens, (layers,))
        return Pass(groups, self.at(lens.backend_adapter.resid_post(groups[-1][-1])), "linear", self.fact_token)

    def two_deltas(self, lens: Lens, groups: Sequence[Group], **options) -> Pass:
        """PMET's pass: z* at the FFN's and attention's outputs, shared out by square roots."""
        ordered = _groups(lens, groups)
        backend, z = lens.backend_adapter, ordered[-1][-1]
        settings = self.at(backend.mlp_out(z), backend.attn_out(z), drop=True)
        return Pass(ordered, settings, "sqrt", **{"fact_token": self.fact_token, **options})


@dataclass(frozen=True, kw_only=True)
class ROME(ClosedForm):
    """Rank-one model editing (Meng et al. 2022): one layer, one fact at a time. Defaults: GPT-J's, of the authors' release.

    `mom2_adjustment=False` takes C0 = I, as EasyEdit ships it.
    """

    layer: int = 5
    steps: int = 20
    clamp: float = 4.0
    mom2_adjustment: bool = True
    read_clean = True
    batch = 1
    style = "rome"

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        layer = lens.check_layer(self.layer)
        one = Pass(
            ((layer,),), self.at(lens.backend_adapter.mlp_out(layer)), "linear", self.fact_token, average="mean",
            read_clean=self.read_clean, mean_value=not self.read_clean,
        )  # fmt: skip
        return (one,)

    def solver(self, job: Job) -> Solver:
        return Solver(_inverses(job) if self.mom2_adjustment else lambda layer, module: identity, lambda n: 0.0)


@dataclass(frozen=True, kw_only=True)
class RROME(ROME):
    """R-ROME (Gupta et al. 2024): ROME with one averaged key (and value) in both places."""

    read_clean = False


@dataclass(frozen=True, kw_only=True)
class EMMET(ClosedForm):
    """Equality-constrained mass editing (Gupta et al. 2024): MEMIT's z*, W K = V exactly (softened by 0.1 for several facts)."""

    layers: Group = (5,)
    soften: float = 0.1

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        return (self.spread(lens, self.layers),)

    def solver(self, job: Job) -> Solver:
        return Solver(_inverses(job), lambda n: self.soften if n > 1 else 0.0)


@dataclass(frozen=True, kw_only=True)
class MEMIT(ClosedForm):
    """Mass-editing memory in a transformer (Meng et al. 2023). Defaults: GPT-J's, of the authors' release.

    `lam` multiplies the mean second moment C0. `fact_token`: where the fact is written.
    """

    layers: Group = (3, 4, 5, 6, 7, 8)
    lam: float = 15000.0

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        return (self.spread(lens, self.layers),)

    def solver(self, job: Job) -> Solver:
        return Solver(_inverses(job), lambda n: self.lam)


@dataclass(frozen=True, kw_only=True)
class RECT(MEMIT):
    """RECT (Gu et al. 2024): MEMIT's delta, only the `keep` share of entries that change their weight most."""

    keep: float = 0.4

    def deltas(self, job: Job) -> Deltas:
        found = super().deltas(job)
        return {key: Delta(rect(job.original(*key), delta.dense(), self.keep)) for key, delta in found.items()}


@dataclass(frozen=True, kw_only=True)
class PRUNE(MEMIT):
    """PRUNE (Ma et al. 2024): MEMIT's whole delta, singular values above the weight's own largest one pulled in."""

    def deltas(self, job: Job) -> Deltas:
        found = super().deltas(job)
        return {key: Delta(prune(job.original(*key), delta.dense())) for key, delta in found.items()}


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(ClosedForm):
    """AlphaEdit (Fang et al. 2025): updates projected into the null space of C0. Defaults: GPT-J's, of the authors' release.

    `threshold`: eigenvalues of C0 below it span the null space. It depends on the model's scale; the patch records the
    rank of P. Keys of a batch are kept for the batches behind it (`edit(..., batch_size=)`).
    """

    layers: Group = (3, 4, 5, 6, 7, 8)
    threshold: float = 2e-2
    L2: float = 10.0

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        return (self.spread(lens, self.layers),)

    def solver(self, job: Job) -> Solver:
        lens, C0 = job.lens, job.moments()
        P = {layer: null_space(C0.of(lens, layer).to(lens.device), self.threshold) for layer in self.plan(lens)[0].groups[0]}
        job.notes["rank_of_P"] = {str(layer): round(float(p.trace())) for layer, p in P.items()}
        if not all(job.notes["rank_of_P"].values()):
            raise EditError(f"No eigenvalue of C0 lies below threshold={self.threshold}: nothing could be written. Raise it.")
        earlier: dict[int, list[Tensor]] = {layer: [] for layer in P}

        def learn(keys: dict[int, list[Tensor]]) -> None:
            for layer, found in keys.items():
                earlier[layer] += found

        return Solver(lambda layer, module: null_space_metric(P[layer], earlier[layer], self.L2), lambda n: 1.0, learn)


@dataclass(frozen=True, kw_only=True)
class PMET(ClosedForm):
    """Precise model editing in a transformer (Li et al. 2024). Defaults: GPT-J's, of the authors' release.

    `attention` also writes W_O, from attention's own delta (statistics with modules=("ffn", "attn")).
    """

    layers: Group = (3, 4, 5, 6, 7, 8)
    steps: int = 30
    lr: float = 0.2
    kl: float = 1.0
    lam: float = 6000.0
    attention: bool = False

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        return (self.two_deltas(lens, (self.layers,), modules=("attn", "ffn") if self.attention else ("ffn",)),)

    def solver(self, job: Job) -> Solver:
        return Solver(_inverses(job), lambda n: self.lam)


@dataclass(frozen=True, kw_only=True)
class IFMET(ClosedForm):
    """IFMET (Zhang et al. 2024, no public code): shallow layers on the request, then deep layers on multi-hop prompts.

    The second pass reads `request.via` (multi-hop prompts that end at the fact) at the last token; a request without any
    is read on its own prompt there.
    """

    layers: Group = (3, 4, 5, 6, 7, 8)
    deep_layers: Group = (16, 17, 18, 19, 20)
    steps: int = 30
    lr: float = 0.2
    kl: float = 1.0
    lam: float = 6000.0

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        deep = self.two_deltas(lens, (self.deep_layers,), fact_token="last", prompts="via")
        return self.two_deltas(lens, (self.layers,)), deep

    def solver(self, job: Job) -> Solver:
        return Solver(_inverses(job), lambda n: self.lam)


@dataclass(frozen=True, kw_only=True)
class ACE(ClosedForm):
    """Attribution-controlled editing: query layers and value layers, chosen by `qv.locate` or by hand.

    Defaults: GPT-J's, of the official release: one search of z* at the last value layer, on the request's own prompt, then
    one ascending sweep in which the query group and the value group each end with the full remaining residual. Several
    requests are edited one after another, z* searched on the weights as edited so far (`joint=True`: as one batch).
    A query layer above the last value layer cannot reach z* and is dropped with a warning, a value layer that the model
    does not have as well; a layer in both groups is written in both.

    The other readings of the paper: `passes='two'` (own search per group), `order`, `value_prompts='via'` (multi-hop
    prompts) and `value_token`; `groups=False` spreads over all layers as one; `attention` writes W_O too; `prefix`, a text
    (a few-shot chain of thought) put before every prompt. `ACE.paper()` and `ACE.official()` put them together.
    """

    value_layers: Group = (23, 24, 25)
    query_layers: Group = (3, 4, 5, 6, 7, 8)
    steps: int = 30
    lr: float = 0.2
    kl: float = 1.0
    lam: float = 6000.0
    joint: bool = False
    passes: Literal["one", "two"] = "one"
    order: Literal["query first", "value first"] = "query first"
    value_prompts: Prompts = "rewrite"
    value_token: FactToken | None = None
    groups: bool = True
    attention: bool = False
    prefix: str = ""

    @classmethod
    def paper(cls) -> ACE:
        """Section 5: two passes, value layers first and on multi-hop prompts at the last token, layers of Appendix F (for
        another model: `dataclasses.replace`)."""
        return cls(
            value_layers=(26, 27, 28), joint=True, passes="two", order="value first", value_prompts="via", value_token="last"
        )

    @classmethod
    def official(cls) -> ACE:
        """The released code as it runs: attention written as well, one flat list of layers, one request after another."""
        return cls(attention=True, groups=False)

    @property
    def batch(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return None if self.joint else 1

    def solver(self, job: Job) -> Solver:
        return Solver(_inverses(job), lambda n: self.lam)

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        query, value = self._layers(lens)
        modules = ("attn", "ffn") if self.attention else ("ffn",)
        token = self.value_token or self.fact_token
        if self.passes == "two":
            first = self.two_deltas(lens, (query,), modules=modules) if query else None
            second = self.two_deltas(lens, (value,), modules=modules, fact_token=token, prompts=self.value_prompts)
            return tuple(p for p in ((first, second) if self.order == "query first" else (second, first)) if p is not None)
        if self.value_prompts != "rewrite" or token != self.fact_token or self.order != "query first":
            raise EditError(
                "One search serves both groups in one ascending sweep; own prompts, tokens and order need passes='two'."
            )
        groups = (query, value) if query else (value,)
        return (self.two_deltas(lens, groups if self.groups else (tuple({*query, *value}),), modules=modules),)

    def _layers(self, lens: Lens) -> tuple[Group, Group]:
        """Query and value layers that exist and can reach z*; what is dropped is warned of."""
        if not self.value_layers:
            raise EditError("ACE needs at least one value layer: z* is searched at the last one.")
        value = tuple(layer for layer in self.value_layers if layer < lens.n_layers)
        if value and len(value) < len(self.value_layers):
            gone = sorted(set(self.value_layers) - set(value))
            warnings.warn(
                f"Value layers {gone} do not exist in a model of layers 0 to {lens.n_layers - 1} and are dropped.", stacklevel=4
            )
        top = max(value or self.value_layers)
        query = tuple(layer for layer in self.query_layers if layer <= top)
        if len(query) < len(self.query_layers):
            dropped = sorted(set(self.query_layers) - set(query))
            warnings.warn(f"Query layers {dropped} lie above the z layer {top} and are dropped.", stacklevel=4)
        return query, value or self.value_layers


# ------------------------------------------------------------------ the loop


def sweep(job: Job, editor: ClosedForm, passes: tuple[Pass, ...], solver: Solver) -> Deltas:
    """Run the passes over the batches; writes as it goes and returns the sum of the deltas by weight."""
    templates, parts = tuple(editor.prefix + template for template in job.prefixes(editor.style)), {}
    for requests in job.batches(editor.batch):
        keys: dict[int, list[Tensor]] = {}
        for one in passes:
            rows = rows_of(job.lens, requests, templates, one.fact_token, one.prompts)
            if job.ahead is not None and not parts:  # nothing is written yet
                targets = job.ahead.of(requests)
            else:
                targets = search(job.lens, requests, rows, one.fact_token, one.search)
            _write(job, rows, targets, one, solver, parts, keys)
        solver.learn(keys)
    return {key: Delta.total(found) for key, found in parts.items()}


def search_ahead(
    lens: Lens, requests: Sequence[EditRequest], editor: ClosedForm, *, templates: Sequence[str] | None = None, seed: int = 0
) -> Ahead:
    """z* of many requests that will each be edited on the weights as they are now, in one search: `edit(..., ahead=)`.

    Raises `EditError` and `FactError` as `edit` does.
    """
    used = contexts(lens, seed, editor.style) if templates is None else tuple(templates)
    one, batch = editor.plan(lens)[0], list(dict.fromkeys(requests))
    rows = rows_of(lens, batch, [editor.prefix + template for template in used], one.fact_token, one.prompts)
    found = search(lens, batch, rows, one.fact_token, one.search)
    return Ahead(editor, lens.fingerprint, tuple(lens.patches), used, {r: found.rows([i]) for i, r in enumerate(batch)})


def _write(
    job: Job, rows: Rows, targets: Targets, one: Pass, solver: Solver,
    parts: dict[tuple[int, str], list[Delta]], keys: dict[int, list[Tensor]],
) -> None:  # fmt: skip
    lens, backend, count = job.lens, job.lens.backend_adapter, len(rows.clean)
    job.losses += [[list(step[i]) for step in targets.losses] for i in range(count)]
    steps = [(group, i) for group in one.groups for i in range(len(group))]
    lowest = min(layer for group in one.groups for layer in group)
    with torch.no_grad():
        at, stream = lowest, lens.stream(rows.heads, lowest)
        for group, i in steps:
            layer, left = group[i], len(group) - i
            if layer < at:  # a later group below an earlier one
                at, stream = lowest, lens.stream(rows.heads, lowest)
            at, stream = layer, stream if layer == at else lens.stream(rows.heads, layer, start=(at, stream))
            key_sites = {module: backend.coefficient(layer) if module == "ffn" else backend.z(layer) for module in one.modules}
            K = {}
            for module, site in key_sites.items():  # all keys are taken before anything of the layer is written
                seen = read(lens, rows, (site,), (at, stream), layer + 1)[site]
                K[module] = (mean_over_contexts(rows, seen, one.average).T.double(), clean_values(rows, seen).T.double())
            for module in one.modules:
                site = one.search.sites[0 if module == "ffn" else 1]
                now = read(lens, rows, (site,), (at, stream), one.z_layer + 1)[site]
                cur = mean_over_contexts(rows, now, one.average) if one.mean_value else clean_values(rows, now)
                z = targets.z_of[0 if module == "ffn" else 1]
                R = (z - cur.double()).T / (left if one.share == "linear" else sqrt(left))
                mean, bare = K[module]
                delta = solve(solver.metric(layer, module), mean, R, solver.eps(count), bare if one.read_clean else None)
                name = "W_out" if module == "ffn" else "W_O"
                job.write(layer, name, delta)
                parts.setdefault((layer, name), []).append(delta)
                if module == "ffn":
                    keys.setdefault(layer, []).append(mean)


def _inverses(job: Job) -> Callable[[int, str], Metric]:
    """C0^-1 of each weight, factored once."""
    known: dict[tuple[int, str], Metric] = {}

    def metric(layer: int, module: str) -> Metric:
        if (layer, module) not in known:
            C0 = job.moments().of(job.lens, layer, "ffn" if module == "ffn" else "attn")
            known[layer, module] = inverse_of(C0.to(job.lens.device))
        return known[layer, module]

    return metric


def _groups(lens: Lens, groups: Sequence[Group]) -> tuple[Group, ...]:
    """Each group ascending, every layer checked against the model."""
    if not all(groups):
        raise EditError("An editor needs at least one layer.")
    return tuple(tuple(sorted({lens.check_layer(layer) for layer in group})) for group in groups)
