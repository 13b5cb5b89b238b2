"""FT, FT-L, KNE: a few trainable numbers per weight, one trainer.

1. A method says which deltas exist and what is trainable in them: whole matrices (FT), some columns
   (KNE), some rows and columns (`ctp`), factors (`adapters`). All parameters of the model stay
   frozen: the forward pass runs with W + delta through hooks (`models.deltas`), so no weight is
   written and none has to be put back.
2. One Adam; the loss is the mean NLL of the new answers, teacher forced, or (FT) of every answer
   token at the prompt's last position; stop below `stop`.
3. The deltas at the end are the edit, kept as factors where they are factors.

Sources: FT, FT-L: the baseline of ROME's authors. KNE: its section 3."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from qv_lens.attribution.ensembles import neuron_ensemble
from qv_lens.editing.bounds import Count, Limit, NotNegative, Positive, Share
from qv_lens.editing.job import Deltas, Job
from qv_lens.errors import EditError, unknown
from qv_lens.facts.spans import Prompt
from qv_lens.models.deltas import Added, delta_hooks, zero_leaf, zeros_like_parameters
from qv_lens.models.lens import Lens, log_probs
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
                return -job.lens.answer_logprobs(
                    prompts, delta_hooks(job.lens, dict(leaves))
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
    """Neuronal ensembles: train only the n columns of a weight that `neuron_ensemble` finds, W_kne;
    dW is 0 beside them, and W' = W + alpha / sqrt(n) dW (KNE, Eq. 8-11).

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
        scale = {key: self.alpha / sqrt(len(index)) for key, index in chosen.items()}  # Eq. 11
        for key, index in chosen.items():
            weight = job.lens.parameter(*key)
            shape = (
                (weight.shape[0], len(index))
                if self.axis == "column"
                else (len(index), weight.shape[1])
            )
            leaves[key] = zero_leaf(weight, *shape)
            added[key] = added_to_some(leaves[key], index, weight.shape[1], self.axis, scale[key])
        train(job, list(leaves.values()), nll(job.lens, added), self.steps, self.lr, self.stop)
        return {
            key: scattered(job.lens, key, leaves[key], index, self.axis, scale[key])
            for key, index in chosen.items()
        }


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
    """The loss of a trainer: minus the mean log-probability per answer token, with the deltas."""
    return lambda prompts: -lens.answer_logprobs(prompts, delta_hooks(lens, added)).mean()


def last_token_loss(lens: Lens, prompts: Sequence[Prompt], hooks: list) -> Tensor:
    """FT's loss: minus the mean over prompts of the mean of log p(token | prompt), all tokens at
    the last position."""
    ends = [(i, p.last) for i, p in enumerate(prompts)]
    logp = log_probs(lens.logits_at([p.ids for p in prompts], ends, hooks))
    return -torch.stack([logp[i, list(p.answer)].mean() for i, p in enumerate(prompts)]).mean()


def added_to_some(
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


def scattered(lens: Lens, key: Key, leaf: Tensor, index: Tensor, axis: str, scale: float) -> Delta:
    """The same D as two factors, the leaf and a selection; whole where that is smaller."""
    shape = lens.parameter(*key).shape
    part = (scale * leaf).detach().double()
    if len(index) * sum(shape) > shape.numel():
        whole = part.new_zeros(shape)
        return Delta(whole.index_copy(1 if axis == "column" else 0, index, part))
    pick = part.new_zeros(len(index), shape[1 if axis == "column" else 0])
    pick[range(len(index)), index] = 1.0
    return Delta(part, pick) if axis == "column" else Delta(pick.T, part)
