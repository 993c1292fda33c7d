r"""Least squares with one shape parameter, and the power law as its best-known case.

    min over theta in [low, high]  of  min over c  of  sum_i w_i (y_i - sum_k c_k f_k(x_i; theta))^2

For every theta the coefficients c are a linear problem, so the search has one dimension: a grid, then
Brent's method around its best points (variable projection). No start values are asked for, and
coefficients may be bounded.

    PowerLaw:    y = c + a x^(-b)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["PowerLaw", "Separable", "fit_power_law", "fit_separable", "observations"]

# A minimum in a plateau between grid points would be missed; the grid is fine against the width of any
# residual's basin in the logarithm of a rate.
GRID = 129


@dataclass(frozen=True)
class Separable:
    """The best fit: the shape `theta`, the `coefficients`, the weighted sum of squares, and if theta ended at a bound.

    `coefficients` is a tuple in the order of the design's columns.
    """

    theta: float
    coefficients: tuple[float, ...]
    sse: float
    at_bound: bool


def fit_separable(
    design: Callable[[float], np.ndarray],
    y: ArrayLike,
    bounds: tuple[float, float],
    *,
    weights: ArrayLike | None = None,
    lower: Sequence[float] | None = None,
    upper: Sequence[float] | None = None,
    tolerance: float = 1e-12,
) -> Separable:
    """Minimise the weighted sum of squares over the shape and the coefficients.

    Args:
        design: theta -> matrix (n, k), column k the values f_k(x_i; theta).
        y: n values.
        bounds: low < high, of theta. Choose theta so that its unit is a relative change (a logarithm).
        weights: n weights >= 0. Default: 1 each.
        lower: k lower bounds of the coefficients. Default: none.
        upper: k upper bounds of the coefficients. Default: none.
        tolerance: of theta. Default 1e-12.

    Returns:
        The best of the minima found; a tie goes to the smaller theta.

    >>> x = np.array([0.0, 1.0, 2.0, 3.0])
    >>> fit = fit_separable(lambda rate: np.exp(-rate * x)[:, None], 2 * np.exp(-0.5 * x), (0.01, 5.0))
    >>> round(fit.theta, 6), round(fit.coefficients[0], 6)
    (0.5, 2.0)
    """
    from scipy.optimize import lsq_linear, minimize_scalar

    values = np.asarray(y, dtype=float)
    root = np.ones_like(values) if weights is None else np.sqrt(np.asarray(weights, dtype=float))
    target = root * values
    bounded = lower is not None or upper is not None

    def solve(theta: float) -> tuple[np.ndarray, float]:
        matrix = design(theta) * root[:, None]
        # Columns of very different size (x^-b over decades) would spoil the conditioning.
        scale = np.sqrt((matrix**2).sum(axis=0))
        scale = np.where(scale > 0, scale, 1.0)
        coefficients, *_ = np.linalg.lstsq(matrix / scale, target, rcond=None)
        coefficients = coefficients / scale
        low = np.full(len(scale), -np.inf) if lower is None else np.asarray(lower, dtype=float)
        high = np.full(len(scale), np.inf) if upper is None else np.asarray(upper, dtype=float)
        if bounded and ((coefficients < low) | (coefficients > high)).any():
            fit = lsq_linear(matrix / scale, target, bounds=(low * scale, high * scale), method="bvls", tol=1e-14)
            coefficients = np.clip(fit.x / scale, low, high)
        residual = target - matrix @ coefficients
        return coefficients, float(residual @ residual)

    grid = np.linspace(*bounds, GRID)
    costs = np.array([solve(theta)[1] for theta in grid])
    costs = np.where(np.isfinite(costs), costs, np.inf)
    inner = np.flatnonzero((costs <= np.append(costs[1:], np.inf)) & (costs <= np.insert(costs[:-1], 0, np.inf)))
    best_theta, best_cost = float(grid[costs.argmin()]), float(costs.min())
    for start in inner[np.argsort(costs[inner], kind="stable")][:3]:
        low, high = grid[max(start - 1, 0)], grid[min(start + 1, GRID - 1)]
        found = minimize_scalar(
            lambda theta: solve(theta)[1], bounds=(low, high), method="bounded", options={"xatol": tolerance}
        )
        if found.fun < best_cost:
            best_theta, best_cost = float(found.x), float(found.fun)
    coefficients, cost = solve(best_theta)
    edge = (bounds[1] - bounds[0]) / (GRID - 1) / 2
    at_bound = best_theta - bounds[0] < edge or bounds[1] - best_theta < edge
    return Separable(best_theta, tuple(float(c) for c in coefficients), cost, at_bound)


@dataclass(frozen=True)
class PowerLaw:
    """y = c + a x^(-b), with the sum of squares of its fit and whether b is identified (not at its bound).

    >>> law = PowerLaw(a=2.0, b=0.5, c=1.0)
    >>> law.predict(4.0), law.inverse(2.0)
    (2.0, 4.0)
    """

    a: float
    b: float
    c: float = 0.0
    sse: float = 0.0
    identified: bool = True

    def predict(self, x: ArrayLike) -> Any:
        """Y at `x` > 0: a float for a float, else an array."""
        value = self.c + self.a * np.asarray(x, dtype=float) ** -self.b
        return float(value) if np.ndim(x) == 0 else value

    def inverse(self, y: float) -> float:
        """The x at which the law reaches `y`; infinity where it never does."""
        if self.a == 0:
            return math.inf
        share = (y - self.c) / self.a
        # A flat law takes an x beyond the floats.
        exponent = -math.log(share) / self.b if share > 0 else math.inf
        return math.exp(exponent) if exponent < 709 else math.inf


def fit_power_law(
    x: ArrayLike,
    y: ArrayLike,
    *,
    floor: bool = True,
    weights: ArrayLike | None = None,
    a: tuple[float, float] = (-math.inf, math.inf),
    c: tuple[float, float] = (-math.inf, math.inf),
    b: tuple[float, float] = (1e-3, 20.0),
    anchor: tuple[float, float] | None = None,
) -> PowerLaw:
    """Fit y = c + a x^(-b) by least squares in y, scaled by the smallest x.

    Args:
        x: n values > 0.
        y: n values.
        floor: fit c too; False holds it at 0. Default True.
        weights: n weights >= 0. Default: 1 each.
        a: bounds of a. Default: none.
        c: bounds of c. Default: none.
        b: bounds of b, both > 0. Default (1e-3, 20).
        anchor: (value, weight) of one more observation at x = infinity. Default None.

    Raises:
        ValueError: x or y is not finite, differs in length, or x <= 0.

    >>> x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    >>> law = fit_power_law(x, 3 + 2 * x**-0.7)
    >>> round(law.a, 6), round(law.b, 6), round(law.c, 6)
    (2.0, 0.7, 3.0)
    """
    xs, ys = observations(x, y)
    scale = xs.min()
    ratio = np.log(xs / scale)
    w = np.ones_like(xs) if weights is None else np.asarray(weights, dtype=float)
    if anchor is not None:
        ratio, ys, w = np.append(ratio, np.inf), np.append(ys, anchor[0]), np.append(w, anchor[1])

    def design(log_b: float) -> np.ndarray:
        power = np.exp(-math.exp(log_b) * ratio)
        return np.stack([power, np.ones_like(power)], axis=1) if floor else power[:, None]

    bounded = any(math.isfinite(bound) for bound in (*a, *c))
    # a is the coefficient of (x / scale)^(-b) times scale^b > 0: bounds other than 0 and infinity would move with b.
    low, high = (a[0], c[0]), (a[1], c[1])
    fit = fit_separable(
        design,
        ys,
        (math.log(b[0]), math.log(b[1])),
        weights=w,
        lower=low[: 1 + floor] if bounded else None,
        upper=high[: 1 + floor] if bounded else None,
    )
    exponent = math.exp(fit.theta)
    return PowerLaw(
        a=fit.coefficients[0] * float(scale) ** exponent,
        b=exponent,
        c=fit.coefficients[1] if floor else 0.0,
        sse=fit.sse,
        identified=not fit.at_bound,
    )


def observations(x: ArrayLike, y: ArrayLike, *, minimum: int = 1, x_name: str = "x", y_name: str = "y") -> Any:
    """`x` and `y` as two arrays of float64, checked.

    Raises:
        ValueError: they are no sequences of the same length, hold fewer than `minimum` values, a value is
            not finite, or an x is <= 0.

    >>> observations([1, 2], [3.0])
    Traceback (most recent call last):
    ...
    ValueError: x and y must be sequences of one length, got shapes (2,) and (1,)
    """
    xs, ys = np.array(x, dtype=float), np.array(y, dtype=float)
    if xs.ndim != 1 or xs.shape != ys.shape:
        raise ValueError(f"{x_name} and {y_name} must be sequences of one length, got shapes {xs.shape} and {ys.shape}")
    if len(xs) < minimum:
        raise ValueError(f"{x_name} must hold at least {minimum} values, got {len(xs)}")
    for name, values in ((x_name, xs), (y_name, ys)):
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            raise ValueError(f"{name} must be finite, got {values[wrong[0]]} at position {wrong[0]}")
    wrong = np.flatnonzero(xs <= 0)
    if len(wrong):
        raise ValueError(f"{x_name} must be > 0, got {xs[wrong[0]]:g} at position {wrong[0]}")
    return xs, ys
