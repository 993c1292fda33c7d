"""What a batch schedule is, whatever decides about the size: a fixed ramp or a statistical test.

A training loop drives every one of them alike, once per optimizer step, with size sequences or
samples over all ranks and all accumulated micro-batches:

    schedule.advance(progress)                 # fraction of the budget that is spent
    micro, accumulation, total = schedule.split
    ...                                        # accumulation micro-batches per rank, optimizer.step()
    if schedule.due(step):
        schedule.update(stats)                 # of that step's gradients
"""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from headway.schedules.gradient_noise import NoiseStats

__all__ = ["BatchSchedule", "Split", "split_batch"]

Split: TypeAlias = tuple[int, int, int]


@runtime_checkable
class BatchSchedule(Protocol):
    """The interface of a batch size that changes during a run; `headway.testing.check_batch_schedule` checks it."""

    @property
    def size(self) -> int:
        """The batch of the next optimizer step, over all ranks; it never shrinks."""
        ...

    @property
    def split(self) -> Split:
        """`size` as (micro, accumulation, total); total = ranks * micro * accumulation covers size."""
        ...

    @property
    def lr_factor(self) -> float:
        """What the learning rate is to be multiplied with at the present size."""
        ...

    @property
    def needs(self) -> Literal["chunks", "samples", "nothing"]:
        """What `update` has to be given: statistics from the gradients of micro-batches, or of single samples."""
        ...

    def due(self, step: int) -> bool:
        """Whether `update` wants statistics of optimizer step `step` = 0, 1, ..."""
        ...

    def update(self, stats: NoiseStats) -> Split:
        """Set `size` by the statistics of the step just done, the same on all ranks; returns `split`."""
        ...

    def advance(self, progress: float) -> None:
        """Set `size` by the spent fraction of the budget."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which `load_state_dict` goes on exactly."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the saved schedule was."""
        ...


def split_batch(size: int, world_size: int = 1, max_micro_batch: int | None = None) -> Split:
    """Even micro-batches of at most `max_micro_batch` samples that cover a batch with little excess.

        accumulation = ceil(size / (world_size * max_micro_batch))
        micro        = ceil(size / (world_size * accumulation))
        total        = world_size * micro * accumulation < size + world_size * accumulation

    Args:
        size: samples per optimizer step, >= 1.
        world_size: ranks, >= 1. Default 1.
        max_micro_batch: what fits one rank at once, >= 1. Default None: anything.

    >>> split_batch(100, world_size=2, max_micro_batch=16)
    (13, 4, 104)
    """
    accumulation = 1 if max_micro_batch is None else -(-size // (world_size * max_micro_batch))
    micro = -(-size // (world_size * accumulation))
    return micro, accumulation, world_size * micro * accumulation


def round_up(size: int, multiple_of: int) -> int:
    """The smallest multiple that is not below `size`."""
    return -(-size // multiple_of) * multiple_of


def check_sizes(initial: int, max_batch: int, multiple_of: int) -> None:
    """Raise `ValueError` unless initial <= max_batch and both are multiples of `multiple_of`."""
    if max_batch < initial:
        raise ValueError(f"max_batch must be >= initial = {initial}, got {max_batch}")
    for name, size in (("initial", initial), ("max_batch", max_batch)):
        if size % multiple_of:
            raise ValueError(f"{name} must be a multiple of multiple_of = {multiple_of}, got {size}")


def checked_size(size: int, initial: int, max_batch: int, multiple_of: int) -> int:
    """A saved size; raises `ValueError` unless a schedule of these arguments can have it."""
    if not initial <= size <= max_batch or size % multiple_of:
        raise ValueError(
            f"the saved size must be a multiple of {multiple_of} in [initial, max_batch] = [{initial}, {max_batch}], "
            f"got {size}"
        )
    return int(size)
