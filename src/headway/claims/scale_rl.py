"""Sigmoid fits of performance against compute: the end of a run forecast from its first part, on a known curve.

    R(C) = 0.30 + 0.31 / (1 + (2542 / C)^1.92),   noise 0.003,   50 noise seeds

The values are those that the study gives for its 8B model. Three windows are fitted: one past the midpoint, which
is to forecast twice its range; one before the midpoint, which is to be refused as not identified; and one that
ends at the midpoint, where a power law with a floor is fitted beside the sigmoid.
"""

from __future__ import annotations

import math

import numpy as np

from headway.budget.scale_rl import ComputePerformanceFit, sigmoid_curve
from headway.claims import Check, Outcome, Panel
from headway.numerics.fitting import fit_power_law

__all__ = ["claim"]

ASYMPTOTE, EXPONENT, MIDPOINT, INITIAL, NOISE = 0.610, 1.92, 2542.0, 0.30, 0.003
TARGET = 16_000.0
LATE = np.linspace(1500, 8000, 27)
EARLY = np.linspace(200, MIDPOINT / 2, 41)
HALF = np.linspace(200, 2500, 41)


def estimator() -> ComputePerformanceFit:
    """What is under test."""
    return ComputePerformanceFit(initial=INITIAL)


def claim(seed: int = 0, seeds: int = 50) -> Outcome:
    """A window past the midpoint forecasts twice its range; an earlier one is reported as unable to.

    Args:
        seed: start of the noise seeds.
        seeds: how many.
    """
    truth = float(_curve(np.array(TARGET)))
    errors, asymptotes, covered, refused, against_power_law = [], [], [], [], []
    for run in range(seeds):
        late = estimator().fit(LATE, _observed(LATE, seed, run))
        low, high, _ = late.asymptote_interval()
        errors.append(abs(late.predict(TARGET) - truth))
        asymptotes.append(abs(late.asymptote_ - ASYMPTOTE))
        covered.append(low <= ASYMPTOTE <= high)
        refused.append(not estimator().fit(EARLY, _observed(EARLY, seed, run)).identified_)
        half = _observed(HALF, seed, run)
        law = fit_power_law(HALF, half, a=(-math.inf, 0.0), c=(-math.inf, 1.0))
        against_power_law.append(
            abs(law.predict(TARGET) - truth) > abs(estimator().fit(HALF, half).predict(TARGET) - truth)
        )
    checks = [
        Check("R(16000) within 0.01 from [1500, 8000], share of seeds", _share(np.array(errors) <= 0.01), ">=", 0.9),
        Check("A within 0.02 from [1500, 8000], share of seeds", _share(np.array(asymptotes) <= 0.02), ">=", 0.9),
        Check("95 % interval contains A, share of seeds", _share(covered), ">=", 0.88, 0.95),
        Check("window before half the midpoint refused, share of seeds", _share(refused), ">=", 0.7),
        Check(
            "R(16000) from [200, 2500]: nearer than a power law, share of seeds", _share(against_power_law), ">=", 0.8
        ),
    ]
    return Outcome(
        statement="A sigmoid through the first part of a run forecasts twice its compute, and says when it cannot.",
        paper="ScaleRL predicted and confirmed on one run of 100,000 GPU-hours, from a study of more than 400,000 "
        "(abstract).",
        checks=checks,
        panels=_panels(seed),
    )


def _panels(seed: int) -> list[Panel]:
    grid = np.geomspace(200, TARGET, 80)
    x, truth = grid.tolist(), _curve(grid).tolist()
    panels = []
    for window, what in ((LATE, "Fitted past the midpoint"), (EARLY, "Fitted before half the midpoint")):
        fit = estimator().fit(window, _observed(window, seed, 0))
        low, high = fit.interval(grid)
        panels.append(
            Panel(
                what if fit.identified_ else f"{what}: not identified",
                "compute",
                "performance",
                {
                    "95 %, low": (x, low.tolist()),
                    "95 %, high": (x, high.tolist()),
                    "fit": (x, fit.predict(grid).tolist()),
                    "truth": (x, truth),
                    "observed": (window.tolist(), _observed(window, seed, 0).tolist()),
                },
                log_x=True,
                styles={"95 %, low": "faint", "95 %, high": "faint", "observed": "points"},
                marks=[float(window[-1])],
            )
        )
    return panels


def _curve(compute: np.ndarray) -> np.ndarray:
    return np.asarray(sigmoid_curve(compute, ASYMPTOTE, EXPONENT, MIDPOINT, INITIAL))


def _observed(compute: np.ndarray, seed: int, run: int) -> np.ndarray:
    generator = np.random.default_rng((seed, run, len(compute), int(compute[-1])))
    return _curve(compute) + NOISE * generator.standard_normal(len(compute))


def _share(flags: object) -> float:
    return float(np.mean(np.asarray(flags)))
