"""The polar factor of matrices: all singular values set to one.

    polar(A) = (A A^T)^(-1/2) A = U V^T,    A = U S V^T the thin SVD

By Newton-Schulz iteration, which is matrix products alone, or exactly by SVD.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.constraints import Constraint, OneOf, Range, check_arguments

__all__ = ["POLAR_RANGES", "polar_factor"]

POLAR_RANGES: dict[str, Constraint] = {
    "method": OneOf("ns", "svd"),
    "steps": Range(low=1, integer=True),
    "beta": Range(low=1 / 3, high=2 / 3, low_open=True, high_open=True),
}


def polar_factor(A: Tensor, method: str = "ns", steps: int = 10, beta: float = 0.5) -> Tensor:
    """The polar factor of each matrix of a batch, (..., m, n).

    `ns` iterates on the smaller side, from Y = A A^T / |A|_F^2 and Z = I::

        T = 3 I - Z Y;  Y = beta Y T;  Z = beta T Z;        polar(A) = Z A / |A|_F

    or, where that is fewer operations, on X = Z A / |A|_F itself: X = beta (3 I - X X^T) X.

    For beta = 1/2 this converges quadratically to the polar factor; other values in (1/3, 2/3) converge linearly, at
    the rate |3 - 6 beta|, to (3 - 1/beta)^(1/2) times it. A small singular value grows by 3 beta a step, so
    `steps` steps leave those below about (3 beta)^-steps |A|_F short of one; for beta = 1/2 and 10 steps, |A|_F / 60.

    `svd` is exact; directions of singular values below max(m, n) eps of the largest stay out, so that a matrix
    without full rank gives the partial isometry. A zero matrix gives zero under both.

    Args:
        A: real matrices, float32 or float64; 16-bit iterations lose orthogonality.
        method: `ns` (default) or `svd`.
        steps: iterations of `ns`, >= 1. Default 10.
        beta: in (1/3, 2/3), the range of convergence. Default 1/2.

    Raises:
        ValueError: an argument outside its range.

    Source: Algorithm 2 of arXiv 2412.13148 as its re-implementations state it; the range of beta is derived from the
    scalar iteration.

    >>> A = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    >>> polar_factor(A, steps=20).round(decimals=4)
    tensor([[1., 0., 0.],
            [0., 0., 1.]])
    """
    check_arguments(POLAR_RANGES, method=method, steps=steps, beta=beta)
    tall = A.shape[-2] > A.shape[-1]
    wide = A.mT if tall else A
    P = _by_svd(wide) if method == "svd" else _by_newton_schulz(wide, steps, beta)
    return P.mT if tall else P


def _by_svd(A: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    floor = S[..., :1] * (max(A.shape[-2:]) * torch.finfo(A.dtype).eps)
    return (U * ((floor < S) & (S > 0)).to(A.dtype).unsqueeze(-2)) @ Vh


def _by_newton_schulz(A: Tensor, steps: int, beta: float) -> Tensor:
    norm = torch.linalg.matrix_norm(A, keepdim=True)
    A = torch.where(norm > 0, A / norm, 0)
    k, n = A.shape[-2:]
    identity3 = 3 * torch.eye(k, dtype=A.dtype, device=A.device)
    if 2 * n < 3 * k:  # the same iterates Z A, with two products of k x k x n a step in place of three of k x k x k
        for _ in range(steps):
            A = (beta * (identity3 - A @ A.mT)) @ A
        return A
    Y = A @ A.mT
    Z: Tensor | None = None  # the identity: the first product with it is saved
    for step in range(steps):
        T = identity3 - (Y if Z is None else Z @ Y)
        Z = beta * T if Z is None else (beta * T) @ Z
        if step + 1 < steps:
            Y = (beta * Y) @ T
    assert Z is not None
    return Z @ A
