"""LoRA and AdaLoRA: low-rank factors beside the weights, trained (`fine_tuning.train`) and merged at
the end.

1. W + A diag(E) B, dropout on the input; E is alpha / rank in LoRA, trained in AdaLoRA. LoRA's A
   starts uniform within 1/sqrt(inputs), B at 0, as PEFT's do.
2. AdaLoRA: after every step PEFT's `RankAllocator` scores the singular values E by |parameter x
   gradient|, smoothed, and silences the lowest: from `init_rank` down to `rank` on average over the
   weights by a cubic schedule.

Sources: LoRA: Hu et al. 2022; AdaLoRA: Zhang et al. 2023, PEFT 0.21; EasyEdit's settings.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from qv_lens.editing.bounds import Count, Dropped, NotNegative, Positive
from qv_lens.editing.fine_tuning import Key, nll, train
from qv_lens.editing.job import Deltas, Job
from qv_lens.editing.layer_by_layer import weights_of
from qv_lens.errors import EditError
from qv_lens.facts.spans import Prompt
from qv_lens.models.lens import Lens
from qv_lens.patch import Delta


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters on the FFN of every layer, merged at the end. Defaults: EasyEdit's."""

    layers: tuple[int, ...] | None = None
    """The layers that are adapted (None: all)."""
    parameters: tuple[str, ...] = ("W_in", "W_out")
    """The weights that are adapted."""
    rank: Count = 8
    """Rank of what is added."""
    alpha: Positive = 32.0
    """Scales what is added, by alpha / rank."""
    dropout: Dropped = 0.1
    """Share of inputs dropped in training."""
    steps: Count = 50
    """Steps of training."""
    lr: Positive = 5e-3
    """Learning rate."""
    stop: NotNegative = 0.0
    """Training ends below this loss (nats)."""

    def deltas(self, job: Job) -> Deltas:
        return job.in_turn(self._trained)

    def _trained(self, job: Job) -> Deltas:
        lens = job.lens
        generator = torch.Generator().manual_seed(job.seed)  # the CPU's: a GPU draws others
        factors: dict[Key, tuple[Tensor, Tensor]] = {}
        for key in self._keys(lens):
            rows, columns = lens.parameter(*key).shape
            uniform = torch.rand(rows, self.rank, generator=generator).to(lens.device)
            A = ((2 * uniform - 1) / sqrt(rows)).requires_grad_(True)
            B = torch.zeros(self.rank, columns, device=lens.device, requires_grad=True)
            factors[key] = (A, B)
        scale = self.alpha / self.rank
        added = {key: self._added(generator, A, B, scale) for key, (A, B) in factors.items()}
        leaves = [leaf for pair in factors.values() for leaf in pair]
        train(job, leaves, nll(lens, added), self.steps, self.lr, self.stop)
        return {
            key: Delta((scale * A).detach().double(), B.detach().double())
            for key, (A, B) in factors.items()
        }

    def _keys(self, lens: Lens) -> list[Key]:
        layers = range(lens.n_layers) if self.layers is None else self.layers
        return weights_of(lens, layers, self.parameters)

    def _added(
        self, generator: torch.Generator, A: Tensor, B: Tensor, scale: Tensor | float
    ) -> Callable[[Tensor], Tensor]:
        """x -> dropout(x) A scale B."""

        def add(x: Tensor) -> Tensor:
            x = x.to(A.dtype)
            if self.dropout:
                kept = torch.rand(x.shape, generator=generator) >= self.dropout
                x = x * (kept.to(x.device) / (1 - self.dropout))
            return (x @ A * scale) @ B

        return add


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(LoRA):
    """Adapters P diag(E) Q of `init_rank`, pruned to `rank` on average. Needs `pip install
    'qv_lens[lora]'`.

    Defaults: alpha, dropout, lr, steps and modules are EasyEdit's, all others PEFT's. Pruning
    follows the paper; EasyEdit's release never prunes (it does not call the allocator). The loss is
    the NLL plus `orth` times the mean of ||P^T P - I|| and ||Q Q^T - I||; there is no early stop,
    because the schedule needs all `steps`."""

    init_rank: Count = 12
    """Rank before pruning."""
    orth: NotNegative = 0.5
    """Weight of the orthogonality of P and Q in the loss."""

    def deltas(self, job: Job) -> Deltas:
        """P diag(E) Q of every weight, trained and pruned."""
        if not 0 < self.rank < self.init_rank or self.steps < 2 or self.stop > 0:
            raise EditError(
                "AdaLoRA prunes from init_rank to a smaller rank over at least two steps, without "
                f"an early stop: got init_rank={self.init_rank}, rank={self.rank}, "
                f"steps={self.steps}, stop={self.stop}."
            )
        return job.in_turn(self._trained)

    def _trained(self, job: Job) -> Deltas:
        lens = job.lens
        generator = torch.Generator().manual_seed(job.seed)  # the CPU's: a GPU draws others
        adapters = {key: self._adapter(lens, key, generator) for key in self._keys(lens)}
        model = _named(adapters)
        allocator = self._allocator(model)
        step = itertools.count(1)

        def loss(prompts: list[Prompt]) -> Tensor:
            added = {}
            distances = []
            for key, adapter in adapters.items():
                A, E, B = self._factors(adapter)
                added[key] = self._added(generator, A, B, E)
                distances += [_from_orthogonal(A.T @ A), _from_orthogonal(B @ B.T)]
            return nll(lens, added)(prompts) + self.orth * torch.stack(distances).mean()

        def prune() -> None:
            allocator.update_and_allocate(model, next(step))

        train(job, list(model.parameters()), loss, self.steps, self.lr, self.stop, after=prune)
        deltas: Deltas = {}
        ranks = {}
        for (layer, name), adapter in adapters.items():
            A, E, B = self._factors(adapter)
            deltas[layer, name] = Delta((A * E).detach().double(), B.detach().double())
            ranks[f"{layer}.{name}"] = int((E != 0).sum())
        job.notes["ranks"] = ranks
        return deltas

    def _adapter(self, lens: Lens, key: Key, generator: torch.Generator) -> dict[str, Tensor]:
        """The trainable factors of one weight, named as PEFT names them; E starts at 0."""
        rows, columns = lens.parameter(*key).shape
        device = lens.device
        A = 0.02 * torch.randn((self.init_rank, rows), generator=generator).to(device)
        B = 0.02 * torch.randn((columns, self.init_rank), generator=generator).to(device)
        E = torch.zeros(self.init_rank, 1, device=device)
        return {
            "lora_A": torch.nn.Parameter(A),
            "lora_B": torch.nn.Parameter(B),
            "lora_E": torch.nn.Parameter(E),
        }

    def _factors(self, adapter: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """P, the scaled diagonal of E, and Q."""
        scale = self.alpha / (self.init_rank + 1e-5)
        return adapter["lora_A"].T, scale * adapter["lora_E"][:, 0], adapter["lora_B"].T

    def _allocator(self, model: torch.nn.Module) -> Any:
        """PEFT's `RankAllocator`. Raises `EditError` where PEFT is not installed."""
        try:
            from peft import AdaLoraConfig
            from peft.tuners.adalora.layer import RankAllocator
        except ImportError as error:
            raise EditError("AdaLoRA needs PEFT: pip install 'qv_lens[lora]'.") from error
        config = AdaLoraConfig(
            target_r=self.rank,
            init_r=self.init_rank,
            total_step=self.steps,
            lora_alpha=int(self.alpha),
        )
        return RankAllocator(model, config, "qv")


def _named(adapters: Mapping[Key, dict[str, Tensor]]) -> torch.nn.ModuleDict:
    """All factors as one module; the allocator finds them by names like "W_out_3_lora_A.qv"."""
    model = torch.nn.ModuleDict()
    for (layer, name), adapter in adapters.items():
        for part, leaf in adapter.items():
            model[f"{name}_{layer}_{part}"] = torch.nn.ParameterDict({"qv": leaf})
    return model


def _from_orthogonal(gram: Tensor) -> Tensor:
    """||P^T P - I||."""
    return (gram - torch.eye(len(gram), device=gram.device)).norm()
