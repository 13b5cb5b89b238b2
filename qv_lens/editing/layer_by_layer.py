"""The loop of all closed forms: search z*, then write layer by layer.

1. A `Pass` searches z* per fact at the last layer of its last group (`targets.search`): ROME at the
   FFN's output of its one layer, MEMIT at the stream after the block, PMET and ACE at the FFN's
   output with a second delta at attention's.
2. It writes its groups one after another, the layers of each in ascending order, on the weights as
   written so far: keys K of the fact's token, cur = the site's value at the z layer on the bare
   prompt (`measured`: or over all contexts), R = (z* - cur) / share, dW = solve(metric, K, R, eps).
   With r layers left in the layer's group, share is r for MEMIT's family and sqrt(r) for PMET's.
3. Where the method trims (RECT; SPHERE's `damp`), the delta of a batch is trimmed before the next
   batch is read.
4. Facts that are each edited on the same weights share one search (`search_ahead`).

Sources: MEMIT (Meng et al. 2023), PMET (Li et al. 2024) and their released code.
"""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, sqrt
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.editing.bounds import Count, Limit, Natural, NotNegative, Part, Positive
from qv_lens.editing.job import Deltas, Job, checked_templates
from qv_lens.editing.kept_targets import KeptTargets, TargetShelf
from qv_lens.editing.keys import (
    Average,
    ContextRows,
    Prompts,
    clean_values,
    contexts,
    mean_over_contexts,
    read,
    rows_of,
    values,
)
from qv_lens.editing.solve import InverseMetric, damped, inverse_of, solve
from qv_lens.editing.statistics import Module
from qv_lens.editing.targets import PrecomputedTargets, Search, SearchKind, Targets, search
from qv_lens.errors import EditError, unknown
from qv_lens.facts.records import EditRequest
from qv_lens.facts.spans import FACT_TOKENS, FactToken
from qv_lens.models.lens import Lens, Start
from qv_lens.patch import Delta

Group = tuple[int, ...]
MODULES: tuple[Module, ...] = ("ffn", "attn")


@dataclass(frozen=True)
class Pass:
    """One search of z* and one sweep. `modules`: what is written, 'ffn' and, before it, 'attn'.
    `read_clean`: ROME's separate key of the bare prompt. `measured`: what R is measured from, the
    bare prompt's value or that over all contexts."""

    groups: tuple[Group, ...]
    """Groups of layers, in the order in which they are written."""
    search: Search
    """The search of z*."""
    share: Literal["linear", "sqrt"]
    """How the residual is shared out over the layers of a group."""
    fact_token: FactToken = "subject_last"
    """Where the fact is written."""
    prompts: Prompts = "rewrite"
    """What is read: the request, or its multi-hop prompts."""
    modules: tuple[Module, ...] = ("ffn",)
    """What is written, 'ffn' and, before it, 'attn'."""
    average: Average = "halves"
    """How keys of several contexts become one."""
    read_clean: bool = False
    """ROME's separate key of the bare prompt."""
    measured: Literal["bare", "mean"] = "bare"
    """What R is measured from: the bare prompt's value, or that over all contexts."""

    @property
    def z_layer(self) -> int:
        return max(itertools.chain(*self.groups))


@dataclass(frozen=True)
class Solver:
    """The metric of each written (layer, module), and eps for a batch of n facts. `learn` takes in
    a batch's keys."""

    metric: Callable[[int, str], InverseMetric]
    """The metric of each written (layer, module)."""
    eps: Callable[[int], float]
    """eps for a batch of n facts."""
    learn: Callable[[dict[int, list[Tensor]]], None] = lambda keys: None
    """Takes in a batch's keys."""
    limit: float = inf
    """Largest ||dW|| / sqrt(n) of a batch of n facts."""


