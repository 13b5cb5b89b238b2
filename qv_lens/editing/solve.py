"""The closed form that every locate-then-edit method shares (ACE, Eq. 11-12; MEMIT), as pure linear
algebra.

Preserve W K0 while writing W K = V:  dW_out = (eps * C0 + K K^T)^-1 K R^T,  with R = V - W K  per fact.
By the push-through identity, with metric = C0^-1 and Y = C0^-1 K,

    dW_out = Y (K_read^T Y + eps * I_n)^-1 R^T,

which needs one Cholesky factor of C0 for all edits and all eps, and an n x n system per batch
(d_mlp x d_mlp where there are more facts than neurons). Everything in float64; no inverse is
formed.

dW_out [d_mlp, d_model] is the transpose of the papers' Delta; their C0 of Eq. 12 holds eps. ROME is
the case of one fact, eps = 0 and a read key k of its own: Lambda = (v* - W k) / ((C0^-1 k*)^T k)
times (C0^-1 k*)^T."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from qv_lens.errors import EditError
from qv_lens.patch import Delta

#: condition of the small system from which equal keys, read in float32, cannot be told apart
SINGULAR = 1e12

InverseMetric = Callable[[Float[Tensor, "d_mlp n"]], Float[Tensor, "d_mlp n"]]
JITTERS = (0.0, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6)


def inverse_of(C0: Float[Tensor, "d_mlp d_mlp"]) -> InverseMetric:
    """K -> C0^-1 K through a cached Cholesky factor.

    A C0 that is not positive definite (too little text; layer 0 of GPT-J, where keys depend on the
    token alone) gets jitter of 1e-10 to 1e-6 of its mean diagonal, with a warning. Raises
    `EditError` if that is not enough."""
    C0 = C0.double()
    scale = float(C0.diagonal().mean())
    for jitter in JITTERS:
        factor, failed = torch.linalg.cholesky_ex(
            C0 + jitter * scale * torch.eye(len(C0), dtype=C0.dtype, device=C0.device)
        )
        if not failed:
            if jitter:
                warnings.warn(
                    f"C0 is singular: {jitter:g} of its mean diagonal was added. Use more text for "
                    "the statistics; layer 0 of GPT-J never has a full C0.",
                    stacklevel=2,
                )
            return lambda K: torch.cholesky_solve(K.double(), factor)
    raise EditError(
        f"C0 of {len(C0)} neurons is not positive definite even with jitter: compute the statistics "
        f"from more text that does not repeat itself, at least {10 * len(C0):,} tokens (ten a neuron; "
        "qv-lens stats takes so many by default)."
    )


def factor_of(system: Float[Tensor, "n n"], remedy: str) -> Float[Tensor, "n n"]:
    """The Cholesky factor of the system of an edit. Raises `EditError`, with a remedy, where it is
    not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(system)
    if failed:
        raise EditError(
            f"The system of the edit is singular: {remedy}, or take C0 from more text (layer 0 of "
            "GPT-J never has a full C0)."
        )
    return factor


def identity(K: Float[Tensor, "d_mlp n"]) -> Float[Tensor, "d_mlp n"]:
    """C0 = I."""
    return K.double()


Spectrum = tuple[Float[Tensor, " d_mlp"], Float[Tensor, "d_mlp d_mlp"]]


def eigen(C0: Float[Tensor, "d_mlp d_mlp"]) -> Spectrum:
    """Eigenvalues and eigenvectors of C0, which serve every threshold."""
    values, vectors = torch.linalg.eigh(C0.double())
    return values, vectors


def null_space(spectrum: Spectrum, threshold: float) -> Float[Tensor, "d_mlp r"]:
    """U0, the eigenvectors of C0 with eigenvalues below the threshold: P = U0 U0^T projects into its
    null space (AlphaEdit). A part of the spectrum, not a copy."""
    values, vectors = spectrum
    return vectors[:, : int((values < threshold).sum())]  # in ascending order


def null_space_metric(
    U0: Float[Tensor, "d_mlp r"],
    earlier: Delta | None,
    L2: float,
    held: Float[Tensor, "d_mlp d_mlp"] | None = None,
) -> InverseMetric:
    """K -> (P (Kp Kp^T + H) P + L2 I)^-1 P K = U0 (U0^T (Kp Kp^T + H) U0 + L2 I_r)^-1 U0^T K;
    `earlier`: Kp Kp^T, Kp the keys of earlier facts (AlphaEdit). `held`: H, lam C0 (BetaEdit; with
    P P = P what it has is this: its update lies in the range of P).

    Without H, and with fewer earlier facts than r, the system is the identity and a product of few
    columns, A = U0^T Kp: (A A^T + L2 I)^-1 = (I - A (A^T A + L2 I_n)^-1 A^T) / L2 (Woodbury)."""
    if held is None and earlier is None:
        return lambda K: U0 @ (U0.T @ K.double()) / L2
    if held is None and earlier is not None and earlier.rank < U0.shape[1]:
        left, right = earlier.factors()
        return _by_few_columns(U0, U0.T @ left, right @ U0, L2)
    system = L2 * torch.eye(U0.shape[1], dtype=U0.dtype, device=U0.device)
    for part in (None if earlier is None else earlier.dense(), held):
        if part is not None:
            system = system + U0.T @ part.to(U0) @ U0
    factor = factor_of(system, "raise L2")
    return lambda K: U0 @ torch.cholesky_solve(U0.T @ K.double(), factor)


