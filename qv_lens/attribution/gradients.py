"""Gradient attribution: KNE's neuronal ensembles, KN's integrated gradients, CTP's critical
transmission paths.

KNE (section 3, Eq. 4-7)
1. Scale a weight matrix of one layer by i/m, i = 1..m, all of it jointly, and take the gradient of
   sum_j P(y*_j | x, y*_<j).
2. Attr(w_k) = w_k/m * sum_i gradient at (i/m) w, summed over the entries of neuron k: a row of the
   stored (Hugging Face) matrix, which is a column here. Mean over the facts.
3. The ensemble is what lies above one quantile over all layers and matrices (Eq. 6, 7).

KN (Dai et al. 2022): the same along the activations m of one prompt, from 0 to what they are, at
the last token. EasyEdit's rule scales what the non-linearity reads.

CTP (section 3.2, Eq. 6; scores as its code computes them)
1. G: the gradient of the cross-entropy of the new answer with respect to W_in and W_out.
2. A key node is neuron j's column of W_in, a value node its row of W_out; each row of G over the
   model's dimension is z-scored over the nodes, and a node's score is the mean absolute value of
   its column.
3. T+ are the `top` nodes of each layer and matrix, T- the `bottom` ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from numbers import Real
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from qv_lens.attribution.value import check_top
from qv_lens.errors import ConfigError, check_count, several, unknown
from qv_lens.facts.records import EditRequest, Fact
from qv_lens.facts.spans import Prompt
from qv_lens.models.backend import Hook
from qv_lens.models.deltas import Added, delta_hooks, zeros_like_parameters
from qv_lens.models.lens import Lens, Start, log_probs
from qv_lens.models.norms import at_least_float32, enlarged
from qv_lens.neurons import NeuronSet
from qv_lens.progress import progress_bar

Records = Fact | EditRequest | Sequence[Fact | EditRequest]
#: token rows in one pass of integrated gradients, of weights or of activations
ROWS = 64
#: and of CTP's gradients, which hold the activations of every layer
TOGETHER = 16
Reduce = Literal["sum", "norm"]
#: KN's attribution as its paper has it, or as EasyEdit runs it
IGRule = Literal["paper", "easyedit"]
NodeScore = Literal["mean_abs_z", "abs_sum", "sum", "norm"]
NODE_SCORES: tuple[NodeScore, ...] = ("mean_abs_z", "abs_sum", "sum", "norm")


def neuron_ensemble(
    lens: Lens,
    records: Records,
    share: float = 0.01,
    *,
    parameters: Sequence[str] = ("W_out",),
    axis: Literal["column", "row"] = "column",
    reduce: Reduce = "sum",
    steps: int = 20,
    together: bool = False,
) -> NeuronSet:
    """KNE's ensemble: the neurons above the 1 - `share` quantile of Attr over all layers (Eq. 4-7),
    unit e.g. 'w_out_column'.

    `records`: an EditRequest counts with its new answer, a Fact with its answer.
    `parameters`: names of `Lens.parameter`.
    `axis`: 'column' is KNE's neuron (a row of the stored matrix), 'row' KN's (W_out alone: FFN
    neurons).
    `reduce`: a neuron's entries summed, or their norm. `together` scales all layers at once
    (`steps` passes instead of one sweep per layer). Scores are probabilities, not nats.
    `settings["threshold"]` is t_p. The weights are scaled in passing: in a bf16 model the small
    steps round with it (up to a tenth of a score on tiny models); load in float32 for exact ones.
    Raises `ConfigError` for a share outside (0, 1], an unknown parameter or axis.
    """
    parameters = _names(parameters)
    _check_ensemble(share, parameters, axis, reduce, steps)
    facts = targets(records)
    names = [(layer, name) for name in parameters for layer in range(lens.n_layers)]
    groups = [names] if together else [[name] for name in names]
    attributions: dict[tuple[int, str], Tensor] = {}
    for group in progress_bar(groups, of="neuron ensemble", unit="matrix"):
        attributions |= weight_attributions(lens, facts, group, steps)
    frames = []
    for (layer, name), entries in attributions.items():
        along = entries.sum if reduce == "sum" else entries.norm
        score = along(dim=1 if axis == "row" else 0)
        columns = {
            "prompt": -1,
            "unit": "ffn" if axis == "row" else f"{name.lower()}_column",
            "layer": layer,
            "neuron": range(len(score)),
            "coefficient": float("nan"),
            "score": score.cpu().numpy(),
        }
        frames.append(pd.DataFrame(columns))
    frame = pd.concat(frames, ignore_index=True)
    if not frame["score"].any():
        raise ConfigError(
            "Every attribution is 0: the answers' probability is too small to be told from 0, or "
            "nothing of these weights reaches it. Choose another answer, or other parameters."
        )
    threshold = float(frame["score"].quantile(1 - share))
    below = ceil((len(frame) - 1) * (1 - share) - 1e-9)
    frame = frame.sort_values("score", ascending=False, kind="stable")
    frame = frame.head(len(frame) - below).reset_index(drop=True)
    settings = {
        **lens.label,
        "method": "integrated gradients of weights",
        "share": share,
        "threshold": threshold,
        "parameters": list(parameters),
        "axis": axis,
        "reduce": reduce,
        "steps": steps,
        "together": together,
    }
    return NeuronSet(frame, settings)


def _names(parameters: Sequence[str]) -> tuple[str, ...]:
    """The parameters' names, read once. Raises `ConfigError` for none, or one alone."""
    names = several(parameters)
    if not names:
        raise ConfigError(
            "parameters are the weights to take neurons from, ('W_out',) or more, got "
            f"{parameters!r:.80}."
        )
    return names