@dataclass(frozen=True, kw_only=True)
class ClosedForm(ABC):
    """A method is its plan (passes) and its solver. Fields: the search of z*, shared by all;
    defaults are MEMIT's for GPT-J."""

    steps: Count = 25
    """Steps of the search of z*."""
    lr: Positive = 0.5
    """Learning rate of the search."""
    weight_decay: NotNegative = 0.5
    """Weight of ||delta|| / ||init||^2."""
    clamp: Limit = 0.75
    """Largest ||delta|| / ||init||."""
    kl: NotNegative = 0.0625
    """mu: weight of the KL at "{subject} is a"."""
    hits: Natural = 0
    """MPES: the search of a fact ends when this many of its steps gave the new answer in every
    prefixed prompt (0: not asked)."""
    sure: Part = 0.0
    """MPES's other rule: the search of a fact ends where its new answer's probability (a token's, in
    the mean over all prompts) exceeds this (0: not asked)."""
    anchor: NotNegative = 0.0
    """NAS: the length that the FFN's part of z* is scaled to (`norm_anchor`; 0: as it is)."""
    damp: Part = 0.0
    """SPHERE: how much of a delta along the weight's own principal directions is taken out, from 0
    (nothing) to 1."""
    spectrum: Part = 0.5
    """SPHERE's eta: the share of the weight's spectrum that counts as principal."""
    fact_token: FactToken = "subject_last"
    """Where the fact is written."""
    batch = None  # how many requests are edited together where `edit` does not say (None: all)
    style = "memit"  # of the sampled contexts
    prefix = ""

    @abstractmethod
    def plan(self, lens: Lens) -> tuple[Pass, ...]:
        """The passes. Raises `ConfigError` for layers that the model does not have, `EditError` for
        none."""

    @abstractmethod
    def solver(self, job: Job) -> Solver:
        """The metric of each written weight, and eps. Raises `EditError` where C0 is needed and was
        not given."""

    @property
    def reads_statistics(self) -> bool:
        """Whether `solver` reads C0."""
        return True

    def written(self, lens: Lens) -> tuple[tuple[int, ...], tuple[Module, ...]]:
        """The layers and modules that the passes write, whose C0 is read. Raises what `plan`
        raises."""
        places = _written(self.plan(lens))
        modules = {module for _, module in places}
        return tuple(sorted({layer for layer, _ in places})), tuple(
            module for module in MODULES if module in modules
        )

    def first_search(self, lens: Lens) -> SearchKind:
        """The search of the first pass, which can be shared by editors (`search_ahead`). Raises
        what `plan` raises."""
        first = self.plan(lens)[0]
        return SearchKind(first.search, first.fact_token, first.prompts, self.prefix)

    def trim(self, W: Tensor, delta: Tensor) -> Tensor:
        """What of a batch's dense delta of one weight W is kept: all of it, unless `damp` or an
        editor (RECT) says otherwise."""
        return damped(W, delta, self.spectrum, self.damp) if self.damp else delta

    @property
    def trims(self) -> bool:
        """Whether `trim` changes anything."""
        return self.damp > 0 or type(self).trim is not ClosedForm.trim

    def kept_of(self, job: Job, before: Mapping[tuple[int, str], Tensor], whole: Deltas) -> Deltas:
        """What `trim` keeps of a batch's deltas, written in their place; `before`: the weights as
        the batch found them."""
        kept = {key: Delta(self.trim(before[key], delta.dense())) for key, delta in whole.items()}
        for key, delta in kept.items():
            job.rewrite(*key, before[key], delta)
        return kept

    def deltas(self, job: Job) -> Deltas:
        passes = self.plan(job.lens)
        for place in _written(passes) if self.reads_statistics else ():
            # missing statistics raise before anything is searched
            job.required_statistics().of(job.lens, *place)
        return sweep(job, self, passes, self.solver(job))

    def at(self, *sites: str, drop: bool = False) -> Search:
        if self.fact_token not in FACT_TOKENS:
            raise unknown("Fact token", self.fact_token, FACT_TOKENS, error=EditError)
        return Search(
            sites, self.steps, self.lr, self.weight_decay, self.clamp, self.kl, drop,
            hits=self.hits, sure=self.sure, anchor=self.anchor,
        )  # fmt: skip

    def spread(self, lens: Lens, layers: Group) -> Pass:
        """MEMIT's pass: z* in the stream, the residual shared out linearly."""
        groups = ordered(lens, (layers,))
        return Pass(
            groups,
            self.at(lens.backend_adapter.resid_post(groups[-1][-1])),
            "linear",
            self.fact_token,
        )

    def two_deltas(self, lens: Lens, groups: Sequence[Group], **options) -> Pass:
        """PMET's pass: z* at the FFN's and attention's outputs, shared out by square roots."""
        ascending = ordered(lens, groups)
        backend = lens.backend_adapter
        z = max(itertools.chain(*ascending))
        settings = self.at(backend.written_at(z), backend.written_at(z, "attn"), drop=True)
        return Pass(ascending, settings, "sqrt", **{"fact_token": self.fact_token, **options})


def sweep(job: Job, editor: ClosedForm, passes: tuple[Pass, ...], solver: Solver) -> Deltas:
    """Run the passes over the batches; writes as it goes and returns the sum of the deltas by
    weight."""
    templates = tuple(editor.prefix + template for template in job.prefixes(editor.style))
    parts: dict[tuple[int, str], list[Delta]] = {}
    for requests in job.batches(editor.batch):
        keys: dict[int, list[Tensor]] = {}
        written: dict[tuple[int, str], list[Delta]] = {}
        names = [(layer, _weight(module)) for layer, module in _written(passes)]
        before = {key: job.lens.parameter(*key).clone() for key in names} if editor.trims else {}
        for plan in passes:
            rows = rows_of(job.lens, requests, templates, plan.fact_token, plan.prompts)
            if job.ahead is not None and not parts and not written:  # nothing is changed yet
                targets = job.ahead.of(requests)
            else:
                targets = search(job.lens, requests, rows, plan.fact_token, plan.search)
            Sweep(job, rows, targets, plan, solver, written, keys).run()
        solver.learn(keys)
        if editor.trims:
            whole = {key: Delta.total(deltas) for key, deltas in written.items()}
            written = {key: [delta] for key, delta in editor.kept_of(job, before, whole).items()}
        for key, deltas in written.items():
            parts.setdefault(key, []).extend(deltas)
    return {key: Delta.total(deltas) for key, deltas in parts.items()}


