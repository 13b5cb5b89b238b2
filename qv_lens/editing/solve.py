"""The closed form that every locate-then-edit method shares (ACE, Eq. 11-12; MEMIT), as pure linear algebra.

Preserve W K0 while writing W K = V:  dW_out = (eps * C0 + K K^T)^-1 K R^T,  with R = V - W K  per fact.
By the push-through identity, with metric = C0^-1 and Y = C0^-1 K,

    dW_out = Y (K_read^T Y + eps * I_n)^-1 R^T,

which needs one Cholesky factor of C0 for all edits and all eps, and an n x n system per batch. Everything in float64;
no inverse is formed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.errors import EditError
from qv_lens.patch import Delta

Metric = Callable[[Float[Tensor, "d_mlp n"]], Float[Tensor, "d_mlp n"]]
JITTERS = (0.0, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6)


def inverse_of(C0: Float[Tensor, "d_mlp d_mlp"]) -> Metric:
    """K -> C0^-1 K through a cached Cholesky factor.

    A C0 that is not positive definite (too little text; layer 0 of GPT-J, where keys depend on the token alone) gets
    jitter of 1e-10 to 1e-6 of its mean diagonal, with a warning. Raises `EditError` if that is not enough.
    """
    C0 = C0.double()
    scale = float(C0.diagonal().mean())
    for jitter in JITTERS:
        factor, failed = torch.linalg.cholesky_ex(C0 + jitter * scale * torch.eye(len(C0), dtype=C0.dtype, device=C0.device))
        if not failed:
            if jitter:
                warnings.warn(
                    f"C0 is singular: {jitter:g} of its mean diagonal was added. Use more text for the statistics; "
                    "layer 0 of GPT-J never has a full C0.",
                    stacklevel=2,
                )
            return lambda K: torch.cholesky_solve(K.double(), factor)
    raise EditError("C0 is not positive definite even with jitter: compute the statistics from more text.")


def solve(
    metric: Metric,
    K: Float[Tensor, "d_mlp n"],
    R: Float[Tensor, "d_model n"],
    eps: float,
    K_read: Float[Tensor, "d_mlp n"] | None = None,
) -> Delta:
    """dW_out as factors [d_mlp, n] @ [n, d_model].

    MEMIT, PMET, ACE: metric C0^-1, eps = lambda. `K_read` differs from K only in ROME.
    Raises `EditError` if the small system is singular (two facts with one key and eps = 0).
    """
    Y, R = metric(K), R.double()
    small = (K if K_read is None else K_read).double().T @ Y
    small = small + eps * torch.eye(len(small), dtype=small.dtype, device=small.device)
    right, info = torch.linalg.solve_ex(small, R.T)
    if info.any() or not torch.isfinite(right).all():
        raise EditError("The system of the edit is singular: two facts share one key. Edit them apart, or raise lambda.")
    return Delta(Y, right)
