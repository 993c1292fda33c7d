"""Armijo backtracking: shrink a step until the function decreases by a fair share of what its slope promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Backtracked", "backtrack"]


@dataclass(frozen=True)
class Backtracked:
    """The last step tried, the value there, the number of trials, and whether the condition held."""

    step: float
    value: float
    trials: int
    found: bool


def backtrack(
    value_at: Callable[[float], float],
    value: float,
    slope: float,
    step: float,
    *,
    c: float,
    beta: float,
    max_trials: int = 100,
    min_step: float = 0.0,
) -> Backtracked:
    """The first of step, beta * step, beta^2 * step, ... with value_at(step) <= value + c * step * slope.

    A value that is NaN or +inf is a trial that failed. The caller evaluates at each step; the last call of `value_at`
    is the one for the step returned.

    Args:
        value_at: the function along the search direction.
        value: its value at step 0.
        slope: its directional derivative there, <= 0: minus the squared gradient norm for steepest descent.
        step: the first step tried, > 0.
        c: the share of the slope's promise, in (0, 1).
        beta: the factor of each retreat, in (0, 1).
        max_trials: the search gives up after this many. Default 100.
        min_step: or when the next step would be below this. Default 0.

    >>> backtrack(lambda a: (1 - 2 * a) ** 2, value=1.0, slope=-4.0, step=1.6, c=0.5, beta=0.5)
    Backtracked(step=0.4, value=0.03999999999999998, trials=3, found=True)
    """
    for trial in range(1, max_trials + 1):
        reached = value_at(step)
        if reached <= value + c * step * slope:
            return Backtracked(step, reached, trial, True)
        if trial == max_trials or beta * step < min_step:
            break
        step *= beta
    return Backtracked(step, reached, trial, False)
