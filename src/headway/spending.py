"""One notion of a training budget: so many optimizer steps, tokens or seconds.

    spent = steps / steps_in_all  or  tokens / tokens_in_all  or  seconds / seconds_in_all

Schedules count steps. A budget of tokens or seconds becomes steps through what a step takes of it,
which is known beforehand (tokens) or measured (seconds).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from headway.constraints import Range, check_arguments

__all__ = ["Budget", "steps_of"]

_UNITS = {
    "": ("steps", 1),
    "step": ("steps", 1),
    "steps": ("steps", 1),
    "token": ("tokens", 1),
    "tokens": ("tokens", 1),
    "s": ("seconds", 1),
    "sec": ("seconds", 1),
    "seconds": ("seconds", 1),
    "min": ("seconds", 60),
    "minutes": ("seconds", 60),
    "h": ("seconds", 3600),
    "hours": ("seconds", 3600),
}
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


@dataclass(frozen=True)
class Budget:
    """What may be spent: exactly one of steps, tokens and seconds.

    Schedules take a `Budget` where they take `total_steps`, if what a step costs is given with it.

    Args:
        steps: optimizer steps, a whole number >= 0; 0 (default): the budget is not in steps.
        tokens: tokens, a whole number >= 0; 0 (default): the budget is not in tokens.
        seconds: seconds >= 0; 0 (default): the budget is not in seconds.
        tokens_per_step: tokens of one optimizer step over all workers, > 0. Default None: not known.
        seconds_per_step: seconds that a step takes, > 0. Default None: not known.

    Raises:
        ValueError: none or more than one of the three is > 0, or a value is out of its range.

    >>> Budget(tokens=1_000_000, tokens_per_step=2048).total_steps
    488
    >>> Budget.parse("10 min").spent(steps=7, tokens=0, seconds=150.0)
    0.25
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    tokens_per_step: float | None = None
    seconds_per_step: float | None = None

    def __post_init__(self) -> None:
        check_arguments(
            {
                "steps": Range(low=0, integer=True),
                "tokens": Range(low=0, integer=True),
                "seconds": Range(low=0),
                "tokens_per_step": Range(low=0, low_open=True, optional=True),
                "seconds_per_step": Range(low=0, low_open=True, optional=True),
            },
            **vars(self),
        )
        given = [name for name in ("steps", "tokens", "seconds") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                f"a budget must be > 0 in exactly one of steps, tokens and seconds, got {' and '.join(given) or 'none'}"
            )

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The budget that a text such as `640`, `640 steps`, `2M tokens`, `90 s`, `10min` or `1.5 h` names.

        Raises:
            ValueError: it names none; the message says what is accepted.

        >>> Budget.parse("2M tokens").tokens
        2000000
        """
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKMB]?)\s*([a-z]*)\s*", text)
        unit = _UNITS.get(match[3]) if match else None
        if match is None or unit is None or (unit[0] == "seconds" and match[2]):
            raise ValueError(
                f"a budget is written like '640', '640 steps', '2M tokens', '90 s', '10 min' or '1.5 h', got {text!r}"
            )
        amount = Fraction(match[1]) * _FACTORS[match[2].lower()] * unit[1]
        if amount > 10**15:
            raise ValueError(f"a budget must be at most 1e15, got {text!r}")
        if unit[0] != "seconds" and amount.denominator != 1:
            raise ValueError(f"a budget in {unit[0]} must be a whole number, got {text!r}")
        return cls(**{unit[0]: float(amount) if unit[0] == "seconds" else int(amount)})  # type: ignore[arg-type]

    @property
    def total_steps(self) -> int:
        """The budget in optimizer steps, rounded down.

        Raises:
            ValueError: it is in tokens or seconds, and what a step costs is not known, or more than the budget.
        """
        if self.steps:
            return self.steps
        amount, cost, name = (
            (self.tokens, self.tokens_per_step, "tokens_per_step")
            if self.tokens
            else (self.seconds, self.seconds_per_step, "seconds_per_step")
        )
        if cost is None:
            raise ValueError(f"{name} must be given to turn {self} into steps, got None")
        if amount < cost:
            unit = name.partition("_")[0]
            raise ValueError(f"a budget must pay for at least one step, {cost:g} {unit}, got {self}")
        return int(amount / cost)

    def spent(self, *, steps: int, tokens: int, seconds: float) -> float:
        """The spent fraction of the budget, in [0, 1]."""
        done, whole = next(
            (done, whole)
            for done, whole in ((steps, self.steps), (tokens, self.tokens), (seconds, self.seconds))
            if whole
        )
        return min(1.0, done / whole)

    def __str__(self) -> str:
        if self.steps:
            return f"{self.steps:,} steps"
        if self.tokens:
            return f"{self.tokens:,} tokens"
        return f"{self.seconds / 60:g} min" if self.seconds >= 60 else f"{self.seconds:g} s"


def steps_of(total: int | Budget) -> int:
    """`total` in optimizer steps if it is a `Budget`, else `total` itself.

    >>> steps_of(Budget(seconds=60, seconds_per_step=0.5)), steps_of(100)
    (120, 100)
    """
    return total.total_steps if isinstance(total, Budget) else total
