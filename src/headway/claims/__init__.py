"""Claims as code: for each method a small experiment that shows its point and can fail.

A claim is a function `claim(seed: int = 0) -> Outcome` in the file named after the method. It runs
the method against the right baseline on data that every machine has, in minutes on two cores, and
returns what was measured; it decides nothing by hand: every `Check` compares a measured number
with a threshold that is fixed in the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from headway.plots import Panel

__all__ = ["Check", "Outcome", "Panel"]


@dataclass(frozen=True)
class Check:
    """One measured number against its threshold; a NaN never holds.

    `baseline` is the number that the method is compared with, where there is one.
    """

    what: str
    measured: float
    relation: Literal["<=", ">="]
    threshold: float
    baseline: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the measured number satisfies the relation."""
        if math.isnan(self.measured) or math.isnan(self.threshold):
            return False
        return self.measured <= self.threshold if self.relation == "<=" else self.measured >= self.threshold


@dataclass(frozen=True)
class Outcome:
    """What a claim measured. `statement` is the method's point in one sentence, `paper` the paper's own figure."""

    statement: str
    paper: str
    checks: Sequence[Check]
    panels: Sequence[Panel] = field(default_factory=tuple)

    @property
    def holds(self) -> bool:
        """Whether there is at least one check and all hold."""
        return bool(self.checks) and all(check.holds for check in self.checks)
