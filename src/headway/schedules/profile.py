r"""A learning-rate schedule as a profile that is read at sampling points.

A profile p maps the spent fraction of the budget z in [0, 1] to the fraction of the lr range in
use; the sampling points say when it is read:

    eta_t = eta_min + (eta_max - eta_min) p(z_t),    z_t = max{ s in S : s <= (t - W) / (T - W) },

with T steps in all, W of them warm-up, and S either every step or a few fractions of the budget.
One scheduler, `ProfileLR`, serves every profile; `LinearLR`, `CosineLR` and `ConstantLR` are its
best-known instances.

Source: the split into profile and sampling rate is that of "REX: Revisiting Budgeted Training with
an Improved Schedule", Chen, Wolfe, Kyrillidis, arXiv 2107.04197.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from headway.constraints import Constraint, Range, check_arguments
from headway.spending import Budget, steps_of

__all__ = [
    "PROFILES",
    "ClosedFormLR",
    "ConstantLR",
    "CosineLR",
    "DelayedLinear",
    "Exponential",
    "Increasing",
    "LinearLR",
    "ProfileLR",
    "Step",
    "base_lrs_of",
    "constant",
    "cosine",
    "linear",
]


def constant(z: float) -> float:
    """p(z) = 1."""
    return 1.0


def linear(z: float) -> float:
    """p(z) = 1 - z."""
    return 1.0 - z


def cosine(z: float) -> float:
    """p(z) = (1 + cos(pi z)) / 2."""
    return (1.0 + math.cos(math.pi * z)) / 2


@dataclass(frozen=True)
class Increasing:
    """A non-empty, strictly increasing sequence of numbers in an interval, or the one word `word`.

    >>> Increasing(low=1, integer=True).describe()
    'a strictly increasing sequence of whole numbers >= 1'
    """

    low: float = -math.inf
    high: float = math.inf
    high_open: bool = False
    integer: bool = False
    word: str | None = None

    def accepts(self, value: Any) -> bool:
        if isinstance(value, str):
            return value == self.word
        if not isinstance(value, Sequence) or not value:
            return False
        item = self._item()
        return all(item.accepts(number) for number in value) and all(a < b for a, b in pairwise(value))

    def describe(self) -> str:
        kind = "whole numbers" if self.integer else "numbers"
        interval = self._item().describe().removeprefix("a whole number ")
        text = f"a strictly increasing sequence of {kind} {interval}"
        return f"{self.word!r} or {text}" if self.word else text

    def outside(self) -> list[Any]:
        inside = self._item().low if math.isfinite(self.low) else 0
        return [[], [inside, inside], "no-such-word", 1, *([number] for number in self._item().outside())]

    def _item(self) -> Range:
        return Range(low=self.low, high=self.high, high_open=self.high_open, integer=self.integer)


@dataclass(frozen=True)
class Exponential:
    """p(z) = exp(gamma z).

    `gamma` < 0; the default -3 ends at 5 % of the peak.
    """

    gamma: float = -3.0

    def __post_init__(self) -> None:
        check_arguments({"gamma": Range(high=0, high_open=True)}, gamma=self.gamma)

    def __call__(self, z: float) -> float:
        return math.exp(self.gamma * z)


@dataclass(frozen=True)
class DelayedLinear:
    """p(z) = 1 up to z = `delay`, then a straight line to 0; `delay` in [0, 1), default 1/2.

    >>> [DelayedLinear(0.5)(z) for z in (0.0, 0.5, 0.75, 1.0)]
    [1.0, 1.0, 0.5, 0.0]
    """

    delay: float = 0.5

    def __post_init__(self) -> None:
        check_arguments({"delay": Range(low=0, high=1, high_open=True)}, delay=self.delay)

    def __call__(self, z: float) -> float:
        return 1.0 if z <= self.delay else (1.0 - z) / (1.0 - self.delay)


@dataclass(frozen=True)
class Step:
    """p(z) falls by the factor `drop` at each of the fractions `at`.

    The default, a tenth at one half and again at three quarters of the budget, is the step schedule
    "50-75" of Chen et al.

    >>> [round(Step()(z), 3) for z in (0.0, 0.49, 0.5, 0.75, 1.0)]
    [1.0, 1.0, 0.1, 0.01, 0.01]
    """

    at: tuple[float, ...] = (0.5, 0.75)
    drop: float = 0.1

    def __post_init__(self) -> None:
        check_arguments(
            {"at": Increasing(low=0, high=1, high_open=True), "drop": Range(low=0, high=1)}, at=self.at, drop=self.drop
        )

    def __call__(self, z: float) -> float:
        return self.drop ** bisect_right(self.at, z)


PROFILES: Mapping[str, Callable[[float], float]] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "step": Step(),
    "exponential": Exponential(),
    "delayed-linear": DelayedLinear(),
}
"""The profiles that `ProfileLR` knows by name."""


@dataclass(frozen=True)
class _ProfileArgument:
    def accepts(self, value: Any) -> bool:
        return value in PROFILES if isinstance(value, str) else callable(value)

    def describe(self) -> str:
        return f"a function of z or one of {', '.join(map(repr, PROFILES))}"

    def outside(self) -> list[Any]:
        return ["no-such-profile", 1.0, None]


def base_lrs_of(optimizer: Optimizer) -> list[float]:
    """The rates that a scheduler built on `optimizer` now would take as base rates."""
    return [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]


class ClosedFormLR(LRScheduler):
    """A scheduler whose rates depend on the step and the base rates only.

    A subclass defines `lr_at`. The chained and the closed form are then one function, so resuming,
    splitting steps into epochs and jumping to a step give the same bits. In a
    `torch.optim.lr_scheduler.ChainedScheduler` such a schedule sets the rate absolutely, as
    `LambdaLR` does: put it first, and after it only schedulers that scale what they find.
    """

    def lr_at(self, step: int) -> list[float | Tensor]:
        """The rate of each parameter group for step `step` (0-based); changes nothing."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """The rates for the current step, `last_epoch`."""
        groups = len(self.optimizer.param_groups)
        if groups != len(self.base_lrs):
            raise ValueError(
                f"the optimizer has {groups} parameter groups, the schedule was built for {len(self.base_lrs)}: "
                "build a new schedule after add_param_group"
            )
        return self.lr_at(self.last_epoch)

    def _get_closed_form_lr(self) -> list[float | Tensor]:
        return self.get_lr()


class ProfileLR(ClosedFormLR):
    r"""Set each group's rate from a profile of the spent budget, after an optional linear warm-up.

    With base rate b, total T, warm-up W, floor m:

        t < W:       eta_t = warmup_start + (b - warmup_start) t / W
        W <= t < T:  eta_t = m + (b - m) p(z_t),   z_t = max{ s in S : s <= (t - W) / (T - W) }
        t >= T:      eta_t = m + (b - m) p(1)

    t is `last_epoch`: the number of `step()` calls since the start, so call `step()` once after every
    optimizer step, not once per epoch - a one-epoch run counted in epochs never decays. The last
    training step t = T - 1 reads z < 1, so its rate is small, not m. A gradient scaler that skips an
    optimizer step spends budget all the same unless the call of `step()` is skipped too.

    Args:
        optimizer: the optimizer; each group's current `lr` is its base rate b, the peak.
        profile: p, a function from [0, 1] to [0, inf), or a name in `PROFILES`. It is not part of
            `state_dict()`; everything else is, and loading a state replaces it.
        total_steps: T >= 1, in optimizer steps, or a `headway.spending.Budget`.
        warmup_steps: W in [0, T), in optimizer steps. Default 0.
        warmup_start: rate at step 0 of the warm-up, in [0, smallest b]. Default 0.
        lr_min: floor m as a rate, in [0, smallest b]. Default 0, as in the paper.
        lr_min_ratio: floor as a fraction of each group's base rate, m = ratio b, in [0, 1]; instead of `lr_min`.
        sampling: "iteration" reads the profile at every step; otherwise the increasing fractions in
            [0, 1) of the budget after warm-up at which it is read (0 always is).
        last_epoch: the last step seen by the scheduler that this one continues, -1 for a new run.

    Raises:
        ValueError: for an argument out of its range, or when the optimizer gets a parameter group later.

    Source: Chen, Wolfe, Kyrillidis, arXiv 2107.04197. Warm-up is not part of the paper; the values
    past T are chosen here.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = ProfileLR(optimizer, "linear", total_steps=4, sampling=[0.5])
    >>> [schedule.lr_at(t)[0] for t in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.0]
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "profile": _ProfileArgument(),
        "total_steps": Range(low=1, integer=True),
        "warmup_steps": Range(low=0, integer=True),
        "warmup_start": Range(low=0),
        "lr_min": Range(low=0),
        "lr_min_ratio": Range(low=0, high=1, optional=True),
        "sampling": Increasing(low=0, high=1, high_open=True, word="iteration"),
        "last_epoch": Range(low=-1, integer=True),
    }

    def __init__(
        self,
        optimizer: Optimizer,
        profile: str | Callable[[float], float],
        total_steps: int | Budget,
        *,
        warmup_steps: int = 0,
        warmup_start: float = 0.0,
        lr_min: float = 0.0,
        lr_min_ratio: float | None = None,
        sampling: str | Sequence[float] = "iteration",
        last_epoch: int = -1,
    ) -> None:
        total_steps = steps_of(total_steps)
        check_arguments(
            ProfileLR.constraints,
            profile=profile,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            warmup_start=warmup_start,
            lr_min=lr_min,
            lr_min_ratio=lr_min_ratio,
            sampling=sampling,
            last_epoch=last_epoch,
        )
        if warmup_steps >= total_steps:
            raise ValueError(f"warmup_steps must be < total_steps = {total_steps}, got {warmup_steps}")
        if lr_min_ratio is not None and lr_min != 0:
            raise ValueError(f"lr_min_ratio must be None when lr_min = {lr_min} is given, got {lr_min_ratio}")
        if isinstance(optimizer, Optimizer):
            smallest = min(base_lrs_of(optimizer))
            for name, rate in (("lr_min", lr_min), ("warmup_start", warmup_start)):
                if rate > smallest:
                    raise ValueError(f"{name} must be <= the smallest base lr = {smallest:g}, got {rate}")
        self.profile = PROFILES[profile] if isinstance(profile, str) else profile
        self.total_steps = int(total_steps)
        self.warmup_steps = int(warmup_steps)
        self.warmup_start = float(warmup_start)
        self.lr_min = float(lr_min)
        self.lr_min_ratio = None if lr_min_ratio is None else float(lr_min_ratio)
        self.sampling = sampling if isinstance(sampling, str) else tuple(float(point) for point in sampling)
        super().__init__(optimizer, last_epoch)

    def lr_at(self, step: int) -> list[float | Tensor]:
        """The rate of each parameter group for step `step` (0-based); changes nothing."""
        if step < self.warmup_steps:
            part = step / self.warmup_steps
            return [self.warmup_start * (1 - part) + base * part for base in self.base_lrs]
        height = self.profile(self._z(step))
        if not 0 <= height < math.inf:
            raise ValueError(f"profile must return finite values >= 0, got {height!r} for step {step}")
        # In this form p = 1 gives the base rate and p = 0 the floor without a rounding error.
        return [base * height + self._floor(base) * (1 - height) for base in self.base_lrs]

    def _z(self, step: int) -> float:
        if step >= self.total_steps:
            return 1.0
        z = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        if isinstance(self.sampling, str):
            return z
        # The slack takes in points such as 0.1 + 0.2, an ulp above the step that they mean.
        read = bisect_right(self.sampling, z + 1e-9)
        return self.sampling[read - 1] if read else 0.0

    def _floor(self, base: float | Tensor) -> float | Tensor:
        return self.lr_min if self.lr_min_ratio is None else base * self.lr_min_ratio

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers, strings and tuples, without the optimizer and the profile."""
        return {name: value for name, value in super().state_dict().items() if name != "profile"}


class LinearLR(ProfileLR):
    """A straight line from the base rate to the floor: `ProfileLR` with p(z) = 1 - z.

    Arguments and errors are those of `ProfileLR`. Unlike `torch.optim.lr_scheduler.LinearLR` it ends
    at the floor without being told factors.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = LinearLR(optimizer, total_steps=4)
    >>> [schedule.lr_at(t)[0] for t in range(5)]
    [1.0, 0.75, 0.5, 0.25, 0.0]
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        name: constraint for name, constraint in ProfileLR.constraints.items() if name != "profile"
    }

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | Budget,
        *,
        warmup_steps: int = 0,
        warmup_start: float = 0.0,
        lr_min: float = 0.0,
        lr_min_ratio: float | None = None,
        sampling: str | Sequence[float] = "iteration",
        last_epoch: int = -1,
    ) -> None:
        super().__init__(
            optimizer,
            "linear",
            total_steps,
            warmup_steps=warmup_steps,
            warmup_start=warmup_start,
            lr_min=lr_min,
            lr_min_ratio=lr_min_ratio,
            sampling=sampling,
            last_epoch=last_epoch,
        )


