"""ROME, R-ROME, EMMET, MEMIT, PMET, AlphaEdit, SPHERE, BetaEdit, ENCORE, RECT, PRUNE, IFMET and
ACE: choices of passes, metric and eps (`layer_by_layer`).

   ROME       one layer, eps 0, K averaged over contexts, K_read of the bare prompt (R-ROME: one averaged key for both)
   EMMET      eps 0.1 (0 for one fact): equality constraints         MEMIT  metric C0^-1, eps lambda
   AlphaEdit  metric (P Kp Kp^T P + L2 I)^-1 P, eps 1, P the null space of C0, Kp the keys of earlier batches
   SPHERE     AlphaEdit, damped along W's spectrum          BetaEdit  AlphaEdit's metric with lam C0 inside, P renewed
   ENCORE     metric (lam C0 + lam_n I + Kp Kp^T)^-1, eps 1
   PMET       one group; attention written by option                 RECT, PRUNE  MEMIT's delta, trimmed by batch or as a sum
   IFMET      two passes: shallow layers on the request, then deep ones on multi-hop prompts at the last token
   ACE        two groups, query layers and value layers: one search and query layers first (official release), one search and
              value layers first (Algorithm 1), or two passes with a search each (section 5)

Sources: the papers named at each class, and their released code.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from qv_lens.editing.bounds import Count, Limit, Natural, NotNegative, Part, Positive, Share
from qv_lens.editing.job import Deltas, Factored, Job
from qv_lens.editing.keys import Prompts
from qv_lens.editing.layer_by_layer import ClosedForm, Group, Pass, Solver, inverses
from qv_lens.editing.solve import (
    InverseMetric,
    eigen,
    held_metric,
    identity,
    null_space,
    null_space_metric,
    prune,
    rect,
)
from qv_lens.errors import EditError, unknown
from qv_lens.facts.spans import FactToken
from qv_lens.models.lens import Lens
from qv_lens.patch import Delta, summed

#: what BetaEdit keeps of each layer beside the keys: K K^T of the last renewal, of how many facts that
#: is, and how many there are in all
RENEWAL, RENEWED, EDITED = "renewal", "renewed", "edited"


@dataclass(frozen=True, kw_only=True)
class ROME(ClosedForm):
    """Rank-one model editing (Meng et al. 2022): one layer, one fact at a time. Defaults: GPT-J's,
    of the authors' release."""

    layer: int = 5
    """The layer that is written."""
    steps: Count = 20
    """Steps of the search of v*."""
    clamp: Limit = 4.0
    """Largest ||delta|| / ||init||."""
    mom2_adjustment: bool = True
    """Whether C0 is used; False takes the identity, as EasyEdit ships it."""
    batch = 1
    style = "rome"

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        layer = lens.check_layer(self.layer)
        search = self.at(lens.backend_adapter.written_at(layer))
        return (
            Pass(((layer,),), search, "linear", self.fact_token, average="mean", read_clean=True),
        )

    @property
    def reads_statistics(self) -> bool:
        return self.mom2_adjustment

    def solver(self, job: Job) -> Solver:
        return Solver(
            inverses(job) if self.mom2_adjustment else lambda layer, module: identity, lambda n: 0.0
        )


@dataclass(frozen=True, kw_only=True)
class RROME(ROME):
    """R-ROME (Gupta et al. 2024): ROME with one averaged key in both places.

    `values`: 'averaged' searches from the value averaged over the contexts, so that R = delta (the
    symmetric reading of the paper). 'released' does as the authors' code and EasyEdit: it searches
    from the bare prompt's value, and R is v* minus the averaged value. The published numbers come
    from the release."""

    values: Literal["averaged", "released"] = "averaged"
    """What the search starts from, and R is measured from (see above)."""

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        if self.values not in ("averaged", "released"):
            raise unknown("R-ROME's values", self.values, ("averaged", "released"), error=EditError)
        (rome,) = super().plan(lens)
        search = replace(rome.search, mean=self.values == "averaged")
        return (replace(rome, search=search, read_clean=False, measured="mean"),)


