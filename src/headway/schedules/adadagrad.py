r"""AdAdaGrad: a batch that grows when a statistical test finds the mini-batch gradient too noisy.

With per-sample gradients g_i, i = 1 ... b, their mean g and unbiased variances over i, a batch passes

    norm         sum_j Var(g_ij) / b  <= eta^2 ||g||^2
    ip           Var(<g_i, g>) / b    <= theta^2 ||g||^4
    ip+orth      ip and sum_j Var(r_ij) / b <= nu^2 ||g||^2,   r_i = g_i - (<g_i, g> / ||g||^2) g
    coordinate   Var(g_ij) / b        <= eta^2 g_j^2 for every coordinate j

and one that fails proposes the smallest size that would have passed. The first two variances add up to
the norm's, sum_j Var(g_ij) = Var(<g_i, g>) / ||g||^2 + sum_j Var(r_ij).

Source: "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", Lau, Liu, Kolar, arXiv
2402.11215; the norm test is that of Byrd, Chin, Nocedal, Wu (2012), the inner-product tests those of
Bollapragada, Byrd, Nocedal (arXiv 1710.11258).
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch.utils.data import Sampler

from headway.constraints import Constraint, Range, check_arguments
from headway.schedules.batch_schedule import Split, check_sizes, checked_size, round_up, split_batch
from headway.schedules.gradient_noise import (
    TESTS,
    NoiseStats,
    chunk_stats,
    gram_stats,
    noise_stats,
    per_sample_grads,
    pool_noise_stats,
)

__all__ = [
    "AdaptiveBatchController",
    "GrowingBatchSampler",
    "NoiseStats",
    "chunk_stats",
    "gram_stats",
    "noise_stats",
    "per_sample_grads",
    "pool_noise_stats",
    "propose_batch",
]

_POSITIVE = Range(low=0, low_open=True)
# What each test reads of the statistics beside grad_sq.
_READS = {"norm": ("var_l1",), "ip": ("var_ip",), "ip+orth": ("var_ip", "var_orth"), "coordinate": ("var_coord_ratio",)}


class AdaptiveBatchController:
    """A batch schedule that grows by a test on gradient noise and never shrinks.

        size <- min(max_batch, max(size, round_up(proposal, multiple_of)))

    with `propose_batch(stats, test, eta, theta, nu)` as the proposal. Give it the statistics of the step just
    done whenever `due(step)`; at `max_batch` it asks no more. Statistics of fewer samples than `size`, as of the
    last, partial batch of an epoch, are left unused; statistics that are not finite are skipped with a warning.

    Small batches are enough while gradients are large; later, noise dominates. So it saves samples early and needs
    no schedule to be tuned, where the hardware is not idle at small batches. The learning rate is not rescaled, so
    learning-rate schedules should count samples, not steps. The proposal is a lower estimate where noise dominates:
    E ||g||^2 is ||grad F||^2 + sum_j Var(g_ij) / b. Dropout and augmentation count as noise.

    Args:
        initial: batch at the start, samples over all ranks, >= 2 (one sample has no variance); the paper uses 8 to
            256. A multiple of `multiple_of`.
        max_batch: largest batch, >= initial, a multiple of `multiple_of`.
        test: "norm" (default), "ip", "ip+orth" or "coordinate". `needs` says which statistics that takes:
            "chunks" for "norm" (`chunk_stats` or any other), "samples" for the rest.
        eta: tolerance of "norm" and "coordinate", > 0. Default 0.1 (authors' code: MNIST and ImageNet; 0.5 CIFAR-10).
        theta: tolerance of the inner-product tests, > 0. Default 0.5 (authors' code, CIFAR-100).
        nu: tolerance of the orthogonality test, > 0. Default 1.0 (authors' code, CIFAR-100).
        test_interval: optimizer steps between tests, >= 1. Default 10, which keeps their cost below 5 % of the time;
            the authors test at every step.
        max_micro_batch: what fits one rank at once, for `split`. Default None: anything.
        world_size: ranks, for `split`. Default 1.
        multiple_of: what sizes are multiples of, so that they divide evenly or suit a compiled graph. Default 1.

    Raises:
        ValueError: for an argument out of its range; from `update`, for statistics without what the test reads.

    Source: arXiv 2402.11215 and the authors' code, with a departure: micro-batches are made even, so that `total`
    exceeds `size` by less than world_size * accumulation; the code fills all but the last.

    >>> schedule = AdaptiveBatchController(8, 256, eta=0.5, max_micro_batch=16)
    >>> schedule.update(NoiseStats(batch=8, var_l1=10.0, grad_sq=1.0))  # 10 / 0.25 = 40 samples would pass
    (14, 3, 42)
    >>> schedule.size
    40
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "initial": Range(low=2, integer=True),
        "max_batch": Range(low=2, integer=True),
        "test": TESTS,
        "eta": _POSITIVE,
        "theta": _POSITIVE,
        "nu": _POSITIVE,
        "test_interval": Range(low=1, integer=True),
        "max_micro_batch": Range(low=1, integer=True, optional=True),
        "world_size": Range(low=1, integer=True),
        "multiple_of": Range(low=1, integer=True),
    }

    def __init__(
        self,
        initial: int,
        max_batch: int,
        *,
        test: str = "norm",
        eta: float = 0.1,
        theta: float = 0.5,
        nu: float = 1.0,
        test_interval: int = 10,
        max_micro_batch: int | None = None,
        world_size: int = 1,
        multiple_of: int = 1,
    ) -> None:
        check_arguments(
            self.constraints,
            initial=initial,
            max_batch=max_batch,
            test=test,
            eta=eta,
            theta=theta,
            nu=nu,
            test_interval=test_interval,
            max_micro_batch=max_micro_batch,
            world_size=world_size,
            multiple_of=multiple_of,
        )
        check_sizes(initial, max_batch, multiple_of)
        self.initial, self.max_batch = int(initial), int(max_batch)
        self.test, self.eta, self.theta, self.nu = test, eta, theta, nu
        self.test_interval = test_interval
        self.multiple_of, self.max_micro_batch, self.world_size = multiple_of, max_micro_batch, world_size
        self.size = self.initial

    @property
    def needs(self) -> Literal["chunks", "samples"]:
        """Which statistics the test takes."""
        return "chunks" if self.test == "norm" else "samples"

    @property
    def split(self) -> Split:
        """`size` as (micro, accumulation, total), see `split_batch`."""
        return split_batch(self.size, self.world_size, self.max_micro_batch)

    @property
    def lr_factor(self) -> float:
        """1: the learning rate does not follow the batch."""
        return 1.0

    def advance(self, progress: float) -> None:
        """Nothing: the statistics decide, not the budget spent."""

    def due(self, step: int) -> bool:
        """Whether statistics of optimizer step `step` = 0, 1, ... are wanted."""
        return step % self.test_interval == 0 and self.size < self.max_batch

    def update(self, stats: NoiseStats) -> Split:
        """Grow, if the test asks for it; returns (micro, accumulation, total).

        Args:
            stats: of the whole batch over all ranks, the same on every rank, so that all decide alike.
        """
        if not _usable(stats, self.test):
            warnings.warn(
                f"the gradient statistics are not finite ({stats}); the batch stays at {self.size}",
                RuntimeWarning,
                stacklevel=2,
            )
        elif stats.batch >= self.size:
            proposal = propose_batch(stats, self.test, self.eta, self.theta, self.nu)
            self.size = min(self.max_batch, max(self.size, round_up(proposal, self.multiple_of)))
        return self.split

    def state_dict(self) -> dict[str, Any]:
        """The size reached."""
        return {"size": self.size}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved size. Raises `ValueError` if this controller cannot have it."""
        self.size = checked_size(state_dict["size"], self.initial, self.max_batch, self.multiple_of)


def propose_batch(stats: NoiseStats, test: str = "norm", eta: float = 0.1, theta: float = 0.5, nu: float = 1.0) -> int:
    """The smallest batch that would have passed the test, at least 1.

        norm         ceil(var_l1 / (eta^2 grad_sq))
        ip           ceil(var_ip / (theta^2 grad_sq^2))
        ip+orth      the larger of ip and ceil(var_orth / (nu^2 grad_sq))
        coordinate   ceil(var_coord_ratio / eta^2)

    Where the mean gradient is 0 and the variance is not, no batch would: `sys.maxsize`.

    Args:
        stats: from `noise_stats` or one of its kin.
        test: see above. Default "norm".
        eta: tolerance of "norm" and "coordinate", > 0. Default 0.1, as all three from the authors' code.
        theta: tolerance of "ip" and "ip+orth", > 0. Default 0.5.
        nu: tolerance of the orthogonality in "ip+orth", > 0. Default 1.0.

    Raises:
        ValueError: a tolerance out of its range; statistics that are not finite, or lack what the test reads.

    >>> propose_batch(NoiseStats(batch=8, var_l1=10.0, grad_sq=1.0), eta=0.5)
    40
    """
    check_arguments(
        {"test": TESTS, "eta": _POSITIVE, "theta": _POSITIVE, "nu": _POSITIVE}, test=test, eta=eta, theta=theta, nu=nu
    )
    if not _usable(stats, test):
        raise ValueError(f"stats must be finite for the test {test!r}, got {stats}")
    var_l1, var_ip, var_orth, coordinate = stats.var_l1, stats.var_ip, stats.var_orth, stats.var_coord_ratio
    # Divided one factor at a time: ||g||^4 of a small gradient would underflow.
    if test == "norm":
        ratio = _ratio(var_l1, stats.grad_sq) / eta**2
    elif test == "coordinate":
        ratio = (coordinate or 0.0) / eta**2
    else:
        ratio = _ratio(_ratio(var_ip or 0.0, stats.grad_sq), stats.grad_sq) / theta**2
        if test == "ip+orth":
            ratio = max(ratio, _ratio(var_orth or 0.0, stats.grad_sq) / nu**2)
    return sys.maxsize if ratio >= sys.maxsize else max(1, math.ceil(ratio))


def _ratio(variance: float, square: float) -> float:
    return variance / square if square > 0 else (math.inf if variance > 0 else 0.0)


def _usable(stats: NoiseStats, test: str) -> bool:
    """Whether the numbers that the test reads are finite; raises `ValueError` if one of them was not measured."""
    numbers = [stats.grad_sq]
    for name in _READS[test]:
        value = getattr(stats, name)
        if value is None:
            raise ValueError(
                f"test {test!r} needs {name}, which was not measured: chunk_stats serves only the test 'norm', "
                "pool_noise_stats the test that it was given"
            )
        # Only a coordinate whose mean is 0 makes this ratio infinite: a proposal without bound, not an accident.
        numbers.append(0.0 if name == "var_coord_ratio" and value == math.inf else value)
    return all(math.isfinite(number) for number in numbers)


class GrowingBatchSampler(Sampler[list[int]]):
    """Batches of indices whose size may be set at any time, for `DataLoader(batch_sampler=...)`.

    A change counts from the next batch that is drawn. A loader with workers draws num_workers * prefetch_factor
    batches ahead, so a change shows that much later there; without workers at once.

    Args:
        sampler: indices, as from `torch.utils.data.RandomSampler(data, generator=...)`, or `range(n)`; with several
            ranks a `DistributedSampler`, and batch sizes per rank.
        batch_size: indices per batch at first, >= 1.
        drop_last: leave out the last batch of a pass if it is not full. Default False.

    Raises:
        ValueError: a batch size that is not a whole number >= 1.

    >>> sampler = GrowingBatchSampler(range(8), batch_size=2)
    >>> for indices in sampler:
    ...     print(indices)
    ...     sampler.set_batch_size(3)
    [0, 1]
    [2, 3, 4]
    [5, 6, 7]
    """

    def __init__(self, sampler: Sampler[int] | Sequence[int], batch_size: int, drop_last: bool = False) -> None:
        self.sampler, self.drop_last = sampler, drop_last
        self.set_batch_size(batch_size)

    def set_batch_size(self, batch_size: int) -> None:
        """The size of the batches that are drawn from now on."""
        check_arguments({"batch_size": Range(low=1, integer=True)}, batch_size=batch_size)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        for index in self.sampler:
            batch.append(index)
            if len(batch) >= self.batch_size:
                yield batch
                batch = []
        if batch and not self.drop_last:
            yield batch

    def __len__(self) -> int:
        """Batches of a whole pass at the present size."""
        indices = len(self.sampler)  # type: ignore[arg-type]
        return indices // self.batch_size if self.drop_last else -(-indices // self.batch_size)
