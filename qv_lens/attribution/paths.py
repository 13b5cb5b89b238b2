"""CTP's critical transmission paths (section 3.2, Eq. 6; scores as its code computes them).

1. G: the gradient of the cross-entropy of the new answer with respect to W_in and W_out.
2. A key node is neuron j's column of W_in, a value node its row of W_out; each row of G over the
   model's dimension is z-scored over the nodes, and a node's score is the mean absolute value of
   its column.
3. T+ are the `top` nodes of each layer and matrix, T- the `bottom` ones."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.errors import ConfigError, check_count, unknown
from qv_lens.facts.records import Fact, Records, asked_facts
from qv_lens.models.deltas import Added, delta_hooks, zeros_like_parameters
from qv_lens.models.lens import Lens, check_lens
from qv_lens.models.norms import enlarged

#: token rows in one pass of CTP's gradients, which hold the activations of every layer
TOGETHER = 16

NodeScore = Literal["mean_abs_z", "abs_sum", "sum", "norm"]

NODE_SCORES: tuple[NodeScore, ...] = ("mean_abs_z", "abs_sum", "sum", "norm")


def transmission_paths(
    lens: Lens,
    records: Records,
    top: int = 15,
    bottom: int = 1,
    *,
    score: NodeScore = "mean_abs_z",
    paths: Literal["ranks", "k_best"] = "ranks",
    gate: bool = False,
    batch_size: int = 2,
    added: Mapping[tuple[int, str], Added] | None = None,
) -> pd.DataFrame:
    """CTP's packed nodes: `layer, kind ('key', 'value'), neuron, score, path ('T+', 'T-' or '')`,
    every node one row.

    `score`: 'mean_abs_z' (CTP's code), 'abs_sum' and 'sum' (Eq. 6 over the node's entries, signed),
    'norm'. Where a LayerNorm reads the stream (GPT-J), Eq. 6 is 0 for every value node: the
    stream's gradient sums to 0 over the model's dimension.
    `paths`: 'ranks' takes the `top` and `bottom` nodes of each layer and kind; 'k_best' the nodes
    on the `top` paths (one node per layer and kind) with the largest sum of scores, and on the
    `bottom` paths with the lowest.
    `gate`: a gated FFN's key node includes its column of W_gate.
    `batch_size`: prompts a pass.
    `added`: deltas in force, as `delta_hooks` takes them.
    Raises `ConfigError` for an unknown `score` or `paths`, `batch_size` below 1, `top` and `bottom`
    that do not fit a layer, `gate` without a gated FFN, no facts, or a gradient that is not
    finite."""
    check_lens(lens)
    if score not in NODE_SCORES:
        raise unknown("Node score", score, NODE_SCORES)
    if paths not in ("ranks", "k_best"):
        raise unknown("paths", paths, ("ranks", "k_best"))
    check_count("batch_size", batch_size)
    if not (0 < top <= lens.d_mlp and 0 <= bottom <= lens.d_mlp - top):
        raise ConfigError(
            f"top={top} and bottom={bottom} must fit into the {lens.d_mlp} neurons of a layer."
        )
    gradients = answer_gradients(lens, asked_facts(records), gate, batch_size, added or {})
    columns = {}
    for layer in range(lens.n_layers):
        key = gradients[layer, "W_in"]
        if gate:
            key = torch.cat([key, gradients[layer, "W_gate"]])
        columns[layer, "key"], columns[layer, "value"] = key, gradients[layer, "W_out"].T
    scores = {node: _node_scores(G, score) for node, G in columns.items()}
    marks = (_by_rank if paths == "ranks" else _by_sum)(scores, top, bottom)
    frame = pd.concat(
        [
            pd.DataFrame(
                {
                    "layer": layer,
                    "kind": kind,
                    "neuron": range(lens.d_mlp),
                    "score": s.cpu().numpy(),
                    "path": marks[layer, kind],
                }
            )
            for (layer, kind), s in scores.items()
        ],
        ignore_index=True,
    )
    frame.attrs.update(
        {**lens.label, "score": score, "paths": paths, "top": top, "bottom": bottom, "gate": gate}
    )
    return frame


def answer_gradients(
    lens: Lens,
    facts: Sequence[Fact],
    gate: bool,
    batch_size: int,
    added: Mapping[tuple[int, str], Added],
) -> dict[tuple[int, str], Tensor]:
    """G: mini-batches' mean cross-entropy of the answers, added up, differentiated with respect to
    W_in, W_out (and W_gate)."""
    if gate and not lens.backend_adapter.gated:
        raise ConfigError(f"gate=True, but the FFN of {lens.name} has no gate.")
    names = [
        (layer, name)
        for layer in range(lens.n_layers)
        for name in ("W_in", "W_out", *(("W_gate",) if gate else ()))
    ]
    prompts, total = lens.tokenize(list(facts)), {name: torch.zeros(()) for name in names}
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    together = max(1, TOGETHER // batch_size)  # mini-batches in one pass: a mean each
    for i in range(0, len(batches), together):
        chunk = batches[i : i + together]
        tokens = [sum(len(prompt.answer) for prompt in batch) for batch in chunk]
        with torch.enable_grad():
            zeros = zeros_like_parameters(lens, names)
            hooks = [*delta_hooks(lens, added), *delta_hooks(lens, dict(zeros))]
            logp = lens.answer_logprobs([prompt for batch in chunk for prompt in batch], hooks)
            means = torch.stack([part.mean() for part in logp.split(tokens)])
            scale = enlarged(logp).min()  # of the least sure of them
            gradients = torch.autograd.grad(-(scale * means).sum(), list(zeros.values()))
        total = {
            name: total[name].to(g.device) + g / scale
            for name, g in zip(names, gradients, strict=True)
        }
    if not all(torch.isfinite(g).all() for g in total.values()):
        raise ConfigError("The gradient of the answers is not finite: no node can be ranked by it.")
    return total


def _node_scores(G: Float[Tensor, "d node"], score: NodeScore) -> Float[Tensor, " node"]:
    if score == "sum":
        return G.sum(0)
    if score == "abs_sum":
        return G.sum(0).abs()
    if score == "norm":
        return G.norm(dim=0)
    spread = G.std(dim=1, keepdim=True)
    z = torch.where(
        spread == 0, 0.0, (G - G.mean(1, keepdim=True)) / torch.where(spread == 0, 1.0, spread)
    )
    return z.abs().mean(0)


def _by_rank(
    scores: dict[tuple[int, str], Tensor], top: int, bottom: int
) -> dict[tuple[int, str], list[str]]:
    marks = {}
    for node, s in scores.items():
        order, names = s.argsort(descending=True).tolist(), [""] * len(s)
        for j in order[:top]:
            names[j] = "T+"
        for j in order[len(order) - bottom :]:
            names[j] = "T-"
        marks[node] = names
    return marks


def _by_sum(
    scores: dict[tuple[int, str], Tensor], top: int, bottom: int
) -> dict[tuple[int, str], list[str]]:
    marks = {node: [""] * len(s) for node, s in scores.items()}
    for mark, count, sign in (("T-", bottom, -1.0), ("T+", top, 1.0)):
        for path in _best_paths([(sign * s).tolist() for s in scores.values()], count):
            for node, j in zip(scores, path, strict=True):
                marks[node][j] = mark
    return marks


def _best_paths(scores: list[list[float]], count: int) -> list[tuple[int, ...]]:
    """The `count` choices of one entry per list with the largest sums: lists merged one by one,
    `count` sums kept."""
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for s in scores:
        order = heapq.nlargest(count, range(len(s)), key=s.__getitem__)
        best = heapq.nlargest(
            count, [(total + s[j], (*path, j)) for total, path in best for j in order]
        )
    return [path for _, path in best]
