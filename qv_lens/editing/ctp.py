"""CTP: critical transmission paths, with contrastive editing.

1. T+ is the nodes of every layer that matter most to the new answers, T- those that matter least
   (`transmission_paths`); both are found again every few epochs (once, where a single request is
   trained by `alone`).
2. Only entries of nodes that were on a path at some time are trained (`_Nodes`); the forward pass
   runs with W + delta through hooks.
3. J = L(f_Theta*(x), y*) + lam L(f_Theta'(x), y) (Eq. 7) is lowered by two Adam steps a mini-batch:
   (A) its first term, the new answer's cross-entropy, on Theta*, the nodes of T+; (B) its second,
   that of the tokens which the model predicted before, on Theta', the nodes of T-.
4. The entries at the end are the edit.

Source: CTP, its released code."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from qv_lens.attribution.paths import transmission_paths
from qv_lens.editing.bounds import Count, Natural, NotNegative, Positive
from qv_lens.editing.fine_tuning import Key, added_to_some, scattered
from qv_lens.editing.job import Deltas, Job
from qv_lens.errors import EditError
from qv_lens.facts.records import EditRequest
from qv_lens.facts.spans import Prompt
from qv_lens.models.deltas import Added, delta_hooks, zero_leaf
from qv_lens.models.lens import Lens
from qv_lens.patch import Delta


@dataclass(frozen=True, kw_only=True)
class CTP:
    """Critical transmission paths with contrastive editing, as its released code runs.

    `epochs` passes over the requests in shuffled mini-batches; before every `every`-th epoch T+ and
    T- are found again on the current weights. Each mini-batch takes two Adam steps: (A) the new
    answer's cross-entropy on the T+ nodes, (B) `lam` times the cross-entropy of the tokens that the
    unedited model predicts, on the T- nodes. A key node includes its entry of b_in; the whole b_out
    is trained in both steps (`train_b_out`). `adam='shared'`: one state for both steps, so that
    nodes without gradient still move by momentum (as released); 'separate': one each, fresh at each
    selection. `stream` takes the requests one after another, each for all `epochs`. A job of one
    request uses `alone` = (lr, steps, stop) in the place of `lr`, `epochs` and `every`, since twelve
    steps of 1e-5 do nothing, and its paths are found once; the default is untuned."""

    top: Count = 15
    """Size of T+, nodes of a layer."""
    bottom: Natural = 1
    """Size of T-, nodes of a layer."""
    epochs: Count = 12
    """Passes over the requests."""
    every: Count = 2
    """Epochs between two selections of T+ and T-."""
    batch_size: Count = 2
    """Requests of a mini-batch."""
    lr: Positive = 1e-5
    """Learning rate."""
    lam: NotNegative = 0.1
    """lambda of the paper: weight of the contrastive loss (step B)."""
    score: Literal["mean_abs_z", "abs_sum", "sum", "norm"] = "mean_abs_z"
    """As `transmission_paths` takes it."""
    paths: Literal["ranks", "k_best"] = "ranks"
    """As `transmission_paths` takes it."""
    adam: Literal["shared", "separate"] = "shared"
    """One state of Adam for both steps (as released), or one each."""
    gate: bool = False
    """Whether columns of W_gate are nodes too."""
    train_b_out: bool = True
    """Whether b_out is trained (as released)."""
    stream: bool = False
    """Whether requests are taken one after another, each for all epochs."""
    alone: tuple[Positive, Count, NotNegative] = (1e-4, 50, 1e-2)
    """(lr, steps, stop) for a job of one request."""

    def deltas(self, job: Job) -> Deltas:
        return job.in_turn(self._trained)

    def _trained(self, job: Job) -> Deltas:
        nodes: list[_Nodes] = []
        for requests in [[r] for r in job.requests] if self.stream else [job.requests]:
            nodes = _contrast(self, job, requests, nodes)
        return {n.key: n.delta(job.lens) for n in nodes if n.entries.any()}


@dataclass(frozen=True)
class _Nodes:
    """What is trained of one weight: some nodes' entries. All other entries stay."""

    key: Key
    index: Int[Tensor, " node"]
    """Columns of W_in and W_gate, rows of W_out, entries of a bias."""
    entries: Tensor
    """D there: [d_model, node] of W_in and W_gate, [node, d_model] of W_out, [node] of a bias."""

    @property
    def axis(self) -> Literal["column", "row"]:
        return "row" if self.key[1] == "W_out" else "column"

    def added(self, lens: Lens) -> Added:
        """D as `delta_hooks` takes it."""
        weight = lens.parameter(*self.key)
        if weight.ndim == 1:
            return self.entries.new_zeros(len(weight)).index_copy(0, self.index, self.entries)
        return added_to_some(self.entries, self.index, weight.shape[1], self.axis, 1.0)

    def delta(self, lens: Lens) -> Delta:
        """D as it is written."""
        added = self.added(lens)
        if isinstance(added, Tensor):
            return Delta(added.detach().double())
        return scattered(lens, self.key, self.entries, self.index, self.axis, 1.0)

    def mask(self, nodes: Mapping[Key, Tensor]) -> Tensor:
        """Which of the entries are some nodes'."""
        theirs = torch.isin(self.index, nodes[self.key])
        return theirs[:, None] if self.axis == "row" else theirs


