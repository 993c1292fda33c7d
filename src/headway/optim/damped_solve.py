"""Solves with a damped symmetric matrix, (H + damping * B) d = r, for every form in which H may come.

- dense H: Cholesky; `LowRank` H = U C U^T: Woodbury, through the r x r matrix alone; `LinearOperator`: conjugate
  gradients; None: H = 0.

B is the metric that lengths are measured in, the identity by default. A matrix that turns out not to be positive
definite gives None in place of a solution: the caller rejects the trial and raises the damping.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "SOLVERS",
    "Curvature",
    "DampedSystem",
    "LinearOperator",
    "LowRank",
    "Metric",
    "conjugate_gradients",
]

SOLVERS = ("cholesky", "woodbury", "cg")


@dataclass(frozen=True, eq=False)
class LowRank:
    """H = U C U^T with U of shape (d, r); C a symmetric (r, r) matrix, an (r,) diagonal, or None for the identity."""

    U: Tensor
    C: Tensor | None = None

    def core(self) -> Tensor:
        """C as an (r, r) matrix."""
        if self.C is None:
            return torch.eye(self.U.shape[1], dtype=self.U.dtype, device=self.U.device)
        return torch.diag(self.C) if self.C.ndim == 1 else self.C

    def dense(self) -> Tensor:
        """The (d, d) matrix.

        >>> LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([3.0])).dense()
        tensor([[ 3.,  6.],
                [ 6., 12.]])
        """
        return self._weighted() @ self.U.mT

    def matvec(self, v: Tensor) -> Tensor:
        """H v."""
        return self._weighted() @ (self.U.mT @ v)

    def _weighted(self) -> Tensor:
        if self.C is None:
            return self.U
        return self.U * self.C if self.C.ndim == 1 else self.U @ self.C


@dataclass(frozen=True, eq=False)
class LinearOperator:
    """A symmetric d x d matrix H known by its product `matvec(v)` with a vector (d,)."""

    matvec: Callable[[Tensor], Tensor]


Curvature = Tensor | LowRank | LinearOperator | None


class Metric:
    """The norms ||h|| = sqrt(h^T B h) and ||g||_* = sqrt(g^T B^-1 g) of a positive definite B, factorised once.

    Args:
        B: symmetric positive definite (d, d), or None for the identity.

    Raises:
        ValueError: B is not a square matrix, not symmetric, or not positive definite.

    >>> metric = Metric(torch.diag(torch.tensor([4.0, 1.0])))
    >>> float(metric.norm(torch.tensor([1.0, 0.0]))), float(metric.dual_norm(torch.tensor([2.0, 0.0])))
    (2.0, 1.0)
    """

    def __init__(self, B: Tensor | None = None) -> None:
        self.B = B
        self.factor: Tensor | None = None
        if B is not None:
            _require_square("B", B, None, 0.0)
            factor, info = torch.linalg.cholesky_ex(B)
            if int(info) != 0:
                raise ValueError("B must be positive definite")
            self.factor = factor

    def norm(self, h: Tensor) -> Tensor:
        """||h||."""
        return torch.linalg.vector_norm(h if self.factor is None else self.factor.mT @ h)

    def dual_norm(self, g: Tensor) -> Tensor:
        """||g||_*."""
        return torch.linalg.vector_norm(self.whiten(g))

    def whiten(self, g: Tensor) -> Tensor:
        """L^-1 g for B = L L^T; g of shape (d,) or (d, r)."""
        if self.factor is None:
            return g
        if g.ndim == 1:
            return torch.linalg.solve_triangular(self.factor, g.unsqueeze(1), upper=False).squeeze(1)
        return torch.linalg.solve_triangular(self.factor, g, upper=False)

    def unwhiten(self, h: Tensor) -> Tensor:
        """L^-T h."""
        if self.factor is None:
            return h
        return torch.linalg.solve_triangular(self.factor.mT, h.unsqueeze(1), upper=True).squeeze(1)

    def inverse(self, g: Tensor) -> Tensor:
        """B^-1 g."""
        return self.unwhiten(self.whiten(g))

    def times(self, h: Tensor) -> Tensor:
        """B h."""
        return h if self.B is None else self.B @ h


class DampedSystem:
    """(H + damping * B) d = r for one H and any number of dampings.

    Args:
        H: the curvature, in one of its forms; symmetric, and positive semi-definite for every damping to succeed.
        metric: B.
        d: the number of unknowns.
        solver: `cholesky`, `woodbury` or `cg`; None (default): the one that the form of H asks for. Cholesky and CG
            take dense and low-rank H; an operator is for CG alone and `woodbury` for low-rank H.
        cg_tol: relative residual at which CG stops. Default None: min(0.1, damping), not below rounding.
        symmetric_to: check that H differs from its transpose by no more than the square root of its precision, relative
            to its largest entry or to this number, whichever is larger. Default None: not checked; an H that is
            the small difference of large matrices is symmetric to their precision only.

    Raises:
        ValueError: H of a wrong shape or, if checked, not symmetric; a solver that cannot take its form.

    A d x d factorisation costs d^3 / 3 operations per damping; Woodbury d r^2 once and d r + r^3 / 3 per damping.

    >>> H = LowRank(torch.tensor([[1.0], [0.0]]), torch.tensor([3.0]))
    >>> DampedSystem(H, Metric(), 2).solve(torch.tensor([8.0, 1.0]), 1.0)
    tensor([2., 1.])
    >>> DampedSystem(-torch.eye(2), Metric(), 2).solve(torch.ones(2), 0.5) is None
    True
    """

    def __init__(
        self,
        H: Curvature,
        metric: Metric,
        d: int,
        solver: str | None = None,
        cg_tol: float | None = None,
        symmetric_to: float | None = None,
    ) -> None:
        if solver is not None and solver not in SOLVERS:
            raise ValueError(f"solver must be one of {', '.join(map(repr, SOLVERS))} or None, got {solver!r}")
        self.metric = metric
        self.cg_tol = cg_tol
        if H is None:
            self._attempt: Callable[[Tensor, float], Tensor | None] = self._metric_alone
        elif isinstance(H, LinearOperator):
            if solver not in (None, "cg"):
                raise ValueError(f"solver must be 'cg' for a LinearOperator, got {solver!r}")
            self._prepare_cg(H.matvec)
        elif isinstance(H, LowRank):
            if H.U.ndim != 2 or H.U.shape[0] != d:
                raise ValueError(f"U must be of shape ({d}, r), got {tuple(H.U.shape)}")
            if H.C is not None and H.C.ndim != 1:
                _require_square("C", H.C, H.U.shape[1], symmetric_to)
            elif H.C is not None and H.C.shape[0] != H.U.shape[1]:
                raise ValueError(f"C must be of shape ({H.U.shape[1]},), got {tuple(H.C.shape)}")
            if solver == "cg":
                self._prepare_cg(H.matvec)
            elif solver == "cholesky":
                self._prepare_cholesky(H.dense())
            else:
                self._prepare_woodbury(H)
        else:
            _require_square("H", H, d, symmetric_to)
            if solver == "woodbury":
                raise ValueError("solver must be 'cholesky' or 'cg' for a dense H, got 'woodbury'")
            if solver == "cg":
                self._prepare_cg(lambda v: H @ v)
            else:
                self._prepare_cholesky(H)

    def solve(self, right: Tensor, damping: float) -> Tensor | None:
        """The solution (d,), or None where H + damping * B is not positive definite or the solution not finite."""
        solution = self._attempt(right, damping)
        return solution if solution is not None and bool(torch.isfinite(solution).all()) else None

    def _metric_alone(self, right: Tensor, damping: float) -> Tensor:
        return self.metric.inverse(right) / damping

    def _prepare_cholesky(self, H: Tensor) -> None:
        def attempt(right: Tensor, damping: float) -> Tensor | None:
            damped = H.clone()
            if self.metric.B is None:
                damped.diagonal().add_(damping)
            else:
                damped.add_(self.metric.B, alpha=damping)
            factor, info = torch.linalg.cholesky_ex(damped)
            return None if int(info) != 0 else torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1)

        self._attempt = attempt

    def _prepare_woodbury(self, H: LowRank) -> None:
        # With B = L L^T and L^-1 U = Q R, the matrix is L (damping + Q K Q^T) L^T, K = R C R^T. The part of the
        # right side outside the span of Q is divided by the damping alone.
        Q, R = torch.linalg.qr(self.metric.whiten(H.U))
        K = R @ H.core() @ R.mT
        small = self._dense(K)

        def attempt(right: Tensor, damping: float) -> Tensor | None:
            whitened = self.metric.whiten(right)
            inside = Q.mT @ whitened
            outside = whitened - Q @ inside
            outside = outside - Q @ (Q.mT @ outside)  # what rounding left inside, which the damping would blow up
            solved = small.solve(inside, damping)
            return None if solved is None else self.metric.unwhiten(Q @ solved + outside / damping)

        self._attempt = attempt

    @staticmethod
    def _dense(K: Tensor) -> DampedSystem:
        return DampedSystem((K + K.mT) / 2, Metric(), K.shape[0])

    def _prepare_cg(self, matvec: Callable[[Tensor], Tensor]) -> None:
        def attempt(right: Tensor, damping: float) -> Tensor | None:
            tolerance = min(0.1, damping) if self.cg_tol is None else self.cg_tol
            return conjugate_gradients(
                lambda v: matvec(v) + damping * self.metric.times(v),
                right,
                rtol=max(tolerance, 10 * torch.finfo(right.dtype).eps),
                max_iter=10 * right.numel(),
                precondition=self.metric.inverse,
            )

        self._attempt = attempt


def conjugate_gradients(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    rtol: float = 1e-8,
    max_iter: int | None = None,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | None:
    """A vector x with ||A x - b|| <= rtol ||b|| for a symmetric positive definite A, or None if A shows that it is not.

    Args:
        matvec: A v for a vector v (d,).
        b: right side, (d,).
        rtol: relative residual, > 0. Default 1e-8.
        max_iter: iterations after which the iterate is returned as it is. Default 10 d.
        precondition: M^-1 v for a positive definite M close to A. Default: M the identity.

    One product with A per iteration, four vectors of memory.

    >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradients(lambda v: A @ v, torch.tensor([3.0, 4.0])).round(decimals=5)
    tensor([1., 1.])
    """
    x = torch.zeros_like(b)
    r = b.clone()
    target = rtol * float(torch.linalg.vector_norm(b))
    z = r if precondition is None else precondition(r)
    p = z.clone()
    rz = torch.dot(r, z)
    for _ in range(10 * b.numel() if max_iter is None else max_iter):
        if float(torch.linalg.vector_norm(r)) <= target:
            break
        Ap = matvec(p)
        curvature = torch.dot(p, Ap)
        if not float(curvature) > 0:  # not positive definite along p, or NaN
            return None
        alpha = rz / curvature
        x = x + alpha * p
        r = r - alpha * Ap
        z = r if precondition is None else precondition(r)
        rz, previous = torch.dot(r, z), rz
        p = z + (rz / previous) * p
    return x


def _require_square(name: str, matrix: Tensor, d: int | None, symmetric_to: float | None) -> None:
    if not isinstance(matrix, Tensor) or matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        seen = f"shape {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else repr(matrix)
        raise ValueError(f"{name} must be a square matrix, got {seen}")
    if d is not None and matrix.shape[0] != d:
        raise ValueError(f"{name} must be of shape ({d}, {d}), got {tuple(matrix.shape)}")
    if symmetric_to is not None and matrix.numel():
        scale = max(float(matrix.abs().max()), symmetric_to)
        if float((matrix - matrix.mT).abs().max()) > torch.finfo(matrix.dtype).eps ** 0.5 * scale:
            raise ValueError(f"{name} must be symmetric")
