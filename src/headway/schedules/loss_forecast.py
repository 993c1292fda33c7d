r"""Where a loss will be after many more steps, from a few at a constant learning rate.

    y(x) ~ a exp(b x) + c,    b < 0

`headway.schedules.autolrs` judges learning rates with it.

Source: "AutoLRS: Automatic Learning-Rate Schedule by Bayesian Optimization on the Fly", Jin, Zhou, Zhao, Zhu, Guo,
Canini, Krishnamurthy, arXiv 2105.10762.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from headway.constraints import Constraint, OneOf, check_arguments
from headway.numerics.fitting import fit_separable

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["ExponentialForecaster"]


class ExponentialForecaster:
    r"""Fit a decaying exponential to a noisy series of losses and read it far beyond the end of the series.

        y(x) = a exp(b x) + c,    -30 <= b (x_last - x_first) <= -0.3

    b within bounds that the series can tell; a and c by linear least squares for each b. Two guards keep noise from
    being extrapolated: a series that rises (a < 0) is forecast at its last value at least, and one that the curve
    describes no better than its mean does, by an F test at 1 %, is forecast at its mean (a = 0).

    A series that is short against the decay is nearly a line and ends at the slow bound of b: its forecast is too low,
    even below zero. Longer series are the remedy.

    Args:
        smoother: "outliers" fits with Cauchy weights first, drops what lies more than four robust standard deviations
            off that fit, and fits the rest. "spline-official" is the authors' way: drop the largest residuals in the
            first half of the series against a smoothing spline of degree 2 (10 times 3 % of them), and fit the spline
            through the rest. Its default smoothing turns losses of order one into a parabola, so that even a clean
            exponential is not recovered. Default "outliers".
        validation: for "spline-official": drop one value once, as for a series of validation losses. Default False.

    Raises:
        ValueError: for an argument out of its range.

    Source: arXiv 2105.10762 and the authors' code, which has neither bounds on b nor guards (nor has
    "spline-official" the F test here, for its smoothed values leave no noise to test against).

    >>> x = np.arange(100)
    >>> forecaster = ExponentialForecaster().fit(2 * np.exp(-0.03 * x) + 0.5, x)
    >>> round(forecaster.a, 4), round(forecaster.b, 4), round(forecaster.c, 4), round(forecaster.predict(1000), 4)
    (2.0, -0.03, 0.5, 0.5)
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "smoother": OneOf("outliers", "spline-official"),
        "validation": OneOf(True, False),
    }

    def __init__(self, smoother: str = "outliers", validation: bool = False) -> None:
        check_arguments(self.constraints, smoother=smoother, validation=validation)
        self.smoother, self.validation = smoother, validation
        self.a = self.b = self.c = self._last = math.nan

    def fit(self, y: ArrayLike, x: ArrayLike | None = None) -> ExponentialForecaster:
        """Fit to n >= 4 finite values `y` at the increasing `x`; default 0, 1, ...

        Raises:
            ValueError: values that are not finite, too few, or x not increasing.
        """
        ys = np.array(y, dtype=float)
        xs = np.arange(ys.size, dtype=float) if x is None else np.array(x, dtype=float)
        if ys.ndim != 1 or xs.shape != ys.shape or len(ys) < 4:
            raise ValueError(f"y and x must be sequences of one length >= 4, got shapes {ys.shape} and {xs.shape}")
        if not (np.isfinite(ys).all() and np.isfinite(xs).all()):
            raise ValueError("y and x must be finite")
        if (np.diff(xs) <= 0).any():
            raise ValueError("x must be increasing")
        span = float(xs[-1] - xs[0])
        low, height = float(ys.min()), float(np.ptp(ys))
        # On the unit square neither the unit of the loss nor that of x makes a difference.
        t, v = (xs - xs[0]) / span, (ys - low) / (height or 1.0)
        if height == 0:
            rate, a, c = 0.3, 0.0, 0.0
        elif self.smoother == "outliers":
            keep = _without_outliers(t, v)
            rate, a, c = _fit_exponential(t[keep], v[keep])
            if not _decay_is_significant(v[keep], a * np.exp(-rate * t[keep]) + c):
                a, c = 0.0, float(v[keep].mean())
        else:
            # The smoothing target of the spline is in the units of the loss.
            rate, a, c = _fit_exponential(t, (_smoothed_by_spline(xs, ys, self.validation) - low) / height)
        self.b = -rate / span
        self.a, self.c = height * a * math.exp(min(rate * float(xs[0]) / span, 700.0)), low + height * c
        self._last = float(ys[-1])
        return self

    def predict(self, x: float) -> float:
        """The loss at `x`.

        Raises:
            RuntimeError: before `fit`.
        """
        if math.isnan(self._last):
            raise RuntimeError("ExponentialForecaster has not been fitted: call fit() first")
        value = self.a * math.exp(min(self.b * x, 700.0)) + self.c
        return max(value, self._last) if self.a < 0 else value


def _fit_exponential(t: np.ndarray, v: np.ndarray) -> tuple[float, float, float]:
    """rate, a, c of v = a exp(-rate t) + c with t on [0, 1]."""

    def design(log_rate: float) -> np.ndarray:
        return np.stack([np.exp(-math.exp(log_rate) * t), np.ones_like(t)], axis=1)

    fit = fit_separable(design, v, (math.log(0.3), math.log(30.0)), tolerance=1e-9)
    return math.exp(fit.theta), fit.coefficients[0], fit.coefficients[1]


def _without_outliers(t: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which values lie within four robust standard deviations of a robust fit, read off a grid of rates."""
    powers = np.exp(-np.geomspace(0.3, 30.0, 257)[:, None] * t)  # [rates, n]
    weights = np.ones_like(t)
    for _ in range(4):
        share = weights / weights.sum()
        centred, v_centred = powers - (powers @ share)[:, None], v - v @ share
        a = (centred @ (share * v_centred)) / ((centred**2) @ share)
        residuals = v_centred - a[:, None] * centred
        residual = np.abs(residuals[((residuals**2) @ share).argmin()])
        deviation = max(1.4826 * float(np.median(residual)), 1e-9)
        weights = 1 / (1 + (residual / (2 * deviation)) ** 2)
    return residual <= 4 * deviation


def _decay_is_significant(v: np.ndarray, fitted: np.ndarray) -> bool:
    """The F test at 1 % of three parameters against the mean alone."""
    from scipy.special import fdtri

    spare = len(v) - 3
    if spare < 1:
        return True
    left, all_in_all = float(((v - fitted) ** 2).sum()), float(((v - v.mean()) ** 2).sum())
    return all_in_all - left > left * 2 / spare * float(fdtri(2, spare, 0.99))


def _smoothed_by_spline(x: np.ndarray, y: np.ndarray, validation: bool) -> np.ndarray:
    from scipy.interpolate import UnivariateSpline

    kept_x, kept_y = x, y
    middle = x[(len(x) - 1) // 2]
    for _ in range(1 if validation else 10):
        residual = np.abs(kept_y - UnivariateSpline(kept_x, kept_y, k=2)(kept_x))
        drop = 1 if validation else round(0.03 * len(kept_x))
        largest = np.argsort(residual, kind="stable")[len(residual) - drop :]
        keep = np.ones(len(kept_x), dtype=bool)
        keep[largest] = False
        keep |= kept_x >= middle
        kept_x, kept_y = kept_x[keep], kept_y[keep]
    return UnivariateSpline(kept_x, kept_y, k=2)(x)
