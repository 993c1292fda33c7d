"""The claim of AdaGrad step sizes: fast without noise, safe with it, and blind to the scale of the objective.

The objective is f(x) = sum_i x_i^2 / (1 + x_i^2) in ten dimensions: smooth (L = 2), not convex, flat far
from its minimum f* = 0. Measured is A(T) = 1/T sum_t |grad f(x_bar_t)|^2, the quantity in the theorems.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from headway.claims import Check, Outcome, Panel
from headway.optim.adagrad_accelerated import AdaGradAGD, adagrad_bound

__all__ = ["claim"]

SMOOTHNESS = 2.0
VARIANTS = ("adagrad", "rsag")
B0 = 1e-2
RATES = (0.2, 1.0, 5.0, 20.0)
SCALES = (1e-3, 1.0, 1e3)
FLOOR = 1e-20  # f below it is drawn at it: a logarithmic axis has no zero


def claim(seed: int = 0, runs: int = 400, steps: int = 6400) -> Outcome:
    """AdaGrad in the accelerated template needs neither the smoothness, the noise nor the scale of the objective.

    `seed` sets the noise, `runs` how many runs with noise there are, `steps` how long all of them are.
    """
    exact_checks, exact_panel = exact_gradients(steps)
    noise_checks, noise_panel = noisy_gradients(seed, runs, steps)
    scale_checks, scale_panel = rescaled_objective(steps)
    return Outcome(
        statement=(
            "With one setting, AdaGrad's mean squared gradient falls like 1/T without noise and like 1/sqrt(T) or "
            "better with it, in nearly every single run, and scaling the objective changes no iterate."
        ),
        paper=(
            "O(1/T) with exact gradients and O(1/sqrt(T)) with probability 1 - delta, with log(1/delta) dependence, "
            "without knowing smoothness or variance (abstract of arXiv 2204.02833; it gives no experiment)."
        ),
        checks=[*exact_checks, *noise_checks, *scale_checks],
        panels=[exact_panel, noise_panel, scale_panel],
    )


def exact_gradients(steps: int) -> tuple[list[Check], Panel]:
    """Slope -1 of A(T), and the accumulator under its explicit bound at four learning rates."""
    checks, curves = [], {}
    for variant in VARIANTS:
        run = _descend(partial(AdaGradAGD, lr=1.0, variant=variant, initial_accumulator=B0**2), steps)
        slope = _slope(run, run.mean_squares[:, 0])
        checks += _within(f"{variant}, exact gradients: slope of log A over log T", slope, -1.02, -0.98)
        curves[variant] = (run.times, run.mean_squares[:, 0].tolist())

    def one_group_each(parameters: Sequence[nn.Parameter]) -> Optimizer:
        groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, RATES, strict=True)]
        return AdaGradAGD(groups, mode="tensor", initial_accumulator=B0**2)

    run = _descend(one_group_each, steps, runs=len(RATES))
    delta0 = float(_value(_start(1))[0])
    for lr, mean_square in zip(RATES, run.mean_squares[-1], strict=True):
        bound = adagrad_bound(SMOOTHNESS, delta0, lr=lr, b0=B0, T=steps)
        what = f"adagrad, exact gradients, lr {lr:g}: T A(T), at most the explicit bound"
        checks.append(Check(what, float(mean_square) * steps, "<=", bound * steps))
    panel = Panel("Exact gradients", "steps T", "mean squared gradient A(T)", curves, log_x=True, log_y=True)
    return checks, panel


def noisy_gradients(seed: int, runs: int, steps: int) -> tuple[list[Check], Panel]:
    """Slope -1/2 or steeper of median and 0.99 quantile of A(T) over many runs, and a thin tail."""
    checks, curves = [], {}
    for variant in VARIANTS:
        optimizer = partial(AdaGradAGD, lr=1.0, variant=variant, mode="tensor", initial_accumulator=B0**2)
        run = _descend(optimizer, steps, runs=runs, noise=1.0, generator=torch.Generator().manual_seed(seed))
        quantiles = {q: np.quantile(run.mean_squares, q, axis=1) for q in (0.5, 0.9, 0.99, 0.9975)}
        for name, q in (("median", 0.5), ("0.99 quantile", 0.99)):
            slope = _slope(run, quantiles[q])
            checks += _within(f"{variant}, noise 1: slope of the {name} of A", slope, -0.75, -0.45)
            curves[f"{variant}, {name}"] = (run.times, quantiles[q].tolist())
        last = {q: float(values[-1]) for q, values in quantiles.items()}
        checks += [
            Check(f"{variant}, noise 1: 0.99 quantile / median of A", last[0.99] / last[0.5], "<=", 1.5),
            Check(f"{variant}, noise 1: 0.9975 / 0.9 quantile of A", last[0.9975] / last[0.9], "<=", 1.3),
        ]
    title = f"Noisy gradients, {runs} runs"
    return checks, Panel(title, "steps T", "mean squared gradient A(T)", curves, log_x=True, log_y=True)


def rescaled_objective(steps: int) -> tuple[list[Check], Panel]:
    """The same iterates for f times 1e-3, 1 and 1e3, where SGD with the step for 1 fails at both other scales."""
    checks: list[Check] = []
    sgd = _descend(partial(torch.optim.SGD, lr=1 / SMOOTHNESS), steps, runs=len(SCALES), scales=SCALES)
    curves = {f"SGD, f times {scale:g}": (sgd.times, _drawn(sgd.values[:, i])) for i, scale in enumerate(SCALES)}
    for variant in VARIANTS:
        optimizer = partial(AdaGradAGD, lr=1.0, variant=variant, mode="tensor")
        run = _descend(optimizer, steps, runs=len(SCALES), scales=SCALES)
        reference = run.iterates[:, SCALES.index(1.0)]
        for i, scale in enumerate(SCALES):
            name = f"{variant}, f times {scale:g}"
            if scale != 1:
                apart = float((run.iterates[:, i] - reference).abs().max())
                checks.append(Check(f"{name}: distance of the iterates from those for f", apart, "<=", 1e-9))
            what = f"{name}: f, unscaled, at the end (baseline SGD)"
            checks.append(Check(what, float(run.values[-1, i]), "<=", 1e-6, baseline=float(sgd.values[-1, i])))
        curves[f"{variant}, worst of the three"] = (run.times, _drawn(run.values.max(axis=1)))
    for scale, least in ((1e-3, 0.5), (1e3, 5.0)):
        what = f"SGD with lr 1/L, f times {scale:g}: f, unscaled, at the end"
        checks.append(Check(what, float(sgd.values[-1, SCALES.index(scale)]), ">=", least))
    y_label = f"f, unscaled (from {FLOOR:g})"
    return checks, Panel("Scale of the objective", "steps T", y_label, curves, log_x=True, log_y=True)


@dataclass(frozen=True)
class _Run:
    """What was seen at `times`: A(T) and f, shape (times, runs); and the iterates of up to four runs."""

    times: Sequence[int]
    mean_squares: np.ndarray
    values: np.ndarray
    iterates: Tensor  # (steps, up to 4 runs, 10)


@torch.no_grad()
def _descend(
    make: Callable[[list[nn.Parameter]], Optimizer],
    steps: int,
    runs: int = 1,
    noise: float = 0.0,
    scales: Sequence[float] = (1.0,),
    generator: torch.Generator | None = None,
) -> _Run:
    """Many runs at once: each is one parameter, a row of a common tensor, with an S of its own in mode `tensor`."""
    x = _start(runs)  # (runs, 10)
    gradients = torch.empty_like(x)
    parameters = [nn.Parameter(row) for row in x]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient
    optimizer = make(parameters)
    factors = torch.tensor(scales, dtype=x.dtype)[:, None]
    times = sorted({*np.geomspace(10, steps, 30).astype(int).tolist(), *_fitted(steps)})
    iterates = torch.empty(steps, min(runs, 4), x.shape[1], dtype=x.dtype)
    total = torch.zeros(runs, dtype=x.dtype)
    mean_squares, values = [], []
    for t in range(1, steps + 1):
        iterates[t - 1] = x[:4]
        exact = 2 * x / (1 + x.square()).square()
        total += exact.square().sum(1)
        gradients.copy_(exact)
        if noise:
            gradients.add_(torch.rand(x.shape, generator=generator, dtype=x.dtype).mul_(2).sub_(1), alpha=noise)
        gradients.mul_(factors)
        optimizer.step()
        if t in times:
            mean_squares.append((total / t).numpy())
            values.append(_value(x).numpy())
    return _Run(times, np.stack(mean_squares), np.stack(values), iterates)


def _start(runs: int) -> Tensor:
    return torch.linspace(0.5, 2, 10, dtype=torch.float64).repeat(runs, 1)


def _value(x: Tensor) -> Tensor:
    return (x.square() / (1 + x.square())).sum(1)


def _fitted(steps: int) -> tuple[int, int, int]:
    """The times between which slopes are fitted."""
    return steps // 16, steps // 4, steps


def _slope(run: _Run, values: np.ndarray) -> float:
    at = [run.times.index(t) for t in _fitted(int(run.times[-1]))]
    return float(np.polyfit(np.log(np.take(run.times, at)), np.log(values[at]), 1)[0])


def _within(what: str, measured: float, low: float, high: float) -> list[Check]:
    return [Check(what, measured, ">=", low), Check(what, measured, "<=", high)]


def _drawn(values: np.ndarray) -> list[float]:
    return np.maximum(values, FLOOR).tolist()
