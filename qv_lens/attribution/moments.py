"""log sum_j p_j exp(delta_j) of every neuron to a tolerance, without the logits of every neuron:
the likeliest tokens exactly, the others by moments.

delta_j = alpha G_kj with G = V U, as in `log_sums` (a frozen divisor).

1. Head: the tokens with the largest p |u / s|^2, and the longest u / s of all, are summed exactly,
   sum_head p_j (e^delta_j - 1); s as in `log_sums.Lengths`.
2. Tail, one base: sum_tail p_j (delta_j + delta_j^2 / 2) = alpha v.mu + alpha^2 v'Sv / 2, with
   mu = sum_tail p u and S = sum_tail p u u': one matrix for all neurons of a layer. What is left
   out is at most alpha^2 v'Sv rho e^rho / 6, with rho = |alpha| |s v| max_tail |u / s|.
3. Tail, several bases: the moments sum_tail p_j G_kj^r, r = 1..4, of all bases together as products
   of G, which all share. What is left out is at most alpha^4 E|G|^4 / 24 * y e^y / 5, with
   y = |alpha| max_tail |G|.
4. Pairs whose bound exceeds the tolerance are summed exactly.

The cheaper of 2 and 3 is taken: d^2 V / 2 for each base, or neurons d V once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qv_lens.attribution.log_sums import (
    CPU_TOKENS,
    Lengths,
    Problems,
    blocks,
    log_sums,
    tile_shape,
)
from qv_lens.errors import ConfigError

TOLERANCE = 1e-6
#: tokens of the head where a matrix holds the tail, and where products of G do
HEAD, HEAD_OF_MANY = 4096, 512
#: how many of them are the longest u / s, and not the likeliest
LONGEST = 256
#: S is symmetric: so many bands of it are formed from the diagonal on
BANDS = 4
#: the share of all multiplications that this leaves
SHARE = (BANDS + 1) / (2 * BANDS)


@dataclass(frozen=True)
class SeriesSums:
    """The sums, and which pairs had to be done exactly."""

    value: Float[Tensor, "problem neuron"]
    """log E_p[e^delta] of every pair."""
    fallback: Bool[Tensor, "problem neuron"]
    """Which pairs were done exactly."""


@dataclass(frozen=True)
class HeadAndTail:
    """The vocabulary split for every base distribution, and what the tail leaves to the neurons of
    a layer."""

    U: Float[Tensor, "d_model d_vocab"]
    """The unembedding, gain folded in."""
    head: Int[Tensor, "base head"]
    """The tokens that are summed exactly."""
    p_head: Float[Tensor, "base head"]
    """Their probabilities."""
    p_tail: Float[Tensor, "base d_vocab"]
    """The probabilities of all others; 0 for the head's."""
    longest: Int[Tensor, " some"]
    """Tokens that are in every base's head."""
    lengths: Lengths
    """How far a vector can move any logit."""
    S: Float[Tensor, "base d_model d_model"] | None
    """sum_tail p u u' of every base; None where products of G hold the tail."""

    @classmethod
    def of(
        cls,
        U: Float[Tensor, "d_model d_vocab"],
        log_p: Float[Tensor, "base d_vocab"],
        neurons: int,
        lengths: Lengths | None = None,
    ) -> HeadAndTail:
        """The split for a layer of so many neurons; `lengths`: those of U, where they are known
        already."""
        d_model, d_vocab = U.shape
        p = log_p.exp()
        p = p / p.sum(1, keepdim=True)
        by_matrix = len(p) * SHARE * d_model < neurons
        size = min(HEAD if by_matrix else HEAD_OF_MANY, d_vocab // 4)
        lengths = Lengths.of(U) if lengths is None else lengths
        longest = lengths.token.topk(min(LONGEST, size)).indices
        weight = p * lengths.token.square()
        weight[:, longest] = torch.inf
        head = weight.topk(size, dim=1).indices
        p_tail = p.scatter(1, head, 0.0)
        S = torch.stack([second_moment(U, row) for row in p_tail]) if by_matrix else None
        return cls(U, head, p.gather(1, head), p_tail, longest, lengths, S)


def second_moment(
    U: Float[Tensor, "d_model d_vocab"], p: Float[Tensor, " d_vocab"]
) -> Float[Tensor, "d_model d_model"]:
    """sum_j p_j u_j u_j', band by band from the diagonal on."""
    d_model, d_vocab = U.shape
    S = U.new_zeros(d_model, d_model)
    bands = torch.arange(d_model, device=U.device).chunk(BANDS)
    for tokens in blocks(d_vocab, CPU_TOKENS):
        W = U.T[tokens] * p[tokens].sqrt()[:, None]
        for band in bands:
            first, end = int(band[0]), int(band[-1]) + 1
            S[first:end, first:].addmm_(W[:, first:end].T, W[:, first:])
    upper = S.triu()
    return upper + upper.triu(1).T


def log_sums_by_moments(
    V: Float[Tensor, "neuron d_model"],
    task: Problems,
    split: HeadAndTail | None = None,
    budget: int | None = None,
    tolerance: float = TOLERANCE,
) -> SeriesSums:
    """`log_sums` to `tolerance` (beside rounding), exact where the bound of what is left out
    exceeds it. `split`: the vocabulary's, where several calls share it.

    Frozen divisor only. Raises `ConfigError` otherwise.
    """
    if task.beta is not None:
        raise ConfigError(
            "method='moments' expands in the coefficient alone: it needs norm='frozen' or 'none'."
        )
    split = HeadAndTail.of(task.U, task.log_p, len(V)) if split is None else split
    shape = tile_shape(task.U, budget)
    if split.S is None:
        tail, error = _by_products(V, task, split, shape)
    else:
        tail, error = _by_matrix(V, task, split)
    series = _heads(V, task, split, shape[0]) + tail
    error = error / (1 + series)
    fallback = ~((error >= 0) & (error < tolerance))  # NaN and infinity too
    value = torch.log1p(series.clamp_min(-0.999))
    if fallback.any():
        value = torch.where(fallback, log_sums(V, task, budget, fallback), value)
    return SeriesSums(value, fallback)


def _heads(
    V: Float[Tensor, "neuron d_model"], task: Problems, split: HeadAndTail, together: int
) -> Float[Tensor, "problem neuron"]:
    """sum_head p (e^delta - 1) of every pair, so many neurons together."""
    sums = torch.empty_like(task.alpha)
    columns = split.U.T
    for base, (head, p) in enumerate(zip(split.head, split.p_head, strict=True)):
        problems = (task.of == base).nonzero()[:, 0]
        u = columns[head]
        for neurons in blocks(len(V), together):
            G = V[neurons] @ u.T
            for q in problems.tolist():
                delta = G * task.alpha[q, neurons, None]
                sums[q, neurons] = torch.mv(delta.expm1_(), p)
    return sums


def _by_matrix(
    V: Float[Tensor, "neuron d_model"], task: Problems, split: HeadAndTail
) -> tuple[Float[Tensor, "problem neuron"], Float[Tensor, "problem neuron"]]:
    """The tail to second order, from S; and the bound of what is left out."""
    assert split.S is not None
    tail, error = torch.empty_like(task.alpha), torch.empty_like(task.alpha)
    length = split.lengths.vector(V)
    for base, (S, p) in enumerate(zip(split.S, split.p_tail, strict=True)):
        first = V @ (split.U @ p)
        second = ((V @ S) * V).sum(1).clamp_min(0)
        longest = (split.lengths.token * (p > 0)).max()
        for q in (task.of == base).nonzero()[:, 0].tolist():
            alpha = task.alpha[q]
            moment = alpha.square() * second
            rho = alpha.abs() * length * longest
            tail[q] = alpha * first + moment / 2
            error[q] = moment * rho * rho.exp() / 6
    return tail, error


def _by_products(
    V: Float[Tensor, "neuron d_model"], task: Problems, split: HeadAndTail, shape: tuple[int, int]
) -> tuple[Float[Tensor, "problem neuron"], Float[Tensor, "problem neuron"]]:
    """The tail to fourth order, from powers of G in blocks of a shape (neurons, tokens); and the
    bound of what is left out."""
    d_vocab = split.U.shape[1]
    moments = V.new_zeros(4, len(split.p_tail), len(V))
    largest = V.new_zeros(len(V))
    beside = torch.ones(d_vocab, dtype=V.dtype, device=V.device)
    beside[split.longest] = 0.0
    for tokens in blocks(d_vocab, shape[1]):
        u, p = split.U[:, tokens] * beside[tokens], split.p_tail[:, tokens]
        for neurons in blocks(len(V), shape[0]):
            G = V[neurons] @ u
            low, high = G.aminmax(dim=1)
            largest[neurons] = torch.maximum(largest[neurons], torch.maximum(high, -low))
            power = G.clone()
            for order in range(4):
                moments[order, :, neurons] += p @ power.T
                if order < 3:
                    power *= G
    alpha, tail = task.alpha, torch.zeros_like(task.alpha)
    term = torch.ones_like(alpha)
    for order, moment in enumerate(moments, 1):
        term = term * alpha / order
        tail += term * moment[task.of]
    y = alpha.abs() * largest
    error = (term * moments[3][task.of]).abs() * y * y.exp() / 5
    return tail, error
