r"""Sigmoid fits of performance against compute: where a reinforcement-learning run will end, from its first part.

    R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B)

R0 is the performance before training, A the asymptote, C_mid the compute at half of the gain and B > 0
the steepness. While C << C_mid, R - R0 ~ (A - R0) (C / C_mid)^B depends on one combination of the three:
an early window cannot tell A, and the fit says so (`identified_`).

The paper's loss, advantages and curriculum (`cispo_loss`, `batch_advantages`, `PositiveFilter`) are training code and
left to post-training.

Source: "The Art of Scaling Reinforcement Learning Compute for LLMs", Khatri, Madaan, Tiwari et al.,
arXiv 2510.13786.
"""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from headway.catalogue import nearest
from headway.constraints import Constraint, Range, check_arguments
from headway.numerics.fitting import observations
from headway.plots import Panel

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["ComputePerformanceFit", "RecipeComparison", "compare_recipes", "read_csv", "sigmoid_curve"]

EXPONENTS = (0.2, 4.0)
# C_mid is searched from a tenth of the smallest compute to ten times the largest.
MIDPOINT_MARGIN = 10.0
MINIMUM_POINTS = 4
# The study went no further than twice the range of its fits.
SUPPORTED_EXTRAPOLATION = 2.0
# An `initial` taken from the first observation is off by this share of the gain before a warning is due.
INITIAL_SHARE = 0.05

_LEVEL = {"level": Range(low=0, high=1, low_open=True, high_open=True)}


def sigmoid_curve(compute: ArrayLike, asymptote: float, exponent: float, midpoint: float, initial: float) -> Any:
    """R(C) = `initial` + (`asymptote` - `initial`) / (1 + (`midpoint` / C)^`exponent`).

    Args:
        compute: C > 0, a number or an array, in any unit; infinity gives the asymptote.
        asymptote: A, the limit for C to infinity.
        exponent: B > 0.
        midpoint: C_mid > 0 in the unit of `compute`.
        initial: R0, the limit for C to 0.

    Returns:
        A float for a float, else an array of the shape of `compute`.

    >>> round(sigmoid_curve(2542, asymptote=0.61, exponent=1.92, midpoint=2542, initial=0.30), 6)
    0.455
    """
    share = _share(np.asarray(compute, dtype=float), exponent, math.log(midpoint))
    value = initial + (asymptote - initial) * share
    return float(value) if np.ndim(compute) == 0 else value


def _share(compute: np.ndarray, exponent: Any, log_midpoint: Any) -> np.ndarray:
    """1 / (1 + (C_mid / C)^B), without overflow at either end."""
    return 0.5 * (1 + np.tanh(0.5 * exponent * (np.log(compute) - log_midpoint)))


