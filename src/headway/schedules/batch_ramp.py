"""A batch that grows in fixed stages of the budget, with the learning rate along or not.

    size(progress) = min(max_batch, initial factor^k)      k of the points `at` are at or below progress

A known ramp is the baseline for every method that measures when to grow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.schedules.batch_schedule import Split, check_sizes, checked_size, round_up, split_batch
from headway.schedules.gradient_noise import NoiseStats
from headway.schedules.profile import Increasing

__all__ = ["BatchRamp"]


class BatchRamp:
    """Multiply the batch by `factor` at each of a few fractions of the budget.

        size      = min(max_batch, initial * factor^k), rounded up to a multiple of multiple_of
        lr_factor = 1 | size / initial | sqrt(size / initial)       for lr_rule none | linear | sqrt

    where k is the number of points in `at` that `advance(progress)` has reached.

    Args:
        initial: batch at the start, samples over all ranks, >= 1, a multiple of `multiple_of`.
        max_batch: largest batch, >= initial, a multiple of `multiple_of`.
        at: increasing fractions of the budget in [0, 1) at which the batch grows. Default (1/4, 1/2, 3/4).
        factor: growth per stage, > 1. Default 2.
        lr_rule: how the learning rate follows the batch: "none" (default), "linear", as suits SGD in the range
            where noise dominates, or "sqrt", as suits Adam.
        multiple_of: what sizes are multiples of, so that they divide evenly or suit a compiled graph. Default 1.
        max_micro_batch: what fits one rank at once, for `split`. Default None: anything.
        world_size: ranks, for `split`. Default 1.

    Raises:
        ValueError: for an argument out of its range, also from `advance` for a progress that is not >= 0.

    Source: common practice, no paper's method: Smith, Kindermans, Ying, Le (arXiv 1711.00489) grow the batch where
    others decay the rate; square-root scaling is Krizhevsky's (arXiv 1404.5997).

    >>> ramp = BatchRamp(32, 128, lr_rule="sqrt")
    >>> for progress in (0.0, 0.25, 0.6, 0.9):
    ...     ramp.advance(progress)
    ...     print(ramp.size, round(ramp.lr_factor, 3))
    32 1.0
    64 1.414
    128 2.0
    128 2.0
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "initial": Range(low=1, integer=True),
        "max_batch": Range(low=1, integer=True),
        "at": Increasing(low=0, high=1, high_open=True),
        "factor": Range(low=1, low_open=True),
        "lr_rule": OneOf("none", "linear", "sqrt"),
        "multiple_of": Range(low=1, integer=True),
        "max_micro_batch": Range(low=1, integer=True, optional=True),
        "world_size": Range(low=1, integer=True),
    }
    needs: Literal["nothing"] = "nothing"

    def __init__(
        self,
        initial: int,
        max_batch: int,
        *,
        at: Sequence[float] = (0.25, 0.5, 0.75),
        factor: float = 2.0,
        lr_rule: str = "none",
        multiple_of: int = 1,
        max_micro_batch: int | None = None,
        world_size: int = 1,
    ) -> None:
        check_arguments(
            self.constraints,
            initial=initial,
            max_batch=max_batch,
            at=at,
            factor=factor,
            lr_rule=lr_rule,
            multiple_of=multiple_of,
            max_micro_batch=max_micro_batch,
            world_size=world_size,
        )
        check_sizes(initial, max_batch, multiple_of)
        self.initial, self.max_batch = int(initial), int(max_batch)
        self.at, self.factor, self.lr_rule = tuple(at), float(factor), lr_rule
        self.multiple_of, self.max_micro_batch, self.world_size = multiple_of, max_micro_batch, world_size
        self.size = self.initial

    @property
    def split(self) -> Split:
        """`size` as (micro, accumulation, total), see `split_batch`."""
        return split_batch(self.size, self.world_size, self.max_micro_batch)

    @property
    def lr_factor(self) -> float:
        """What the learning rate is to be multiplied with at the present size."""
        growth = self.size / self.initial
        return {"none": 1.0, "linear": growth, "sqrt": math.sqrt(growth)}[self.lr_rule]

    def advance(self, progress: float) -> None:
        """Set `size` for the spent fraction `progress` >= 0 of the budget; going back does not shrink it."""
        check_arguments({"progress": Range(low=0)}, progress=progress)
        size: float = self.initial
        for _ in range(sum(progress >= point for point in self.at)):
            size = min(self.max_batch, size * self.factor)  # capped at each stage, so that it stays finite
        self.size = max(self.size, min(self.max_batch, round_up(math.ceil(size), self.multiple_of)))

    def due(self, step: int) -> bool:
        """False: a fixed ramp asks for no statistics."""
        return False

    def update(self, stats: NoiseStats) -> Split:
        """The present `split`; the statistics change nothing."""
        return self.split

    def state_dict(self) -> dict[str, Any]:
        """The size reached."""
        return {"size": self.size}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved size. Raises `ValueError` if this ramp cannot have it."""
        self.size = checked_size(state_dict["size"], self.initial, self.max_batch, self.multiple_of)