@dataclass(frozen=True, kw_only=True)
class EMMET(ClosedForm):
    """Equality-constrained mass editing (Gupta et al. 2024): MEMIT's z*, W K = V exactly (softened
    by 0.1 for several facts)."""

    layers: Group = (5,)
    """The layers that are written."""
    soften: NotNegative = 0.1
    """Added to the diagonal of K^T C0^-1 K where several facts are edited."""

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        return (self.spread(lens, self.layers),)

    def solver(self, job: Job) -> Solver:
        return Solver(inverses(job), lambda n: self.soften if n > 1 else 0.0)


@dataclass(frozen=True, kw_only=True)
class MEMIT(ClosedForm):
    """Mass-editing memory in a transformer (Meng et al. 2023). Defaults: GPT-J's, of the authors'
    release."""

    layers: Group = (3, 4, 5, 6, 7, 8)
    """The layers that are written."""
    lam: Positive = 15000.0
    """Multiplies the mean second moment C0."""

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        return (self.spread(lens, self.layers),)

    def solver(self, job: Job) -> Solver:
        return Solver(inverses(job), lambda n: self.lam)


@dataclass(frozen=True, kw_only=True)
class RECT(MEMIT):
    """RECT (Gu et al. 2024): MEMIT's delta, of which only a share is kept: the `keep` share of
    entries that change their weight most.

    Each batch (`edit(..., batch_size=)`) is trimmed against the weights as that batch finds them,
    so that k batches in one call equal k calls in a row."""

    keep: Share = 0.4
    """Share of entries that are kept."""

    def trim(self, W: Tensor, delta: Tensor) -> Tensor:
        return rect(W, super().trim(W, delta), self.keep)


@dataclass(frozen=True, kw_only=True)
class PRUNE(MEMIT):
    """PRUNE (Ma et al. 2024): MEMIT's whole delta, with singular values above the weight's own
    largest one reduced.

    Consecutive edits go on from the weights as MEMIT alone would have left them. Their sum is
    restrained, against the weight before the first edit (AlphaEdit's repository instead restrains
    each edit on top of the others)."""

    def deltas(self, job: Job) -> Deltas:
        earlier = [patch for patch in job.earlier(self) if patch.kept]
        restrained_of = summed(patch.deltas for patch in earlier)
        before: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        out: Deltas = {}
        for key, whole in summed(patch.kept for patch in earlier).items():
            before[key] = whole.dense(), restrained_of[key].dense()
            job.write(*key, Delta(before[key][0] - before[key][1]))
            job.ahead = None  # the z* searched ahead belong to other weights
        for key, delta in super().deltas(job).items():
            whole, restrained = before.get(key, (0.0, 0.0))
            job.kept[key] = delta
            out[key] = Delta(
                prune(job.original(*key).double() - restrained, whole + delta.dense()) - restrained
            )
        return out


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(ClosedForm):
    """AlphaEdit (Fang et al. 2025): updates projected into the null space of C0. Defaults: GPT-J's,
    of the authors' release.

    `threshold`: eigenvalues of C0 below it span the null space. It depends on the model's scale;
    the patch records the rank of P. The keys of a batch are kept for later batches (`edit(...,
    batch_size=)`). They are also kept with the patch, for edits made while it is applied."""

    layers: Group = (3, 4, 5, 6, 7, 8)
    """The layers that are written."""
    threshold: Positive = 2e-2
    """Eigenvalues of C0 below it span the null space."""
    L2: Positive = 10.0
    """Weight of the norm of the update."""

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        return (self.spread(lens, self.layers),)

    def solver(self, job: Job) -> Solver:
        lens, C0 = job.lens, job.required_statistics()
        U0 = {
            layer: self._null_space(job, C0.of(lens, layer), layer)
            for layer in self.plan(lens)[0].groups[0]
        }
        job.notes["rank_of_P"] = {str(layer): u.shape[1] for layer, u in U0.items()}
        if not all(job.notes["rank_of_P"].values()):
            raise EditError(
                f"No eigenvalue of C0 lies below threshold={self.threshold}: nothing could be "
                "written. Raise it."
            )
        seen = EarlierKeys(job, self)

        def metric(layer: int, module: str) -> InverseMetric:
            return null_space_metric(U0[layer], seen.keys(layer), self.L2)

        return Solver(metric, lambda n: 1.0, seen.learn)

    def _null_space(self, job: Job, C0: Tensor, layer: int) -> Tensor:
        """U0 of a layer: C0's spectrum, made once for all edits that share their statistics and for
        all thresholds, below this one."""
        spectrum = job.factored.once(("spectrum", layer), lambda: eigen(C0.to(job.lens.device)))
        return null_space(spectrum, self.threshold)


