"""FT, FT-L, KNE, CTP: a few trainable numbers per weight, one trainer. KN, which trains nothing.

1. A method says which deltas exist and what is trainable in them: whole matrices (FT), some columns
   (KNE), some rows and columns (CTP), factors (`adapters`). All parameters of the model stay
   frozen: the forward pass runs with W + delta through hooks (`models.deltas`), so no weight is
   written and none has to be put back.
2. One Adam; the loss is the mean NLL of the new answers, teacher forced, or (FT) of every answer
   token at the prompt's last position; stop below `stop`.
3. The deltas at the end are the edit, kept as factors where they are factors.

Sources: FT, FT-L: the baseline of ROME's authors. KNE: its section 3. CTP: its released code. KN:
Dai et al. 2022 and its authors' code, or EasyEdit's."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from qv_lens.attribution.gradients import (
    IGRule,
    answer_logprobs,
    greedy_tokens,
    integrated_gradients,
    neuron_ensemble,
    transmission_paths,
)
from qv_lens.editing.bounds import Count, Limit, Natural, NotNegative, Positive, Share
from qv_lens.editing.edit import Deltas, Job
from qv_lens.errors import EditError, unknown
from qv_lens.facts.records import UNKNOWN, EditRequest
from qv_lens.facts.spans import Prompt
from qv_lens.models.deltas import Added, delta_hooks, zero_leaf, zeros_like_parameters
from qv_lens.models.lens import Lens, log_probs
from qv_lens.models.norms import at_least_float32
from qv_lens.patch import Delta
from qv_lens.progress import progress_bar

Key = tuple[int, str]
Objective = Literal["last_token", "target_new"]


@dataclass(frozen=True, kw_only=True)
class FT:
    """Fine-tuning of one layer's W_out and b_out (the baseline of ROME's authors). Defaults:
    GPT-J's, unconstrained.

    `objective`: 'last_token' (as released: every token of the answer at the prompt's last
    position), 'target_new' (a language model's loss, FT-M).
    `clamp`: largest change of any entry (None: free)."""

    layer: int = 21
    """The layer that is written."""
    steps: Count = 25
    """Steps of training."""
    lr: Positive = 5e-4
    """Learning rate."""
    stop: NotNegative = 1e-2
    """Training ends below this loss (nats)."""
    objective: Objective = "last_token"
    """'last_token' (as released) or 'target_new' (a language model's loss, FT-M)."""
    clamp: Limit | None = None
    """Largest change of any entry (None: free)."""

    def deltas(self, job: Job) -> Deltas:
        return job.in_turn(self._trained)

    def _trained(self, job: Job) -> Deltas:
        if self.objective not in ("last_token", "target_new"):
            raise unknown(
                "Objective", self.objective, ("last_token", "target_new"), error=EditError
            )
        layer = job.lens.check_layer(self.layer)
        names = [
            (layer, "W_out"),
            *([(layer, "b_out")] if "b_out" in job.lens.parameter_names else []),
        ]
        leaves = zeros_like_parameters(job.lens, names)

        def loss(prompts: list[Prompt]) -> Tensor:
            if self.objective == "target_new":
                return -answer_logprobs(
                    job.lens, prompts, delta_hooks(job.lens, dict(leaves))
                ).mean()
            return last_token_loss(job.lens, prompts, delta_hooks(job.lens, dict(leaves)))

        def limit() -> None:
            if self.clamp is not None:
                for leaf in leaves.values():
                    leaf.data.clamp_(-self.clamp, self.clamp)

        train(job, list(leaves.values()), loss, self.steps, self.lr, self.stop, after=limit)
        return {key: Delta(leaf.detach().double()) for key, leaf in leaves.items()}


@dataclass(frozen=True, kw_only=True)
class FTL(FT):
    """FT-L: fine-tuning with every entry kept within `clamp` of the original. Defaults: GPT-J's, of
    ROME's authors."""

    layer: int = 0
    """The layer that is written."""
    clamp: Limit | None = 5e-5
    """Largest change of any entry."""


@dataclass(frozen=True, kw_only=True)
class KNE:
    """Neuronal ensembles: train only the columns that `neuron_ensemble` finds; W' = W + alpha /
    sqrt(n) dW.

    `share`: the ensemble's share of all columns of `parameters`. The paper gives no alpha, lr,
    steps or m (`steps_ig`): untuned. Several requests share one ensemble (mean attribution),
    located on the first `located` of them (None: all)."""

    share: Share = 0.01
    """The ensemble's share of all columns of `parameters`."""
    parameters: tuple[str, ...] = ("W_out",)
    """The weights that it is taken from."""
    axis: Literal["column", "row"] = "column"
    """Whether a neuron is a column or a row of a weight."""
    alpha: Positive = 1.0
    """alpha of the paper: scales dW / sqrt(n)."""
    steps: Count = 25
    """Steps of training."""
    lr: Positive = 5e-4
    """Learning rate."""
    stop: NotNegative = 1e-2
    """Training ends below this loss (nats)."""
    steps_ig: Count = 20
    """m of the paper: steps of integrated gradients."""
    together: bool = False
    """Whether integrated gradients scale all layers at once."""
    located: Count | None = None
    """On how many of the requests the ensemble is located (None: all)."""

    def deltas(self, job: Job) -> Deltas:
        return job.in_turn(self._trained)

    def _trained(self, job: Job) -> Deltas:
        ensemble = neuron_ensemble(
            job.lens,
            job.requests[: self.located],
            self.share,
            parameters=self.parameters,
            axis=self.axis,
            steps=self.steps_ig,
            together=self.together,
        )
        by_name = {"ffn": "W_out", **{f"{name.lower()}_column": name for name in self.parameters}}
        chosen: dict[Key, Tensor] = {}
        for (unit, layer), rows in ensemble.frame.groupby(["unit", "layer"]):
            chosen[int(layer), by_name[str(unit)]] = torch.tensor(
                sorted(rows["neuron"]), device=job.lens.device
            )
        job.notes["ensemble"] = {
            f"{layer}.{name}": len(index) for (layer, name), index in chosen.items()
        }
        leaves, added = {}, {}
        for key, index in chosen.items():
            weight = job.lens.parameter(*key)
            shape = (
                (weight.shape[0], len(index))
                if self.axis == "column"
                else (len(index), weight.shape[1])
            )
            leaves[key] = zero_leaf(weight, *shape)
            added[key] = _some(
                leaves[key], index, weight.shape[1], self.axis, self.alpha / sqrt(len(index))
            )
        train(job, list(leaves.values()), nll(job.lens, added), self.steps, self.lr, self.stop)
        return {
            key: _scattered(
                job.lens,
                key,
                leaves[key],
                chosen[key],
                self.axis,
                self.alpha / sqrt(len(chosen[key])),
            )
            for key in chosen
        }


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
    request uses `alone` = (lr, steps, stop) instead (untuned), since twelve steps of 1e-5 do
    nothing."""

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


@dataclass(frozen=True, kw_only=True)
class KN:
    """Knowledge neurons (Dai et al. 2022): rows of W_out with the largest attribution for the OLD
    answer are moved from its embedding towards the new answer's.

    `rule='paper'`: the attribution of the paper (`integrated_gradients`), and the move of the
    authors' code, row +=
    |row| (`lam_new` e_new - `lam_old` e_old), e the unit vector along an answer's mean embedding.
    `rule='easyedit'`: EasyEdit's attribution, -2 emb(what the model itself says) + emb(new); for a
    new answer of n > 1 tokens, -1 times each of n greedy tokens and +1 times each token of the
    new answer.
    `threshold`: share of the largest attribution that a neuron must exceed.
    Both moves are added to a row whatever the sign of its coefficient; in a gated FFN it is often
    negative, and the row then pushes towards the old answer.
    """

    rule: IGRule = "paper"
    """Whose attribution and move (see above)."""
    threshold: Share = 0.1
    """Share of the largest attribution that a neuron must exceed."""
    steps: Count = 20
    """Steps of integrated gradients."""
    lam_old: NotNegative = 1.0
    """How far a row moves from the old answer's embedding."""
    lam_new: NotNegative = 8.0
    """How far it moves to the new answer's."""

    def deltas(self, job: Job) -> Deltas:
        if self.rule not in ("paper", "easyedit"):
            raise unknown("KN's rule", self.rule, ("paper", "easyedit"), error=EditError)
        return job.in_turn(self._moved)

    def _moved(self, job: Job) -> Deltas:
        lens = job.lens
        rows: dict[int, dict[int, Tensor]] = {}
        for request in job.requests:
            if request.fact.answer == UNKNOWN:
                raise EditError(
                    f"KN moves away from the old answer, and that of {request.fact.text!r} is not "
                    "known. Give it, or choose another editor."
                )
            neurons = integrated_gradients(
                lens, request.fact, None, steps=self.steps, rule=self.rule
            ).frame
            strong = neurons[neurons["score"] > self.threshold * neurons["score"].max()]
            if strong.empty:
                raise EditError(
                    f"No neuron speaks for {request.fact.answer!r} after {request.fact.text!r}: no "
                    "attribution is above 0, so KN has nothing to write."
                )
            for layer, neuron in strong[["layer", "neuron"]].itertuples(index=False):
                table = rows.setdefault(int(layer), {})
                W_out = at_least_float32(lens.w_out(int(layer)))
                move = self._move(lens, request, W_out[int(neuron)])
                table[int(neuron)] = table.get(int(neuron), torch.zeros_like(move)) + move
        job.notes["neurons"] = {str(layer): sorted(table) for layer, table in rows.items()}
        out = {}
        for layer, table in rows.items():
            left = torch.zeros(lens.d_mlp, len(table), dtype=torch.float64, device=lens.device)
            left[list(table), range(len(table))] = 1.0
            out[layer, "W_out"] = Delta(left, torch.stack(list(table.values())).double())
        return out

    def _move(self, lens: Lens, request: EditRequest, row: Tensor) -> Tensor:
        """The vector added to one row."""
        embed = at_least_float32(lens.backend_adapter.embedding())
        new = list(lens.answer_ids(request.fact, request.new))
        if self.rule == "paper":
            old = list(lens.answer_ids(request.fact))
            e_old, e_new = (F.normalize(embed[ids].mean(0), dim=0) for ids in (old, new))
            return row.norm() * (self.lam_new * e_new - self.lam_old * e_old)
        said = greedy_tokens(lens, request.fact, len(new))
        return embed[new].sum(0) - (2.0 if len(new) == 1 else 1.0) * embed[said].sum(0)


# ------------------------------------------------------------------ the trainer


def train(
    job: Job,
    leaves: Sequence[Tensor],
    loss: Callable[[list[Prompt]], Tensor],
    steps: int,
    lr: float,
    stop: float,
    after: Callable[[], None] = lambda: None,
) -> None:
    """Adam on the leaves until the loss is below `stop`. Raises `EditError` if it is not finite."""
    prompts, adam, losses = (
        job.lens.tokenize([r.target for r in job.requests]),
        torch.optim.Adam(leaves, lr=lr),
        [],
    )
    for step in progress_bar(range(steps), of="fine-tuning", unit="step"):
        adam.zero_grad()
        with torch.enable_grad():
            value = loss(prompts)
        losses.append(value.item())
        if not torch.isfinite(value):
            raise EditError(f"The loss is not finite at step {step}: lower lr.")
        if losses[-1] < stop:
            break
        value.backward()
        adam.step()
        after()
    job.losses.append([[value] for value in losses])


def nll(lens: Lens, added: Mapping[Key, Added]) -> Callable[[list[Prompt]], Tensor]:
    return lambda prompts: -answer_logprobs(lens, prompts, delta_hooks(lens, added)).mean()


def last_token_loss(lens: Lens, prompts: Sequence[Prompt], hooks: list) -> Tensor:
    """FT's loss: minus the mean over prompts of the mean of log p(token | prompt), all tokens at
    the last position."""
    ends = [(i, p.last) for i, p in enumerate(prompts)]
    logp = log_probs(lens.logits_at([p.ids for p in prompts], ends, hooks))
    return -torch.stack([logp[i, list(p.answer)].mean() for i, p in enumerate(prompts)]).mean()


def _some(
    leaf: Tensor, index: Tensor, columns: int, axis: str, scale: float
) -> Callable[[Tensor], Tensor]:
    """x @ D where only some columns (or rows) of D are there."""

    def add(x: Tensor) -> Tensor:
        x = x.to(leaf.dtype)
        if axis == "row":
            return x[..., index] @ leaf * scale
        out = x.new_zeros(*x.shape[:-1], columns)
        return out.index_copy(-1, index, x @ leaf * scale)

    return add


def _scattered(lens: Lens, key: Key, leaf: Tensor, index: Tensor, axis: str, scale: float) -> Delta:
    """The same D as two factors, the leaf and a selection; whole where that is smaller."""
    shape = lens.parameter(*key).shape
    part = (scale * leaf).detach().double()
    if len(index) * sum(shape) > shape.numel():
        whole = part.new_zeros(shape)
        return Delta(whole.index_copy(1 if axis == "column" else 0, index, part))
    pick = part.new_zeros(len(index), shape[1 if axis == "column" else 0])
    pick[range(len(index)), index] = 1.0
    return Delta(part, pick) if axis == "column" else Delta(pick.T, part)


# ------------------------------------------------------------------ CTP's loop


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
        return _some(self.entries, self.index, weight.shape[1], self.axis, 1.0)

    def delta(self, lens: Lens) -> Delta:
        """D as it is written."""
        added = self.added(lens)
        if isinstance(added, Tensor):
            return Delta(added.detach().double())
        return _scattered(lens, self.key, self.entries, self.index, self.axis, 1.0)

    def mask(self, nodes: Mapping[Key, Tensor]) -> Tensor:
        """Which of the entries are some nodes'."""
        theirs = torch.isin(self.index, nodes[self.key])
        return theirs[:, None] if self.axis == "row" else theirs


def _joined(nodes: Sequence[_Nodes]) -> list[_Nodes]:
    """Every weight once."""
    parts = {key: [n for n in nodes if n.key == key] for key in sorted({n.key for n in nodes})}
    return [
        _Nodes(
            key,
            torch.cat([n.index for n in of]),
            torch.cat([n.entries for n in of], 0 if of[0].axis == "row" else -1),
        )
        for key, of in parts.items()
    ]


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
            asked = [prompts[b] for b in batch]
            loss = _step(lens, nodes, asked, None, plus, optimisers[0], 1.0)
            total += loss * len(batch)
            if editor.lam > 0 and editor.bottom > 0:
                before = [old_answers[b] for b in batch]
                _step(lens, nodes, asked, before, minus, optimisers[1], editor.lam)
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
        loss = -answer_logprobs(lens, prompts, delta_hooks(lens, added), labels).mean()
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