class ComputePerformanceFit:
    """Least-squares fit of R(C) = R0 + (A - R0) / (1 + (C_mid / C)^B), with profile-likelihood intervals.

        min over B, C_mid of SSE = sum_j w_j (y_j - R(C_j))^2,
        A - R0 = sum_j w_j f_j (y_j - R0) / sum_j w_j f_j^2,   f_j = 1 / (1 + (C_mid / C_j)^B),   A <= A_max

    The interval of any quantity g (A, or R at some compute) are its extremes over all curves with
    SSE <= SSE_min + F s^2, s^2 = SSE_min / (n - 3), F the `level` quantile of Fisher's F(1, n - 3).

    Args:
        initial: R0 in [0, A_max), measured before training. Default None: the first observation, also when
            `min_compute` leaves it out of the fit; with a warning when the fit says it comes too late.
        min_compute: observations below it, the noisy start of a run, are left out (they bias B).
            Default 0; the study leaves out its first 1500 GPU-hours.
        max_asymptote: A_max > 0, the best value that the metric can take. Default 1.

    Attributes:
        asymptote_: A.
        exponent_: B.
        midpoint_: C_mid, in the unit of the compute.
        initial_: R0.
        sse_: weighted sum of squares.
        points_: n, the observations in the fit.
        identified_: whether the data bound A from above at 95 % (`asymptote_interval`).

    Raises:
        ValueError: an argument is out of its range.

    Source: arXiv 2510.13786, whose protocol is known here from public summaries: it searches a grid over A and
    C_mid and takes the margin of A (0.02) from three runs. Here A is solved in closed form, the search is
    over B in [0.2, 4] and C_mid from a tenth of the smallest to ten times the largest compute, and margins
    come from one run's residuals. Fisher's F in place of its limit for many points (3.84) keeps the
    intervals honest with few.

    >>> compute = np.linspace(1500, 8000, 27)
    >>> noise = 0.003 * np.random.default_rng(0).standard_normal(27)
    >>> performance = sigmoid_curve(compute, asymptote=0.61, exponent=1.92, midpoint=2542, initial=0.30) + noise
    >>> fit = ComputePerformanceFit(initial=0.30).fit(compute, performance)
    >>> low, high, identified = fit.asymptote_interval()
    >>> round(fit.asymptote_, 2), bool(low < 0.61 < high), identified
    (0.61, True, True)
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "initial": Range(low=0, optional=True),
        "min_compute": Range(low=0),
        "max_asymptote": Range(low=0, low_open=True),
    }

    def __init__(self, initial: float | None = None, min_compute: float = 0.0, max_asymptote: float = 1.0) -> None:
        check_arguments(self.constraints, initial=initial, min_compute=min_compute, max_asymptote=max_asymptote)
        if initial is not None and initial >= max_asymptote:
            raise ValueError(f"initial must be < max_asymptote = {max_asymptote:g}, got {initial!r}")
        self.initial = initial
        self.min_compute = min_compute
        self.max_asymptote = max_asymptote

    def fit(
        self, compute: ArrayLike, performance: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> ComputePerformanceFit:
        """Fit one run, or several joined and sorted by compute.

        Args:
            compute: n values > 0 that do not decrease: cumulative compute in one unit, generation included.
            performance: n values in [0, A_max].
            sample_weight: n weights >= 0, for example 1 / variance. Default: 1 each.

        Raises:
            ValueError: the data are none of that, or fewer than 4 points with a weight lie at or above `min_compute`.

        Warns:
            UserWarning: R0 lies above all data, B or C_mid ended at the edge of the search, or R0 was taken from
                an observation that comes too late.
        """
        self._solve(compute, performance, sample_weight)
        if self.initial_ > self._performance.max():
            _warn(f"initial = {self.initial_:g} lies above all performances: the fitted curve falls")
        for name, theta, edges in (
            ("exponent", self.exponent_, EXPONENTS),
            ("midpoint", math.log(self.midpoint_), self._log_midpoints),
        ):
            if min(theta - edges[0], edges[1] - theta) < 1e-6 * (edges[1] - edges[0]):
                value = theta if name == "exponent" else math.exp(theta)
                _warn(f"{name} ended at the edge of its search range, {value:.4g}: the data do not tell it")
        passed = self._passed_at_initial()
        if passed > INITIAL_SHARE:
            _warn(
                f"initial was taken from the first observation, where the fit has made {passed:.0%} of its gain: "
                "give the performance before training"
            )
        return self

    def predict(self, compute: ArrayLike) -> Any:
        """R at `compute` > 0: a float for a float, else an array.

        Raises:
            RuntimeError: there was no `fit`.
            ValueError: a compute is not > 0.
        """
        self._check_fitted()
        _check_compute(compute)
        return sigmoid_curve(compute, self.asymptote_, self.exponent_, self.midpoint_, self.initial_)

    def interval(self, compute: ArrayLike, level: float = 0.95) -> tuple[Any, Any]:
        """The profile-likelihood interval of the curve (not of a noisy observation) at `compute` > 0.

        Args:
            compute: a number or an array.
            level: confidence in (0, 1). Default 0.95.
        """
        check_arguments(_LEVEL, level=level)
        mean = self.predict(compute)
        exponents, log_midpoints, asymptotes = self._region(level)
        ends = []
        for c, value in zip(np.ravel(np.asarray(compute, dtype=float)), np.ravel(mean), strict=True):
            curves = self.initial_ + (asymptotes - self.initial_) * _share(c, exponents, log_midpoints)
            ends.append((min(curves.min(), value), max(curves.max(), value)))
        if np.ndim(compute) == 0:
            return float(ends[0][0]), float(ends[0][1])
        low, high = np.array(ends).T.reshape(2, *np.shape(compute))
        return low, high

    def asymptote_interval(self, level: float = 0.95) -> tuple[float, float, bool]:
        """(low, high, identified) of A.

        `identified` is False when the interval is cut by A_max or by the limits of the search (C_mid at ten
        times the largest compute, B at 0.2) in place of by the data, and when R0 was taken from an observation
        that comes too late, whose error the interval does not contain.
        """
        low, high = self.interval(math.inf, level)
        exponents, log_midpoints, _ = self._region(level)
        cut = (
            high >= self.max_asymptote * (1 - 1e-9)
            or log_midpoints.max() >= self._log_midpoints[1] - 1e-9
            or exponents.min() <= EXPONENTS[0] + 1e-9
        )
        return low, high, not cut and self._passed_at_initial() <= INITIAL_SHARE

    @property
    def identified_(self) -> bool:
        """Whether the data bound A from above at 95 %."""
        return self.asymptote_interval()[2]

    def forecast(self, compute: ArrayLike, level: float = 0.95) -> tuple[Any, Any, Any]:
        """(R, low, high) at `compute`.

        Warns:
            UserWarning: beyond twice the largest compute of the fit, which the study does not support.
        """
        low, high = self.interval(compute, level)
        limit = SUPPORTED_EXTRAPOLATION * self._compute.max()
        if np.max(np.asarray(compute, dtype=float)) > limit:
            _warn(f"compute {np.max(compute):g} is beyond {limit:g}, twice the fitted range: take it as a guess")
        return self.predict(compute), low, high

    def compute_for(self, performance: float) -> float:
        """The compute at which the curve reaches `performance`: infinity at or above A, 0 at or below R0."""
        self._check_fitted()
        needed = _compute_for(performance, self.initial_, self.asymptote_, self.exponent_, math.log(self.midpoint_))
        return float(needed)

    def panels(self, until: float | None = None) -> list[Panel]:
        """Observations, fit and 95 % interval.

        Args:
            until: largest compute drawn. Default: twice the largest one fitted.
        """
        self._check_fitted()
        last = SUPPORTED_EXTRAPOLATION * self._compute.max() if until is None else max(until, self._compute.max())
        grid = np.geomspace(self._compute.min(), last, 80)
        low, high = self.interval(grid)
        x = grid.tolist()
        return [
            Panel(
                f"Asymptote {self.asymptote_:.3f}" + ("" if self.identified_ else ", not identified"),
                "compute",
                "performance",
                {
                    "95 %, low": (x, low.tolist()),
                    "95 %, high": (x, high.tolist()),
                    "fit": (x, self.predict(grid).tolist()),
                    "observed": (self._all_compute.tolist(), self._all_performance.tolist()),
                },
                log_x=True,
                styles={"95 %, low": "faint", "95 %, high": "faint", "observed": "points"},
                marks=[float(self._compute.max())],
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """Options, data and fitted values as plain numbers."""
        self._check_fitted()
        return {
            "options": {
                "initial": self.initial,
                "min_compute": self.min_compute,
                "max_asymptote": self.max_asymptote,
            },
            "compute": self._all_compute.tolist(),
            "performance": self._all_performance.tolist(),
            "sample_weight": self._all_weights.tolist(),
            "asymptote": self.asymptote_,
            "exponent": self.exponent_,
            "midpoint": self.midpoint_,
            "identified": self.identified_,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ComputePerformanceFit:
        """The fit that `to_dict` described, by fitting its data again."""
        fit = cls(**values["options"])
        fit._solve(values["compute"], values["performance"], values["sample_weight"])
        return fit

    def _passed_at_initial(self) -> float:
        """The share of the gain already made where R0 was taken; 0 for an R0 that was given."""
        if self.initial is not None:
            return 0.0
        return float(_share(self._all_compute[0], self.exponent_, math.log(self.midpoint_)))

    def _check_fitted(self) -> None:
        if not hasattr(self, "asymptote_"):
            raise RuntimeError(f"{type(self).__name__} has not been fitted: call fit() first")

    def _solve(self, compute: ArrayLike, performance: ArrayLike, sample_weight: ArrayLike | None) -> None:
        from scipy.optimize import least_squares

        c, y = observations(compute, performance, x_name="compute", y_name="performance")
        w = np.ones_like(y) if sample_weight is None else np.array(sample_weight, dtype=float)
        self._check_data(c, y, w)
        used = (c >= self.min_compute) & (w > 0)
        if used.sum() < MINIMUM_POINTS:
            raise ValueError(
                f"compute must hold at least {MINIMUM_POINTS} points with a weight at or above "
                f"min_compute = {self.min_compute:g}, got {used.sum()}"
            )
        self._all_compute, self._all_performance, self._all_weights = c, y, w
        self._compute, self._performance, self._weights = c[used], y[used], w[used]
        self.initial_ = float(y[0]) if self.initial is None else float(self.initial)
        self.points_ = int(used.sum())
        self._log_midpoints = (
            math.log(self._compute.min() / MIDPOINT_MARGIN),
            math.log(self._compute.max() * MIDPOINT_MARGIN),
        )
        self._regions: dict[float, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

        log_midpoints = np.linspace(*self._log_midpoints, 65)
        exponents, costs = self._best_exponents(log_midpoints)
        root = np.sqrt(self._weights)

        def residual(theta: np.ndarray) -> np.ndarray:
            share = _share(self._compute, *theta)
            return root * (self._performance - self.initial_ - self._gains(share)[0] * share)

        low, high = np.array([EXPONENTS, self._log_midpoints]).T
        start = np.clip([exponents[costs.argmin()], log_midpoints[costs.argmin()]], low, high)
        found = least_squares(residual, start, bounds=(low, high), xtol=1e-15, ftol=1e-15, gtol=1e-15)
        best = found.x if 2 * found.cost < costs.min() else start
        share = _share(self._compute, *best)
        gain, sse, _ = self._gains(share)
        self.exponent_, self.midpoint_ = float(best[0]), math.exp(best[1])
        self.asymptote_, self.sse_ = self.initial_ + float(gain), float(sse)

    def _check_data(self, c: np.ndarray, y: np.ndarray, w: np.ndarray) -> None:
        falls = np.flatnonzero(np.diff(c) < 0)
        if len(falls):
            at = falls[0] + 1
            raise ValueError(
                f"compute must not decrease (cumulative, in one unit, runs sorted together), got {c[at]:g} after "
                f"{c[at - 1]:g} at position {at}"
            )
        outside = np.flatnonzero((y < 0) | (y > self.max_asymptote))
        if len(outside):
            raise ValueError(
                f"performance must be in [0, max_asymptote = {self.max_asymptote:g}], got {y[outside[0]]:g} at "
                f"position {outside[0]}"
            )
        if w.shape != y.shape:
            raise ValueError(f"sample_weight must be one weight per performance, {len(y)}, got shape {w.shape}")
        wrong = np.flatnonzero(~np.isfinite(w) | (w < 0))
        if len(wrong):
            raise ValueError(f"sample_weight must be finite and >= 0, got {w[wrong[0]]:g} at position {wrong[0]}")

    def _gains(self, share: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The best A - R0 with A <= A_max, its sum of squares, and sum w f^2, for shares f of shape (..., n)."""
        rise = self._performance - self.initial_
        curvature = (self._weights * share**2).sum(axis=-1)
        gain = np.minimum((self._weights * share * rise).sum(axis=-1) / curvature, self.max_asymptote - self.initial_)
        residual = rise - gain[..., None] * share
        return gain, (self._weights * residual**2).sum(axis=-1), curvature

    def _cost(self, exponents: np.ndarray, log_midpoints: np.ndarray) -> np.ndarray:
        return self._gains(_share(self._compute, exponents[:, None], log_midpoints[:, None]))[1]

    def _best_exponents(self, log_midpoints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best B for every C_mid, and its sum of squares: a grid, then golden sections, all C_mid at once."""
        grid = np.linspace(*EXPONENTS, 33)
        costs = np.array([self._cost(np.full_like(log_midpoints, b), log_midpoints) for b in grid])
        at = costs.argmin(axis=0)
        low, high = grid[np.maximum(at - 1, 0)], grid[np.minimum(at + 1, len(grid) - 1)]
        ratio = (math.sqrt(5) - 1) / 2
        for _ in range(32):
            left, right = high - ratio * (high - low), low + ratio * (high - low)
            better = self._cost(left, log_midpoints) < self._cost(right, log_midpoints)
            low, high = np.where(better, low, left), np.where(better, right, high)
        middle = (low + high) / 2
        inner, outer = self._cost(middle, log_midpoints), costs.min(axis=0)
        return np.where(inner <= outer, middle, grid[at]), np.minimum(inner, outer)

    def _region(self, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """B, log C_mid and A of curves that cover the boundary of {SSE <= SSE_min + F s^2}, the best one among them."""
        if level in self._regions:
            return self._regions[level]
        from scipy.stats import f as fisher

        degrees = self.points_ - 3
        limit = self.sse_ * (1 + float(fisher.ppf(level, 1, degrees)) / degrees)
        best = self.exponent_, math.log(self.midpoint_), self.asymptote_
        log_midpoints, exponents = self._midpoints_within(limit)
        curves = [np.array([value]) for value in best]
        if len(log_midpoints):
            low = self._exponent_edge(exponents, EXPONENTS[0], log_midpoints, limit)
            high = self._exponent_edge(exponents, EXPONENTS[1], log_midpoints, limit)
            b = np.linspace(low, high, 25).ravel()
            m = np.tile(log_midpoints, 25)
            share = _share(self._compute, b[:, None], m[:, None])
            gain, sse, curvature = self._gains(share)
            # Along A the sum of squares is a parabola, which A_max may cut on its rising or on its falling side.
            free = (self._weights * share * (self._performance - self.initial_)).sum(axis=-1) / curvature
            sse = sse - curvature * (gain - free) ** 2
            half = np.sqrt(np.maximum(limit - sse, 0) / curvature)
            top = self.max_asymptote - self.initial_
            upper, lower = np.minimum(free + half, top), np.minimum(free - half, gain)
            for index, values in enumerate((b, m)):
                curves[index] = np.concatenate([curves[index], values, values])
            curves[2] = np.concatenate([curves[2], self.initial_ + upper, self.initial_ + lower])
        self._regions[level] = curves[0], curves[1], curves[2]
        return self._regions[level]

    def _midpoints_within(self, limit: float) -> tuple[np.ndarray, np.ndarray]:
        """Values of log C_mid that cover those with SSE <= limit for some B, and the best B of each."""
        (low, high), best = self._log_midpoints, math.log(self.midpoint_)
        for _ in range(12):
            grid = np.unique(np.concatenate([np.linspace(low, best, 33), np.linspace(best, high, 33)]))
            exponents, costs = self._best_exponents(grid)
            within = np.flatnonzero(costs <= limit)
            if not len(within):
                break
            first, last = within[0], within[-1]
            if len(within) > len(grid) / 2:
                break
            low, high = grid[max(first - 1, 0)], grid[min(last + 1, len(grid) - 1)]
        return grid[within], exponents[within]

    def _exponent_edge(self, inside: np.ndarray, end: float, log_midpoints: np.ndarray, limit: float) -> np.ndarray:
        """Between `inside` and `end`, the B at which the sum of squares passes the limit, by bisection."""
        outside = np.full_like(inside, end)
        inside = np.where(self._cost(outside, log_midpoints) <= limit, end, inside)
        for _ in range(30):
            middle = (inside + outside) / 2
            within = self._cost(middle, log_midpoints) <= limit
            inside, outside = np.where(within, middle, inside), np.where(within, outside, middle)
        return inside


@dataclass(frozen=True)
class RecipeComparison:
    """How two recipes differ.

    `verdict` is "asymptote", "efficiency" or "indistinguishable"; `better` is "a", "b" or None;
    `asymptote_difference` is A_a - A_b; `compute_ratio` is the compute of a over that of b at
    `performance`, halfway from the higher R0 to the lower A; `identified` says whether both asymptotes are.
    """

    verdict: Literal["asymptote", "efficiency", "indistinguishable"]
    better: Literal["a", "b"] | None
    asymptote_difference: float
    compute_ratio: float
    performance: float
    identified: bool


def compare_recipes(
    fit_a: ComputePerformanceFit, fit_b: ComputePerformanceFit, margin: float = 0.02
) -> RecipeComparison:
    """Whether two recipes differ in the ceiling, only in the compute on the way there, or in neither.

    The ceilings differ if both are identified, their 95 % intervals are disjoint and they are more than `margin`
    apart. Otherwise efficiency differs if the 95 % intervals of the compute at a common performance are disjoint.

    Args:
        fit_a: fitted, in the same unit of compute and metric as `fit_b`.
        fit_b: fitted.
        margin: smallest difference of asymptotes that counts, >= 0. Default 0.02, the study's margin between
            runs of one recipe.

    Raises:
        RuntimeError: one has not been fitted.
        ValueError: margin < 0.

    >>> compute = np.geomspace(500, 20000, 40)
    >>> slow, fast = (
    ...     ComputePerformanceFit(initial=0.3).fit(compute, sigmoid_curve(compute, 0.61, 1.9, middle, 0.3))
    ...     for middle in (4000, 2000)
    ... )
    >>> report = compare_recipes(slow, fast)
    >>> report.verdict, report.better, round(report.compute_ratio, 3)
    ('efficiency', 'b', 2.0)
    """
    check_arguments({"margin": Range(low=0)}, margin=margin)
    (low_a, high_a, known_a), (low_b, high_b, known_b) = (fit.asymptote_interval() for fit in (fit_a, fit_b))
    difference = fit_a.asymptote_ - fit_b.asymptote_
    common = (max(fit_a.initial_, fit_b.initial_) + min(fit_a.asymptote_, fit_b.asymptote_)) / 2
    needed_a, needed_b = fit_a.compute_for(common), fit_b.compute_for(common)
    identified = known_a and known_b
    verdict: Literal["asymptote", "efficiency", "indistinguishable"] = "indistinguishable"
    better: Literal["a", "b"] | None = None
    if identified and abs(difference) > margin and (low_a > high_b or low_b > high_a):
        verdict, better = "asymptote", "a" if difference > 0 else "b"
    else:
        (first_a, last_a), (first_b, last_b) = (_compute_interval(fit, common) for fit in (fit_a, fit_b))
        if last_a < first_b or last_b < first_a:
            verdict, better = "efficiency", "a" if last_a < first_b else "b"
    ratio = needed_a / needed_b if 0 < needed_b < math.inf else math.nan
    return RecipeComparison(verdict, better, difference, ratio, common, identified)


def _compute_for(performance: float, initial: float, asymptote: Any, exponent: Any, log_midpoint: Any) -> Any:
    done, left = performance - initial, np.asarray(asymptote) - performance
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        needed = np.exp(log_midpoint + np.log(done / left) / exponent) if done > 0 else np.zeros_like(left)
    return np.where((done > 0) & (left <= 0), math.inf, needed)


def _compute_interval(fit: ComputePerformanceFit, performance: float) -> tuple[float, float]:
    exponents, log_midpoints, asymptotes = fit._region(0.95)
    needed = _compute_for(performance, fit.initial_, asymptotes, exponents, log_midpoints)
    return float(needed.min()), float(needed.max())


def read_csv(path: str | Path, x: str, y: str) -> tuple[list[float], list[float]]:
    r"""Two columns of numbers of a CSV file with a header line.

    Rows with nothing in column `y`, which logs write for steps without an evaluation, are left out.

    Args:
        path: the file, UTF-8.
        x: name of the first column, such as gpu_hours.
        y: name of the second column, such as pass_rate.

    Raises:
        OSError: the file cannot be read.
        ValueError: no such column, or a cell that is no number; the message names file, line and column.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "runs.csv")
    ...     _ = path.write_text("step,gpu_hours,pass_rate\n1,10,0.3\n2,20,\n3,30,0.4\n")
    ...     read_csv(path, "gpu_hours", "pass_rate")
    ([10.0, 30.0], [0.3, 0.4])
    """
    xs: list[float] = []
    ys: list[float] = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            header = rows.fieldnames or []
            for name in (x, y):
                if name not in header:
                    hint = nearest(name, header) if header else " (the file is empty)"
                    raise ValueError(f"{path} has no column {name!r}{hint}")
            for row in rows:
                if not (row[y] or "").strip():
                    continue
                for name, values in ((x, xs), (y, ys)):
                    try:
                        values.append(float(row[name] or ""))
                    except ValueError:
                        raise ValueError(
                            f"{path}, line {rows.line_num}: {name} must be a number, got {row[name] or ''!r}"
                        ) from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV file in UTF-8: {error}") from error
    if not xs:
        raise ValueError(f"{path} has no row with a value of {y!r}")
    return xs, ys


def _check_compute(compute: ArrayLike) -> None:
    wrong = [value for value in np.ravel(np.asarray(compute, dtype=float)) if not value > 0]
    if wrong:
        raise ValueError(f"compute must be > 0, got {wrong[0]:g}")


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
