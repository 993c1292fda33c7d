"""diffGrad's point on the paper's one-dimensional functions: it stops where Adam overshoots into a worse minimum.

    F1'(x) = 2x + 0.6                               for x <= 0,    2x - 0.4 for x > 0
    F2'(x) = -40                                    for x <= -0.9, 8x cos(8x) + sin(8x) + 3x^2 for x > -0.9
    F3'(x) = 2x | 1 | -7/8 | 7/8 | -1 | 2x          cut at -0.5, -0.4, 0, 0.4, 0.5

from x = -1 with lr 0.1, betas (0.95, 0.999) and 299 steps. F1 has its global minimum at -0.3 (value 0) and a local one
at 0.2 (value 0.05). Adam at half the learning rate is measured next to it, because the friction lies in [1/2, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.optim import Adam, Optimizer

from headway.claims import Check, Outcome, Panel
from headway.optim.diffgrad import DiffGrad

__all__ = ["claim", "trajectory"]

BETAS = (0.95, 0.999)
Maker = Callable[[Sequence[nn.Parameter], float], Optimizer]


def f1(x: float) -> float:
    return 2 * x + 0.6 if x <= 0 else 2 * x - 0.4


def f2(x: float) -> float:
    return -40.0 if x <= -0.9 else 8 * x * math.cos(8 * x) + math.sin(8 * x) + 3 * x * x


def f3(x: float) -> float:
    for end, slope in ((-0.5, 2 * x), (-0.4, 1.0), (0.0, -7 / 8), (0.4, 7 / 8), (0.5, -1.0)):
        if x <= end:
            return slope
    return 2 * x


def trajectory(make: Maker, lr: float, gradient: Callable[[float], float], steps: int, start: float) -> list[float]:
    """The points x_0 ... x_steps of an optimizer that is given `gradient(x)` at each."""
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = make([x], lr)
    points = [start]
    for _ in range(steps):
        x.grad = torch.tensor(gradient(points[-1]), dtype=torch.float64)
        optimizer.step()
        points.append(x.item())
    return points


def _diffgrad(params: Sequence[nn.Parameter], lr: float) -> Optimizer:
    return DiffGrad(params, lr=lr, betas=BETAS)


def _adam(params: Sequence[nn.Parameter], lr: float) -> Optimizer:
    return Adam(params, lr=lr, betas=BETAS)


def claim(seed: int = 0, steps: int = 299, make: Maker = _diffgrad) -> Outcome:
    """Measure the claim, in which nothing is random. `make(params, lr)` builds the optimizer under test."""
    del seed
    runs = {
        name: {
            "diffGrad, lr 0.1": trajectory(make, 0.1, gradient, steps, -1.0),
            "Adam, lr 0.1": trajectory(_adam, 0.1, gradient, steps, -1.0),
            "Adam, lr 0.05": trajectory(_adam, 0.05, gradient, steps, -1.0),
        }
        for name, gradient in (("F1", f1), ("F2", f2), ("F3", f3))
    }
    ends = {name: points[-1] for name, points in runs["F1"].items()}
    constant = {
        name: trajectory(maker, 0.1, lambda x: 0.3, 50, 0.0) for name, maker in (("ours", make), ("Adam", _adam))
    }
    moves = {name: [b - a for a, b in pairwise(points)] for name, points in constant.items()}
    halves = max(abs(a - b / 2) for a, b in list(zip(moves["ours"], moves["Adam"], strict=True))[1:])
    checks = [
        Check(
            "F1: distance of diffGrad's end from the global minimum at -0.3",
            abs(ends["diffGrad, lr 0.1"] + 0.3),
            "<=",
            0.005,
            baseline=abs(ends["Adam, lr 0.1"] + 0.3),
        ),
        Check(
            "F1: distance of Adam's end from the local minimum at 0.2",
            abs(ends["Adam, lr 0.1"] - 0.2),
            "<=",
            0.005,
        ),
        Check(
            "F1: distance of Adam's end at half the learning rate from the global minimum, which it finds too",
            abs(ends["Adam, lr 0.05"] + 0.3),
            "<=",
            0.005,
        ),
        Check(
            "constant gradient: largest difference from half of Adam's step, from the second step on",
            halves,
            "<=",
            1e-12,
        ),
    ]
    time = [float(step) for step in range(steps + 1)]
    panels = [
        Panel(name, "step", "x", {label: (time, points) for label, points in curves.items()})
        for name, curves in runs.items()
    ]
    return Outcome(
        statement="Where the gradient changes little the step is half of Adam's, which keeps the first function's "
        "global minimum that Adam leaves; Adam at half the learning rate keeps it too.",
        paper="No figure in the abstract: better than SGDM, AdaGrad, AdaDelta, RMSProp, AMSGrad and Adam with ResNets "
        "on CIFAR-10 and CIFAR-100 and on three synthetic functions.",
        checks=checks,
        panels=panels,
    )
