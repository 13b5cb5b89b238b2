"""The exact sums on a CUDA GPU, fused: a tile of G = V U stays on the chip while all problems use
it.

1. A program owns `BLOCK_N` neurons and walks through the vocabulary in tiles of `BLOCK_V`.
2. For each tile it forms G in pieces of `BLOCK_D` (float32 from three TF32 products, `tf32x3`:
   plain TF32 rounds delta by 2^-10, which exactness does not allow).
3. For each problem it adds exp(log p + alpha G + beta b) to a running maximum and sum per neuron (a
   log-sum-exp that never sees all logits at once). G is neither written nor read again, so 64
   prompts cost one product.

`log_sums.log_sums` is the reference and the fallback; `TRITON_INTERPRET=1` runs this kernel on a CPU
(tests). Importing this module needs Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_N, BLOCK_V, BLOCK_D = 64, 128, 32


def log_sums(
    V: Float[Tensor, "neuron d_model"],
    U: Float[Tensor, "d_model d_vocab"],
    log_p: Float[Tensor, "base d_vocab"],
    of: Int[Tensor, " problem"],
    alpha: Float[Tensor, "problem neuron"],
    beta: Float[Tensor, "problem neuron"] | None = None,
    b: Float[Tensor, "base d_vocab"] | None = None,
) -> Float[Tensor, "problem neuron"]:
    """log sum_j p_j exp(alpha G_kj + beta b_j) of every pair, in float32."""
    neurons, d_model = V.shape
    V, U, log_p, alpha = V.contiguous(), U.contiguous(), log_p.contiguous(), alpha.contiguous()
    top, total = torch.full_like(alpha, -torch.inf), torch.zeros_like(alpha)
    second, offsets = (
        (alpha, log_p) if beta is None or b is None else (beta.contiguous(), b.contiguous())
    )
    fused: Any = _fused  # Triton's decorator hides its type
    fused[(-(-neurons // BLOCK_N),)](
        V,
        U,
        log_p,
        of.to(torch.int32),
        alpha,
        second,
        offsets,
        top,
        total,
        neurons,
        d_model,
        U.shape[1],
        len(alpha),
        beta is not None,
        BLOCK_N,
        BLOCK_V,
        BLOCK_D,
    )
    return top + total.log()


@triton.jit
def _fused(
    V,
    U,
    log_p,
    of,
    alpha,
    beta,
    b,
    top,
    total,
    neurons,
    d_model,
    d_vocab,
    problems,
    FULL: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    n_in = n < neurons
    for start in range(0, d_vocab, BV):
        j = start + tl.arange(0, BV)
        j_in = j < d_vocab
        G = tl.zeros((BN, BV), dtype=tl.float32)
        for at in range(0, d_model, BD):
            d = at + tl.arange(0, BD)
            d_in = d < d_model
            v = tl.load(
                V + n[:, None].to(tl.int64) * d_model + d[None, :],
                mask=n_in[:, None] & d_in[None, :],
                other=0.0,
            )
            u = tl.load(
                U + d[:, None].to(tl.int64) * d_vocab + j[None, :],
                mask=d_in[:, None] & j_in[None, :],
                other=0.0,
            )
            G += tl.dot(v, u, input_precision="tf32x3")
        for q in range(problems):
            base = tl.load(of + q).to(tl.int64)
            here = q * neurons + n
            a = tl.load(alpha + here, mask=n_in, other=0.0)
            x = (
                a[:, None] * G
                + tl.load(log_p + base * d_vocab + j, mask=j_in, other=-float("inf"))[None, :]
            )
            if FULL:
                s = tl.load(beta + here, mask=n_in, other=0.0)
                x += s[:, None] * tl.load(b + base * d_vocab + j, mask=j_in, other=0.0)[None, :]
            before = tl.load(top + here, mask=n_in, other=0.0)
            after = tl.maximum(before, tl.max(x, axis=1))
            sums = tl.load(total + here, mask=n_in, other=0.0) * tl.exp(before - after)
            sums += tl.sum(tl.exp(x - after[:, None]), axis=1)
            tl.store(top + here, after, mask=n_in)
            tl.store(total + here, sums, mask=n_in)
        tl.debug_barrier()  # the next tile's threads must see these stores