def _check_ensemble(
    share: float, parameters: Sequence[str], axis: str, reduce: str, steps: int
) -> None:
    """Raise `ConfigError` for options that `neuron_ensemble` does not take."""
    if not isinstance(share, Real) or not 0 < share <= 1:
        raise ConfigError(
            f"share is a fraction of the neurons, above 0 and at most 1; got {share!r}."
        )
    check_count("steps", steps)
    vectors = [name for name in parameters if not str(name).startswith("W_")]
    if vectors:
        raise ConfigError(
            f"{vectors[0]!r} is not a weight matrix: a neuron of KNE is a column of W_out, W_in, "
            "W_gate, W_O, W_Q, W_K or W_V."
        )
    if axis not in ("column", "row"):
        raise unknown("Axis", axis, ("column", "row"))
    if axis == "row" and tuple(parameters) != ("W_out",):
        raise ConfigError(
            "axis='row' means FFN neurons, rows of W_out: use it with parameters=('W_out',)."
        )
    if reduce not in ("sum", "norm"):
        raise unknown("Reduction", reduce, ("sum", "norm"))


def weight_attributions(
    lens: Lens, facts: Sequence[Fact], names: list[tuple[int, str]], steps: int = 20
) -> dict[tuple[int, str], Tensor]:
    """w/m sum_i dP/dw at (i/m) w for every entry of the named weights, scaled together, mean over
    the facts (Eq. 5).

    The m scales run side by side as copies of the facts' rows, from the lowest named layer on:
    below it nothing changes."""
    prompts, first = lens.tokenize(list(facts)), min(layer for layer, _ in names)
    with torch.no_grad():
        below = lens.stream(
            [prompt.row("answer") for prompt in prompts],
            first,
            last=[prompt.last for prompt in prompts],
        )
    total, together = {name: torch.zeros(()) for name in names}, max(1, ROWS // len(prompts))
    for begin in range(0, steps, together):
        shares = (
            torch.arange(begin + 1, min(begin + together, steps) + 1, device=lens.device) / steps
        )
        # one for all copies: its gradient is the sum over them
        leaves = zeros_like_parameters(lens, names)
        added: dict[tuple[int, str], Added] = {
            name: _rescaled(lens.parameter(*name), leaf, shares.repeat_interleave(len(prompts)))
            for name, leaf in leaves.items()
        }
        with torch.enable_grad():
            start = first, below.repeat(len(shares), 1, 1)
            logp = answer_logprobs(
                lens, prompts * len(shares), delta_hooks(lens, added), start=start
            )
            # dP = P dlog P: the gradient of a small P, or of one near 1, lies below float16's range
            p = logp.detach().exp()
            size = (p / enlarged(logp)).max().clamp_min(torch.finfo(p.dtype).tiny)
            gradients = torch.autograd.grad((p / size * logp).sum(), list(leaves.values()))
        for name, gradient in zip(names, gradients, strict=True):
            total[name] = total[name].to(gradient.device) + gradient * (size / len(prompts))
    return {
        (layer, name): lens.parameter(layer, name).to(g.dtype) * g / steps
        for (layer, name), g in total.items()
    }


def _rescaled(weight: Tensor, leaf: Tensor, shares: Float[Tensor, " row"]) -> Added:
    """What turns W into share * W + leaf, each row by its own share."""
    weight, less = weight.to(leaf.dtype), (shares.to(leaf.dtype) - 1)[:, None, None]

    def add(x: Tensor) -> Tensor:
        x = x.to(leaf.dtype)
        return (x @ weight) * less + x @ leaf

    return add


@torch.no_grad()
def greedy_tokens(lens: Lens, fact: Fact, count: int) -> list[int]:
    """The model's own `count` likeliest tokens after a fact's prompt, one by one."""
    ids = list(lens.tokenize(fact)[0].ids)
    start = len(ids)
    for _ in range(count):
        logits = lens.logits_at([ids], [(0, len(ids) - 1)], last=[start - 1])
        ids.append(int(logits.argmax()))
    return ids[start:]


def integrated_gradients(
    lens: Lens, records: Records, top: int | None = 300, *, steps: int = 20, rule: IGRule = "paper"
) -> NeuronSet:
    """KN's attribution of FFN neurons: m_k/steps sum_i dP(answer)/dm_k at (i/steps) m, at the token
    that predicts.

    Each layer is scaled alone, all its neurons jointly. An answer of several tokens is teacher
    forced, token by token, and added up. Scores are probabilities. The `top` best of each prompt are
    kept (None: all).

    `rule='easyedit'`: what EasyEdit runs. It scales what the non-linearity reads (not m), on a grid
    from 0 to 1 with both ends; later tokens of an answer follow what the model itself would say,
    and the scores of all tokens of an answer are averaged."""
    if rule not in ("paper", "easyedit"):
        raise unknown("Rule", rule, ("paper", "easyedit"))
    least = 2 if rule == "easyedit" else 1
    if steps < least:
        raise ConfigError(f"steps must be at least {least}, got {steps}.")
    check_top(top)
    facts = targets(records)
    answers = _answer_rows(lens, facts, rule)
    grid = _shares(steps, rule)
    backend = lens.backend_adapter
    site_of = backend.coefficient if rule == "paper" else backend.pre
    count = torch.bincount(answers.owner)[:, None]
    frames = []
    start: Start | None = None
    layers = range(lens.n_layers)
    for layer in progress_bar(layers, of="integrated gradients", unit="layer"):
        site = site_of(layer)
        with torch.no_grad():  # scaling a layer changes nothing in front of it
            stream = lens.stream(answers.rows, layer, start=start, last=answers.ends)
            start = layer, stream
            value = _value_at(lens, answers, layer, site, start)
        gradient = _path_gradient(lens, answers, site, value, start, grid)
        score = answers.by_fact(value * gradient / steps, len(facts))
        if rule == "easyedit":
            score /= count
        coefficient = answers.by_fact(value, len(facts)) / count
        frames.append(_neurons_of_layer(layer, coefficient, score))
    frame = pd.concat(frames, ignore_index=True)
    frame = frame.sort_values(["prompt", "score"], ascending=[True, False], kind="stable")
    settings = {"method": "integrated gradients", "steps": steps, "rule": rule}
    neurons = NeuronSet(frame.reset_index(drop=True), {**lens.label, **settings})
    return neurons if top is None else neurons.top(top)


@dataclass(frozen=True)
class _AnswerRows:
    """The answers' tokens, a row each: what is read before the token, teacher forced."""

    rows: list[tuple[int, ...]]
    """Token ids up to the one that predicts."""
    token: Int[Tensor, " row"]
    """The token whose probability is attributed."""
    owner: Int[Tensor, " row"]
    """Which fact it belongs to."""
    ends: list[int]
    """Where the fact's prompt ends."""
    last: Int[Tensor, " row"]
    """Where the row ends."""

    def by_fact(
        self, values: Float[Tensor, "row d_mlp"], facts: int
    ) -> Float[Tensor, "fact d_mlp"]:
        """Rows added up by fact."""
        sums = torch.zeros(facts, values.shape[1], dtype=values.dtype, device=values.device)
        return sums.index_add_(0, self.owner, values)


def _answer_rows(lens: Lens, facts: Sequence[Fact], rule: IGRule) -> _AnswerRows:
    """What is asked of each fact: its answer token by token, after its own tokens (or, as EasyEdit
    runs it, after those that the model itself would say)."""
    rows, tokens, owners, ends = [], [], [], []
    for owner, (fact, prompt) in enumerate(zip(facts, lens.tokenize(list(facts)), strict=True)):
        forced = prompt.answer
        if rule == "easyedit":
            forced = tuple(greedy_tokens(lens, fact, len(prompt.answer) - 1))
        for position in prompt.positions("answer"):
            place = position - prompt.last
            rows.append((*prompt.ids, *forced[:place]))
            tokens.append(prompt.answer[place])
            owners.append(owner)
            ends.append(prompt.last)
    last = [len(row) - 1 for row in rows]
    device = lens.device
    return _AnswerRows(
        rows,
        torch.tensor(tokens, device=device),
        torch.tensor(owners, device=device),
        ends,
        torch.tensor(last, device=device),
    )


def _shares(steps: int, rule: IGRule) -> Float[Tensor, " step"]:
    """The shares of its value at which a site is read: 1/m to 1, or (EasyEdit) 0 to 1."""
    if rule == "easyedit":
        return torch.linspace(0, 1, steps, dtype=torch.float64)
    return torch.arange(1, steps + 1, dtype=torch.float64) / steps


def _neurons_of_layer(
    layer: int, coefficient: Float[Tensor, "fact d_mlp"], score: Float[Tensor, "fact d_mlp"]
) -> pd.DataFrame:
    """A row for each fact and neuron."""
    facts, width = score.shape
    return pd.DataFrame(
        {
            "prompt": np.repeat(np.arange(facts), width),
            "unit": "ffn",
            "layer": layer,
            "neuron": np.tile(np.arange(width), facts),
            "coefficient": coefficient.flatten().cpu().numpy(),
            "score": score.flatten().cpu().numpy(),
        }
    )


def _value_at(
    lens: Lens, answers: _AnswerRows, layer: int, site: str, start: Start
) -> Float[Tensor, "row d_mlp"]:
    """A site's value at each row's last token."""
    kept: list[Tensor] = []
    lens.stream(answers.rows, layer + 1, [(site, kept.append)], start, last=answers.ends)
    row = torch.arange(len(answers.rows), device=answers.last.device)
    return at_least_float32(kept[0][row, answers.last])


def _path_gradient(
    lens: Lens,
    answers: _AnswerRows,
    site: str,
    value: Float[Tensor, "row d_mlp"],
    start: Start,
    grid: Float[Tensor, " step"],
) -> Float[Tensor, "row d_mlp"]:
    """sum over the grid of dP(token)/dvalue where the site is set to a share of its value at each
    row's last token."""
    count = len(answers.rows)
    gradient = torch.zeros_like(value)
    together = max(1, ROWS // count)  # steps in one pass
    for shares in grid.to(value).split(together):
        copies = len(shares)
        with torch.enable_grad():
            leaf = (value * shares[:, None, None]).flatten(0, 1).requires_grad_(True)
            logp = _logprobs(lens, answers, site, leaf, start, copies)
            scale = enlarged(logp)
            (each,) = torch.autograd.grad((scale * logp).sum(), leaf)
        each *= (logp.detach().exp() / scale)[:, None]  # dP = P dlog P, as above
        gradient += each.unflatten(0, (copies, count)).sum(0)
    return gradient


def _logprobs(
    lens: Lens,
    answers: _AnswerRows,
    site: str,
    leaf: Float[Tensor, "copy_row d_mlp"],
    start: Start,
    copies: int,
) -> Float[Tensor, " copy_row"]:
    """log P(token) of every copy of the rows, the site set to `leaf` at its last token."""
    layer, stream = start
    last = answers.last.repeat(copies)
    row = torch.arange(len(leaf), device=leaf.device)

    def put(x: Tensor) -> Tensor:
        out = x.clone()
        out[row, last] = leaf.to(x.dtype)
        return out

    final = lens.stream(
        answers.rows * copies,
        lens.n_layers,
        [(site, put)],
        (layer, stream.repeat(copies, 1, 1)),
        last=answers.ends * copies,
    )
    return log_probs(lens.read_out(final[row, last]))[row, answers.token.repeat(copies)]


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
    `added`: deltas in force, as `delta_hooks` takes them."""
    if score not in NODE_SCORES:
        raise unknown("Node score", score, NODE_SCORES)
    if paths not in ("ranks", "k_best"):
        raise unknown("paths", paths, ("ranks", "k_best"))
    check_count("batch_size", batch_size)
    if not (0 < top <= lens.d_mlp and 0 <= bottom <= lens.d_mlp - top):
        raise ConfigError(
            f"top={top} and bottom={bottom} must fit into the {lens.d_mlp} neurons of a layer."
        )
    gradients = answer_gradients(lens, targets(records), gate, batch_size, added or {})
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
            logp = answer_logprobs(lens, [prompt for batch in chunk for prompt in batch], hooks)
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


def answer_logprobs(
    lens: Lens,
    prompts: Sequence[Prompt],
    hooks: list[Hook],
    labels: Sequence[tuple[int, ...]] | None = None,
    start: Start | None = None,
) -> Float[Tensor, " token"]:
    """log P(y_j | x, y_<j) of every answer token of every prompt, in one pass, in order; or of
    other `labels` there.

    `start`: as `Lens.logits` takes it.
    """
    targets = [p.answer for p in prompts] if labels is None else labels
    pairs = [zip(p.answer, own, strict=True) for p, own in zip(prompts, targets, strict=True)]
    token = torch.tensor([t for pair in pairs for _, t in pair], device=lens.device)
    logp = log_probs(lens.answer_logits(prompts, hooks, start))
    return logp.gather(1, token[:, None])[:, 0]


def targets(records: Records) -> list[Fact]:
    """The facts whose answers are asked for; a request counts with its new answer. Raises
    `ConfigError` for none."""
    several = [records] if isinstance(records, (Fact, EditRequest)) else list(records)
    if not several:
        raise ConfigError("No facts were given: pass at least one Fact or EditRequest.")
    return [record.target if isinstance(record, EditRequest) else record for record in several]


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
