"""The contract of planners passes a good one and catches each way to be a bad one."""

import math
import random
from typing import ClassVar

import numpy as np
import pytest

from headway.constraints import Range, check_arguments
from headway.plots import Panel
from headway.testing import check_planner

X = np.array([1.0, 2.0, 3.0, 4.0])
DATA = (X, 2 * X + 1)


class Line:
    """y = slope x + offset."""

    constraints: ClassVar = {"shrink": Range(low=0, high=1, high_open=True)}

    def __init__(self, shrink=0.0):
        check_arguments(self.constraints, shrink=shrink)
        self.shrink = shrink

    def fit(self, x, y):
        x, y = np.array(x, dtype=float), np.array(y, dtype=float)
        if not np.isfinite(y).all():
            raise ValueError("y must be finite")
        slope, offset = np.polyfit(x, y, 1)
        self.slope_, self.offset_ = float(slope) * (1 - self.shrink), float(offset)
        self.x_, self.y_ = x, y
        return self

    def predict(self, x):
        if not hasattr(self, "slope_"):
            raise RuntimeError("Line has not been fitted: call fit() first")
        return self.slope_ * x + self.offset_

    def interval(self, x, level=0.95):
        check_arguments({"level": Range(low=0, high=1, low_open=True, high_open=True)}, level=level)
        return self.predict(x) - level, self.predict(x) + level

    def panels(self):
        return [Panel("", "x", "y", {"data": (self.x_.tolist(), self.y_.tolist())})]

    def to_dict(self):
        return {"slope": self.slope_, "offset": self.offset_}

    @classmethod
    def from_dict(cls, values):
        line = cls()
        line.slope_, line.offset_ = values["slope"], values["offset"]
        return line


def test_a_good_planner_passes():
    check_planner(Line, fit=DATA, predict=(np.array([5.0, 6.0]),))
    check_planner(Line, fit=DATA, predict=(5.0,), arguments={"shrink": 0.5})


class Accepts(Line):
    def __init__(self, shrink=0.0):
        self.shrink = 0.0


class Unfitted(Line):
    def predict(self, x):
        return getattr(self, "slope_", 0.0) * x


class NotItself(Line):
    def fit(self, x, y):
        super().fit(x, y)


class Attribute(Line):
    def fit(self, x, y):
        self.count = len(x)
        return super().fit(x, y)


class Mutates(Line):
    def fit(self, x, y):
        super().fit(x, y)
        y += 1
        return self


class KeepsArrays(Line):
    def fit(self, x, y):
        super().fit(x, y)
        self.kept_ = x
        return self

    def predict(self, x):
        return super().predict(x) + (float(self.kept_[0]) if hasattr(self, "kept_") else 0.0)


class RandomFit(Line):
    def fit(self, x, y):
        super().fit(x, y)
        self.offset_ += random.random()
        return self


class MovesGenerator(Line):
    def fit(self, x, y):
        np.random.rand()
        return super().fit(x, y)


class Accumulates(Line):
    fits_ = 0

    def fit(self, x, y):
        super().fit(x, y)
        self.fits_ += 1
        return self

    def predict(self, x):
        return super().predict(x) + self.fits_


class IntervalAside(Line):
    def interval(self, x, level=0.95):
        return self.predict(x) + 1, self.predict(x) + 2


class AnyLevel(Line):
    def interval(self, x, level=0.95):
        return self.predict(x) - 1, self.predict(x) + 1


class NoPanels(Line):
    def panels(self):
        return []


class Rounds(Line):
    def to_dict(self):
        return {"slope": round(self.slope_, 1) + 0.1, "offset": self.offset_}


class NanInDict(Line):
    def to_dict(self):
        return {**super().to_dict(), "note": math.nan}


class TakesNan(Line):
    def fit(self, x, y):
        return super().fit(x, np.nan_to_num(y))


@pytest.mark.parametrize(
    ("planner", "clause"),
    [
        (Accepts, "bad arguments are refused"),
        (Unfitted, "prediction needs a fit"),
        (NotItself, "fit returns the object"),
        (Attribute, "fit returns the object"),
        (Mutates, "data are left alone"),
        (KeepsArrays, "data are left alone"),
        (RandomFit, "the same data give the same prediction"),
        (MovesGenerator, "the same data give the same prediction"),
        (Accumulates, "a second fit forgets the first"),
        (IntervalAside, "the interval brackets the prediction"),
        (AnyLevel, "the interval brackets the prediction"),
        (NoPanels, "panels can be drawn"),
        (Rounds, "plain values hold the fit"),
        (NanInDict, "plain values hold the fit"),
        (TakesNan, "nan is refused"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_broken_planner_is_caught(planner, clause):
    with pytest.raises(AssertionError, match=f"{planner.__name__} breaks the clause '{clause}'"):
        check_planner(planner, fit=DATA, predict=(5.0,))


def test_a_function_is_checked_too():
    check_planner(lambda params, tokens: {"ratio": tokens / params}, predict=(10.0, 50.0))

    def counts(items):
        items.append(1)
        return len(items)

    with pytest.raises(AssertionError, match="the arguments are changed"):
        check_planner(counts, predict=([],))
    with pytest.raises(AssertionError, match="another result"):
        check_planner(lambda: random.random())
    with pytest.raises(AssertionError, match="the result is plain"):
        check_planner(lambda: object)