class EarlierKeys:
    """The keys of earlier facts: those of the method's patches in force, and those of this edit's
    batches so far, which the patch keeps."""

    def __init__(self, job: Job, editor: ClosedForm) -> None:
        self.job = job
        self.earlier = job.kept_earlier(editor)

    def keys(self, layer: int) -> Delta | None:
        """K K^T of the layer's, K with a column for each fact in the order of their edits."""
        parts = [
            of[layer, "W_out"] for of in (self.earlier, self.job.kept) if (layer, "W_out") in of
        ]
        return Delta.total(parts) if parts else None

    def gram(self, layer: int) -> Tensor | None:
        """K K^T itself. (A long row of edits keeps no K: it would have more columns than rows.)"""
        keys = self.keys(layer)
        return None if keys is None else keys.dense()

    def learn(self, keys: dict[int, list[Tensor]]) -> None:
        """Take in a batch's keys."""
        for layer, parts in keys.items():
            K = torch.cat(parts, 1)
            self.job.kept.update(summed([self.job.kept, {(layer, "W_out"): Delta(K, K.T)}]))


@dataclass(frozen=True, kw_only=True)
class SPHERE(AlphaEdit):
    """SPHERE (EasyEdit's release, 2025): AlphaEdit whose delta loses half of what it has along the
    weight's own principal directions. With `damp=` every other closed form does the same.

    As released, the layers above are written on the whole delta, and each batch is damped at its
    end, against the weights as that batch finds them."""

    damp: Part = 0.5
    """How much of a delta along the weight's own principal directions is taken out, from 0
    (nothing) to 1."""


@dataclass(frozen=True, kw_only=True)
class BetaEdit(AlphaEdit):
    """BetaEdit (2025): AlphaEdit with C0 inside the system, and a null space renewed from the keys
    of the facts edited so far. Defaults: GPT-J's, of the authors' release.

    The keys are kept with the patch, as AlphaEdit's are, and so are the numbers of facts: of all, and
    of those from which the null space was last renewed. Raises `EditError` where an update is
    larger than `limit` a fact; the release then leaves the lower layers written."""

    lam: NotNegative = 3000.0
    """lambda_1: weight of C0 beside the earlier keys."""
    renew: Count = 1000
    """tau: after how many facts the null space is renewed."""
    limit: Limit = 20.0
    """Largest ||dW|| / sqrt(n) of a batch of n facts."""

    def solver(self, job: Job) -> Solver:
        base, lens, C0 = super().solver(job), job.lens, job.required_statistics()
        seen, spaces = EarlierKeys(job, self), Factored(None)
        before = job.kept_earlier(self)

        def keep(key: tuple[int, str], more: Tensor) -> None:
            job.kept.update(summed([job.kept, {key: Delta(more)}]))

        def metric(layer: int, module: str) -> InverseMetric:
            moment = C0.of(lens, layer).to(lens.device).double()
            held, keys = summed([before, job.kept]), seen.keys(layer)
            count, since = (
                int(held[layer, name].dense()) if (layer, name) in held else 0
                for name in (EDITED, RENEWED)
            )
            if keys is not None and count - since >= self.renew:
                # the patch keeps what is new in the sums
                old = held[layer, RENEWAL].dense() if since else 0.0
                keep((layer, RENEWAL), keys.dense() - old)
                keep((layer, RENEWED), moment.new_tensor([[count - since]]))
                held, since = summed([before, job.kept]), count
            if since:
                make = partial(self._renewed, held[layer, RENEWAL].dense() / since, moment)
                U0 = spaces.once((layer, since), make)
                job.notes["rank_of_P"][str(layer)] = U0.shape[1]
            else:
                U0 = self._null_space(job, moment, layer)
            return null_space_metric(U0, keys, self.L2, self.lam * moment)

        def learn(keys: dict[int, list[Tensor]]) -> None:
            seen.learn(keys)
            for layer, parts in keys.items():
                count = sum(K.shape[1] for K in parts)
                keep((layer, EDITED), parts[0].new_tensor([[count]], dtype=torch.float64))

        return replace(base, metric=metric, learn=learn, limit=self.limit)

    def _renewed(self, moment: Tensor, C0: Tensor) -> Tensor:
        """U0 from the mean second moment of the keys of all facts edited so far, and C0."""
        return null_space(eigen((moment + self.lam * C0) / (self.lam + 1)), self.threshold)


