r"""Schedules from gradient norms: linear decay when nothing is known, a refined one after a first run.

For x_{t+1} = x_t - eta_t g_t, t = 1 .. T, any weights w_t > 0 give a schedule with a guarantee for the last
iterate,

    eta_t = w_t * (w_{t+1} + ... + w_T) / (w_1 + ... + w_T),

and the best weights are w_t = G_t^-2 with G_t = ||g_t||_2 (SGD), for methods that scale each coordinate by
itself, as Adam does, w_t = 1 / ||g_t||_1. Equal norms give linear decay, the optimum when no more than a bound on the
gradients is known; the norms of an earlier run give that task's own warm-up and final annealing.

Not for a run whose training loss goes to zero: its norms vanish at the end, and the formula keeps the rate
for the end. `RefinedLR` sees this and falls back to linear decay.

Source: "When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement" (later: "Optimal Linear Decay
Learning Rate Schedules and Further Refinements"), Defazio, Cutkosky, Mehta, Mishchenko, arXiv 2310.07831.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.schedules.gradient_norms import NORMS, GradNormRecorder, as_numbers, clean_norms, read_norms
from headway.schedules.profile import ClosedFormLR
from headway.spending import Budget, steps_of

__all__ = [
    "ArrayLR",
    "RefinedLR",
    "last_iterate_bound",
    "linear_decay",
    "refine_schedule",
]

_NORM = OneOf(*NORMS)
_SMOOTHING = Range(low=0, high=0.5, high_open=True)
_STEPS = Range(low=1, integer=True)


def linear_decay(total_steps: int, *, warmup: int = 0) -> np.ndarray:
    r"""Multipliers of linear decay, the schedule with the best worst-case guarantee.

        s_t = t / W  for t < W,    s_t = 1 - (t - W) / (T - W)  for W <= t < T,    t = 0 .. T - 1

    Args:
        total_steps: T >= 1.
        warmup: W in [0, T). Default 0.

    Returns:
        Float64 array of shape (T,). Its last value is 1 / (T - W), not 0: no step is spent without moving.

    Raises:
        ValueError: for an argument out of its range.

    Source: arXiv 2310.07831; the warm-up is no part of the theorem.

    >>> linear_decay(4).tolist(), linear_decay(4, warmup=2).tolist()
    ([1.0, 0.75, 0.5, 0.25], [0.0, 0.5, 1.0, 0.5])
    """
    check_arguments(
        {"total_steps": _STEPS, "warmup": Range(low=0, integer=True)}, total_steps=total_steps, warmup=warmup
    )
    if warmup >= total_steps:
        raise ValueError(f"warmup must be < total_steps = {total_steps}, got {warmup}")
    return _with_warmup(1 - np.arange(total_steps - warmup) / (total_steps - warmup), warmup)


def refine_schedule(
    norms: Sequence[float] | np.ndarray | Tensor,
    *,
    norm: str = "l2",
    smoothing: float = 0.1,
    length: int | None = None,
    normalize: bool = True,
) -> np.ndarray:
    r"""The schedule that the gradient norms of a complete run ask for.

        G    <-  norms, NaN and infinities replaced by interpolation, then a running median over the fraction tau
        w_t   =  G_t^-2 ("l2")  or  1 / G_t ("l1")
        eta_t =  w_t * sum_{p > t} w_p / sum_p w_p,        s_t = eta_t / max_t eta_t

    Args:
        norms: one norm per step of the run, or per several steps, in order; at least 2 finite ones, all > 0.
        norm: which weights: "l2" (default) for SGD from 2-norms, "l1" for Adam and its like from 1-norms. 2-norms
            do with "l1" as long as the ratio of the two norms keeps about the same during the run.
        smoothing: tau in [0, 0.5), the window of the median as a fraction of the run. Default 0.1, that of
            the authors' code; 0 for none.
        length: number of values to return, >= 1; from first to last by linear interpolation. Default: as many as norms.
        normalize: divide by the largest value, so that the schedule multiplies a peak rate. Without it
            D / sqrt(sum_t G_t^-2) times the result is the step of the theorem (for "l2"), with D the distance
            from the start to the solution.

    Returns:
        Float64 array of shape (length,). All values are >= 0; the last is 0 (except for length 1).

    Raises:
        ValueError: for an argument out of its range, or norms as above that are too few or not > 0.

    Source: arXiv 2310.07831. The authors' code divides by w_T where the theorem has the sum of all weights, which
    normalising hides; here it is the sum. The end of the run is padded by reflection for the median, the start by its
    first value, as there.

    >>> refine_schedule([2.0, 2.0, 2.0, 2.0, 2.0]).round(12).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    >>> refine_schedule([4.0, 2.0, 2.0, 2.0, 4.0], smoothing=0).round(3).tolist()
    [0.361, 1.0, 0.556, 0.111, 0.0]
    """
    check_arguments(
        {"norm": _NORM, "smoothing": _SMOOTHING, "length": Range(low=1, integer=True, optional=True)},
        norm=norm,
        smoothing=smoothing,
        length=length,
    )
    G = _median(clean_norms(norms), smoothing)
    # The smallest norm becomes 1, so that no weight overflows; a schedule does not depend on their scale.
    smallest = G.min()
    w = (G / smallest) ** -NORMS[norm]
    sums = w[::-1].cumsum()[::-1]  # (T,), from each step to the end
    eta = w * np.append(sums[1:], 0.0) / sums[0]
    if length is not None and length != len(eta):
        eta = np.interp(np.linspace(0, len(eta) - 1, length), np.arange(len(eta)), eta)
    if not normalize:
        return eta * smallest ** -NORMS[norm]
    if eta.max() == 0:
        raise ValueError(f"norms must span fewer orders of magnitude, got values from {smallest:g} to {G.max():g}")
    return eta / eta.max()


def last_iterate_bound(norms: Sequence[float] | np.ndarray | Tensor, distance: float) -> float:
    r"""What the theorem guarantees for the last iterate: E f(x_T) - f* <= D / sqrt(sum_t G_t^-2).

    It holds for the run whose norms these are, made with the schedule and the scale that `refine_schedule`
    describes. A new run with that schedule has other norms; only linear decay with the largest norm G gives a
    guarantee beforehand, D G / sqrt(T).

    Args:
        norms: 2-norms of the gradients, one per step; as for `refine_schedule`.
        distance: D > 0, from the start to the solution.

    Raises:
        ValueError: for an argument out of its range.

    Source: arXiv 2310.07831.

    >>> last_iterate_bound([2.0] * 100, distance=3.0)
    0.6
    """
    check_arguments({"distance": Range(low=0, low_open=True)}, distance=distance)
    return float(distance / math.sqrt((clean_norms(norms) ** -2.0).sum()))


@dataclass(frozen=True)
class _Numbers:
    """A sequence of at least one finite number >= 0."""

    def accepts(self, value: Any) -> bool:
        numbers = as_numbers(value)
        return numbers is not None and numbers.size > 0 and bool((np.isfinite(numbers) & (numbers >= 0)).all())

    def describe(self) -> str:
        return "a sequence of finite numbers >= 0, one or more"

    def outside(self) -> list[Any]:
        return [[], [1.0, -1.0], [math.nan], [[1.0]], 1.0, "1", None]


@dataclass(frozen=True)
class _Norms:
    """Gradient norms or where they stand; whether a path leads anywhere shows when it is read."""

    def accepts(self, value: Any) -> bool:
        return value is None or isinstance(value, str | os.PathLike) or as_numbers(value) is not None

    def describe(self) -> str:
        return "a sequence of numbers, the path of a metrics.jsonl or of a folder that holds one, or None"

    def outside(self) -> list[Any]:
        return [1.0, [[1.0, 2.0]], [], [1.0], [1.0, -1.0], [1.0, 0.0, 2.0], [math.nan, 1.0], "no/such/run"]


class ArrayLR(ClosedFormLR):
    """Play a schedule given as an array: step t runs at `base_lr * multipliers[t]`.

    Args:
        optimizer: the optimizer; each group's current `lr` is its base rate.
        multipliers: one finite number >= 0 per optimizer step, at least one; past the end the last one holds.
            They are part of `state_dict()`, and loading a state replaces them.
        last_epoch: the last step seen by the scheduler that this one continues, -1 for a new run.

    Raises:
        ValueError: for an argument out of its range.

    Source: a carrier for the schedules of arXiv 2310.07831, and for any other.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    >>> schedule = ArrayLR(optimizer, [0.5, 1.0, 0.25])
    >>> [schedule.lr_at(t)[0] for t in range(4)]
    [1.0, 2.0, 0.5, 0.5]
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "multipliers": _Numbers(),
        "last_epoch": Range(low=-1, integer=True),
    }

    def __init__(
        self, optimizer: Optimizer, multipliers: Sequence[float] | np.ndarray | Tensor, last_epoch: int = -1
    ) -> None:
        check_arguments(ArrayLR.constraints, multipliers=multipliers, last_epoch=last_epoch)
        numbers = as_numbers(multipliers)
        assert numbers is not None
        self.multipliers = tuple(numbers.tolist())
        super().__init__(optimizer, last_epoch)

    def lr_at(self, step: int) -> list[float | Tensor]:
        """The rate of each parameter group for step `step` (0-based); changes nothing."""
        multiplier = self.multipliers[min(step, len(self.multipliers) - 1)]
        return [base * multiplier for base in self.base_lrs]


