r"""Warmup-Stable-Decay: good models at several budgets of one run whose length need not be known.

A constant rate makes progress that noise hides; a short decay reveals it. With peak eta, floor
eta_min = r eta and a decay of d steps, u in (0, 1] being the spent part of the decay:

    stable:   eta_t = eta
    decay:    1 / eta_t = (1 - u) / eta + u / eta_min        (inverse-proportional, the paper's)

Three ways to get models at T_1 < ... < T_K:

- `WSDLR` with `DecayBranchPlanner`: the main branch stays at eta for ever; a branch forked at T_k - d_k
  decays, is published and dropped. Cost (1 - rho) T_K + rho sum T_k steps.
- `WSDSLR` ("WSD-S"): one branch decays, publishes, and goes on at eta from the decayed checkpoint. Cost T_K.
- separate runs: cost sum T_k.

Why 1 / eta is a line: for a quadratic of curvature g under gradient noise s, the step that minimises
the next expected squared distance v is g v / (g^2 v + s^2), and along that path 1 / eta grows by g a step.

Source: "Understanding Warmup-Stable-Decay Learning Rates: A River Valley Loss Landscape
Perspective", Wen, Li, Wang, Hall, Liang, Ma, arXiv 2410.05192.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, Literal

from torch import Tensor
from torch.optim import Optimizer

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.schedules.profile import ClosedFormLR, Increasing
from headway.spending import Budget, steps_of

__all__ = ["DECAYS", "WSDLR", "WSDSLR", "DecayBranchPlanner", "decay_factor"]

DECAYS = ("inverse", "linear", "cosine", "1-sqrt", "1-square", "exponential")
"""The decay shapes by name."""

Phase = Literal["warmup", "stable", "decay"]

_SHORT_DECAY = 20  # below this many steps the noise of the stable phase is not averaged out


def decay_factor(decay: str, u: float, start: float, floor: float) -> float:
    r"""The rate, as a fraction of the peak, when the fraction u of a decay from `start` to `floor` is spent.

        inverse:      1 / ((1 - u) / start + u / floor)
        linear:       (1 - u) start + u floor
        cosine:       floor + (start - floor) (1 + cos(pi u)) / 2
        1-sqrt:       floor + (start - floor) (1 - sqrt(u))
        1-square:     floor + (start - floor) (1 - u^2)
        exponential:  start (floor / start)^u

    Args:
        decay: a name in `DECAYS`.
        u: spent fraction of the decay in [0, 1].
        start: fraction of the peak at u = 0, > 0.
        floor: fraction of the peak at u = 1, in [0, start]; > 0 for "inverse" and "exponential".

    Raises:
        ValueError: unknown `decay`.

    >>> [round(decay_factor("inverse", u, start=1.0, floor=0.1), 4) for u in (0, 0.5, 1)]
    [1.0, 0.1818, 0.1]
    """
    check_arguments({"decay": OneOf(*DECAYS)}, decay=decay)
    if decay == "inverse":
        return start * floor / ((1 - u) * floor + u * start)
    if decay == "exponential":
        return start * (floor / start) ** u
    left = {
        "linear": 1 - u,
        "cosine": (1 + math.cos(math.pi * u)) / 2,
        "1-sqrt": 1 - math.sqrt(u),
        "1-square": 1 - u * u,
    }[decay]
    return start * left + floor * (1 - left)


def _check_floor(decay: str, min_lr_ratio: float) -> None:
    if decay in ("inverse", "exponential") and min_lr_ratio == 0:
        raise ValueError(f"min_lr_ratio must be in (0, 1] for decay={decay!r}, got {min_lr_ratio}")


def _warn_if_short(steps: int, where: str, stacklevel: int) -> None:
    if steps < _SHORT_DECAY:
        warnings.warn(
            f"the decay {where} has {steps} steps: fewer than {_SHORT_DECAY} leave noise in the published model",
            stacklevel=stacklevel + 1,
        )


def _whole_part(fraction: float, steps: int) -> int:
    # The slack undoes roundings such as 0.29 * 100 = 28.999...
    return int(fraction * steps + 1e-9)


class WSDLR(ClosedFormLR):
    r"""Warm up, stay at the peak, and decay when told to: no total is needed.

        t < W:            eta_t = eta t / W
        stable:           eta_t = eta
        decay from t = D: u = (t - D + 1) / d, eta_t = eta * decay_factor(decay, min(u, 1), f, r)

    f is the rate at the moment of `begin_decay` as a fraction of eta (1 in the stable phase). The
    last of the d decay steps runs exactly at the floor r eta, and so does every later step until
    `resume_stable`. Events are part of `state_dict()`; resuming by `last_epoch` alone is the main
    branch, which has none.

    Args:
        optimizer: the optimizer; each group's current `lr` is its peak eta.
        warmup_steps: W >= 0, in optimizer steps; the rate is 0 at step 0 and eta at step W.
        decay_steps: d >= 1 that `begin_decay()` uses when it is given none. Default None.
        decay: shape, one of `DECAYS`. Default "inverse", the paper's.
        min_lr_ratio: r in [0, 1], > 0 for "inverse" and "exponential". Default 0.1, that of the authors' framework.
        last_epoch: the last step seen by the scheduler that this one continues, -1 for a new run.

    Raises:
        ValueError: for an argument out of its range.

    Source: arXiv 2410.05192.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = WSDLR(optimizer, warmup_steps=0)
    >>> for _ in range(100):
    ...     optimizer.step()
    ...     schedule.step()
    >>> schedule.begin_decay(30)
    >>> schedule.phase(), round(schedule.lr_at(129)[0], 6)
    ('decay', 0.1)
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "warmup_steps": Range(low=0, integer=True),
        "decay_steps": Range(low=1, integer=True, optional=True),
        "decay": OneOf(*DECAYS),
        "min_lr_ratio": Range(low=0, high=1),
        "last_epoch": Range(low=-1, integer=True),
    }

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int,
        decay_steps: int | None = None,
        decay: str = "inverse",
        min_lr_ratio: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        check_arguments(
            self.constraints,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            decay=decay,
            min_lr_ratio=min_lr_ratio,
            last_epoch=last_epoch,
        )
        _check_floor(decay, min_lr_ratio)
        self.warmup_steps = int(warmup_steps)
        self.decay_steps = None if decay_steps is None else int(decay_steps)
        self.decay = decay
        self.min_lr_ratio = float(min_lr_ratio)
        self.decay_start: int | None = None
        self.decay_length = 0
        self.decay_from = 1.0
        super().__init__(optimizer, last_epoch)

    def begin_decay(self, steps: int | None = None) -> None:
        """Decay over the next `steps` steps, the coming one included, from the current rate to the floor.

        Args:
            steps: d >= 1; None takes the constructor's `decay_steps`. Fewer than 20 raise a warning.

        Raises:
            ValueError: no number of steps given here or to the constructor, or one < 1.
            RuntimeError: the current rate lies below the floor (early in the warm-up).
        """
        if steps is None:
            steps = self.decay_steps
        check_arguments({"steps": Range(low=1, integer=True)}, steps=steps)
        assert steps is not None
        start = self.factor(self.last_epoch)
        if start < self.min_lr_ratio or start == 0:
            raise RuntimeError(
                f"begin_decay at step {self.last_epoch}: the rate is {start:g} of the peak, below the floor "
                f"min_lr_ratio = {self.min_lr_ratio:g}"
            )
        _warn_if_short(steps, f"from step {self.last_epoch}", stacklevel=2)
        self.decay_start, self.decay_length, self.decay_from = self.last_epoch, int(steps), start
        self._update_lr(self.last_epoch)

    def resume_stable(self) -> None:
        """Return to the main branch's rate at once: the coming step runs at the peak (or where the warm-up is)."""
        self.decay_start, self.decay_length, self.decay_from = None, 0, 1.0
        self._update_lr(self.last_epoch)

    def phase(self, step: int | None = None) -> Phase:
        """The phase of step `step`, by default of the coming one."""
        step = self.last_epoch if step is None else step
        if self.decay_start is not None and step >= self.decay_start:
            return "decay"
        return "warmup" if step < self.warmup_steps else "stable"

    def factor(self, step: int) -> float:
        """The rate of step `step` as a fraction of the peak."""
        phase = self.phase(step)
        if phase == "warmup":
            return step / self.warmup_steps
        if phase == "stable":
            return 1.0
        assert self.decay_start is not None
        u = min(1.0, (step - self.decay_start + 1) / self.decay_length)
        return decay_factor(self.decay, u, self.decay_from, self.min_lr_ratio)

    def lr_at(self, step: int) -> list[float | Tensor]:
        """The rate of each parameter group for step `step` (0-based); changes nothing."""
        factor = self.factor(step)
        return [base * factor for base in self.base_lrs]


