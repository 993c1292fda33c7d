r"""The spectrum of a symmetric operator that is known by its products only: Lanczos and its quadrature.

    A V^T ~ V^T T,   T = tridiag(beta, alpha, beta) = U diag(theta) U^T,   gamma_j = U[0, j]^2
    sum_j gamma_j theta_j^k = v^T A^k v   for k <= 2m - 1,   v the unit start vector

m products give m Ritz values theta_j, of which the extreme ones converge first, and weights gamma_j: a Gauss
quadrature of the spectral density seen by v.

Source: Golub and Welsch, "Calculation of Gauss Quadrature Rules", 1969; as the means to look at curvature of networks
e.g. in Granziol, Zohren, Roberts, "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to
Neural Network Training", arXiv 2006.09092.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headway.constraints import Range, check_arguments

__all__ = ["Spectrum", "Tridiagonal", "lanczos", "slq"]

Matvec = Callable[[Tensor], Tensor]

_COUNTS = {name: Range(low=1, integer=True) for name in ("n", "m", "probes")}

# The Krylov space is used up where a new direction is no longer than this fraction of the operator: the
# first number, or what rounding leaves in the working precision.
_USED_UP, _ROUNDINGS = 1e-10, 10.0


class Tridiagonal(NamedTuple):
    """The result of `lanczos`: diagonal and off-diagonal of T in float64 on the CPU, and the basis, if kept."""

    alpha: Tensor
    """The k <= m entries of the diagonal."""
    beta: Tensor
    """The k - 1 entries beside it."""
    V: Tensor | None
    """The orthonormal basis (k, n), a vector per row; None without re-orthogonalisation."""


@dataclass(frozen=True)
class Spectrum:
    """A spectral density as a sum of points.

    Args:
        ritz: the Ritz values, ascending, float64, shape (k,).
        weights: their weights, >= 0 with sum 1, float64, shape (k,).

    >>> Spectrum(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5])).moments(2)
    5.0
    """

    ritz: Tensor
    weights: Tensor

    @property
    def lam_max(self) -> float:
        """The largest Ritz value, a lower bound of the largest eigenvalue."""
        return float(self.ritz[-1])

    @property
    def lam_min(self) -> float:
        """The smallest Ritz value, an upper bound of the smallest eigenvalue."""
        return float(self.ritz[0])

    def moments(self, k: int) -> float:
        """sum_j weights_j ritz_j^k: v^T A^k v for k <= 2m - 1, whose mean over random v is trace(A^k) / n."""
        return float((self.weights * self.ritz**k).sum())


def lanczos(
    matvec: Matvec,
    n: int,
    m: int,
    *,
    v0: Tensor | None = None,
    generator: torch.Generator | None = None,
    reorth: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tridiagonal:
    r"""Lanczos' three-term recurrence: m products of a symmetric operator become a tridiagonal matrix.

        w = A v_j;  alpha_j = <v_j, w>;  w = w - V^T V w  (twice);  beta_j = |w|;  v_{j+1} = w / beta_j

    It ends early when the Krylov space is used up: beta_j <= max(1e-10, 10 eps) max(|alpha|, beta), with eps of the
    working precision. So a matrix with k distinct eigenvalues ends it after k steps, and no more than n are made.

    Memory: n (m + 2) numbers with re-orthogonalisation, of which n min(m, n) are the basis; 3 n without, at the price
    that converged eigenvalues come back as copies ("ghosts"). One number a step is read from the device.

    Args:
        matvec: v -> A v for a vector of n entries; must be symmetric and the same operator at every call.
        n: size of the operator, >= 1.
        m: steps, >= 1.
        v0: start vector of n entries, not zero, of any length; its dtype (float32 at least) and device are used.
            Default: Gaussian entries.
        generator: draws the start vector, on the generator's device. Default: a new one with seed 0; the global
            generators are not used.
        reorth: keep all basis vectors and orthogonalise against them twice. Default True.
        dtype: working precision if `v0` is not given. Default float32, the least.
        device: where to work if `v0` is not given. Default: the generator's.

    Raises:
        ValueError: n or m < 1, a start vector of another shape or with the length zero, a 16-bit `dtype`.
        FloatingPointError: a product holds a NaN or an infinity.

    >>> A = torch.diag(torch.tensor([1.0, 1.0, 2.0, 4.0]))
    >>> alpha, beta, V = lanczos(A.mv, 4, 4, v0=torch.ones(4))
    >>> alpha.shape, beta.shape, V.shape
    (torch.Size([3]), torch.Size([2]), torch.Size([3, 4]))
    """
    check_arguments(_COUNTS, n=n, m=m)
    v = _start(n, v0, generator, dtype, device)
    steps = min(m, n)
    basis = torch.empty((steps if reorth else 1, n), dtype=v.dtype, device=v.device)
    basis[0] = v
    alpha: list[float] = []
    beta: list[float] = []
    previous = torch.zeros_like(v)
    used_up = max(_USED_UP, _ROUNDINGS * torch.finfo(v.dtype).eps)
    for j in range(steps):
        w = matvec(v).to(v)
        along = torch.dot(v, w)
        if reorth:
            known = basis[: j + 1]
            for _ in range(2):
                w = w - known.T @ (known @ w)
        else:
            w = w - along * v - (beta[-1] if beta else 0.0) * previous
        diagonal, length = torch.stack([along, torch.linalg.vector_norm(w)]).tolist()
        if not abs(diagonal) + length < float("inf"):
            raise FloatingPointError(f"the operator's product {j + 1} is not finite")
        alpha.append(diagonal)
        size = max(max(map(abs, alpha)), max(beta, default=0.0))
        if j + 1 == steps or length <= used_up * size:
            break
        beta.append(length)
        previous, v = v, w / length
        if reorth:
            basis[j + 1] = v
    T = torch.tensor(alpha, dtype=torch.float64), torch.tensor(beta, dtype=torch.float64)
    return Tridiagonal(*T, basis[: len(alpha)] if reorth else None)


def slq(
    matvec: Matvec,
    n: int,
    m: int = 20,
    probes: int = 1,
    *,
    v0: Tensor | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Spectrum:
    """Stochastic Lanczos quadrature: the spectral density of a symmetric operator from `probes` runs of m products.

    Always with full re-orthogonalisation (memory n (m + 2) numbers); T is decomposed in float64. Ritz values of
    several probes are joined, each probe with the same total weight.

    Args:
        matvec: v -> A v, as for `lanczos`.
        n: size of the operator, >= 1.
        m: products per probe, >= 1. Default 20.
        probes: random start vectors, >= 1. Default 1, enough for the extremes; the density wants more.
        v0: the start vector of the only probe. Default: random.
        generator: draws the start vectors. Default: a new one with seed 0.
        dtype: working precision if `v0` is not given. Default float32, the least.
        device: where to work if `v0` is not given. Default: the generator's.

    Raises:
        ValueError: as for `lanczos`; probes < 1, or more than one with a given `v0`.
        FloatingPointError: a product is not finite.

    >>> spectrum = slq(torch.diag(torch.tensor([1.0, 2.0, 4.0])).mv, 3, m=3)
    >>> [round(value, 5) for value in spectrum.ritz.tolist()], round(float(spectrum.weights.sum()), 9)
    ([1.0, 2.0, 4.0], 1.0)
    """
    check_arguments(_COUNTS, n=n, m=m, probes=probes)
    if v0 is not None and probes > 1:
        raise ValueError(f"probes must be 1 when v0 is given, got {probes}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    ritz, weights = [], []
    for _ in range(probes):
        alpha, beta, _ = lanczos(matvec, n, m, v0=v0, generator=generator, dtype=dtype, device=device)
        theta, U = torch.linalg.eigh(torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1))
        ritz.append(theta)
        weights.append(U[0] ** 2 / probes)
    values, order = torch.cat(ritz).sort()
    return Spectrum(values, torch.cat(weights)[order])


def _start(
    n: int, v0: Tensor | None, generator: torch.Generator | None, dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    if v0 is None:
        if torch.promote_types(dtype, torch.float32) != dtype or not dtype.is_floating_point:
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        v = torch.randn(n, generator=generator, device=generator.device, dtype=dtype)
        v = v.to(generator.device if device is None else device)
    else:
        if v0.shape != (n,):
            raise ValueError(f"v0 must have the shape ({n},), got {tuple(v0.shape)}")
        v = v0.detach().to(torch.promote_types(v0.dtype, torch.float32))
    length = float(torch.linalg.vector_norm(v))
    if not 0 < length < float("inf"):
        raise ValueError(f"v0 must have a finite length > 0, got {length:g}")
    return v / length
