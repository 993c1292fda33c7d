r"""REX: an exponential-looking decay reflected about the anti-diagonal, for a small fixed budget.

    p(z) = (1 - z) / ((1 - beta) + beta (1 - z)),    eta_t = eta_min + (eta_max - eta_min) p(t / T)

It stays above the linear line and drops late: its mean is 2 (1 - ln 2) = 0.614 of the peak at
beta = 1/2, so the best peak rate can be slightly lower than for a linear schedule.

Source: "REX: Revisiting Budgeted Training with an Improved Schedule", Chen, Wolfe, Kyrillidis,
arXiv 2107.04197.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from headway.constraints import Constraint, Range, check_arguments
from headway.schedules.profile import LinearLR, ProfileLR
from headway.spending import Budget

__all__ = ["REXLR", "rex_profile"]

Number = TypeVar("Number", float, Tensor)

_BETA = Range(low=0, high=1, high_open=True)


def rex_profile(z: Number, beta: float = 0.5) -> Number:
    r"""The fraction of the peak rate that is left when the fraction z of the budget is spent.

        p(z) = (1 - z) / ((1 - beta) + beta (1 - z))

    p is its own inverse, lies on or above 1 - z, is the linear line at beta = 0 and tends to a
    constant with a drop at the end as beta tends to 1.

    Args:
        z: spent fraction of the budget in [0, 1], a number or a tensor of any shape.
        beta: curvature in [0, 1); 1/2 is the paper's REX.

    Raises:
        ValueError: beta out of its range.

    >>> rex_profile(0.5)
    0.6666666666666666
    """
    check_arguments({"beta": _BETA}, beta=beta)
    return (1 - z) / ((1 - beta) + beta * (1 - z))


class REXLR(ProfileLR):
    r"""Decay each group's rate along the REX profile over a known number of steps.

        eta_t = eta_min + (eta_max - eta_min) (1 - z_t) / ((1 - beta) + beta (1 - z_t)),   z_t = (t - W) / (T - W)

    Use it when the budget is small against what the task would take at leisure; the peak rate and T
    are all there is to set. A run without a known end wants `headway.schedules.wsd_s` instead.

    Args:
        optimizer: the optimizer; each group's current `lr` is its peak rate eta_max.
        total_steps: T >= 1, in optimizer steps (not epochs).
        beta: curvature in [0, 1). Default 1/2, the paper's REX; 0 is the linear schedule.
        warmup_steps: W in [0, T), linear warm-up in optimizer steps. Default 0.
        warmup_start: rate at step 0 of the warm-up. Default 0.
        lr_min: floor eta_min as a rate, at most the smallest peak. Default 0, as in the paper.
        lr_min_ratio: floor as a fraction of each group's peak in [0, 1]; instead of `lr_min`.
        sampling: "iteration" (the paper's choice for REX), or increasing fractions in [0, 1) of the
            budget at which the profile is read; in between the rate is held.
        last_epoch: the last step seen by the scheduler that this one continues, -1 for a new run.

    Raises:
        ValueError: for an argument out of its range.

    Source: arXiv 2107.04197. Third-party code exists with beta = 0.9 (the curve of the momentum
    decay "Demon") under the same name; the paper's formula is beta = 1/2. Warm-up and a floor other
    than 0 are additions.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = REXLR(optimizer, total_steps=4)
    >>> [round(schedule.lr_at(t)[0], 4) for t in range(5)]
    [1.0, 0.8571, 0.6667, 0.4, 0.0]
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {**LinearLR.constraints, "beta": _BETA}

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | Budget,
        *,
        beta: float = 0.5,
        warmup_steps: int = 0,
        warmup_start: float = 0.0,
        lr_min: float = 0.0,
        lr_min_ratio: float | None = None,
        sampling: str | Sequence[float] = "iteration",
        last_epoch: int = -1,
    ) -> None:
        check_arguments(self.constraints, beta=beta)
        super().__init__(
            optimizer,
            partial(rex_profile, beta=beta),
            total_steps,
            warmup_steps=warmup_steps,
            warmup_start=warmup_start,
            lr_min=lr_min,
            lr_min_ratio=lr_min_ratio,
            sampling=sampling,
            last_epoch=last_epoch,
        )
