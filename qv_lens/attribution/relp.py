"""RelP: layer-wise relevance by four detachments and one ordinary backward pass.

The pass computes what it always does; only its gradient changes:

1. norm        x / sigma with sigma detached: relevance passes a norm as if it only scaled.
2. activation  act(x) read as x [act(x) / x], the bracket detached.
3. product     p = act(x) * u of a gated FFN read as p/2 + [p/2]: half the relevance to each factor.
4. attention   the pattern detached, by its queries and keys: relevance passes through the values
               alone.

A unit's relevance is then m dy/dm in that graph. Where no bias adds to the stream, and all four
rules hold, relevance is conserved: over a complete cut of the model it adds up to a target that is
linear in the logits. Source: arXiv 2508.21258 (RelP); the rules are those of AttnLRP (2402.05602)
and of Ali et al. (2022). The norms of queries and keys shape the pattern alone; no rule touches
them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from qv_lens.errors import ConfigError, several, unknown
from qv_lens.models.hooks import Hook, keeper
from qv_lens.models.lens import Lens

Rule = Literal["norm", "activation", "product", "attention"]
RULES: tuple[Rule, ...] = ("norm", "activation", "product", "attention")
#: how near to zero act(x) / x is still divided by x
NEAR_ZERO = 1e-6


def check_rules(rules: Collection[str]) -> None:
    """Raise `ConfigError` for a rule that does not exist, or one name alone."""
    if several(rules) is None:
        raise ConfigError(
            f"rules are several of RelP's ({', '.join(RULES)}), as ('norm', 'activation'); got {rules!r:.80}."
        )
    for rule in rules:
        if rule not in RULES:
            raise unknown("Rule of RelP", rule, RULES)


def relp_hooks(lens: Lens, rules: Collection[Rule]) -> list[Hook]:
    """Hooks that change the gradient of a pass, and nothing that it computes, by the rules. They
    belong under the interventions in force, whose effect on the gradient then stays."""
    hooks: list[Hook] = []
    backend = lens.backend_adapter
    for layer in range(lens.n_layers):
        if "norm" in rules:
            hooks += backend.constant_scales(layer)
        if "attention" in rules:
            hooks += backend.constant_pattern(layer)
        if "activation" in rules or ("product" in rules and backend.gated):
            hooks += _ffn_hooks(lens, layer, rules)
    return hooks


def read_out(lens: Lens, stream: Tensor, rules: Collection[Rule]) -> Tensor:
    """Logits of final stream vectors; under the norm rule sigma of the final norm is detached."""
    if "norm" not in rules:
        return lens.read_out(stream)
    scale = lens.backend_adapter.norm(None).scale(stream).detach()
    return lens.read_out(stream, scale)


def _ffn_hooks(lens: Lens, layer: int, rules: Collection[Rule]) -> list[Hook]:
    """The rules of activation and product, as a hook on m that looks at what the FFN read."""
    backend = lens.backend_adapter
    read: dict[str, Tensor] = {}

    def rewrite(m: Tensor) -> Tensor:
        x = read["pre"]
        act = backend.activation(x)
        if "activation" in rules:
            away = torch.where(x.abs() < NEAR_ZERO, torch.full_like(x, NEAR_ZERO), x)
            act = x * (backend.activation(away) / away).detach()
        if backend.gated:
            act = act * read["linear"]
            if "product" in rules:
                act = act / 2
        return m.detach() + (act - act.detach())  # the value stays what the model computes

    hooks: list[Hook] = [(backend.pre(layer), keeper(read, "pre"))]
    if backend.gated:
        hooks.append((backend.pre_linear(layer), keeper(read, "linear")))
    return [*hooks, (backend.coefficient(layer), rewrite)]
