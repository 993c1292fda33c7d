import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.optim.line_search import backtrack


@given(curvature=st.floats(0.01, 100), step=st.floats(0.01, 100), c=st.floats(0.05, 0.95), beta=st.floats(0.2, 0.9))
def test_a_found_step_keeps_the_condition_and_the_one_before_it_broke_it(curvature, step, c, beta):
    def value(a):  # of x^2 curvature / 2 at x - a * gradient, from x = 1
        return curvature / 2 * (1 - a * curvature) ** 2

    found = backtrack(value, value(0), -(curvature**2), step, c=c, beta=beta, max_trials=200)
    assert found.found
    assert found.value == value(found.step) <= value(0) - c * found.step * curvature**2
    assert found.step == pytest.approx(step * beta ** (found.trials - 1))
    if found.trials > 1:
        before = found.step / beta
        # (1 - c) curvature a <= 2 (1 - c) is the condition; before it must be at least as large as the boundary
        assert before * curvature >= 2 * (1 - c) * (1 - 1e-9)


def test_nan_and_infinity_are_trials_that_failed():
    found = backtrack(lambda a: math.nan if a > 3 else math.inf if a > 1 else -a, 0.0, -1.0, 8.0, c=0.5, beta=0.5)
    assert (found.step, found.trials, found.found) == (1.0, 4, True)


def test_gives_up_at_the_limits_and_returns_the_last_step_tried():
    seen = []

    def rising(a):
        seen.append(a)
        return a

    found = backtrack(rising, 0.0, -1.0, 1.0, c=0.5, beta=0.5, max_trials=3)
    assert (found.step, found.value, found.trials, found.found) == (0.25, 0.25, 3, False)
    assert seen == [1.0, 0.5, 0.25]
    found = backtrack(rising, 0.0, -1.0, 1.0, c=0.5, beta=0.5, min_step=0.3)
    assert (found.step, found.trials, found.found) == (0.5, 2, False)
