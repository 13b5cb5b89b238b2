"""MEMIT, PMET and ACE: one search of z*, then one ascending sweep over layer groups that writes W_out.

1. z* per fact at the last layer of the last group (`targets.search`): MEMIT at the stream behind the block, PMET and
   ACE at the FFN's output (with a second delta at attention's, thrown away).
2. For each layer in ascending order, on the weights as written so far: keys K of the fact's token, cur = the site's
   value at the z layer on the bare prompt, R = (z* - cur) / share, dW_out = solve(C0^-1, K, R, lambda).
   With r layers left in the layer's group, share is r for MEMIT and sqrt(r) for PMET and ACE.
3. ACE's groups are query layers, then value layers (official release, Algorithm 1; `editing.md` section 2): the query
   group ends with the full remaining residual, and so does the value group.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any, Literal, Protocol

import torch

from qv_lens.editing.keys import clean_values, contexts, mean_over_contexts, read, rows_of
from qv_lens.editing.solve import inverse_of, solve
from qv_lens.editing.statistics import Statistics
from qv_lens.editing.targets import Search, search
from qv_lens.errors import EditError, unknown
from qv_lens.facts.records import EditRequest
from qv_lens.facts.spans import FACT_TOKENS, FactToken
from qv_lens.models.lens import Lens
from qv_lens.patch import Delta, Patch


@dataclass(frozen=True)
class Plan:
    """What an editor asks of the one loop: layer groups, the site of z*, how the residual is shared, one by one or joint."""

    groups: tuple[tuple[int, ...], ...]
    site: Literal["resid", "ffn"]
    share: Literal["linear", "sqrt"]
    search: Search
    lam: float
    fact_token: FactToken
    joint: bool


class Editor(Protocol):
    """A frozen dataclass of hyperparameters that can lay out a plan for a model."""

    def plan(self, lens: Lens) -> Plan: ...


@dataclass(frozen=True)
class MEMIT:
    """Mass-editing memory in a transformer (Meng et al. 2023). Defaults: GPT-J's, of the authors' release.

    `lam` multiplies the mean second moment C0. `fact_token`: where the fact is written.
    """

    layers: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    steps: int = 25
    lr: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 0.75
    kl: float = 0.0625
    lam: float = 15000.0
    fact_token: FactToken = "subject_last"

    def plan(self, lens: Lens) -> Plan:
        groups = _groups(lens, (self.layers,))
        site = lens.backend_adapter.resid_post(groups[-1][-1])
        settings = Search((site,), self.steps, self.lr, self.weight_decay, self.clamp, self.kl)
        return Plan(groups, "resid", "linear", settings, self.lam, self.fact_token, joint=True)


@dataclass(frozen=True)
class PMET:
    """Precise model editing in a transformer (Li et al. 2024), FFN written. Defaults: GPT-J's, of the authors' release."""

    layers: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    steps: int = 30
    lr: float = 0.2
    weight_decay: float = 0.5
    clamp: float = 0.75
    kl: float = 1.0
    lam: float = 6000.0
    fact_token: FactToken = "subject_last"

    def plan(self, lens: Lens) -> Plan:
        groups = _groups(lens, (self.layers,))
        return Plan(groups, "ffn", "sqrt", _two_deltas(lens, groups, self), self.lam, self.fact_token, joint=True)


@dataclass(frozen=True)
class ACE:
    """Attribution-controlled editing: query layers and value layers, one search of z* at the last value layer.

    Defaults: GPT-J's, of the official release. Several requests are edited one after another, z* searched on the
    weights as edited so far (`joint=True`: as one batch). A query layer above the last value layer cannot reach z* and
    is dropped with a warning; a layer in both groups is written in both.
    """

    value_layers: tuple[int, ...] = (23, 24, 25)
    query_layers: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    steps: int = 30
    lr: float = 0.2
    weight_decay: float = 0.5
    clamp: float = 0.75
    kl: float = 1.0
    lam: float = 6000.0
    fact_token: FactToken = "subject_last"
    joint: bool = False

    def plan(self, lens: Lens) -> Plan:
        if not self.value_layers:
            raise EditError("ACE needs at least one value layer: z* is searched at the last one.")
        top = max(self.value_layers)
        reach = tuple(layer for layer in self.query_layers if layer <= top)
        if len(reach) < len(self.query_layers):
            dropped = sorted(set(self.query_layers) - set(reach))
            warnings.warn(f"Query layers {dropped} lie above the z layer {top} and are dropped.", stacklevel=3)
        groups = _groups(lens, (reach, self.value_layers) if reach else (self.value_layers,))
        return Plan(groups, "ffn", "sqrt", _two_deltas(lens, groups, self), self.lam, self.fact_token, self.joint)


def edit(
    lens: Lens,
    requests: Sequence[EditRequest] | EditRequest,
    editor: Editor,
    *,
    statistics: Statistics,
    templates: Sequence[str] | None = None,
    seed: int = 0,
) -> Patch:
    """Compute an edit as a Patch; the lens is left as it was, bit for bit, also after an exception.

    `statistics`: C0 of every layer written. `templates`: contexts with `{}`; None samples them from the model (`seed`).
    Raises `EditError` for layers, tokens or systems that cannot be edited, `FactError` for requests that do not tokenise.
    """
    batch = [requests] if isinstance(requests, EditRequest) else list(requests)
    if not batch:
        raise EditError("No edit was requested: pass at least one EditRequest (fact.to('new answer')).")
    plan = editor.plan(lens)
    if plan.fact_token not in FACT_TOKENS:
        raise unknown("Fact token", plan.fact_token, FACT_TOKENS, error=EditError)
    fingerprint = lens.fingerprint
    metrics = {layer: inverse_of(statistics.of(lens, layer).to(lens.device)) for group in plan.groups for layer in group}
    prefixes = tuple(templates) if templates is not None else contexts(lens, seed)
    saved = {layer: lens.w_out(layer).clone() for layer in metrics}
    parts: dict[int, list[Delta]] = {layer: [] for layer in metrics}
    losses = []
    try:
        for chunk in [batch] if plan.joint else [[request] for request in batch]:
            losses += _write(lens, chunk, plan, prefixes, metrics, parts)
    finally:
        for layer, weight in saved.items():
            lens.w_out(layer).copy_(weight)
    deltas = {
        (layer, "W_out"): Delta(torch.cat([d.left for d in found], 1), torch.cat([d.right for d in found], 0))
        for layer, found in sorted(parts.items())
    }
    relative = {str(layer): deltas[layer, "W_out"].norm() / float(saved[layer].double().norm()) for layer in sorted(saved)}
    return Patch(deltas, fingerprint, _info(lens, batch, editor, prefixes, statistics, losses, relative, seed))


def _write(lens: Lens, requests: list[EditRequest], plan: Plan, prefixes: Sequence[str], metrics: dict, parts: dict) -> list:
    """Search z*, then write the groups' layers in ascending order; collects the deltas and returns the losses by fact and step."""
    rows = rows_of(lens, requests, prefixes, plan.fact_token)
    targets = search(lens, requests, rows, plan.fact_token, plan.search)
    site = plan.search.sites[0]
    for group in plan.groups:
        for i, layer in enumerate(group):
            left = len(group) - i
            key_site = lens.backend_adapter.coefficient(layer)
            seen = read(lens, rows, (key_site, site))
            K = mean_over_contexts(rows, seen[key_site]).double().T
            R = (targets.z - clean_values(rows, seen[site]).double()).T / (left if plan.share == "linear" else sqrt(left))
            delta = solve(metrics[layer], K, R, plan.lam)
            lens.w_out(layer).copy_(lens.w_out(layer).double() + delta.dense())
            parts[layer].append(delta)
    return [[list(step[i]) for step in targets.losses] for i in range(len(requests))]


