r"""Unified Budget-Aware schedule (UBA): a family of decays with one shape parameter, cosine among them.

    p(z) = 2 (1 + c) / (2 phi + (2 - phi) (1 + c)),   c = cos(pi z),    eta_t = eta_min + (eta_max - eta_min) p(z_t)

phi = 2 is the cosine schedule, a smaller phi holds the rate high for longer, a larger one drops it early and
keeps a low tail. The family comes from one question: which steps of a fixed budget contract best, when the
curvature is the worst in a range? For a quadratic with eigenvalues in [mu, L] and kappa = L / mu, the choice
phi = 2 kappa, eta_max = 1 / mu, eta_min = 1 / L at the midpoint angles gives the Chebyshev steps, whose worst
contraction 2 rho^T / (1 + rho^(2 T)), rho = (sqrt(kappa) - 1) / (sqrt(kappa) + 1), no other T steps can beat.

Source: "Stepsize anything: A unified learning rate schedule for budgeted-iteration training", Tang, Dong,
Zeng, Xun, Lin, arXiv 2505.24452.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.schedules.profile import LinearLR, ProfileLR
from headway.spending import Budget

__all__ = ["UBALR", "chebyshev_steps", "phi_from_condition_number", "uba_profile"]

Number = TypeVar("Number", float, Tensor)

_PHI = Range(low=0, low_open=True)


def uba_profile(z: Number, phi: float = 1.0) -> Number:
    r"""The fraction of the lr range in use when the fraction z of the budget is spent.

        p(z) = 2 s / (2 s + phi (1 - s)),    s = (1 + cos(pi z)) / 2

    the published expression in a form whose terms are all >= 0, so that both ends are exact for every phi.
    p(1/2) = 2 / (2 + phi); the mean of p is 1/2 at phi = 2 and tends to 1 as phi tends to 0.

    Args:
        z: spent fraction of the budget in [0, 1], a number or a tensor of any shape.
        phi: shape > 0. Default 1.

    Raises:
        ValueError: phi out of its range.

    >>> [round(uba_profile(t / 4), 4) for t in range(5)]
    [1.0, 0.921, 0.6667, 0.2555, 0.0]
    """
    check_arguments({"phi": _PHI}, phi=phi)
    s = (1 + (torch.cos(math.pi * z) if isinstance(z, Tensor) else math.cos(math.pi * z))) / 2
    return 2 * s / (2 * s + phi * (1 - s))


def phi_from_condition_number(kappa: float) -> float:
    """The phi = 2 kappa that is optimal for a quadratic of condition number kappa.

    It belongs to eta_max = 1 / mu, eta_min = 1 / L and the midpoint angles; for a neural network, where none
    of the three is known, try phi in {0.25, 0.5, 1, 2, 5} at a tenth of the budget instead.

    Args:
        kappa: L / mu >= 1.

    Raises:
        ValueError: kappa out of its range.

    Source: the equality of phi = 2 kappa with Chebyshev's steps is derived here.

    >>> phi_from_condition_number(10)
    20.0
    """
    check_arguments({"kappa": Range(low=1)}, kappa=kappa)
    return 2.0 * kappa


def chebyshev_steps(n: int, mu: float, L: float, order: str = "decreasing") -> np.ndarray:
    r"""The n gradient steps that contract the worst eigenvalue in [mu, L] best.

        eta_t = 2 / ((L + mu) - (L - mu) cos theta_t),    theta_t = pi (2 t - 1) / (2 n),    t = 1 .. n

    In exact arithmetic the order does not matter. In floating point, steps in monotone order let the error of
    the large eigenvalues grow beyond all digits before the small steps undo it, in float32 from n = 50 or so;
    the Leja order keeps every partial product small.

    Args:
        n: number of steps >= 1.
        mu: smallest eigenvalue > 0.
        L: largest eigenvalue >= mu.
        order: "decreasing" (default, a learning-rate schedule's) or "leja".

    Returns:
        Float64 array of shape (n,).

    Raises:
        ValueError: for an argument out of its range.

    Source: the classical Richardson iteration with Chebyshev roots; here as the case phi = 2 L / mu of
    arXiv 2505.24452.

    >>> chebyshev_steps(3, mu=1.0, L=4.0).round(4).tolist()
    [0.8327, 0.4, 0.2632]
    """
    check_arguments(
        {
            "n": Range(low=1, integer=True),
            "mu": Range(low=0, low_open=True),
            "L": Range(),
            "order": OneOf("decreasing", "leja"),
        },
        n=n,
        mu=mu,
        L=L,
        order=order,
    )
    if mu > L:
        raise ValueError(f"L must be >= mu = {mu:g}, got {L}")
    theta = math.pi * (2 * np.arange(1, n + 1) - 1) / (2 * n)
    roots = ((L + mu) - (L - mu) * np.cos(theta)) / 2
    return 1 / (roots if order == "decreasing" else _leja(roots))


def _leja(points: np.ndarray) -> np.ndarray:
    """The points reordered: the largest first, then always the one with the largest product of distances."""
    left = points.copy()
    log_products = np.log(left)
    chosen = []
    while left.size:
        k = int(log_products.argmax())
        point = left[k]
        chosen.append(point)
        left, log_products = np.delete(left, k), np.delete(log_products, k)
        with np.errstate(divide="ignore"):  # equal points, where mu = L
            log_products = log_products + np.log(np.abs(left - point)) if len(chosen) > 1 else np.log(point - left)
    return np.array(chosen)


class UBALR(ProfileLR):
    r"""Decay each group's rate along the UBA profile over a known number of steps.

        eta_t = eta_min + (eta_max - eta_min) * 2 (1 + c_t) / (2 phi + (2 - phi) (1 + c_t)),    c_t = cos theta_t

    with theta_t = pi (t - W) / (T - W) ("endpoint": eta_max at step W, eta_min from step T on) or
    theta_t = pi (t - W + 1/2) / (T - W) ("midpoint": Chebyshev's nodes; step T - 1 is above eta_min).

    One knob in place of a zoo of schedules. phi and the peak rate interact - a small phi spends more of the
    budget near the peak - so tune the peak again, within a factor of 2, when phi changes. A cheap way to
    choose: phi in {0.25, 0.5, 1, 2, 5} at a tenth of the budget. Read at fewer points, or restarted in
    phases, the same curve is `ProfileLR(optimizer, partial(uba_profile, phi=...), ...)`.

    Args:
        optimizer: the optimizer; each group's current `lr` is its peak rate eta_max.
        total_steps: T >= 1, in optimizer steps (not epochs).
        phi: shape > 0, the same for all groups. Default 1, chosen here: no default is published. Between 0.25
            and 0.5 suits Adam-type optimizers at short budgets; 2 is cosine.
        warmup_steps: W in [0, T), linear warm-up in optimizer steps. Default 0.
        warmup_start: rate at step 0 of the warm-up. Default 0.
        lr_min: floor eta_min as a rate, at most the smallest peak. Default 0.
        lr_min_ratio: floor as a fraction of each group's peak in [0, 1]; instead of `lr_min`.
        angle: "endpoint" (default) or "midpoint".
        last_epoch: the last step seen by the scheduler that this one continues, -1 for a new run.

    Raises:
        ValueError: for an argument out of its range.

    Warns of phi > 4 (T - W): the decay is then over within the first steps.

    Source: arXiv 2505.24452. The formula was checked against a public re-implementation, which also limits
    phi to [0, 2]; nothing in the formula asks for that. Warm-up and the angle conventions are chosen here.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> schedule = UBALR(optimizer, total_steps=4, phi=0.5)
    >>> [round(schedule.lr_at(t)[0], 4) for t in range(5)]
    [1.0, 0.9589, 0.8, 0.407, 0.0]
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        **{name: constraint for name, constraint in LinearLR.constraints.items() if name != "sampling"},
        "phi": _PHI,
        "angle": OneOf("endpoint", "midpoint"),
    }

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | Budget,
        *,
        phi: float = 1.0,
        warmup_steps: int = 0,
        warmup_start: float = 0.0,
        lr_min: float = 0.0,
        lr_min_ratio: float | None = None,
        angle: str = "endpoint",
        last_epoch: int = -1,
    ) -> None:
        check_arguments(self.constraints, phi=phi, angle=angle)
        self.phi = float(phi)
        self.angle = angle
        super().__init__(
            optimizer,
            self._profile,
            total_steps,
            warmup_steps=warmup_steps,
            warmup_start=warmup_start,
            lr_min=lr_min,
            lr_min_ratio=lr_min_ratio,
            last_epoch=last_epoch,
        )
        if phi > 4 * (self.total_steps - self.warmup_steps):
            warnings.warn(
                f"phi = {phi:g} is more than 4 times the {self.total_steps - self.warmup_steps} steps of the decay: "
                "the first steps do all the work",
                stacklevel=2,
            )

    # A method instead of a function with phi bound in: phi is then part of the state, as all other settings are.
    def _profile(self, z: float) -> float:
        return uba_profile(z, self.phi)

    def _z(self, step: int) -> float:
        if self.angle == "endpoint" or step >= self.total_steps:
            return super()._z(step)
        return (step - self.warmup_steps + 0.5) / (self.total_steps - self.warmup_steps)