def _by_few_columns(
    U0: Float[Tensor, "d_mlp r"],
    A: Float[Tensor, "r n"],
    A_T: Float[Tensor, "n r"],
    L2: float,
) -> InverseMetric:
    """K -> U0 (A A^T + L2 I_r)^-1 U0^T K, A of fewer columns than rows."""
    small = A_T @ A + L2 * torch.eye(len(A_T), dtype=A.dtype, device=A.device)
    factor = factor_of(small, "raise L2")

    def metric(K: Tensor) -> Tensor:
        x = U0.T @ K.double()
        return U0 @ (x - A @ torch.cholesky_solve(A_T @ x, factor)) / L2

    return metric


def held_metric(
    C0: Float[Tensor, "d_mlp d_mlp"],
    earlier: Float[Tensor, "d_mlp d_mlp"] | None,
    lam: float,
    norm: float,
) -> InverseMetric:
    """K -> (lam C0 + norm I + Kp Kp^T)^-1 K; `earlier`: Kp Kp^T, Kp the keys of earlier facts
    (ENCORE)."""
    system = lam * C0.double()
    system = system + norm * torch.eye(len(system), dtype=system.dtype, device=system.device)
    if earlier is not None:
        system = system + earlier
    factor = factor_of(system, "raise norm")
    return lambda K: torch.cholesky_solve(K.double(), factor)


def damped(
    W: Float[Tensor, "d_mlp d_model"],
    delta: Float[Tensor, "d_mlp d_model"],
    share: float,
    alpha: float,
) -> Float[Tensor, "d_mlp d_model"]:
    """(I - alpha U U^T) dW (SPHERE): U the fewest top eigenvectors, on the side of the keys, that
    hold more than `share` of the spectrum of W's normalised columns."""
    columns = W.double() / (W.double().norm(dim=0, keepdim=True) + 1e-8)
    U, s, _ = torch.linalg.svd(columns, full_matrices=False)
    held = s.square().cumsum(0) / s.square().sum()
    top = U[:, : int((held <= share).sum()) + 1]
    return delta - alpha * top @ (top.T @ delta)


def rect(W: Float[Tensor, "a b"], delta: Float[Tensor, "a b"], keep: float) -> Float[Tensor, "a b"]:
    """The `keep` share of the entries with the largest |dW / (W + 1e-8)|, all others 0 (RECT).
    As released: the entry that the other share ends with is kept as well."""
    change = (delta / (W.double() + 1e-8)).abs().flatten()
    left_out = int(change.numel() * (1 - keep))
    count = min(change.numel(), change.numel() - left_out + 1)
    mask = torch.zeros_like(change, dtype=torch.bool)
    mask[change.topk(count).indices] = True
    return delta * mask.view_as(delta)


def prune(W: Float[Tensor, "a b"], delta: Float[Tensor, "a b"]) -> Float[Tensor, "a b"]:
    """Singular values s of dW above sigma = sigma_max(W) become ln s - ln sigma + sigma (PRUNE)."""
    limit = torch.linalg.matrix_norm(W.double(), 2)
    U, s, V = torch.linalg.svd(delta, full_matrices=False)
    return U * torch.where(s > limit, s.log() - limit.log() + limit, s) @ V


def solve(
    metric: InverseMetric,
    K: Float[Tensor, "d_mlp n"],
    R: Float[Tensor, "d_model n"],
    eps: float,
    K_read: Float[Tensor, "d_mlp n"] | None = None,
) -> Delta:
    """dW_out as factors [d_mlp, n] @ [n, d_model].

    MEMIT, PMET, ACE: metric C0^-1, eps = lambda. EMMET and ROME: eps 0 (0.1 for several facts).
    `K_read` differs from K only in ROME. Where there are more facts than neurons, (Y K_read^T + eps
    I) dW_out = Y R^T is the smaller system.
    Raises `EditError` if the system is singular, or so nearly that rounding decides (two facts with
    one key and eps = 0)."""
    Y = metric(K)
    R = R.double()
    K_read = (K if K_read is None else K_read).double()
    if K.shape[1] > K.shape[0] and eps > 0:
        primal = Y @ K_read.T + eps * torch.eye(K.shape[0], dtype=Y.dtype, device=Y.device)
        return Delta(torch.linalg.solve(primal, Y @ R.T))
    small = K_read.T @ Y
    small = small + eps * torch.eye(len(small), dtype=small.dtype, device=small.device)
    right, info = torch.linalg.solve_ex(small, R.T)
    if (
        info.any()
        or not torch.isfinite(right).all()
        or (len(small) > 1 and torch.linalg.cond(small) > SINGULAR)
    ):
        raise EditError(
            "The system of the edit is singular: two facts share one key. Edit them apart, or raise "
            "lam, soften or L2 (whichever the editor has)."
        )
    return Delta(Y, right)
