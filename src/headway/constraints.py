"""The accepted values of hyper-parameters, stated once per class.

A method declares `constraints = {"lr": Range(low=0, low_open=True), ...}`. Its constructor calls
`check_arguments(constraints, lr=lr, ...)`, and the contract of its role (`headway.testing`) draws
values from `outside()` to see that every one of them is refused. No torch here: the command line
validates with these before anything heavy is imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Protocol

__all__ = ["Constraint", "OneOf", "Range", "check_arguments"]


class Constraint(Protocol):
    """What `check_arguments` and the contracts need of an accepted set of values."""

    def accepts(self, value: Any) -> bool:
        """Whether `value` lies in the set."""
        ...

    def describe(self) -> str:
        """The set in words that complete "NAME must be ..."."""
        ...

    def outside(self) -> list[Any]:
        """Some values that are refused."""
        ...


@dataclass(frozen=True)
class Range:
    """A real (or whole) number in an interval; with `length`, a sequence of that many such numbers.

    NaN and infinities are never accepted. `optional` also accepts None.

    >>> Range(low=0, low_open=True).describe()
    '> 0'
    >>> Range(low=0, high=1, high_open=True).describe()
    'in [0, 1)'
    >>> Range(low=1, integer=True).describe()
    'a whole number >= 1'
    """

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    integer: bool = False
    optional: bool = False
    length: int | None = None

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if self.length is not None:
            return (
                isinstance(value, tuple | list)
                and len(value) == self.length
                and all(self._accepts_number(item) for item in value)
            )
        return self._accepts_number(value)

    def _accepts_number(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Integral if self.integer else Real):
            return False
        number = float(value)
        above = number > self.low if self.low_open else number >= self.low
        below = number < self.high if self.high_open else number <= self.high
        return math.isfinite(number) and above and below

    def describe(self) -> str:
        low, high = f"{self.low:g}", f"{self.high:g}"
        if math.isfinite(self.low) and math.isfinite(self.high):
            interval = f"in {'(' if self.low_open else '['}{low}, {high}{')' if self.high_open else ']'}"
        elif math.isfinite(self.low):
            interval = f"{'>' if self.low_open else '>='} {low}"
        elif math.isfinite(self.high):
            interval = f"{'<' if self.high_open else '<='} {high}"
        else:
            interval = "finite"
        if self.integer:
            interval = f"a whole number {interval}"
        if self.length is not None:
            interval = f"{self.length} numbers {interval}"
        return f"{interval} or None" if self.optional else interval

    def outside(self) -> list[Any]:
        numbers: list[Any] = [math.nan, math.inf]
        if math.isfinite(self.low):
            numbers.append(self.low - 1)
            if self.low_open:
                numbers.append(type(self.low)(self.low))
        if math.isfinite(self.high):
            numbers.append(self.high + 1)
            if self.high_open:
                numbers.append(self.high)
        if self.integer:
            numbers.append(self.low + 0.5 if math.isfinite(self.low) else 0.5)
        if self.length is None:
            return numbers
        inside = self._inside()
        return [tuple([number] + [inside] * (self.length - 1)) for number in numbers] + [(inside,) * (self.length + 1)]

    def _inside(self) -> float:
        if math.isfinite(self.low) and math.isfinite(self.high):
            middle = (self.low + self.high) / 2
            return math.floor(middle) if self.integer else middle
        if math.isfinite(self.low):
            return self.low + 1
        return self.high - 1 if math.isfinite(self.high) else 0


@dataclass(frozen=True, init=False)
class OneOf:
    """One of a few named values.

    >>> OneOf("norm", "diag").describe()
    "one of 'norm', 'diag'"
    """

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)

    def accepts(self, value: Any) -> bool:
        return any(type(value) is type(known) and value == known for known in self.values)

    def describe(self) -> str:
        return "one of " + ", ".join(repr(value) for value in self.values)

    def outside(self) -> list[Any]:
        return ["no-such-value", -1]


def check_arguments(constraints: Mapping[str, Constraint], **arguments: Any) -> None:
    """Raise `ValueError` for the first argument outside its constraint.

    Arguments without a constraint pass. The message names the argument, what is accepted and the
    value received.

    >>> check_arguments({"lr": Range(low=0, low_open=True)}, lr=-0.1)
    Traceback (most recent call last):
    ...
    ValueError: lr must be > 0, got -0.1
    """
    for name, value in arguments.items():
        constraint = constraints.get(name)
        if constraint is not None and not constraint.accepts(value):
            raise ValueError(f"{name} must be {constraint.describe()}, got {value!r}")