@dataclass(frozen=True, kw_only=True)
class ENCORE(MEMIT):
    """ENCORE (Gupta et al. 2025): MEMIT with a penalty on the update's norm, the keys of earlier
    facts held, and a search that stops a few steps after the answer is given everywhere (MPES).
    Defaults: GPT2-XL's of the authors' release, which has none for GPT-J, at GPT-J's layers."""

    hits: Natural = 4
    """MPES: the search of a fact ends when this many of its steps gave the new answer in every
    prefixed prompt (0: not asked)."""
    lam: Positive = 20000.0
    """Multiplies the mean second moment C0."""
    norm: NotNegative = 10.0
    """lambda_n: weight of the norm of the update."""

    def solver(self, job: Job) -> Solver:
        seen, C0 = EarlierKeys(job, self), job.required_statistics()

        def metric(layer: int, module: str) -> InverseMetric:
            moment = C0.of(job.lens, layer).to(job.lens.device)
            return held_metric(moment, seen.gram(layer), self.lam, self.norm)

        return Solver(metric, lambda n: 1.0, seen.learn)


@dataclass(frozen=True, kw_only=True)
class TwoDeltas(ClosedForm):
    """What PMET, IFMET and ACE share: z* is searched as a delta of attention and one of the FFN, and
    the system is MEMIT's. Defaults: GPT-J's, of PMET's release."""

    steps: Count = 30
    """Steps of the search of z*."""
    lr: Positive = 0.2
    """Learning rate of the search."""
    kl: NotNegative = 1.0
    """mu: weight of the KL at "{subject} is a"."""
    lam: Positive = 6000.0
    """Multiplies the mean second moment C0."""

    solver = MEMIT.solver


@dataclass(frozen=True, kw_only=True)
class PMET(TwoDeltas):
    """Precise model editing in a transformer (Li et al. 2024). Defaults: GPT-J's, of the authors'
    release."""

    layers: Group = (3, 4, 5, 6, 7, 8)
    """The layers that are written."""
    attention: bool = False
    """Whether W_O is written too, from attention's own delta (statistics with modules=("ffn",
    "attn"))."""

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        return (
            self.two_deltas(
                lens, (self.layers,), modules=("attn", "ffn") if self.attention else ("ffn",)
            ),
        )


@dataclass(frozen=True, kw_only=True)
class IFMET(TwoDeltas):
    """IFMET (Zhang et al. 2024, no public code): shallow layers on the request, then deep layers on
    multi-hop prompts.

    The second pass reads `request.via` (multi-hop prompts that end at the fact) at the last token;
    a request without `via` is read at the last token of its own prompt."""

    layers: Group = (3, 4, 5, 6, 7, 8)
    """The shallow layers, written first."""
    deep_layers: Group = (16, 17, 18, 19, 20)
    """The deep layers, written on multi-hop prompts."""

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        deep = self.two_deltas(lens, (self.deep_layers,), fact_token="last", prompts="via")
        return self.two_deltas(lens, (self.layers,)), deep


