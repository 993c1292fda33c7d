r"""The fit behind `headway.budget.annealing_scaling_law`, in unknowns without a scale.

    min  sum_i Huber_delta( log y_i - log( L0 + A S1_i^(-alpha) - C S2_i ) ),   L0, A, C >= 0

`Problem` divides losses by their median, S1 by its geometric mean and S2 by its largest value. Starts come from a grid
of alpha, for which the rest is non-negative least squares; `polish` goes down from one start, `refit` from one start
for many resampled curves at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["PARAMETERS", "Curve", "Problem", "law_value", "thin"]

PARAMETERS = ("L0", "A", "alpha", "C")
ALPHAS = tuple(np.geomspace(0.03, 3.0, 16).tolist())
ALPHA_BOUNDS = (1e-3, 10.0)
REPLICATE_STEPS = 25


def law_value(values: np.ndarray, S1: np.ndarray, S2: np.ndarray) -> np.ndarray:
    """L0 + A S1^(-alpha) - C S2, for `values` in the order of `PARAMETERS`."""
    L0, A, alpha, C = values
    with np.errstate(divide="ignore"):
        return L0 + A * S1**-alpha - C * S2


def thin(share: float, *columns: np.ndarray) -> list[np.ndarray]:
    """About the share of the rows, evenly spread; all of them where share >= 1."""
    count = len(columns[0])
    index = np.unique(np.linspace(0, count - 1, max(2, min(count, round(share * count)))).round().astype(int))
    return [column[index] for column in columns]


@dataclass(frozen=True)
class Curve:
    """The points of a run that are fitted, with the areas there."""

    steps: np.ndarray
    losses: np.ndarray
    S1: np.ndarray
    S2: np.ndarray


@dataclass(frozen=True)
class Problem:
    """The fit in scale-free unknowns: L0 / unit, A ref^(-alpha) / unit, alpha, C max|S2| / unit."""

    losses: np.ndarray
    log_u: np.ndarray  # log(S1 / ref)
    v: np.ndarray  # S2 / max|S2|
    unit: float
    log_ref: float
    S2_max: float
    delta: float
    decays: bool

    @classmethod
    def of(cls, curves: Sequence[Curve], delta: float, annealing: bool) -> Problem:
        losses, S1, S2 = (np.concatenate([getattr(c, name) for c in curves]) for name in ("losses", "S1", "S2"))
        if S1.min() <= 0:
            raise ValueError("lrs must have a positive sum before the first loss, got 0")
        unit = float(np.median(losses))
        S2_max = float(np.abs(S2).max())
        log_S1 = np.log(S1)
        # At the middle of the curve, A and alpha are least entangled.
        log_ref = float(log_S1.mean())
        decays = annealing and S2_max > 0
        return cls(losses / unit, log_S1 - log_ref, S2 / (S2_max or 1.0), unit, log_ref, S2_max or 1.0, delta, decays)

    def solve(self, attempts: int = 3) -> tuple[np.ndarray, float]:
        starts = sorted((self._start(alpha) for alpha in ALPHAS), key=lambda start: start[1])
        return min((self.polish(start) for start, _ in starts[:attempts]), key=lambda found: found[1])

    def _start(self, alpha: float) -> tuple[np.ndarray, float]:
        """The best L0, A, C >= 0 for this alpha in relative least squares, and the objective there."""
        from scipy.optimize import nnls

        columns = [np.ones_like(self.v), np.exp(-alpha * self.log_u)] + ([-self.v] if self.decays else [])
        matrix = np.stack(columns, axis=1) / self.losses[:, None]
        coefficients, _ = nnls(matrix, np.ones(len(matrix)))
        x = np.array([coefficients[0], coefficients[1], alpha, coefficients[2] if self.decays else 0.0])
        return x, float(self._objective(self._residual(x)))

    def polish(self, start: np.ndarray) -> tuple[np.ndarray, float]:
        """The minimum that the start leads to; C stays 0 where no curve decays."""
        from scipy.optimize import least_squares

        free, low, high = self._free()

        def full(part: np.ndarray) -> np.ndarray:
            return part if self.decays else np.append(part, 0.0)

        found = least_squares(
            lambda part: self._residual(full(part)),
            np.clip(start[free], low, high),
            jac=lambda part: self._jacobian(full(part))[:, free],
            bounds=(low, high),
            loss="huber",
            f_scale=self.delta,
            x_scale="jac",
            ftol=1e-9,
            xtol=1e-9,
            gtol=1e-15,
            max_nfev=100,
        )
        x = full(found.x)
        return x, float(self._objective(self._residual(x)))

    def refit(self, start: np.ndarray, log_losses: np.ndarray) -> np.ndarray:
        """The minima near the start for many curves at once, log_losses (curves, n): (curves, 4).

        Levenberg-Marquardt on re-weighted least squares, all curves in one array operation.
        """
        free, low, high = self._free()
        x = np.tile(start, (len(log_losses), 1))
        x[:, free] = np.clip(x[:, free], low, high)
        cost = self._objective(log_losses - np.log(self._line(x)))
        damping = np.full(len(x), 1e-3)
        for _ in range(REPLICATE_STEPS):
            residual = log_losses - np.log(self._line(x))
            slope = self._jacobian(x)[..., free]  # [curves, n, free]
            weighted = slope / np.maximum(1, np.abs(residual) / self.delta)[..., None]
            normal = np.einsum("bni,bnj->bij", weighted, slope)
            diagonal = np.einsum("bii->bi", normal)
            normal = normal + np.eye(len(free)) * (damping[:, None] * diagonal + 1e-300)[:, None]
            step = np.linalg.solve(normal, -np.einsum("bni,bn->bi", weighted, residual)[..., None])[..., 0]
            trial = x.copy()
            trial[:, free] = np.clip(x[:, free] + step, low, high)
            trial_cost = self._objective(log_losses - np.log(self._line(trial)))
            better = trial_cost < cost
            x, cost = np.where(better[:, None], trial, x), np.where(better, trial_cost, cost)
            damping = np.clip(damping * np.where(better, 0.2, 5.0), 1e-9, 1e9)
        return x

    def _free(self) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Which unknowns are fitted, and their bounds."""
        free = [0, 1, 2, 3] if self.decays else [0, 1, 2]
        low = np.array([0.0, 0.0, ALPHA_BOUNDS[0], 0.0])
        high = np.array([self.losses.max(), np.inf, ALPHA_BOUNDS[1], np.inf])
        return free, low[free], high[free]

    def _line(self, x: np.ndarray) -> np.ndarray:
        """The law for unknowns (..., 4): (..., n)."""
        L0, A, alpha, C = (x[..., k : k + 1] for k in range(4))
        # A trial step may take the law below zero, where the logarithm ends: such a point costs much and pulls nowhere.
        return np.maximum(L0 + A * np.exp(-alpha * self.log_u) - C * self.v, 1e-6)

    def _residual(self, x: np.ndarray) -> np.ndarray:
        return np.log(self.losses / self._line(x))

    def _jacobian(self, x: np.ndarray) -> np.ndarray:
        power = np.exp(-x[..., 2:3] * self.log_u)
        one, v = np.ones_like(power), np.broadcast_to(self.v, power.shape)
        columns = np.stack([one, power, -x[..., 1:2] * power * self.log_u, -v], axis=-1)
        return -columns / self._line(x)[..., None]

    def _objective(self, residual: np.ndarray) -> Any:
        size = np.abs(residual)
        return np.where(size <= self.delta, size**2 / 2, self.delta * (size - self.delta / 2)).sum(axis=-1)

    def unscaled(self, x: np.ndarray) -> np.ndarray:
        return self.unit * np.array([x[0], x[1] * math.exp(x[2] * self.log_ref), x[2] / self.unit, x[3] / self.S2_max])

    def scaled(self, values: np.ndarray) -> np.ndarray:
        L0, A, alpha, C = values
        return np.array([L0, A * math.exp(-alpha * self.log_ref), alpha * self.unit, C * self.S2_max]) / self.unit