def _joined(nodes: Sequence[_Nodes]) -> list[_Nodes]:
    """Every weight once."""
    joined = []
    for key in sorted({each.key for each in nodes}):
        parts = [each for each in nodes if each.key == key]
        axis = 0 if parts[0].axis == "row" else -1
        index = torch.cat([part.index for part in parts])
        joined.append(_Nodes(key, index, torch.cat([part.entries for part in parts], axis)))
    return joined


def _contrast(
    editor: CTP, job: Job, requests: list[EditRequest], begun: list[_Nodes]
) -> list[_Nodes]:
    """One run of CTP's epochs; `begun` is what earlier runs trained. Only nodes that were in T+ or
    T- at some time have entries here: the rest of a weight can't move."""
    lens, nodes = job.lens, list(begun)
    prompts = lens.tokenize([request.target for request in requests])
    old_answers = _said(lens, prompts)
    single = len(job.requests) == 1
    lr, epochs, stop = editor.alone if single else (editor.lr, editor.epochs, 0.0)
    order = random.Random(job.seed)
    optimisers: list[torch.optim.Adam] = []
    losses = []
    plus: dict[Key, Tensor] = {}
    minus: dict[Key, Tensor] = {}
    for epoch in range(epochs):
        if epoch % editor.every == 0 and (not single or epoch == 0):
            plus, minus = _paths(editor, job, requests, nodes)
            fresh = _unseen(lens, plus, minus, nodes)
            nodes += fresh
            if not optimisers or editor.adam == "separate":
                optimisers = _optimisers(editor, nodes, lr)
            else:
                _join(optimisers[0], fresh)
        shuffled = order.sample(range(len(prompts)), len(prompts))
        total = 0.0
        for i in range(0, len(shuffled), editor.batch_size):
            batch = shuffled[i : i + editor.batch_size]
            chosen = [prompts[b] for b in batch]
            loss = _step(lens, nodes, chosen, None, plus, optimisers[0], 1.0)
            total += loss * len(batch)
            if editor.lam > 0 and editor.bottom > 0:
                before = [old_answers[b] for b in batch]
                _step(lens, nodes, chosen, before, minus, optimisers[1], editor.lam)
        losses.append([total / len(prompts)])
        if losses[-1][0] < stop:
            break
    job.losses.append(losses)
    return [replace(n, entries=n.entries.detach().requires_grad_()) for n in _joined(nodes)]


