"""How much each of many vectors raises log p(token), for many prompts at once: the numerics behind
every score.

For neuron k and problem q (a prompt, with base distribution p and coefficient m_qk) the logits move
by

    delta_j = alpha G_kj + beta b_j,   G = V U (one product for all problems),   alpha = m / sigma_k,
    beta = 1/sigma_k - 1/sigma_0 (zero unless the final norm is recomputed for every vector),

and I = delta_t - log sum_j p_j exp(delta_j).

1. `log_sums`      the second term exactly: tiles of G; per problem one exp in place and one matrix-vector product, or
                   on a CUDA GPU the fused kernel (`kernel.py`), which keeps G on the chip.
2. `log_sums_by_moments`  the same by a Taylor series in alpha: with a centre g_k that no prompt decides (the mean of
                   G_kj over the vocabulary),
                   E_p[e^{alpha G}] = e^{alpha g} sum_r alpha^r / r! * (p @ (G - g)^r): products with p for all
                   problems together. The remainder is bounded by alpha^order E_p[|G - g|^order] * |alpha| rho
                   e^{|alpha| rho} / (order + 1)!, rho = max_j |G_kj - g_k|; pairs above the tolerance are done exactly.
3. `bounds`        Jensen: I <= J = delta_t - E_p[delta], from two matrix-vector products per problem.

Where the logits are soft-capped (c tanh(z / c)), delta_j is what the cap leaves of it; then only
`log_sums` holds.

Nothing of the size problems x neurons x vocabulary is ever held; `tile_rows` sizes the tiles.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qv_lens.errors import ConfigError

#: entries of a tile [neuron, vocabulary]: on a CPU what stays in its cache, on a GPU what keeps it
#: busy
CPU_TILE, GPU_TILE = 1 << 20, 1 << 28
#: up to this spread of delta over the vocabulary (and this size of delta), exp and the sum need no
#: shift in float32
SAFE = 50.0


@dataclass(frozen=True)
class Problems:
    """What every neuron is scored for. `of` says which base distribution a problem starts from,
    `sigma_0` its divisor; `z` are the base's logits before the soft `cap`, where there is one."""

    U: Float[Tensor, "d_model d_vocab"]
    """The unembedding, gain folded in."""
    log_p: Float[Tensor, "base d_vocab"]
    """The base distributions."""
    of: Int[Tensor, " problem"]
    """Which base a problem starts from."""
    alpha: Float[Tensor, "problem neuron"]
    """m / sigma of every pair."""
    beta: Float[Tensor, "problem neuron"] | None = None
    """1/sigma_k - 1/sigma_0, where the norm is recomputed."""
    b: Float[Tensor, "base d_vocab"] | None = None
    """The base's centred stream through U, there."""
    sigma_0: Float[Tensor, "problem 1"] | None = None
    """The base's divisor, there."""
    cap: float | None = None
    """The soft cap of the logits."""
    z: Float[Tensor, "base d_vocab"] | None = None
    """The base's logits before it."""

    def of_neurons(self, some: Int[Tensor, " some"]) -> Problems:
        """The same problems for some of the neurons."""
        return replace(
            self, alpha=self.alpha[:, some], beta=None if self.beta is None else self.beta[:, some]
        )

    def reach(self, V: Float[Tensor, "neuron d_model"]) -> Float[Tensor, "problem neuron"]:
        """Twice an upper bound of |delta_j|: a bound of delta's spread over the vocabulary
        (Cauchy-Schwarz, no G)."""
        bound = self.alpha.abs() * (V.norm(dim=1) * self.U.norm(dim=0).max())
        if self.beta is not None and self.b is not None:
            bound = bound + self.beta.abs() * self.b.abs().amax(1)[self.of][:, None]
        return 2 * bound

    def delta(
        self, V: Float[Tensor, "neuron d_model"], token: Int[Tensor, " base"]
    ) -> Float[Tensor, "problem neuron"]:
        """delta at one token of each problem."""
        wanted = self.alpha * (V @ self.U[:, token]).T[self.of]
        if self.beta is not None and self.b is not None:
            wanted = wanted + self.beta * self.b.gather(1, token[:, None])[self.of]
        return (
            wanted
            if self.z is None
            else self.capped(wanted, self.z.gather(1, token[:, None])[self.of])
        )

    def capped(self, delta: Tensor, z: Tensor) -> Tensor:
        """What the soft cap leaves of a move of the logits z."""
        assert self.cap is not None
        return self.cap * (torch.tanh((z + delta) / self.cap) - torch.tanh(z / self.cap))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device: for a CPU, the free memory that the system reports (all
    memory where it reports none)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def tile_rows(U: Tensor, budget: int | None = None) -> int:
    """Neurons per tile such that its two buffers [neuron, vocabulary] fit `budget` bytes (default:
    half of what is free).

    Raises `ConfigError` for a budget below one row.
    """
    row = 2 * U.shape[1] * U.element_size()
    allowed = free_memory(U.device) // 2 if budget is None else budget
    if allowed < row:
        raise ConfigError(
            f"memory_budget={allowed} bytes is less than one neuron's logits take ({row} bytes). "
            "Give more, or None for half of what is free."
        )
    preferred = (GPU_TILE if U.is_cuda else CPU_TILE) // U.shape[1]
    return max(1, min(preferred, allowed // row))


def log_sums(
    V: Float[Tensor, "neuron d_model"],
    task: Problems,
    budget: int | None = None,
    wanted: Bool[Tensor, "problem neuron"] | None = None,
) -> Float[Tensor, "problem neuron"]:
    """log sum_j p_j exp(delta_j) of every pair, or of the `wanted` ones (the others stay 0)."""
    if wanted is not None and not wanted.any(0).all():  # only the neurons that somebody wants
        some = wanted.any(0).nonzero()[:, 0]
        out = torch.zeros_like(task.alpha)
        if len(some):
            out[:, some] = log_sums(V[some], task.of_neurons(some), budget, wanted[:, some])
        return out
    rows = tile_rows(task.U, budget)
    if (
        wanted is None
        and task.cap is None
        and V.is_cuda
        and V.dtype == torch.float32
        and importlib.util.find_spec("triton")
    ):
        from qv_lens.attribution import kernel

        return kernel.log_sums(V, task.U, task.log_p, task.of, task.alpha, task.beta, task.b)
    out = torch.zeros_like(task.alpha)
    p = task.log_p.exp()
    sums = _Sums(
        task,
        p,
        torch.mv(p, p.new_ones(p.shape[1])),
        V.new_empty(min(rows, len(V)), task.U.shape[1]),
        task.reach(V),
    )
    for i in range(0, len(V), rows):
        tile = slice(i, i + rows)
        sums.add(V[tile] @ task.U, tile, None if wanted is None else wanted[:, tile], out)
    return out


@dataclass(frozen=True)
class _Sums:
    """The exact sums of one tile after another, through one buffer."""

    task: Problems
    p: Float[Tensor, "base d_vocab"]
    whole: Float[Tensor, " base"]  # sum of p, 1 but for rounding: the same rounding as in the sums
    buffer: Float[Tensor, "tile d_vocab"]
    reach: Float[Tensor, "problem neuron"]

    def add(
        self, G: Float[Tensor, "tile d_vocab"], tile: slice, wanted: Tensor | None, out: Tensor
    ) -> None:
        for q, base in enumerate(self.task.of.tolist()):
            keep = slice(None) if wanted is None else wanted[q].nonzero()[:, 0]
            part = G[keep]
            if not len(part):
                continue
            alpha = self.task.alpha[q, tile][keep]
            delta = torch.mul(part, alpha[:, None], out=self.buffer[: len(part)])
            if self.task.beta is not None and self.task.b is not None:
                delta.addcmul_(self.task.beta[q, tile][keep][:, None], self.task.b[base][None])
            if self.task.z is not None:
                delta = self.task.capped(delta, self.task.z[base])
            if float(self.reach[q, tile][keep].max()) < SAFE or _spread(delta) < SAFE:
                value = (torch.mv(delta.exp_(), self.p[base]) / self.whole[base]).log_()
            else:
                value = torch.logsumexp(delta.add_(self.task.log_p[base]), dim=1)
            out[q, tile][keep] = value


def _spread(delta: Tensor) -> float:
    """The largest size of delta, and its range: what exp in float32 has to bear without a shift."""
    low, high = delta.aminmax()
    return float(max(high, -low, high - low))


@dataclass(frozen=True)
class SeriesSums:
    """Result of `log_sums_by_moments`: the sums, and which pairs had to be done exactly."""

    value: Float[Tensor, "problem neuron"]
    """log E_p[e^delta] of every pair."""
    fallback: Bool[Tensor, "problem neuron"]
    """Which pairs were done exactly."""


def log_sums_by_moments(
    V: Float[Tensor, "neuron d_model"],
    task: Problems,
    budget: int | None = None,
    order: int = 4,
    tolerance: float = 1e-6,
) -> SeriesSums:
    """`log_sums` to `tolerance`, by moments of G under p up to an even `order`; exact where the
    error bound exceeds `tolerance`.

    Frozen divisor only. Raises `ConfigError` otherwise, or for an odd order.
    """
    if task.beta is not None:
        raise ConfigError(
            "method='moments' expands in the coefficient alone: it needs norm='frozen' or 'none'."
        )
    if order < 2 or order % 2:
        raise ConfigError(f"The order of the moments must be even and at least 2, got {order}.")
    rows = tile_rows(task.U, budget)
    value, error = torch.empty_like(task.alpha), torch.empty_like(task.alpha)
    p = task.log_p.exp()
    p = p / p.sum(1, keepdim=True)
    for i in range(0, len(V), rows):
        tile = slice(i, i + rows)
        G = V[tile] @ task.U
        g = G.mean(1)
        G -= g[:, None]
        low, high = G.aminmax(dim=1)
        rho = torch.maximum(high, -low)
        power, alpha = G.clone(), task.alpha[:, tile]
        term, series = alpha.clone(), torch.zeros_like(alpha)
        for r in range(1, order + 1):
            moment = (power @ p.T).T[task.of]
            series += term * moment
            if r < order:
                power *= G
                term = term * alpha / (r + 1)
            else:  # the last moment is even: E|G - g|^order itself
                y = alpha.abs() * rho
                error[:, tile] = (term * moment).abs() * y / (order + 1) * y.exp()
        value[:, tile] = torch.log1p(series.clamp_min(-0.999)) + alpha * g
    fallback = ~(error < tolerance) | (error.isnan())
    if fallback.any():
        value = torch.where(fallback, log_sums(V, task, budget, fallback), value)
    return SeriesSums(value, fallback)


def bounds(V: Float[Tensor, "neuron d_model"], task: Problems) -> Float[Tensor, "problem neuron"]:
    """E_p[delta] <= log sum_j p_j exp(delta_j), of every pair, without G."""
    p = task.log_p.exp()
    mean = task.alpha * (V @ (p @ task.U.T).T).T[task.of]
    if task.beta is None or task.b is None:
        return mean
    return mean + task.beta * (p * task.b).sum(1)[task.of][:, None]