class WSDSLR(ClosedFormLR):
    r"""Decay before every checkpoint and jump back to the peak after it, on one branch (WSD-S).

    Cycle k holds the steps T_{k-1} <= t < T_k (T_0 = 0) and decays over its last d_k steps:

        d_k = floor(rho (T_k - T_{k-1}))  or, with decay_of="total",  floor(rho T_k)
        eta_t = eta t / W                                               t < W                    (cycle 1)
        eta_t = eta (r + (1 - r) (t - T_{k-1}) / R)                     T_{k-1} <= t < T_{k-1} + R  (later cycles)
        eta_t = eta                                                     until T_k - d_k
        eta_t = eta * decay_factor(decay, u, 1, r),   u = (t - (T_k - d_k) + 1) / d_k

    so the step before T_k runs exactly at the floor: save the model when T_k steps are done, then
    go on, optimizer state and data position untouched. Past the last checkpoint the next cycle's
    stable phase begins; `extend` gives it an end.

    The loss rises right after a checkpoint, where `phase` turns from "decay" to "stable": no reason
    for a divergence guard or early stopping to act. Averages of the weights, and a weight decay that
    is scaled by the rate, change meaning there too.

    Args:
        optimizer: the optimizer; each group's current `lr` is its peak eta.
        checkpoints: T_1 < T_2 < ... >= 1, counts of optimizer steps or `headway.spending.Budget`s.
        warmup_steps: W >= 0, at most T_1 - d_1. Default 0.
        rewarmup_steps: R >= 0, linear from the floor after each checkpoint, at most
            (T_k - T_{k-1}) - d_k. Default 0: back to eta at once.
        decay_fraction: rho in (0, 1]. Default 0.1.
        decay_of: "cycle" (default, as in the authors' framework) or "total" (a share of all steps so
            far); which of the two the paper means is not certain. A decay longer than its cycle is refused.
        decay: shape, one of `DECAYS`. Default "inverse", the paper's.
        min_lr_ratio: r in [0, 1], > 0 for "inverse" and "exponential". Default 0.1, that of the authors' framework.
        convention: "inclusive" as above; "levanter" reads u = j / d_k at the j-th decay step (from 0; for
            "inverse" max(j, 1) / d_k), as the authors' framework does: the floor itself is then never used.
        last_epoch: the last step seen by the scheduler that this one continues, -1 for a new run.

    Raises:
        ValueError: for an argument out of its range.

    Warns of a decay of fewer than 20 steps.

    Source: arXiv 2410.05192 and the schedule code of stanford-crfm/levanter. The inclusive reading of u
    and the stable phase past the last checkpoint (levanter stays at the floor) are departures.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = WSDSLR(optimizer, [200, 400])
    >>> [round(schedule.lr_at(t)[0], 3) for t in (0, 179, 189, 199, 200, 399)]
    [1.0, 1.0, 0.182, 0.1, 1.0, 0.1]
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "checkpoints": Increasing(low=1, integer=True),
        "warmup_steps": Range(low=0, integer=True),
        "rewarmup_steps": Range(low=0, integer=True),
        "decay_fraction": Range(low=0, high=1, low_open=True),
        "decay_of": OneOf("cycle", "total"),
        "decay": OneOf(*DECAYS),
        "min_lr_ratio": Range(low=0, high=1),
        "convention": OneOf("inclusive", "levanter"),
        "last_epoch": Range(low=-1, integer=True),
    }

    def __init__(
        self,
        optimizer: Optimizer,
        checkpoints: Sequence[int | Budget],
        *,
        warmup_steps: int = 0,
        rewarmup_steps: int = 0,
        decay_fraction: float = 0.1,
        decay_of: str = "cycle",
        decay: str = "inverse",
        min_lr_ratio: float = 0.1,
        convention: str = "inclusive",
        last_epoch: int = -1,
    ) -> None:
        if isinstance(checkpoints, Sequence) and not isinstance(checkpoints, str):
            checkpoints = [steps_of(checkpoint) for checkpoint in checkpoints]
        check_arguments(
            self.constraints,
            checkpoints=checkpoints,
            warmup_steps=warmup_steps,
            rewarmup_steps=rewarmup_steps,
            decay_fraction=decay_fraction,
            decay_of=decay_of,
            decay=decay,
            min_lr_ratio=min_lr_ratio,
            convention=convention,
            last_epoch=last_epoch,
        )
        _check_floor(decay, min_lr_ratio)
        self.warmup_steps = int(warmup_steps)
        self.rewarmup_steps = int(rewarmup_steps)
        self.decay_fraction = float(decay_fraction)
        self.decay_of = decay_of
        self.decay = decay
        self.min_lr_ratio = float(min_lr_ratio)
        self.convention = convention
        self.checkpoints = tuple(int(steps_of(checkpoint)) for checkpoint in checkpoints)
        for start, end in pairwise((0, *self.checkpoints)):
            self._check_cycle(start, end)
        super().__init__(optimizer, last_epoch)

    def extend(self, checkpoint: int | Budget) -> None:
        """Add a checkpoint after the last one; the rate of no step already taken changes.

        Args:
            checkpoint: a count of optimizer steps above the last checkpoint, far enough ahead that
                its decay does not start before the coming step.

        Raises:
            ValueError: `checkpoint` is not, or its cycle cannot hold its warm-up and decay.
        """
        last = self.checkpoints[-1]
        checkpoint = steps_of(checkpoint)
        check_arguments(
            {"checkpoint": Range(low=max(last, self.last_epoch), low_open=True, integer=True)}, checkpoint=checkpoint
        )
        decay_start = checkpoint - self._decay_steps(last, checkpoint)
        if decay_start < self.last_epoch:
            raise ValueError(
                f"checkpoint must leave its decay ahead of step {self.last_epoch}, got {checkpoint}, "
                f"whose decay starts at step {decay_start}"
            )
        self._check_cycle(last, checkpoint)
        self.checkpoints = (*self.checkpoints, int(checkpoint))
        if decay_start == self.last_epoch:
            self._update_lr(self.last_epoch)

    def phase(self, step: int | None = None) -> Phase:
        """The phase of step `step`, by default of the coming one; a re-warm-up is "warmup" too."""
        step = self.last_epoch if step is None else step
        start, end = self._cycle(step)
        if step - start < self._warmup(start):
            return "warmup"
        if end is not None and step >= end - self._decay_steps(start, end):
            return "decay"
        return "stable"

    def factor(self, step: int) -> float:
        """The rate of step `step` as a fraction of the peak."""
        phase, (start, end) = self.phase(step), self._cycle(step)
        if phase == "warmup":
            part = (step - start) / self._warmup(start)
            return part if start == 0 else part + self.min_lr_ratio * (1 - part)
        if phase == "stable":
            return 1.0
        assert end is not None
        steps = self._decay_steps(start, end)
        done = step - (end - steps)
        if self.convention == "inclusive":
            done += 1
        elif self.decay == "inverse":
            done = max(done, 1)
        return decay_factor(self.decay, done / steps, 1.0, self.min_lr_ratio)

    def lr_at(self, step: int) -> list[float | Tensor]:
        """The rate of each parameter group for step `step` (0-based); changes nothing."""
        factor = self.factor(step)
        return [base * factor for base in self.base_lrs]

    def _cycle(self, step: int) -> tuple[int, int | None]:
        k = bisect_right(self.checkpoints, step)
        start = self.checkpoints[k - 1] if k else 0
        return start, self.checkpoints[k] if k < len(self.checkpoints) else None

    def _warmup(self, cycle_start: int) -> int:
        return self.rewarmup_steps if cycle_start else self.warmup_steps

    def _decay_steps(self, start: int, end: int) -> int:
        return _whole_part(self.decay_fraction, end - start if self.decay_of == "cycle" else end)

    def _check_cycle(self, start: int, end: int) -> None:
        steps = self._decay_steps(start, end)
        stable = end - start - steps
        if stable < 0:
            raise ValueError(
                f"decay_fraction must keep every decay within its cycle, got {self.decay_fraction}: "
                f"{steps} steps before checkpoint {end}, whose cycle has {end - start}"
            )
        if self._warmup(start) > stable:
            name = "rewarmup_steps" if start else "warmup_steps"
            raise ValueError(
                f"{name} must be <= {stable}, what the decay leaves of the cycle before checkpoint {end}, "
                f"got {self._warmup(start)}"
            )
        _warn_if_short(steps, f"before checkpoint {end}", stacklevel=3)


class DecayBranchPlanner:
    r"""When to save, fork and publish so that a WSD run yields a model at each of several budgets.

    Branch k forks from the main branch when T_k - d_k steps are done, d_k = floor(rho T_k), and is
    published after d_k steps of decay. A branch sees the data that the main branch would see next,
    so a saved main checkpoint holds model, optimizer, random state and data position; it is kept
    after the branch is published, because the decayed model cannot replace it.

    Args:
        budgets: T_1 < T_2 < ... >= 1, in optimizer steps.
        decay_fraction: rho in (0, 1]. Default 0.1.

    Raises:
        ValueError: for an argument out of its range.

    Source: arXiv 2410.05192.

    >>> plan = DecayBranchPlanner([250, 500, 1000])
    >>> plan.events()[:3]
    [(225, 'save_main'), (225, 'start_branch', 0), (250, 'publish', 0)]
    >>> [plan.total_steps(mode) for mode in ("separate", "wsd", "wsd-s")]
    [1750, 1075, 1000]
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "budgets": Increasing(low=1, integer=True),
        "decay_fraction": Range(low=0, high=1, low_open=True),
    }

    def __init__(self, budgets: Sequence[int], decay_fraction: float = 0.1) -> None:
        check_arguments(self.constraints, budgets=budgets, decay_fraction=decay_fraction)
        self.budgets = tuple(int(budget) for budget in budgets)
        self.decay_fraction = float(decay_fraction)

    def decay_steps(self, k: int) -> int:
        """The length d_k of the decay of branch k (0-based)."""
        return _whole_part(self.decay_fraction, self.budgets[k])

    def events(self) -> list[tuple[int, str] | tuple[int, str, int]]:
        """What to do, in the order in which a single process does it.

        `(step, "save_main")`, `(step, "start_branch", k)`, `(step, "publish", k)`: `step` counts the
        optimizer steps done, on the main branch for the first two and on branch k for the third; k
        is 0-based. After a "publish" the main branch goes on from its last "save_main".
        """
        events: list[tuple[int, str] | tuple[int, str, int]] = []
        for k, budget in enumerate(self.budgets):
            fork = budget - self.decay_steps(k)
            events += [(fork, "save_main"), (fork, "start_branch", k), (budget, "publish", k)]
        return events

    def total_steps(self, mode: str = "wsd") -> int:
        """The optimizer steps that all budgets cost together.

        Args:
            mode: "wsd" (main branch and decay branches), "wsd-s" (one branch) or "separate" (one run per budget).

        Raises:
            ValueError: another mode.
        """
        check_arguments({"mode": OneOf("wsd", "wsd-s", "separate")}, mode=mode)
        if mode == "separate":
            return sum(self.budgets)
        if mode == "wsd-s":
            return self.budgets[-1]
        decays = [self.decay_steps(k) for k in range(len(self.budgets))]
        return self.budgets[-1] - decays[-1] + sum(decays)