def _paths(
    editor: CTP, job: Job, requests: list[EditRequest], nodes: list[_Nodes]
) -> tuple[dict[Key, Tensor], dict[Key, Tensor]]:
    """T+ and T- on the weights as they are: what step A and step B may move of each weight."""
    lens = job.lens
    table = transmission_paths(
        lens,
        requests,
        editor.top,
        editor.bottom,
        score=editor.score,
        paths=editor.paths,
        gate=editor.gate,
        batch_size=editor.batch_size,
        added={part.key: part.added(lens) for part in _joined(nodes)},
    )
    key_names = [
        name
        for name in ("W_in", *(("W_gate",) if editor.gate else ()), "b_in")
        if name in lens.parameter_names
    ]
    biases = range(lens.n_layers) if editor.train_b_out and "b_out" in lens.parameter_names else ()
    paths = []
    for sign in ("T+", "T-"):
        chosen = {
            (layer, "b_out"): torch.arange(lens.d_model, device=lens.device) for layer in biases
        }
        for (layer, kind), rows in table[table["path"] == sign].groupby(["layer", "kind"]):
            index = torch.tensor(rows["neuron"].to_numpy(), device=lens.device)
            for name in ("W_out",) if kind == "value" else key_names:
                chosen[int(layer), name] = index
        paths.append(chosen)
    return paths[0], paths[1]


def _unseen(
    lens: Lens, plus: dict[Key, Tensor], minus: dict[Key, Tensor], nodes: list[_Nodes]
) -> list[_Nodes]:
    """Nodes of T+ and T- that have no entries yet, with a D of zeros."""
    seen = {part.key: part.index for part in _joined(nodes)}
    fresh = []
    for key in sorted({*plus, *minus}):
        index = torch.cat([path[key] for path in (plus, minus) if key in path]).unique()
        if key in seen:
            index = index[~torch.isin(index, seen[key])]
        if len(index):
            weight = lens.parameter(*key)
            shape = list(weight.shape)
            shape[0 if key[1] == "W_out" else -1] = len(index)
            fresh.append(_Nodes(key, index, zero_leaf(weight, *shape)))
    return fresh


def _optimisers(editor: CTP, nodes: list[_Nodes], lr: float) -> list[torch.optim.Adam]:
    """Adam of step A and of step B: one state for both, or one each."""
    first = torch.optim.Adam([part.entries for part in nodes], lr=lr)
    if editor.adam == "shared":
        return [first, first]
    return [first, torch.optim.Adam([part.entries for part in nodes], lr=lr)]


def _join(adam: torch.optim.Adam, fresh: list[_Nodes]) -> None:
    """Nodes enter an Adam under way as the entries of a whole matrix that were masked until now:
    with the steps that were taken, and no momentum."""
    steps = next(iter(adam.state.values()))["step"]
    for part in fresh:
        adam.add_param_group({"params": [part.entries]})
        adam.state[part.entries] = {
            "step": steps.clone(),
            "exp_avg": torch.zeros_like(part.entries),
            "exp_avg_sq": torch.zeros_like(part.entries),
        }


def _step(
    lens: Lens,
    nodes: list[_Nodes],
    prompts: list[Prompt],
    labels: list[tuple[int, ...]] | None,
    path: dict[Key, Tensor],
    adam: torch.optim.Optimizer,
    factor: float,
) -> float:
    """One Adam step of a path's nodes on the answers, or other labels at their positions; returns
    the loss before it. Nodes that are not on the path move by momentum alone."""
    adam.zero_grad(set_to_none=False)
    with torch.enable_grad():
        added = {part.key: part.added(lens) for part in _joined(nodes)}
        loss = -lens.answer_logprobs(prompts, delta_hooks(lens, added), labels=labels).mean()
        if not torch.isfinite(loss):
            raise EditError("CTP's loss is not finite: lower lr.")
        (factor * loss).backward()
    for part in nodes:
        assert part.entries.grad is not None
        part.entries.grad.mul_(part.mask(path))
    adam.step()
    return loss.item()


@torch.no_grad()
def _said(lens: Lens, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """The model's tokens at the answer's positions before this edit, teacher forced on the new
    answer. In a row of edits, this model already holds the earlier ones (the released code takes
    all facts in one run, and asks the unedited model once)."""
    return [
        tuple(
            lens.logits_at(
                [p.row("answer")], [(0, at) for at in p.positions("answer")], last=[p.last]
            )
            .argmax(-1)
            .tolist()
        )
        for p in prompts
    ]
