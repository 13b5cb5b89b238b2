"""How much each of many vectors raises log p(token), for many prompts at once: the numerics behind
every score.

For neuron k and problem q (a prompt, with base distribution p and coefficient m_qk) the logits move
by

    delta_j = alpha G_kj + beta b_j,   G = V U (one product for all problems),   alpha = m / sigma_k,
    beta = 1/sigma_k - 1/sigma_0 (zero unless the final norm is recomputed for every vector),

and I = delta_t - log sum_j p_j exp(delta_j).

1. `log_sums`   the second term exactly: G in blocks of neurons and tokens that a cache holds; per
                problem one exp in place and one matrix-vector product, or on a CUDA GPU the fused
                kernel (`kernel.py`), which keeps G on the chip.
2. `bounds`     Jensen: I <= J = delta_t - E_p[delta], from two matrix-vector products per problem.

`moments` has the second term to a tolerance, from fewer products.

Where the logits are soft-capped (c tanh(z / c)), delta_j is what the cap leaves of it; then only
`log_sums` holds.

Nothing of the size problems x neurons x vocabulary is ever held; `tile_shape` sizes the blocks.
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
#: tokens of a block on a CPU
CPU_TOKENS = 4096
#: up to this spread of delta over the vocabulary (and this size of delta), exp and the sum need no
#: shift in float32
SAFE = 50.0
#: log sum below which it is taken by log-sum-exp
LOW = -0.7


@dataclass(frozen=True)
class Lengths:
    """How far a vector can move any logit: |v.u_j| <= |s v| |u_j / s| (Cauchy-Schwarz).

    s is the root mean square of U's rows. A gain may make a few coordinates of every u large that
    the neurons hardly write to: with s = 1 the bound is then 50 times what is reached (Gemma 3), with
    this s 5 to 8 times, as where the gain is even."""

    scale: Float[Tensor, " d_model"]
    """s of every coordinate."""
    token: Float[Tensor, " d_vocab"]
    """|u / s| of every token."""

    @classmethod
    def of(cls, U: Float[Tensor, "d_model d_vocab"]) -> Lengths:
        s = U.norm(dim=1) / U.shape[1] ** 0.5
        s = torch.where(s > 0, s, 1.0)  # nothing is read there
        # in blocks: with a real vocabulary a copy of U is half a GB
        places = blocks(U.shape[1], CPU_TOKENS)
        square = torch.cat([U[:, some].square().T @ s.pow(-2) for some in places])
        return cls(s, square.sqrt())

    def vector(self, V: Float[Tensor, "neuron d_model"]) -> Float[Tensor, " neuron"]:
        """|s v| of every vector."""
        return (V * self.scale).norm(dim=1)


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
    lengths: Lengths | None = None
    """Those of U, where they are known already."""
    mean: Float[Tensor, "base d_model"] | None = None
    """E_p[u], where it is known already."""

    def of_neurons(self, some: Int[Tensor, " some"]) -> Problems:
        """The same problems for some of the neurons."""
        return replace(
            self, alpha=self.alpha[:, some], beta=None if self.beta is None else self.beta[:, some]
        )

    def reach(self, V: Float[Tensor, "neuron d_model"]) -> Float[Tensor, "problem neuron"]:
        """Twice an upper bound of |delta_j|: a bound of delta's spread over the vocabulary (no
        G)."""
        lengths = Lengths.of(self.U) if self.lengths is None else self.lengths
        bound = self.alpha.abs() * (lengths.vector(V) * lengths.token.max())
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


def tile_shape(U: Tensor, budget: int | None = None) -> tuple[int, int]:
    """Neurons and tokens of a block of G, whose two buffers fit `budget` bytes: on a CPU what its
    cache holds, on a GPU all tokens. Raises as `tile_rows`."""
    rows = tile_rows(U, budget)
    if U.is_cuda:
        return rows, U.shape[1]
    tokens = min(CPU_TOKENS, U.shape[1])
    room = CPU_TILE if budget is None else budget // (2 * U.element_size())
    return max(1, min(CPU_TILE, room) // tokens), tokens


def blocks(size: int, width: int) -> list[slice]:
    """The places from 0 to `size`, `width` at a time."""
    return [slice(i, min(i + width, size)) for i in range(0, size, width)]


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
    shape = tile_shape(task.U, budget)
    if (
        wanted is None
        and task.cap is None
        and V.is_cuda
        and V.dtype == torch.float32
        and importlib.util.find_spec("triton")
    ):
        from qv_lens.attribution import kernel

        sums = kernel.log_sums(V, task.U, task.log_p, task.of, task.alpha, task.beta, task.b)
        return sums - mass(task.log_p).log()[task.of][:, None]
    far = (task.reach(V) >= SAFE).any(0)
    out = torch.zeros_like(task.alpha)
    for shifted in (False, True):
        some = (far == shifted).nonzero()[:, 0]
        if len(some):
            each = None if wanted is None else wanted[:, some]
            out[:, some] = _sums(V[some], task.of_neurons(some), shape, shifted, each)
    # 1 + x loses digits where x is near -1
    low = ~far & (out < LOW)
    if low.any():
        out = torch.where(low, _sums(V, task, shape, True, low), out)
    return out


def mass(log_p: Float[Tensor, "base d_vocab"]) -> Float[Tensor, " base"]:
    """sum_j p_j: 1, but for the rounding of log p, which every sum over tokens shares."""
    return log_p.double().exp().sum(1).to(log_p)


def _sums(
    V: Float[Tensor, "neuron d_model"],
    task: Problems,
    shape: tuple[int, int],
    shifted: bool,
    wanted: Bool[Tensor, "problem neuron"] | None,
) -> Float[Tensor, "problem neuron"]:
    """The exact sums, block by block; `shifted`: by log-sum-exp, which any delta bears."""
    neurons, tokens = blocks(len(V), shape[0]), blocks(task.U.shape[1], shape[1])
    of = list(enumerate(task.of.tolist()))
    p = task.log_p.exp()
    total = torch.full_like(task.alpha, -torch.inf if shifted else 0.0)
    buffer = V.new_empty(min(shape[0], len(V)), shape[1])
    for columns in tokens:
        u = task.U[:, columns]
        for rows in neurons:
            G = V[rows] @ u
            for q, base in of:
                keep = slice(None) if wanted is None else wanted[q, rows].nonzero()[:, 0]
                delta = _delta(G[keep], task, q, base, rows, keep, columns, buffer)
                if shifted:
                    new = torch.logsumexp(delta.add_(task.log_p[base, columns]), dim=1)
                    total[q, rows][keep] = torch.logaddexp(total[q, rows][keep], new)
                else:  # e^delta - 1: the sum of e^delta would round at 1, where scores are millionths
                    total[q, rows][keep] += torch.mv(delta.exp_().sub_(1), p[base, columns])
    whole = mass(task.log_p)[task.of][:, None]
    total = total - whole.log() if shifted else (total / whole).log1p_()
    return total if wanted is None else total.masked_fill(~wanted, 0.0)


def _delta(
    G: Float[Tensor, "some token"],
    task: Problems,
    problem: int,
    base: int,
    rows: slice,
    keep: Tensor | slice,
    columns: slice,
    buffer: Float[Tensor, "tile token"],
) -> Float[Tensor, "some token"]:
    """How a block's logits move for one problem, which starts from `base`."""
    out = buffer[: len(G), : G.shape[1]]
    delta = torch.mul(G, task.alpha[problem, rows][keep][:, None], out=out)
    if task.beta is not None and task.b is not None:
        delta.addcmul_(task.beta[problem, rows][keep][:, None], task.b[base, columns][None])
    return delta if task.z is None else task.capped(delta, task.z[base, columns])


def bounds(V: Float[Tensor, "neuron d_model"], task: Problems) -> Float[Tensor, "problem neuron"]:
    """E_p[delta] <= log sum_j p_j exp(delta_j), of every pair, without G."""
    u = task.log_p.exp() @ task.U.T if task.mean is None else task.mean
    mean = task.alpha * (V @ u.T).T[task.of]
    if task.beta is None or task.b is None:
        return mean
    return mean + task.beta * (task.log_p.exp() * task.b).sum(1)[task.of][:, None]
