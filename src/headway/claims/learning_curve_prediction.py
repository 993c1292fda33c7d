"""Learning curves: the accuracy at 1400 examples predicted from the first 500, on scikit-learn's digits.

Two classifiers are trained on 50, 100, ... examples of ten shuffles, their test accuracies averaged. The
trend of the first ten points says what the full set will give; the baseline says that nothing will change.
A synthetic curve checks the equations, another one what the anchor does with a bad observation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from headway.budget.learning_curve_prediction import LearningCurve, NotConvergedWarning
from headway.claims import Check, Outcome, Panel

__all__ = ["claim"]

STEP, LAST, PREFIX = 50, 1400, 10
SIZES = tuple(range(STEP, LAST + 1, STEP))
LIMIT = 0.6
BAD_LEVEL, BAD_POINTS = 12, -8.0


def predictor(**options: Any) -> LearningCurve:
    """What is under test."""
    return LearningCurve(**options)


def claim(seed: int = 0, permutations: int = 10, sizes: Sequence[int] = SIZES) -> Outcome:
    """Predictions from 500 examples land within 0.6 points, and closer than carrying the last value forward.

    Args:
        seed: start of the shuffles' seeds, and of the synthetic noise.
        permutations: shuffles to average over.
        sizes: training-set sizes; the first ten are the prefix, the last is predicted.

    Raises:
        ImportError: scikit-learn is missing; the message says what brings it.
    """
    checks = [_exact()]
    panels = []
    for name, accuracy in _accuracies(sizes, seed, permutations).items():
        x = [float(size) for size in sizes]
        curve = predictor().fit(x[:PREFIX], accuracy[:PREFIX])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConvergedWarning)
            predicted = curve.predict(float(LAST))
            line = curve.predict(np.array(x)).tolist()
        error, carried = float(abs(predicted - accuracy[-1])), float(abs(accuracy[PREFIX - 1] - accuracy[-1]))
        what = f"{name}: error at {LAST} examples in points, from {PREFIX * STEP}"
        checks.append(Check(what, error, "<=", LIMIT, carried))
        checks.append(
            Check(f"{name}: that error, against the last value carried forward", error, "<=", carried, carried)
        )
        panels.append(
            Panel(
                f"{name}, predicted from {PREFIX * STEP} examples",
                "training examples",
                "test accuracy in percent",
                {"predicted": (x, line), "measured": (x, accuracy.tolist())},
                styles={"measured": "points"},
                marks=[float(PREFIX * STEP)],
            )
        )
    moved = {anchor: _moved_by_a_bad_observation(seed, anchor) for anchor in (True, False)}
    checks.append(
        Check(
            f"asymptote moved by an observation {-BAD_POINTS:g} points too low: anchored / not anchored",
            moved[True] / moved[False],
            "<=",
            0.5,
            1.0,
        )
    )
    return Outcome(
        statement="A power law through the first third of a learning curve tells the accuracy of the full set.",
        paper="No number in the abstract: the method is proved correct under its hypotheses, with a stopping "
        "criterion, and agrees with experiments on part-of-speech taggers.",
        checks=checks,
        panels=panels,
    )


def _exact() -> Check:
    """The largest error, over levels, of the asymptote and of a far prediction on a curve that is a power law."""
    x = np.arange(500, 10_001, 500, dtype=float)
    curve = predictor(anchor=False)
    errors = []
    for size, score in zip(x.tolist(), (96 - 400 * x**-0.5).tolist(), strict=True):
        trend = curve.add(size, score)
        if trend is not None:
            errors += [abs(trend.a / 400 - 1), abs(trend.b / 0.5 - 1), abs(trend.asymptote / 96 - 1)]
    return Check("exact power law: largest relative error of a, b, c over all levels", max(errors), "<=", 1e-4)


def _moved_by_a_bad_observation(seed: int, anchor: bool) -> float:
    """How far the asymptote of level 12 moves when its observation is 8 points too low."""
    x = np.arange(500, 500 * BAD_LEVEL + 1, 500, dtype=float)
    clean = 96 - 400 * x**-0.5 + 0.02 * np.random.default_rng(seed).standard_normal(len(x))
    bad = clean.copy()
    bad[-1] += BAD_POINTS
    return abs(predictor(anchor=anchor).fit(x, bad).asymptote_ - predictor(anchor=anchor).fit(x, clean).asymptote_)


def _accuracies(sizes: Sequence[int], seed: int, permutations: int) -> dict[str, np.ndarray]:
    """Mean test accuracy in percent of each classifier at each size."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.naive_bayes import MultinomialNB
        from sklearn.neighbors import KNeighborsClassifier
    except ImportError as error:
        raise ImportError(
            'the claim of learning-curve-prediction needs scikit-learn: pip install "headway[estimators]"'
        ) from error
    bunch = load_digits()
    makers: dict[str, Callable[[], Any]] = {
        "naive Bayes": MultinomialNB,
        "3 nearest neighbours": lambda: KNeighborsClassifier(n_neighbors=3),
    }
    totals = {name: np.zeros(len(sizes)) for name in makers}
    for permutation in range(permutations):
        order = np.random.default_rng(1000 * seed + permutation).permutation(len(bunch.target))
        x, y = bunch.data[order], bunch.target[order]
        for name, make in makers.items():
            for i, size in enumerate(sizes):
                totals[name][i] += 100 * make().fit(x[:size], y[:size]).score(x[LAST:], y[LAST:])
    return {name: total / permutations for name, total in totals.items()}