def _groups(lens: Lens, groups: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Each group ascending, every layer checked against the model."""
    if not all(groups):
        raise EditError("An editor needs at least one layer.")
    return tuple(tuple(sorted({lens.check_layer(layer) for layer in group})) for group in groups)


def _two_deltas(lens: Lens, groups: tuple[tuple[int, ...], ...], editor: PMET | ACE) -> Search:
    z_layer, backend = groups[-1][-1], lens.backend_adapter
    sites = (backend.mlp_out(z_layer), backend.attn_out(z_layer))
    return Search(sites, editor.steps, editor.lr, editor.weight_decay, editor.clamp, editor.kl, drop=True)


def _info(
    lens: Lens, batch: list[EditRequest], editor: Any, prefixes: Sequence[str], statistics: Statistics,
    losses: list, relative: dict[str, float], seed: int,
) -> dict[str, Any]:  # fmt: skip
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(editor).items()}  # as JSON gives it back
    return {
        "model": lens.name, "backend": lens.backend, "method": type(editor).__name__, "hyperparameters": plain,
        "facts": [{"prompt": r.fact.prompt, "subject": r.fact.subject, "old": r.fact.answer, "new": r.new} for r in batch],
        "contexts": list(prefixes), "seed": seed, "statistics": {"corpus": statistics.corpus, "tokens": statistics.tokens},
        "relative_norm": relative, "losses": losses,
    }  # fmt: skip
