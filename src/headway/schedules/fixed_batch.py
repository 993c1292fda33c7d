"""The batch schedule that schedules nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from headway.constraints import Constraint, Range, check_arguments
from headway.schedules.batch_schedule import Split, split_batch
from headway.schedules.gradient_noise import NoiseStats

__all__ = ["FixedBatch"]


class FixedBatch:
    """The same batch at every step.

    Args:
        initial: sequences (samples) per optimizer step over all workers, >= 1.

    Raises:
        ValueError: for an argument out of its range.

    >>> batch = FixedBatch(8)
    >>> batch.advance(0.5)
    >>> batch.size, batch.lr_factor
    (8, 1.0)
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {"initial": Range(low=1, integer=True)}
    needs: ClassVar[Literal["nothing"]] = "nothing"

    def __init__(self, initial: int) -> None:
        check_arguments(self.constraints, initial=initial)
        self.size = int(initial)

    @property
    def lr_factor(self) -> float:
        """What the learning rate is multiplied by: 1."""
        return 1.0

    def due(self, step: int) -> bool:
        """Whether statistics of the gradient are wanted at step `step`: never."""
        return False

    def advance(self, progress: float) -> None:
        """Take note of the spent fraction of the budget; changes nothing."""

    @property
    def split(self) -> Split:
        """(micro, accumulation, total): the whole batch at once."""
        return split_batch(self.size)

    def update(self, stats: NoiseStats) -> Split:
        """Take statistics of the gradient; changes nothing."""
        return self.split

    def state_dict(self) -> dict[str, Any]:
        """The size."""
        return {"size": self.size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a size over."""
        self.size = int(state_dict["size"])