def _written(passes: tuple[Pass, ...]) -> list[tuple[int, Module]]:
    """The layers and modules that the passes write, each once, in their order."""
    places = []
    for plan in passes:
        places += itertools.product(itertools.chain(*plan.groups), plan.modules)
    return list(dict.fromkeys(places))


def _weight(module: Module) -> str:
    """The weight of a module that is written."""
    return "W_out" if module == "ffn" else "W_O"


def search_ahead(
    lens: Lens,
    requests: Sequence[EditRequest],
    editor: ClosedForm,
    *,
    templates: Sequence[str] | None = None,
    seed: int = 0,
    folder: Path | None = None,
) -> PrecomputedTargets:
    """z* of many requests that will each be edited on the weights as they are now, in one search:
    `edit(..., ahead=)`.

    With a `folder`, z* that an editor with the same search found on the same weights are read from
    that folder, and new ones are kept in it (`kept_targets`).

    Raises `EditError` for no request, a loss that is not finite or a fact that no gradient reaches,
    `ConfigError` for layers that do not exist, `FactError` for requests that do not tokenise.
    Everything else that `edit` refuses is refused when `edit` runs."""
    if not requests:
        raise EditError("There is nothing to search for: pass at least one EditRequest.")
    kind = editor.first_search(lens)
    used = contexts(lens, seed, editor.style) if templates is None else checked_templates(templates)
    batch = list(dict.fromkeys(requests))
    shelf = None if folder is None else TargetShelf.of(lens, kind, used, folder)
    known = {} if shelf is None else shelf.read(batch)
    missing = [request for request in batch if request not in known]
    if missing:
        start = time.perf_counter()
        rows = rows_of(
            lens, missing, [kind.prefix + template for template in used], kind.token, kind.prompts
        )
        searched = search(lens, missing, rows, kind.token, kind.search)
        share = (time.perf_counter() - start) / len(missing)
        for i, request in enumerate(missing):
            known[request] = KeptTargets(searched.rows([i]), share)
        if shelf is not None:
            shelf.write({request: known[request] for request in missing})
    targets = {request: known[request].targets for request in batch}
    seconds = {request: known[request].seconds for request in batch}
    return PrecomputedTargets(
        kind, lens.fingerprint, (*lens.patches, *lens.interventions), used, targets, seconds
    )


