r"""A law for the whole loss curve of one model under any learning-rate schedule.

    L(s) = L0 + A S1(s)^(-alpha) - C S2(s)

    S1(s) = sum_{i<=s} eta_i                                     forward area: progress
    m_i = lam m_{i-1} + (eta_{i-1} - eta_i),   m_0 = 0
    S2(s) = sum_{i<=s} m_i                                       annealing area: what decaying the rate has released

One or two short runs fix the four numbers; then the loss at any step under any other schedule follows: cosine against
constant with a late decay, the length of the decay, the worth of more steps. The model, the data and the batch size
stay those of the fitted runs.

Source: "Scaling Law with Learning Rate Annealing", Tissue, Wang, Wang, arXiv 2408.11029.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from headway.budget.annealing_fit import PARAMETERS, Curve, Problem, law_value, thin
from headway.budget.training_run import FEWEST_POINTS, Run, checked_rates, checked_steps, warmup_length
from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.plots import Panel, downsample

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["AnnealingLaw", "Run", "annealing_area", "best_decay_fraction", "forward_area"]

LAM_GRID = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
MOST_POINTS = 2000
SELECTION_POINTS = 400
REPLICATES = 100
REPLICATE_POINTS = 500
PIECE = 20_000
DECAYS = ("linear", "cosine", "1-sqrt")


def forward_area(lrs: ArrayLike) -> np.ndarray:
    """S1(s) = sum_{i<=s} eta_i for s = 1 ... T.

    Args:
        lrs: eta_1 ... eta_T >= 0, the rate of every optimizer step (not only of logged ones).

    Raises:
        ValueError: a rate is negative or not finite, or there is none.

    >>> forward_area([1.0, 1.0, 0.5]).tolist()
    [1.0, 2.0, 2.5]
    """
    return np.cumsum(checked_rates(lrs))


def annealing_area(lrs: ArrayLike, lam: float = 0.999, warmup_steps: int = 0) -> np.ndarray:
    """S2(s) = sum_{i<=s} m_i for s = 1 ... T, with m_i = lam m_{i-1} + (eta_{i-1} - eta_i) and m_0 = 0.

    The first difference, and those up to the first step after the warm-up, count as zero.

    Args:
        lrs: eta_1 ... eta_T >= 0, the rate of every optimizer step.
        lam: decay of the momentum m in [0, 1). Default 0.999, for runs of many thousand steps; 1 / (1 - lam) should
            be well below the length of a decay.
        warmup_steps: number of steps at the start whose rate is still below the peak.

    Raises:
        ValueError: an argument out of its range.

    >>> annealing_area([1.0, 1.0, 0.5, 0.5], lam=0.5).tolist()
    [0.0, 0.0, 0.5, 0.75]
    """
    check_arguments({"lam": LAM, "warmup_steps": Range(low=0, integer=True)}, lam=lam, warmup_steps=warmup_steps)
    rates = checked_rates(lrs)
    drops = -np.diff(rates, prepend=rates[0])
    drops[: warmup_steps + 1] = 0.0
    return np.cumsum(np.fromiter(accumulate(drops.tolist(), lambda m, drop: lam * m + drop), float, len(drops)))


LAM = Range(low=0, high=1, high_open=True)


class AnnealingLaw:
    r"""Predict a loss curve from the learning-rate schedule, after a fit to one or two runs.

        L(s) = L0 + A S1(s)^(-alpha) - C S2(s),   L0, A, alpha, C >= 0

    `fit` minimises sum Huber_delta(log L_observed - log L) over the points after each run's warm-up, at most 2000 of
    them, with L0 at most the largest loss. For fixed alpha the law is linear: a grid of alpha with non-negative least
    squares gives starts without a scale of their own, and a bounded trust-region method with the exact derivative
    polishes the best ones.

    `interval` is for a loss as the fitted ones were measured. It adds in quadrature the spread of the law, from a
    moving-block bootstrap of the log residuals along each curve (100 replicates, fixed seed, blocks of the square root
    of the number of points, each replicate fitted again at the same lam), and the quantiles of the log residuals. The
    law's own error on schedules unlike the fitted ones is not in it: on open curves of 25M- to 400M-parameter models,
    fitted to one cosine run each, the final losses of other schedules were 0.4 % off on average and 1 % at most. See
    `extrapolation`.

    Args:
        lam: lambda in [0, 1), or "auto" for the one of 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999 with the smallest
            objective, judged on about 400 points. Default 0.999, for runs of many thousand steps: on the open curves
            the error grew below 0.998. "auto" follows the fitted runs more closely and is the choice for short ones.
        warmup_steps: steps at the start below the peak, for every schedule, fitted or predicted. Default "auto": each
            schedule's own strictly rising start.
        warmup_area: "true" counts the warm-up's own rates in S1, "peak" counts them as the rate right after it.
            Default "true", which predicted the unseen schedules of the open curves better.
        huber_delta: where a log residual stops counting quadratically, > 0. Default 1e-3, the paper's.
        annealing: False holds C at 0, which leaves a power law in S1. Default True.

    Attributes:
        params_: L0, A, alpha, C.
        lam_: lambda of the fit.
        objective_: the minimum.
        annealing_identified_: whether a fitted run decays, without which nothing is known of C.

    Raises:
        ValueError: for an argument out of its range.

    Source: arXiv 2408.11029. Departures: the starts (the paper gives grids for losses and rates of its own scale);
    L0 may exceed the smallest loss, since under a decayed rate the loss falls below the constant-rate limit that L0
    is; the warm-up is left out of S2 and, by default, true in S1.

    >>> lrs = np.r_[np.full(300, 0.1), np.linspace(0.1, 0.01, 100)]
    >>> steps = np.arange(20, 401, 5)
    >>> curve = 2 + 1.5 * forward_area(lrs)**-0.5 - 0.3 * annealing_area(lrs, lam=0.95)
    >>> law = AnnealingLaw(lam=0.95).fit([Run(lrs, steps, curve[steps - 1])])
    >>> {name: round(value, 3) for name, value in law.params_.items()}
    {'L0': 2.0, 'A': 1.5, 'alpha': 0.5, 'C': 0.3}
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "warmup_area": OneOf("true", "peak"),
        "huber_delta": Range(low=0, low_open=True),
        "annealing": OneOf(True, False),
    }

    params_: dict[str, float]
    lam_: float
    objective_: float
    annealing_identified_: bool

    def __init__(
        self,
        lam: float | str = 0.999,
        warmup_steps: int | str = "auto",
        warmup_area: str = "true",
        huber_delta: float = 1e-3,
        annealing: bool = True,
    ) -> None:
        check_arguments(self.constraints, warmup_area=warmup_area, huber_delta=huber_delta, annealing=annealing)
        if lam != "auto" and not LAM.accepts(lam):
            raise ValueError(f"lam must be in [0, 1) or 'auto', got {lam!r}")
        if warmup_steps != "auto" and not Range(low=0, integer=True).accepts(warmup_steps):
            raise ValueError(f"warmup_steps must be a whole number >= 0 or 'auto', got {warmup_steps!r}")
        self.lam, self.warmup_steps, self.warmup_area = lam, warmup_steps, warmup_area
        self.huber_delta, self.annealing = huber_delta, annealing

    def fit(self, runs: Sequence[Run]) -> AnnealingLaw:
        """Fit the four numbers, and lambda where it is "auto", to all runs at once.

        Args:
            runs: at least one, together with at least 8 losses after the warm-ups. Without a decaying one C is 0.

        Raises:
            ValueError: no run, too few points, or a run with invalid values.
        """
        if isinstance(runs, Run) or not all(isinstance(run, Run) for run in runs) or not len(runs):
            raise ValueError(f"runs must be a sequence of at least one Run, got {type(runs).__name__}")
        raw = []
        for run in runs:
            rates, steps, losses = run.arrays()
            order = np.argsort(steps, kind="stable")
            steps, losses = steps[order], losses[order]
            kept = steps > self._warmup_of(rates)
            raw.append((rates, steps[kept], losses[kept]))
        count = sum(len(steps) for _, steps, _ in raw)
        if count < FEWEST_POINTS:
            raise ValueError(f"runs must hold at least {FEWEST_POINTS} losses after the warm-up, got {count}")
        # In one order whatever the caller's, so that sums, and with them the last bits, do not depend on it.
        raw.sort(key=lambda item: (len(item[1]), item[1].tolist(), item[2].tolist(), item[0].tolist()))
        raw = [item for item in raw if len(item[1])]
        if self.lam == "auto":
            # Starts and areas are shared work; a few hundred points tell one lambda from another.
            trials = [self._problem(raw, lam, SELECTION_POINTS / count)[0].solve(1)[1] for lam in LAM_GRID]
            self.lam_ = LAM_GRID[int(np.argmin(trials))]
        else:
            self.lam_ = float(self.lam)
        problem, self._curves = self._problem(raw, self.lam_, MOST_POINTS / count)
        x, self.objective_ = problem.solve()
        values = problem.unscaled(x)
        self.params_ = dict(zip(PARAMETERS, values.tolist(), strict=True))
        self.annealing_identified_ = any(np.abs(curve.S2).max() > 0 for curve in self._curves)
        self._replicates: np.ndarray | None = None
        return self

    def predict(self, lrs: ArrayLike, steps: ArrayLike | None = None) -> np.ndarray:
        """The loss after each of `steps` steps of a schedule.

        Args:
            lrs: eta_1 ... eta_T >= 0.
            steps: whole numbers in 1 ... T. Default: all of them. In the warm-up the law is not meant to hold.

        Warns:
            UserWarning: the schedule decays and no fitted run did: C is 0, and the loss comes out too high.

        Raises:
            RuntimeError: before `fit`.
            ValueError: a rate or step out of its range.
        """
        self._need_fit()
        S1, S2 = self._at(lrs, steps)
        if self.annealing and not self.annealing_identified_ and (np.abs(S2) > 0).any():
            warnings.warn(
                "the schedule decays, but all fitted runs have a constant rate and tell nothing about C; C = 0",
                stacklevel=2,
            )
        return law_value(np.array([self.params_[name] for name in PARAMETERS]), S1, S2)

    def interval(
        self, lrs: ArrayLike, steps: ArrayLike | None = None, level: float = 0.95
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end around `predict`, from the bootstrap that the class describes.

        Args:
            lrs: eta_1 ... eta_T >= 0.
            steps: whole numbers in 1 ... T. Default: all of them.
            level: in (0, 1). Default 0.95.

        Raises:
            RuntimeError: before `fit`.
            ValueError: an argument out of its range.
        """
        check_arguments({"level": Range(low=0, high=1, low_open=True, high_open=True)}, level=level)
        center = self.predict(lrs, steps)
        return self._bounds(*self._at(lrs, steps), center, level)

    def score(self, run: Run) -> float:
        """The coefficient of determination R^2 on a run's losses after its warm-up."""
        rates, steps, losses = run.arrays()
        kept = steps > self._warmup_of(rates)
        if kept.sum() < 2 or np.ptp(losses[kept]) == 0:
            raise ValueError(f"run must hold at least 2 different losses after the warm-up, got {int(kept.sum())}")
        residual = losses[kept] - self.predict(rates, steps[kept])
        return float(1 - (residual**2).sum() / ((losses[kept] - losses[kept].mean()) ** 2).sum())

    def extrapolation(self, lrs: ArrayLike) -> dict[str, float]:
        """The largest S1 and S2 of a schedule over the largest of the fitted points; above 1 is outside.

        The linear term of S2 promises too much for late, steep decays far above 1.
        """
        self._need_fit()
        areas = self._at(lrs, None)
        fitted = [max(float(getattr(curve, name).max()) for curve in self._curves) for name in ("S1", "S2")]
        ends = [float(area.max()) for area in areas]
        return {
            name: end / known if known > 0 else (math.inf if end > 0 else 0.0)
            for name, end, known in zip(("S1", "S2"), ends, fitted, strict=True)
        }

    def compare(self, schedules: Mapping[str, ArrayLike]) -> dict[str, dict[str, float]]:
        """The loss at the end of each schedule, lowest first.

        Args:
            schedules: name -> rates of every step.

        Returns:
            name -> `loss`, the ends `low` and `high` of its 95 % interval, and `S1`, `S2` of `extrapolation`.

        Raises:
            RuntimeError: before `fit`.
            ValueError: no schedule, or one with invalid rates.
        """
        if not schedules:
            raise ValueError("schedules must hold at least one schedule, got none")
        rows = {}
        for name, lrs in schedules.items():
            end = [len(checked_rates(lrs))]
            low, high = self.interval(lrs, end)
            loss = float(self.predict(lrs, end)[0])
            rows[name] = {"loss": loss, "low": float(low[0]), "high": float(high[0]), **self.extrapolation(lrs)}
        return dict(sorted(rows.items(), key=lambda row: row[1]["loss"]))

    def panels(self) -> list[Panel]:
        """One plot per fitted run: its losses, the law, and the ends of the 95 % interval."""
        self._need_fit()
        values = np.array([self.params_[name] for name in PARAMETERS])
        panels = []
        for number, curve in enumerate(self._curves, start=1):
            center = law_value(values, curve.S1, curve.S2)
            low, high = self._bounds(curve.S1, curve.S2, center, 0.95)
            panels.append(
                Panel(
                    f"Loss curve and fit{f', run {number}' if len(self._curves) > 1 else ''}",
                    "step",
                    "loss",
                    {
                        "measured": downsample(curve.steps, curve.losses),
                        "law": downsample(curve.steps, center),
                        "95 % low": downsample(curve.steps, low),
                        "95 % high": downsample(curve.steps, high),
                    },
                    log_x=True,
                    styles={"95 % low": "faint", "95 % high": "faint"},
                )
            )
        return panels

    def to_dict(self) -> dict[str, Any]:
        """Options, fitted numbers and fitted points as plain values for JSON."""
        self._need_fit()
        return {
            "options": {
                "lam": self.lam,
                "warmup_steps": self.warmup_steps,
                "warmup_area": self.warmup_area,
                "huber_delta": self.huber_delta,
                "annealing": self.annealing,
            },
            "params": dict(self.params_),
            "lam": self.lam_,
            "objective": self.objective_,
            "curves": [
                {name: getattr(curve, name).tolist() for name in ("steps", "losses", "S1", "S2")}
                for curve in self._curves
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AnnealingLaw:
        """The law that `to_dict` described: same predictions, same intervals."""
        law = cls(**values["options"])
        law.params_, law.lam_, law.objective_ = dict(values["params"]), values["lam"], values["objective"]
        law._curves = [Curve(**{name: np.asarray(column) for name, column in c.items()}) for c in values["curves"]]
        law.annealing_identified_ = any(np.abs(curve.S2).max() > 0 for curve in law._curves)
        law._replicates = None
        return law

    def _need_fit(self) -> None:
        if not hasattr(self, "params_"):
            raise RuntimeError("AnnealingLaw has not been fitted: call fit() first")

    def _warmup_of(self, rates: np.ndarray) -> int:
        return warmup_length(rates) if self.warmup_steps == "auto" else int(self.warmup_steps)

    def _areas(self, rates: np.ndarray, lam: float) -> tuple[np.ndarray, np.ndarray]:
        warmup = self._warmup_of(rates)
        S2 = annealing_area(rates, lam, warmup)
        if self.warmup_area == "peak":
            rates = rates.copy()
            rates[:warmup] = rates[min(warmup, len(rates) - 1)]
        return np.cumsum(rates), S2

    def _problem(self, raw: list[Any], lam: float, share: float) -> tuple[Problem, list[Curve]]:
        curves = []
        for rates, steps, losses in raw:
            S1, S2 = self._areas(rates, lam)
            steps, losses = thin(share, steps, losses)
            curves.append(Curve(steps, losses, S1[steps - 1], S2[steps - 1]))
        return Problem.of(curves, self.huber_delta, self.annealing), curves

    def _at(self, lrs: ArrayLike, steps: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
        rates = checked_rates(lrs)
        S1, S2 = self._areas(rates, self.lam_)
        if steps is None:
            return S1, S2
        index = checked_steps(steps, len(rates)) - 1
        return S1[index], S2[index]

    def _bounds(
        self, S1: np.ndarray, S2: np.ndarray, center: np.ndarray, level: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """The interval's ends: the spread of the refitted laws and that of the residuals, added in quadrature."""
        if self._replicates is None:
            self._replicates = self._bootstrap()
        values = np.array([self.params_[name] for name in PARAMETERS])
        residuals = np.concatenate([np.log(c.losses / law_value(values, c.S1, c.S2)) for c in self._curves])
        tails = [(1 - level) / 2, (1 + level) / 2]
        # In pieces, so that a million steps times the replicates need not fit into memory.
        pieces = [slice(start, start + PIECE) for start in range(0, len(S1), PIECE)]
        low, high = np.concatenate(
            [
                np.quantile(np.stack([law_value(row, S1[piece], S2[piece]) for row in self._replicates]), tails, axis=0)
                for piece in pieces
            ],
            axis=1,
        )
        noise = np.expm1(np.quantile(residuals, tails))
        with np.errstate(invalid="ignore"):
            below = np.hypot(np.minimum(low - center, 0), center * min(noise[0], 0))
            above = np.hypot(np.maximum(high - center, 0), center * max(noise[1], 0))
        return center - below, center + above

    def _bootstrap(self) -> np.ndarray:
        """Parameters refitted to curves made of the law and resampled blocks of log residuals: (replicates, 4)."""
        share = REPLICATE_POINTS / sum(len(curve.steps) for curve in self._curves)
        curves = [Curve(*thin(share, c.steps, c.losses, c.S1, c.S2)) for c in self._curves]
        values = np.array([self.params_[name] for name in PARAMETERS])
        generator = np.random.default_rng(0)
        resampled = []
        for curve in curves:
            line = np.log(law_value(values, curve.S1, curve.S2))
            residual = np.log(curve.losses) - line
            count, length = len(line), math.ceil(math.sqrt(len(line)))
            starts = generator.integers(0, count - length + 1, size=(REPLICATES, -(-count // length), 1))
            index = (starts + np.arange(length)).reshape(REPLICATES, -1)[:, :count]
            resampled.append(line + residual[index])
        problem = Problem.of(curves, self.huber_delta, self.annealing)
        found = problem.refit(problem.scaled(values), np.concatenate(resampled, axis=1) - math.log(problem.unit))
        return np.stack([problem.unscaled(x) for x in found])


def best_decay_fraction(
    law: AnnealingLaw,
    total_steps: int,
    peak: float,
    shape: str = "linear",
    grid: Sequence[float] | None = None,
    *,
    floor: float = 0.0,
    warmup_steps: int = 0,
) -> tuple[float, float]:
    """The share of a run to spend on the decay after a constant rate, and the loss that the law predicts for it.

    Args:
        law: fitted, to at least one run that decays.
        total_steps: T >= 2.
        peak: the constant rate, > 0.
        shape: "linear", "cosine" or "1-sqrt". Default "linear".
        grid: shares in (0, 1] to choose from. Default 0.05, 0.1, ..., 1.
        floor: the last rate as a share of the peak in [0, 1). Default 0.
        warmup_steps: linear warm-up in [0, T). The decay begins after it at the earliest.

    Raises:
        RuntimeError: the law has not been fitted.
        ValueError: an argument out of its range, or a law fitted to constant rates alone.

    >>> lrs = np.r_[np.full(300, 0.1), np.linspace(0.1, 0.01, 100)]
    >>> curve = 2 + 1.5 * forward_area(lrs)**-0.5 - 0.3 * annealing_area(lrs, lam=0.95)
    >>> law = AnnealingLaw(lam=0.95).fit([Run(lrs, np.arange(20, 401), curve[19:])])
    >>> fraction, loss = best_decay_fraction(law, total_steps=400, peak=0.1)
    >>> 0 < fraction < 1, bool(loss < curve[-1])
    (True, True)
    """
    check_arguments(
        {
            "total_steps": Range(low=2, integer=True),
            "peak": Range(low=0, low_open=True),
            "shape": OneOf(*DECAYS),
            "floor": Range(low=0, high=1, high_open=True),
            "warmup_steps": Range(low=0, high=total_steps - 1, integer=True),
        },
        total_steps=total_steps,
        peak=peak,
        shape=shape,
        floor=floor,
        warmup_steps=warmup_steps,
    )
    law._need_fit()
    if not law.annealing_identified_:
        raise ValueError("law must be fitted to at least one run whose rate decays, got constant rates only")
    fractions = [round(0.05 * k, 2) for k in range(1, 21)] if grid is None else [float(share) for share in grid]
    if not fractions or not all(0 < share <= 1 for share in fractions):
        raise ValueError(f"grid must hold numbers in (0, 1], got {fractions}")
    losses = []
    for share in fractions:
        decay = max(1, min(round(share * total_steps), total_steps - warmup_steps))
        u = np.arange(1, decay + 1) / decay
        left = {"linear": 1 - u, "cosine": (1 + np.cos(np.pi * u)) / 2, "1-sqrt": 1 - np.sqrt(u)}[shape]
        heights = np.ones(total_steps)
        heights[:warmup_steps] = np.arange(warmup_steps) / max(warmup_steps, 1)
        heights[total_steps - decay :] = floor + (1 - floor) * np.maximum(left, 0.0)
        losses.append(float(law.predict(peak * heights, [total_steps])[0]))
    best = int(np.argmin(losses))
    return fractions[best], losses[best]
