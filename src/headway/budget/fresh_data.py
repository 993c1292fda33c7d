"""Training data that are seen once: a sampler without repetition and a guard around a loader.

For `headway.budget.one_epoch`, whose gain rests on every gradient being taken on fresh data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.utils.data import Sampler, get_worker_info

from headway.constraints import Constraint, OneOf, Range, check_arguments

__all__ = ["DataExhausted", "EpochGuard", "NoRepeatSampler", "epoch_guard"]


class DataExhausted(RuntimeError):  # noqa: N818 - the name of an event, as StopIteration
    """Data were asked for that would be repeated."""


class NoRepeatSampler(Sampler[int]):
    """The indices of a data set in random order, each once over all ranks, workers and passes.

    A pass that is broken off goes on where it stopped. When all are drawn, iteration ends; asking for more raises
    `DataExhausted`. Inside a worker process of a `DataLoader` (an iterable data set that holds the sampler), the
    workers share a rank's indices, and only they know how far they are.

    A `DataLoader` with workers draws ahead of what it has delivered: what it held when a run stopped is left out by the
    resumed run, and never repeated.

    Args:
        size: N >= 1. The order is stored: 8 bytes per index.
        seed: of the order. Default 0.
        shuffle: False keeps the order of the data set. Default True.
        drop_last: leave out up to ranks - 1 indices at the end so that all ranks draw equally many, without which the
            last step of a data-parallel run waits for ever. Default False: each index once.
        rank: 0 <= rank < world_size. Default: that of torch.distributed where it is initialised, else 0.
        world_size: number of ranks. Default: as for `rank`, else 1.

    Raises:
        ValueError: for an argument out of its range.

    >>> sampler = NoRepeatSampler(5)
    >>> sorted(sampler)
    [0, 1, 2, 3, 4]
    >>> next(iter(sampler))
    Traceback (most recent call last):
    ...
    headway.budget.fresh_data.DataExhausted: all 5 indices have been drawn once
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "size": Range(low=1, integer=True),
        "seed": Range(low=0, integer=True),
        "shuffle": OneOf(True, False),
        "drop_last": OneOf(True, False),
        "rank": Range(low=0, integer=True),
        "world_size": Range(low=1, integer=True),
    }

    def __init__(
        self,
        size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        running = dist.is_available() and dist.is_initialized()
        rank = (dist.get_rank() if running else 0) if rank is None else rank
        world_size = (dist.get_world_size() if running else 1) if world_size is None else world_size
        check_arguments(
            self.constraints,
            size=size,
            seed=seed,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        if rank >= world_size:
            raise ValueError(f"rank must be < world_size = {world_size}, got {rank}")
        self.size, self.seed, self.shuffle, self.drop_last = size, seed, shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        # Indices that all ranks together have drawn, now and when they began: the same on each, so that the number of
        # ranks may change in between.
        self._drawn = self._begun = 0

    def __iter__(self) -> Iterator[int]:
        if self._drawn >= self._end():
            raise DataExhausted(f"all {self._end()} indices have been drawn once")
        return self._indices()

    def __len__(self) -> int:
        """The indices left to this rank."""
        return len(range(self._drawn + self.rank, self._end(), self.world_size))

    def state_dict(self) -> dict[str, Any]:
        """The position and what the order depends on, as plain values."""
        return {"drawn": self._drawn, "size": self.size, "seed": self.seed, "shuffle": self.shuffle}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the indices drawn before, also with another number of ranks.

        Raises:
            ValueError: the state is of another order.
        """
        for name in ("size", "seed", "shuffle"):
            if state[name] != getattr(self, name):
                raise ValueError(f"{name} must be {state[name]!r} as in the state, got {getattr(self, name)!r}")
        self._drawn = self._begun = int(state["drawn"])

    def _indices(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        # As an array, whose entries are read much faster one by one than those of a tensor.
        order = (torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)).numpy()
        worker = get_worker_info()
        shift, stride = self.rank, self.world_size
        if worker is not None:
            # In this split the rank's own share does not depend on its number of workers.
            shift, stride = self.rank + worker.id * self.world_size, self.world_size * worker.num_workers
        while self._drawn + shift < self._end():
            index = int(order[self._drawn + shift])
            self._drawn += stride
            yield index
        self._drawn = self._end()

    def _end(self) -> int:
        return self.size - (self.size - self._begun) % self.world_size if self.drop_last else self.size


class EpochGuard:
    """A data loader that may be gone through a limited number of times; see `epoch_guard`."""

    def __init__(self, loader: Iterable[Any], max_epochs: int = 1) -> None:
        check_arguments({"max_epochs": Range(low=1, integer=True)}, max_epochs=max_epochs)
        self.loader, self.max_epochs = loader, max_epochs
        self._started = self._finished = 0

    def __iter__(self) -> Iterator[Any]:
        if self._started >= self.max_epochs:
            raise DataExhausted(f"data would be repeated: max_epochs = {self.max_epochs} passes were started")
        self._started += 1
        return self._pass()

    def __len__(self) -> int:
        if not isinstance(self.loader, Sized):
            raise TypeError(f"{type(self.loader).__name__} has no length")
        return len(self.loader)

    def state_dict(self) -> dict[str, int]:
        """How many passes have ended; a pass under way is left to the loader's own state."""
        return {"finished": self._finished}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue after the passes that had ended; an unfinished one may be started again by a loader that resumes."""
        self._started = self._finished = int(state["finished"])

    def _pass(self) -> Iterator[Any]:
        yield from self.loader
        self._finished += 1


def epoch_guard(loader: Iterable[Any], max_epochs: int = 1) -> EpochGuard:
    """The loader, with an error where data would be seen more than `max_epochs` times.

    A pass counts from its start, so breaking off and starting again counts twice. Near-duplicates within the data are
    repetition that no guard sees.

    Args:
        loader: anything that can be iterated over again and again.
        max_epochs: >= 1. Default 1.

    Raises:
        ValueError: max_epochs out of its range. `DataExhausted` comes from starting one pass too many.

    >>> guarded = epoch_guard([1, 2, 3])
    >>> sum(guarded)
    6
    >>> sum(guarded)
    Traceback (most recent call last):
    ...
    headway.budget.fresh_data.DataExhausted: data would be repeated: max_epochs = 1 passes were started
    """
    return EpochGuard(loader, max_epochs)