@dataclass
class Sweep:
    """One pass over the layers of a batch: reads each layer with all earlier writes in place, then
    writes it."""

    job: Job
    """The edit."""
    rows: ContextRows
    """The contexts of the batch."""
    targets: Targets
    """z* of the batch."""
    plan: Pass
    """Which layers, and how the residual is shared out."""
    solver: Solver
    """What makes a delta of keys and residuals."""
    deltas: dict[tuple[int, str], list[Delta]] = field(default_factory=dict)
    """What was written, by weight."""
    keys: dict[int, list[Tensor]] = field(default_factory=dict)
    """The FFN's keys, by layer."""

    @torch.no_grad()
    def run(self) -> None:
        """Write the groups' layers in their order."""
        count = len(self.rows.clean)
        for i in range(count):
            self.job.losses.append([list(step[i]) for step in self.targets.losses])
        lens = self.job.lens
        lowest = min(layer for group in self.plan.groups for layer in group)
        start = (lowest, lens.stream(self.rows.heads, lowest))
        for group in self.plan.groups:
            for i, layer in enumerate(group):
                if layer < start[0]:  # a later group below an earlier one
                    start = (lowest, lens.stream(self.rows.heads, lowest))
                if layer > start[0]:
                    start = (layer, lens.stream(self.rows.heads, layer, start=start))
                self._write(layer, len(group) - i, start)

    def _write(self, layer: int, left: int, start: Start) -> None:
        """Write a layer; `left`: how many of its group, with it, are still to be written."""
        # all keys are taken before anything of the layer is written
        keys = {module: self._keys(layer, module, start) for module in self.plan.modules}
        for module in self.plan.modules:
            mean, bare = keys[module]
            delta = solve(
                self.solver.metric(layer, module),
                mean,
                self._residual(layer, module, left, start),
                self.solver.eps(len(self.rows.clean)),
                bare if self.plan.read_clean else None,
            )
            name = _weight(module)
            self._check_size(layer, name, delta)
            self.job.write(layer, name, delta)
            self.deltas.setdefault((layer, name), []).append(delta)
            if module == "ffn":
                self.keys.setdefault(layer, []).append(mean)

    def _check_size(self, layer: int, name: str, delta: Delta) -> None:
        size = delta.norm() / sqrt(len(self.rows.clean))
        if size > self.solver.limit:
            raise EditError(
                f"The edit of {name}[{layer}] has the size {size:.3g} a fact, more than "
                f"{self.solver.limit:g}: nothing was kept. Edit fewer facts at once, or give the "
                "update's norm more weight."
            )

    def _keys(self, layer: int, module: Module, start: Start) -> tuple[Tensor, Tensor]:
        """K, a column per fact: over the contexts, and of the bare prompt."""
        backend = self.job.lens.backend_adapter
        site = backend.coefficient(layer) if module == "ffn" else backend.z(layer)
        seen = read(self.job.lens, self.rows, (site,), start, layer + 1)[site]
        mean = mean_over_contexts(self.rows, seen, self.plan.average)
        return mean.T.double(), clean_values(self.rows, seen).T.double()

    def _residual(self, layer: int, module: Module, left: int, start: Start) -> Tensor:
        """R, a column per fact: what is missing of z*, shared out over the layers left."""
        lens = self.job.lens
        place = 0 if module == "ffn" else 1
        site = self.plan.search.sites[place]
        now = read(lens, self.rows, (site,), start, self.plan.z_layer + 1)[site]
        current = values(self.rows, now, self.plan.measured == "mean")
        share = left if self.plan.share == "linear" else sqrt(left)
        R = (self.targets.z_of[place] - current.double()).T / share
        if site == lens.backend_adapter.written_at(self.plan.z_layer, module):
            if layer == self.plan.z_layer:
                return R
            R = _after_norm(lens, self.plan.z_layer, module, R, clean_values(self.rows, now))
        return _before_norm(lens, self.rows, layer, module, R, start)


def _after_norm(
    lens: Lens, layer: int, module: Module, R: Tensor, written: Float[Tensor, "fact d_model"]
) -> Tensor:
    """What R, in front of the norm that follows a sublayer, is in the stream behind it: R gain /
    sigma, with sigma of what the sublayer writes. Where no norm follows, it is R itself."""
    after = lens.backend_adapter.norm_after(layer, module)
    if after is None:
        return R
    return R * after.gain.double()[:, None] / after.scale(written).double().T


def _before_norm(
    lens: Lens, rows: ContextRows, layer: int, module: Module, R: Tensor, start: tuple[int, Tensor]
) -> Tensor:
    """The residual to write before the norm that follows a sublayer, so that R reaches the stream
    after that norm: R sigma / gain, with sigma of the bare prompt. Where no norm follows, it is R
    itself. A gain near zero lets nothing through and is not divided by."""
    after = lens.backend_adapter.norm_after(layer, module)
    if after is None:
        return R
    site = lens.backend_adapter.written_at(layer, module)
    sigma = after.scale(
        clean_values(rows, read(lens, rows, (site,), start, layer + 1)[site])
    ).double()
    gain = after.gain.double()
    passes = gain.abs() > 0.01 * gain.abs().mean()
    return R * sigma.T * torch.where(passes, 1 / torch.where(passes, gain, 1.0), 0.0)[:, None]


def inverses(job: Job) -> Callable[[int, str], InverseMetric]:
    """C0^-1 of each weight, factored once."""

    def metric(layer: int, module: str) -> InverseMetric:
        C0 = job.required_statistics().of(job.lens, layer, "ffn" if module == "ffn" else "attn")
        return job.factored.once(
            ("inverse", layer, module), lambda: inverse_of(C0.to(job.lens.device))
        )

    return metric


def ordered(lens: Lens, groups: Sequence[Group]) -> tuple[Group, ...]:
    """Each group ascending, every layer checked against the model."""
    plan: list[Group] = []
    for layers in groups:
        if not len(layers):
            raise EditError("An editor needs at least one layer.")
        plan.append(tuple(sorted({lens.check_layer(layer) for layer in layers})))
    return tuple(plan)


def weights_of(
    lens: Lens, layers: Sequence[int], parameters: Sequence[str]
) -> list[tuple[int, str]]:
    """(layer, name) of every weight of an editor that writes the same ones of each layer, in
    ascending order. Raises `EditError` for none."""
    if not len(parameters):
        raise EditError("An editor needs at least one weight to write.")
    (group,) = ordered(lens, (tuple(layers),))
    return [(layer, name) for layer in group for name in parameters]