@dataclass(frozen=True, kw_only=True)
class ACE(TwoDeltas):
    """Attribution-controlled editing: query layers and value layers, chosen by `qv.locate` or by
    hand.

    Defaults: GPT-J's, of the official release: one search of z* at the last value layer, on the
    request's own prompt, then the query group and the value group, each of which ends with the full
    remaining residual. Several requests are edited one after another, and z* is searched on the
    weights as edited so far (`joint=True`: as one batch). With one search a query layer above the
    last value layer cannot reach z* and is dropped with a warning; so is a value layer that the
    model does not have. A layer in both groups is written in both.

    The other readings: `order='value first'` (the paper's Algorithm 1: one search, value layers,
    then query layers); `passes='two'` (section 5: a search per group), with `value_prompts='via'`
    (multi-hop prompts) and `value_token`; `groups=False` spreads the residual over all layers as
    one group; `attention` writes W_O too; `prefix`, a text (a few-shot chain of thought) put before
    every prompt. `ACE.algorithm_1()`, `ACE.paper()` and `ACE.official()` combine these options."""

    value_layers: Group = (23, 24, 25)
    """Layers of value neurons."""
    query_layers: Group = (3, 4, 5, 6, 7, 8)
    """Layers of query neurons."""
    joint: bool = False
    """Whether several requests are one batch."""
    passes: Literal["one", "two"] = "one"
    """One search for both groups, or a search for each (section 5)."""
    order: Literal["query first", "value first"] = "query first"
    """Which group is written first."""
    value_prompts: Prompts = "rewrite"
    """What the value group's search reads: the request's prompt, or its multi-hop prompts."""
    value_token: FactToken | None = None
    """Where the value group is written (None: at `fact_token`)."""
    groups: bool = True
    """Whether each group ends with the full residual; False spreads it over all layers as one."""
    attention: bool = False
    """Whether W_O is written too."""
    prefix: str = ""
    """A text put before every prompt (a few-shot chain of thought)."""

    @classmethod
    def algorithm_1(cls) -> ACE:
        """The paper's Algorithm 1: v* searched once, written to the value layers first, then to the
        query layers."""
        return cls(order="value first")

    @classmethod
    def paper(cls) -> ACE:
        """Section 5: two passes, value layers first and on multi-hop prompts at the last token,
        layers of Appendix F (for another model: `dataclasses.replace`)."""
        return cls(
            value_layers=(26, 27, 28),
            joint=True,
            passes="two",
            order="value first",
            value_prompts="via",
            value_token="last",
        )

    @classmethod
    def official(cls) -> ACE:
        """The released code as it runs: attention written as well, one flat list of layers, one
        request after another."""
        return cls(attention=True, groups=False)

    @property
    def batch(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return None if self.joint else 1

    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        query, value = self._layers(lens)
        modules = ("attn", "ffn") if self.attention else ("ffn",)
        token = self.value_token or self.fact_token
        if self.passes == "two":
            first = self.two_deltas(lens, (query,), modules=modules) if query else None
            second = self.two_deltas(
                lens, (value,), modules=modules, fact_token=token, prompts=self.value_prompts
            )
            return tuple(
                p
                for p in ((first, second) if self.order == "query first" else (second, first))
                if p is not None
            )
        if self.value_prompts != "rewrite" or token != self.fact_token:
            raise EditError(
                "One search serves both groups; prompts and a token of the value layers' own need "
                "passes='two'."
            )
        if not self.groups and self.order != "query first":
            raise EditError(
                "groups=False spreads over all layers as one, in ascending order: it has no order "
                "of groups."
            )
        groups = (query, value) if self.order == "query first" else (value, query)
        flat = (tuple({*query, *value}),)
        return (
            self.two_deltas(
                lens, tuple(g for g in groups if g) if self.groups else flat, modules=modules
            ),
        )

    def deltas(self, job: Job) -> Deltas:
        self._warn_of_dropped(job.lens)
        return super().deltas(job)

    def _layers(self, lens: Lens) -> tuple[Group, Group]:
        """Query and value layers that exist and can reach z*."""
        if not self.value_layers:
            raise EditError("ACE needs at least one value layer: z* is searched at the last one.")
        there = tuple(layer for layer in self.value_layers if layer < lens.n_layers)
        value = there or self.value_layers
        if self.passes == "two":
            return self.query_layers, value
        return tuple(layer for layer in self.query_layers if layer <= max(value)), value

    def _warn_of_dropped(self, lens: Lens) -> None:
        """Warn of layers that `_layers` leaves out."""
        query, value = self._layers(lens)
        missing = sorted(set(self.value_layers) - set(value))
        above = sorted(set(self.query_layers) - set(query))
        if missing:
            warnings.warn(
                f"Value layers {missing} do not exist in a model of layers 0 to {lens.n_layers - 1} "
                "and are dropped.",
                stacklevel=4,
            )
        if above:
            warnings.warn(
                f"Query layers {above} lie above the z layer {max(value)} and are dropped.",
                stacklevel=4,
            )