class CosineLR(ProfileLR):
    """Half a cosine from the base rate to the floor: `ProfileLR` with p(z) = (1 + cos(pi z)) / 2.

    Arguments and errors are those of `ProfileLR`. Past the end it stays at the floor, where
    `torch.optim.lr_scheduler.CosineAnnealingLR` would rise again.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = CosineLR(optimizer, total_steps=4)
    >>> [round(schedule.lr_at(t)[0], 4) for t in range(5)]
    [1.0, 0.8536, 0.5, 0.1464, 0.0]
    """

    constraints: ClassVar[Mapping[str, Constraint]] = LinearLR.constraints

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | Budget,
        *,
        warmup_steps: int = 0,
        warmup_start: float = 0.0,
        lr_min: float = 0.0,
        lr_min_ratio: float | None = None,
        sampling: str | Sequence[float] = "iteration",
        last_epoch: int = -1,
    ) -> None:
        super().__init__(
            optimizer,
            "cosine",
            total_steps,
            warmup_steps=warmup_steps,
            warmup_start=warmup_start,
            lr_min=lr_min,
            lr_min_ratio=lr_min_ratio,
            sampling=sampling,
            last_epoch=last_epoch,
        )


class ConstantLR(ProfileLR):
    """The base rate throughout, after an optional linear warm-up: `ProfileLR` with p(z) = 1.

    Args:
        optimizer: the optimizer; each group's current `lr` is its base rate.
        total_steps: accepted so that it can stand in for any other schedule; changes no rate. Default None, open end.
        warmup_steps: W in [0, total_steps), in optimizer steps. Default 0.
        warmup_start: rate at step 0 of the warm-up, in [0, smallest base rate]. Default 0.
        last_epoch: the last step seen by the scheduler that this one continues, -1 for a new run.

    Raises:
        ValueError: for an argument out of its range.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = ConstantLR(optimizer, warmup_steps=2)
    >>> [schedule.lr_at(t)[0] for t in range(4)]
    [0.0, 0.5, 1.0, 1.0]
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "total_steps": Range(low=1, integer=True, optional=True),
        "warmup_steps": Range(low=0, integer=True),
        "warmup_start": Range(low=0),
        "last_epoch": Range(low=-1, integer=True),
    }

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | Budget | None = None,
        *,
        warmup_steps: int = 0,
        warmup_start: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        total_steps = None if total_steps is None else steps_of(total_steps)
        check_arguments(self.constraints, total_steps=total_steps, warmup_steps=warmup_steps)
        super().__init__(
            optimizer,
            "constant",
            warmup_steps + 1 if total_steps is None else total_steps,
            warmup_steps=warmup_steps,
            warmup_start=warmup_start,
            last_epoch=last_epoch,
        )
