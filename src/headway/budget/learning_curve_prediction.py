r"""Accuracy against the size of the training set, predicted from a prefix, with a point at which to stop.

    A_l(x) = c - a x^(-b),   a >= 0,  b > 0:   the trend of level l, fitted to the first l observations
    alpha_l = c:                               its asymptote; alpha_3, alpha_4, ... is the backbone

Early trends are erratic. The working level is where the backbone has come to rest, the prediction
level the first one from there whose asymptote is a possible score; from then on each trend is anchored at
the asymptote of the one before it.

Source: "Modeling of learning curves with applications to pos tagging", Vilares Ferro, Darriba Bilbao, Ribadas
Pena, arXiv 2402.02515.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.numerics.fitting import fit_power_law, fit_separable, observations
from headway.plots import Panel

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["Comparison", "ExponentialPattern", "LearningCurve", "NotConvergedWarning", "PowerPattern", "Trend"]

# nu, as a share of the highest possible score, when none is given: the paper's 4e-5 points per word at 100,000 words.
DEFAULT_NU = 0.04
# Weight of the anchor against one observation.
ANCHOR_WEIGHT = 1.0
# Differences of two trends below this share of the score are rounding, not a crossing.
ROUNDING = 1e-9

_POSITIVE = Range(low=0, low_open=True)
_LEVEL = {"level": Range(low=0, high=1, low_open=True, high_open=True)}


class NotConvergedWarning(UserWarning):
    """A prediction was asked for before the prediction level."""


@dataclass(frozen=True)
class PowerPattern:
    """y = c - a x^(-b), a >= 0, b > 0: increasing, concave, bounded by c.

    >>> trend = PowerPattern.fit([1, 4, 16, 64], [50, 70, 80, 85])
    >>> round(trend.asymptote, 6), round(trend(256), 6), round(trend.inverse(87.5), 3)
    (90.0, 87.5, 256.0)
    """

    a: float
    b: float
    c: float
    sse: float = 0.0

    @classmethod
    def fit(cls, x: ArrayLike, y: ArrayLike, anchor: float | None = None, weights: ArrayLike | None = None) -> Any:
        """Least squares; `anchor` is one more observation at x = infinity."""
        xs, ys = observations(x, y)
        at_infinity = None if anchor is None else (anchor, ANCHOR_WEIGHT)
        law = fit_power_law(xs, ys, a=(-math.inf, 0.0), b=cls.rates(xs), anchor=at_infinity, weights=weights)
        return cls(max(-law.a, 0.0), law.b, law.c, law.sse)

    def __call__(self, x: ArrayLike) -> Any:
        """The score at `x` > 0: a float for a float, else an array."""
        value = self.c - self.a * np.asarray(x, dtype=float) ** -self.b
        return float(value) if np.ndim(x) == 0 else value

    @property
    def asymptote(self) -> float:
        """The limit for x to infinity."""
        return self.c

    def inverse(self, y: float) -> float:
        """The x at which the trend reaches `y`, infinity at or above the asymptote."""
        if y >= self.c:
            return math.inf
        return (self.a / (self.c - y)) ** (1 / self.b)

    @staticmethod
    def rates(x: np.ndarray) -> tuple[float, float]:
        """Bounds of b: from nearly a straight line in log x to one that is over at the second x."""
        return 1e-3, 20.0

    @staticmethod
    def shape(x: np.ndarray, b: Any, scale: float) -> np.ndarray:
        """The falling part at rate b, 1 at x = scale."""
        return np.exp(-b * np.log(x / scale))


@dataclass(frozen=True)
class ExponentialPattern:
    """y = c - a exp(-b x), a >= 0, b > 0: for scores that saturate faster than a power law.

    >>> trend = ExponentialPattern.fit([0.5, 1, 2, 3], 90 - 40 * np.exp(-np.array([0.5, 1, 2, 3])))
    >>> round(trend.a, 6), round(trend.b, 6), round(trend.c, 6)
    (40.0, 1.0, 90.0)
    """

    a: float
    b: float
    c: float
    sse: float = 0.0

    @classmethod
    def fit(cls, x: ArrayLike, y: ArrayLike, anchor: float | None = None, weights: ArrayLike | None = None) -> Any:
        """Least squares; `anchor` is one more observation at x = infinity."""
        xs, ys = observations(x, y)
        first = xs.min()
        distance = xs - first
        w = np.ones_like(ys) if weights is None else np.asarray(weights, dtype=float)
        if anchor is not None:
            distance, ys, w = np.append(distance, math.inf), np.append(ys, anchor), np.append(w, ANCHOR_WEIGHT)

        def design(log_b: float) -> np.ndarray:
            falling = np.exp(-math.exp(log_b) * distance)
            return np.stack([-falling, np.ones_like(falling)], axis=1)

        slowest, fastest = cls.rates(xs)
        found = fit_separable(
            design,
            ys,
            (math.log(slowest), math.log(fastest)),
            weights=w,
            lower=(0.0, -math.inf),
            upper=(math.inf, math.inf),
        )
        b = math.exp(found.theta)
        return cls(found.coefficients[0] * math.exp(b * first), b, found.coefficients[1], found.sse)

    def __call__(self, x: ArrayLike) -> Any:
        """The score at `x` > 0: a float for a float, else an array."""
        value = self.c - self.a * np.exp(-self.b * np.asarray(x, dtype=float))
        return float(value) if np.ndim(x) == 0 else value

    @property
    def asymptote(self) -> float:
        """The limit for x to infinity."""
        return self.c

    def inverse(self, y: float) -> float:
        """The x at which the trend reaches `y`: infinity at or above the asymptote, 0 at or below c - a."""
        if y >= self.c:
            return math.inf
        return max(math.log(self.a / (self.c - y)) / self.b, 0.0) if self.a > 0 else 0.0

    @staticmethod
    def rates(x: np.ndarray) -> tuple[float, float]:
        """Bounds of b: from nearly a straight line to one that is over at the second x."""
        return 1e-3 / float(x.max()), 20.0 / float(x.min())

    @staticmethod
    def shape(x: np.ndarray, b: Any, scale: float) -> np.ndarray:
        """The falling part at rate b, 1 at x = scale."""
        return np.exp(-b * (x - scale))


PATTERNS: dict[str, Any] = {"power": PowerPattern, "exponential": ExponentialPattern}


@dataclass(frozen=True)
class Trend:
    """What is known at one level: the observation, the trend fitted up to it, and where that stands.

    `crossing` is q_l, `layer` chi_l; `working`, `prediction` and `converged` say that the level has
    reached the working level, the prediction level and the stopping criterion.
    """

    level: int
    x: float
    y: float
    a: float
    b: float
    asymptote: float
    sse: float
    crossing: float
    layer: float
    working: bool
    prediction: bool
    converged: bool


class Comparison(NamedTuple):
    """`better`: the first curve is predicted above the second, by `margin`; `comparable`: both predict already."""

    better: bool
    margin: float
    comparable: bool


class LearningCurve:
    """The score that more training data will give, from the scores on the first portions of it.

        A_l = argmin over a >= 0, b > 0, c of sum_{i <= l} (y_i - c + a x_i^(-b))^2  [+ (c - alpha_{l-1})^2 if l > p]
        omega = min{ l : |alpha_{i+1} - alpha_i| <= nu (x_{i+1} - x_i) / x_i  for i = l ... l + lam }
        p = min{ l >= omega : alpha_l <= upper }
        chi_l = alpha_l - A_l(q_l),   q_l = the last crossing of A_l and A_{l-1} beyond x_1, or x_l
        converged: chi_l <= tau for some l >= p

    omega is the working level, known lam + 1 observations after it; p the prediction level. Beyond q_l no
    prediction lies further than chi_l from the asymptote. Average the scores of several folds or repeats: noise makes b
    small and the asymptote too high.

    Args:
        pattern: "power" (the equations above) or "exponential" (exp(-b x) for x^(-b)). Default "power".
        upper: highest possible score, > 0. Default 100, for percent.
        nu: points of score that the asymptote may move per doubling of x (more exactly per relative growth), > 0.
            Default None: 4 % of `upper`, which at 100,000 words is the paper's 4e-5 per word.
        lam: how many further levels have to be at rest, >= 1. Default 5 (from the paper).
        tau: points of score from the asymptote at which to stop, > 0. Default None: never converged.
        anchor: anchor the trends from the prediction level on. Default True.
        min_level: level of the first trend, >= 3. Default 3.

    Raises:
        ValueError: an argument is out of its range.

    Source: arXiv 2402.02515. The paper states nu per word of text; relative growth is independent of the
    unit of x. Its slow-down exponent is 1 here. Anchor (weight 1), crossing and layer are reconstructed from
    the published terms.

    >>> x = np.arange(500, 10001, 500)
    >>> curve = LearningCurve(tau=5).fit(x, 96 - 400 * x**-0.5)
    >>> round(curve.predict(1e6), 3), round(curve.asymptote_, 3), curve.prediction_level_, curve.converged_
    (95.6, 96.0, 3, True)
    >>> round(curve.required_size(95), -1)
    160000.0
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "pattern": OneOf(*PATTERNS),
        "upper": _POSITIVE,
        "nu": Range(low=0, low_open=True, optional=True),
        "lam": Range(low=1, integer=True),
        "tau": Range(low=0, low_open=True, optional=True),
        "anchor": OneOf(True, False),
        "min_level": Range(low=3, integer=True),
    }

    def __init__(
        self,
        pattern: str = "power",
        upper: float = 100.0,
        nu: float | None = None,
        lam: int = 5,
        tau: float | None = None,
        anchor: bool = True,
        min_level: int = 3,
    ) -> None:
        self.pattern = pattern
        self.upper = upper
        self.nu = nu
        self.lam = lam
        self.tau = tau
        self.anchor = anchor
        self.min_level = min_level
        check_arguments(self.constraints, **self._options())
        self._forget()

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.constraints}

    def _forget(self) -> None:
        self._x: list[float] = []
        self._y: list[float] = []
        # Trends by level: as fitted freely, and from the prediction level on as reported.
        self._trends: dict[int, Any] = {}
        self._layers: dict[int, tuple[float, float]] = {}
        self._working: int | None = None
        self._prediction: int | None = None

    def fit(self, xs: ArrayLike, ys: ArrayLike) -> LearningCurve:
        """Forget what was added and add these observations.

        Args:
            xs: n >= `min_level` sizes > 0, strictly increasing.
            ys: n scores <= `upper`.

        Raises:
            ValueError: the data are none of that.
        """
        x, y = observations(xs, ys, minimum=self.min_level, x_name="xs", y_name="ys")
        for i in range(len(x)):
            self._check(float(x[i]), float(y[i]), float(x[i - 1]) if i else 0.0)
        self._forget()
        for size, score in zip(x.tolist(), y.tolist(), strict=True):
            self.add(size, score)
        return self

    def add(self, x: float, y: float) -> Trend | None:
        """Add one observation; the trend of its level, or None while there are too few for one.

        Args:
            x: size of the training set, larger than the last one.
            y: score on the held-out set, the same for all x.

        Raises:
            ValueError: x does not increase or y is no possible score.
        """
        self._check(x, y, self._x[-1] if self._x else 0.0)
        self._x.append(float(x))
        self._y.append(float(y))
        level = len(self._x)
        if level < self.min_level:
            return None
        self._trends[level] = self._fit_trend(level)
        self._advance()
        return self.levels_[-1]

    def _check(self, x: float, y: float, last: float) -> None:
        check_arguments({"x": _POSITIVE, "y": Range(high=self.upper)}, x=x, y=y)
        if x <= last:
            raise ValueError(f"x must increase strictly, got {x:g} after {last:g}")

    def _fit_trend(self, level: int) -> Any:
        """Anchored if the level lies beyond the prediction level."""
        anchor = None
        if self.anchor and self._prediction is not None and level > self._prediction:
            anchor = self._trends[level - 1].asymptote
        x, y = self._x[:level], self._y[:level]
        pattern = PATTERNS[self.pattern]
        if min(y) == max(y) and anchor in (None, y[0]):
            return pattern(0.0, 1.0, y[0])
        return pattern.fit(x, y, anchor=anchor)

    def _advance(self) -> None:
        """Look for the working and the prediction level, and fit again what the latter changes."""
        last, lam = len(self._x), self.lam
        if self._working is None:
            candidate = last - lam - 1
            if candidate < self.min_level or not all(self._at_rest(i) for i in range(candidate, candidate + lam + 1)):
                return
            self._working = candidate
        if self._prediction is None:
            within = [i for i in range(self._working, last + 1) if self._trends[i].asymptote <= self.upper]
            if not within:
                return
            self._prediction = within[0]
            self._layers.clear()
            if self.anchor:
                for level in range(self._prediction + 1, last + 1):
                    self._trends[level] = self._fit_trend(level)

    def _at_rest(self, level: int) -> bool:
        nu = self.nu or DEFAULT_NU * self.upper
        moved = abs(self._trends[level + 1].asymptote - self._trends[level].asymptote)
        growth = (self._x[level] - self._x[level - 1]) / self._x[level - 1]
        return bool(moved <= nu * growth)

    def _layer(self, level: int) -> tuple[float, float]:
        """(q_l, chi_l)."""
        if level not in self._layers:
            trend = self._trends[level]
            crossing = self._x[level - 1]
            if level - 1 in self._trends:
                crossing = self._last_crossing(trend, self._trends[level - 1], crossing)
            self._layers[level] = crossing, abs(trend(crossing) - trend.asymptote)
        return self._layers[level]

    def _last_crossing(self, trend: Any, before: Any, default: float) -> float:
        from scipy.optimize import brentq

        grid = np.geomspace(self._x[0], 1e6 * default, 2000)
        difference = trend(grid) - before(grid)
        clear = np.flatnonzero(np.abs(difference) > ROUNDING * max(abs(y) for y in self._y))
        changes = np.flatnonzero(np.diff(np.sign(difference[clear])) != 0)
        if not len(changes):
            return default
        low, high = grid[clear[changes[-1]]], grid[clear[changes[-1] + 1]]
        return float(brentq(lambda x: trend(x) - before(x), low, high))

    @property
    def levels_(self) -> list[Trend]:
        """The record of every level so far."""
        records = []
        for level, trend in self._trends.items():
            crossing, layer = self._layer(level)
            predicts = self._prediction is not None and level >= self._prediction
            records.append(
                Trend(
                    level=level,
                    x=self._x[level - 1],
                    y=self._y[level - 1],
                    a=trend.a,
                    b=trend.b,
                    asymptote=trend.asymptote,
                    sse=trend.sse,
                    crossing=crossing,
                    layer=layer,
                    working=self._working is not None and level >= self._working,
                    prediction=predicts,
                    converged=predicts and self.tau is not None and layer <= self.tau,
                )
            )
        return records

    @property
    def trend_level_(self) -> int:
        """The level of the latest trend: the number of observations."""
        if not self._trends:
            raise RuntimeError(f"{type(self).__name__} has not been fitted: call fit() first")
        return len(self._x)

    @property
    def trend_(self) -> Any:
        """The latest trend: a pattern with a, b, c and the sum of squares."""
        return self._trends[self.trend_level_]

    @property
    def asymptote_(self) -> float:
        """alpha_l of the latest level."""
        return float(self.trend_.asymptote)

    @property
    def backbone_(self) -> list[float]:
        """alpha_l of every level."""
        return [float(trend.asymptote) for trend in self._trends.values()]

    @property
    def monotone_(self) -> bool:
        """Whether the backbone has not risen since the working level.

        Then the layer also bounds how far later trends will move beyond the crossing; otherwise it bounds
        only the distance of this trend from its own asymptote. False before the working level.
        """
        if self._working is None:
            return False
        settled = [trend.asymptote for level, trend in self._trends.items() if level >= self._working]
        return bool((np.diff(settled) <= ROUNDING * max(abs(y) for y in self._y)).all())

    @property
    def working_level_(self) -> int | None:
        """omega, or None while the backbone is not at rest."""
        return self._working

    @property
    def prediction_level_(self) -> int | None:
        """p, or None while predictions are not to be trusted."""
        return self._prediction

    @property
    def layer_(self) -> float:
        """chi_l of the latest level, in points of score."""
        return self._layer(self.trend_level_)[1]

    @property
    def converged_(self) -> bool:
        """Whether some level from the prediction level on has come within `tau` of its asymptote."""
        return any(record.converged for record in self.levels_)

    def predict(self, x: ArrayLike) -> Any:
        """The score at size `x` > 0: a float for a float, else an array.

        Raises:
            RuntimeError: there are too few observations for a trend.
            ValueError: a size is not > 0.

        Warns:
            NotConvergedWarning: the prediction level is not reached.
        """
        trend = self.trend_
        wrong = [value for value in np.ravel(np.asarray(x, dtype=float)) if not value > 0]
        if wrong:
            raise ValueError(f"x must be > 0, got {wrong[0]:g}")
        if self._prediction is None:
            warnings.warn(
                f"the prediction level is not reached after {len(self._x)} observations", NotConvergedWarning, 2
            )
        return trend(x)

    def interval(self, x: ArrayLike, level: float = 0.95) -> tuple[Any, Any]:
        """The profile-likelihood interval of the trend (not of a noisy score) at size `x` > 0.

        The extremes at `x` over all b, c and a (of either sign) with sse <= sse_min (1 + F / d), where d = l - 3
        (l - 2 with an anchor) and F is the `level` quantile of Fisher's F(1, d). Scores of one held-out set
        share its sampling error, which this cannot see.

        Args:
            x: a number or an array.
            level: confidence in (0, 1). Default 0.95.

        Raises:
            ValueError: there are as many parameters as observations.
        """
        check_arguments(_LEVEL, level=level)
        from scipy.stats import f as fisher

        value = self.predict(x)
        last = len(self._x)
        sizes, scores = np.array(self._x), np.array(self._y)
        anchored = self.anchor and self._prediction is not None and last > self._prediction
        degrees = last - 3 + anchored
        if degrees < 1:
            raise ValueError(f"interval needs at least 4 observations, got {last}")
        anchor = self._trends[last - 1].asymptote if anchored else None
        limit = self.trend_.sse * (1 + float(fisher.ppf(level, 1, degrees)) / degrees)
        ends = _profile(self.trend_, sizes, scores, anchor, limit, np.ravel(np.asarray(x, dtype=float)))
        low, high = np.minimum(ends[0], np.ravel(value)), np.maximum(ends[1], np.ravel(value))
        if np.ndim(x) == 0:
            return float(low[0]), float(high[0])
        return low.reshape(np.shape(x)), high.reshape(np.shape(x))

    def required_size(self, score: float) -> float:
        """The size at which the trend reaches `score`; infinity at or above the asymptote."""
        return float(self.trend_.inverse(score))

    def compare(self, other: LearningCurve, at: float) -> Comparison:
        """Which of two curves will be higher at size `at`; comparable only if both are past their prediction level.

        >>> x = np.arange(500, 10001, 500)
        >>> steep, flat = (LearningCurve().fit(x, c - a * x**-0.5) for a, c in ((400, 96), (100, 90)))
        >>> steep.compare(flat, at=1e6).better
        True
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            margin = self.predict(at) - other.predict(at)
        return Comparison(margin > 0, float(margin), None not in (self.prediction_level_, other.prediction_level_))

    def panels(self) -> list[Panel]:
        """Observations with the trend and its 95 % interval, and the asymptotes level by level."""
        trend = self.trend_
        grid = np.geomspace(self._x[0], 4 * self._x[-1], 80)
        x = grid.tolist()
        curves: dict[str, tuple[list[float], list[float]]] = {}
        if len(self._x) > 3:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotConvergedWarning)
                low, high = self.interval(grid)
            curves = {"95 %, low": (x, low.tolist()), "95 %, high": (x, high.tolist())}
        styles: dict[str, Any] = dict.fromkeys(curves, "faint")
        curves["trend"] = (x, trend(grid).tolist())
        curves["observed"] = (list(self._x), list(self._y))
        levels = [float(level) for level in self._trends]
        marks = [] if self._prediction is None else [float(self._prediction)]
        return [
            Panel(
                "Score and trend",
                "training examples",
                "score",
                curves,
                log_x=True,
                styles={**styles, "observed": "points"},
            ),
            Panel("Asymptote by level", "level", "score", {"asymptote": (levels, self.backbone_)}, marks=marks),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Options and observations as plain numbers; they determine everything else."""
        return {"options": self._options(), "x": list(self._x), "y": list(self._y)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LearningCurve:
        """The curve that `to_dict` described."""
        curve = cls(**values["options"])
        for x, y in zip(values["x"], values["y"], strict=True):
            curve.add(x, y)
        return curve


def _profile(
    trend: Any, x: np.ndarray, y: np.ndarray, anchor: float | None, limit: float, at: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Extremes at `at` of all trends with a sum of squares within `limit`; (inf, -inf) if none is."""
    target = y if anchor is None else np.append(y, anchor)
    slowest, fastest = trend.rates(x)
    low, high = math.log(slowest), math.log(fastest)
    best = min(max(math.log(trend.b), low), high)
    # The set of b may be far narrower than any fixed grid: look closer until half of the grid lies in it.
    for _ in range(12):
        grid = np.unique(np.concatenate([np.linspace(low, best, 65), np.linspace(best, high, 65)]))
        b = np.exp(grid)[:, None]
        falling = trend.shape(x, b, x[0])  # (rates, n)
        if anchor is not None:
            falling = np.append(falling, np.zeros((len(b), 1)), axis=1)
        # For a given b the trend is a straight line in the falling part: mean, slope and their variances.
        centre, middle = falling.mean(axis=1, keepdims=True), target.mean()
        spread = ((falling - centre) ** 2).sum(axis=1, keepdims=True)
        slope = ((falling - centre) * (target - middle)).sum(axis=1, keepdims=True) / spread
        spare = limit - ((target - middle - slope * (falling - centre)) ** 2).sum(axis=1, keepdims=True)
        within = np.flatnonzero(spare >= 0)
        if not len(within) or len(within) > len(grid) / 2:
            break
        low, high = grid[max(within[0] - 1, 0)], grid[min(within[-1] + 1, len(grid) - 1)]
    distance = trend.shape(at, b[within], x[0]) - centre[within]
    half = np.sqrt(spare[within] * (1 / len(target) + distance**2 / spread[within]))
    line = middle + slope[within] * distance
    return (line - half).min(axis=0, initial=math.inf), (line + half).max(axis=0, initial=-math.inf)