class RefinedLR(ArrayLR):
    r"""Follow the schedule refined from an earlier run's gradient norms, or linear decay without them.

        t < W:       eta_t = b s_0 t / W
        W <= t < T:  eta_t = b (s_{t-W} + final (1 - s_{t-W}))

    s is `refine_schedule(norms, length=T - W)`, or `linear_decay(T - W)` where `norms` is None or the run interpolates
    its data. One earlier run of the same task with any sensible schedule is enough; its norms must have been taken
    before clipping. Norms of a network that starts near zero grow at first, so that the refined schedule has no
    warm-up of its own: give it a short one.

    Args:
        optimizer: the optimizer; each group's current `lr` is its peak rate b.
        total_steps: T >= 1, in optimizer steps; need not be that of the earlier run.
        norms: norms of the earlier run as for `refine_schedule`; or the path of a `metrics.jsonl`, or of a run's folder
            that holds one: its records with a `grad_norm` count, in the order of `step`, of several with one
            step the last. Default None: nothing is known.
        norm: "l2" (default) or "l1" weights, see `refine_schedule`. `grad_norm` in a run's folder is a 2-norm.
        smoothing: window of the median as a fraction of the earlier run, in [0, 0.5). Default 0.1.
        warmup_steps: W in [0, T). Default 0.
        final: lowest multiplier in [0, 1]. Default 0: the last step of a refined schedule stands still, as in
            the theorem.
        last_epoch: the last step seen by the scheduler that this one continues, -1 for a new run.

    Raises:
        ValueError: for an argument out of its range, or a file that is missing or cannot be read as metrics.

    Warns when the refined schedule shows that the run interpolated - its mean is below 0.15, or its maximum lies in the
    last tenth - and takes linear decay.

    Source: arXiv 2310.07831; fallback, `final` and the explicit warm-up are additions.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = RefinedLR(optimizer, total_steps=5, norms=[4.0, 2.0, 2.0, 2.0, 4.0], smoothing=0)
    >>> [round(schedule.lr_at(t)[0], 3) for t in range(5)]
    [0.361, 1.0, 0.556, 0.111, 0.0]
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "total_steps": _STEPS,
        "norms": _Norms(),
        "norm": _NORM,
        "smoothing": _SMOOTHING,
        "warmup_steps": Range(low=0, integer=True),
        "final": Range(low=0, high=1),
        "last_epoch": Range(low=-1, integer=True),
    }

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | Budget,
        *,
        norms: str | Path | Sequence[float] | np.ndarray | Tensor | None = None,
        norm: str = "l2",
        smoothing: float = 0.1,
        warmup_steps: int = 0,
        final: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        total_steps = steps_of(total_steps)
        check_arguments(
            self.constraints,
            total_steps=total_steps,
            norms=norms,
            norm=norm,
            smoothing=smoothing,
            warmup_steps=warmup_steps,
            final=final,
            last_epoch=last_epoch,
        )
        if warmup_steps >= total_steps:
            raise ValueError(f"warmup_steps must be < total_steps = {total_steps}, got {warmup_steps}")
        length = total_steps - warmup_steps
        shape = linear_decay(length)
        if norms is not None:
            values = read_norms(norms) if isinstance(norms, str | os.PathLike) else norms
            trouble = _degenerate(refine_schedule(values, norm=norm, smoothing=smoothing))
            if trouble:
                warnings.warn(f"the refined schedule {trouble}: linear decay is used instead", stacklevel=2)
            else:
                shape = refine_schedule(values, norm=norm, smoothing=smoothing, length=length)
        super().__init__(optimizer, _with_warmup(shape + final * (1 - shape), warmup_steps), last_epoch)

    @classmethod
    def from_run(
        cls,
        optimizer: Optimizer,
        norms: GradNormRecorder | str | Path | Sequence[float] | np.ndarray | Tensor,
        total_steps: int | Budget,
        *,
        norm: str | None = None,
        **options: Any,
    ) -> RefinedLR:
        """The schedule refined from a run: the constructor with `norms` required, which may be the run's recorder.

        Args:
            optimizer: as for the constructor, like all arguments not named here.
            norms: a recorder, a path or numbers.
            total_steps: T.
            norm: "l2" or "l1". Default None: the recorder's, without one "l2".
            **options: `smoothing`, `warmup_steps`, `final`, `last_epoch`.

        Raises:
            ValueError: as the constructor, and for `norms` None.

        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> RefinedLR.from_run(optimizer, [3.0, 3.0, 3.0], total_steps=3).multipliers
        (1.0, 0.5, 0.0)
        """
        if norms is None:
            raise ValueError(f"norms must be a recorder, {_Norms().describe().removesuffix(', or None')}, got None")
        if isinstance(norms, GradNormRecorder):
            norm = norms.norm if norm is None else norm
            norms = norms.norms
        return cls(optimizer, total_steps, norms=norms, norm="l2" if norm is None else norm, **options)


def _with_warmup(shape: np.ndarray, warmup: int) -> np.ndarray:
    return np.concatenate([shape[0] * np.arange(warmup) / max(warmup, 1), shape])


def _degenerate(schedule: np.ndarray) -> str:
    """What shows that the norms are those of an interpolating run; empty if nothing does."""
    if schedule.mean() < 0.15:
        return f"has a mean of {schedule.mean():.2g} (norms that vanish, as when the loss goes to zero)"
    if schedule.argmax() >= 0.9 * len(schedule):
        return "has its maximum in the last tenth (norms that vanish, as when the loss goes to zero)"
    return ""


def _median(values: np.ndarray, smoothing: float) -> np.ndarray:
    """The running median over the fraction `smoothing` of the values; same shape."""
    width = 2 * (int(smoothing * len(values)) // 2) + 1
    if width == 1:
        return values
    from scipy.ndimage import median_filter

    padded = np.pad(values, (0, 2 * width), mode="reflect")
    return median_filter(padded, size=width, mode="nearest")[: len(values)]
