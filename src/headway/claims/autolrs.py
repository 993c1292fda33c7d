"""AutoLRS against tuned constant and linearly decaying rates, on a noisy quadratic.

    L(w) = sum_i lambda_i w_i^2 / 2,   lambda = 10^-1.5 ... 1 in 30 coordinates,   w_0 = 1
    gradient noise: 0.3 sqrt(lambda_i) in coordinate i, fresh at every step

SGD without momentum. The best rate falls as the loss comes near the floor that the noise holds up, so no constant
rate is right throughout. AutoLRS searches [0.001, 1.5] in stages of 100, 200, 400 and 800 steps, judged by the exact
loss; the others get the same 1500 applied steps at the best of eight rates over the same range.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headway.claims import Check, Outcome, Panel
from headway.schedules.autolrs import AutoLRS, Stage

__all__ = ["claim"]

CURVATURE = torch.logspace(-1.5, 0, 30, dtype=torch.float64)
NOISE = 0.3
LOWEST, HIGHEST = 1e-3, 1.5
RATES = torch.tensor([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 1.5], dtype=torch.float64)
TAU, TAU_MAX = 100, 800
STEPS = 100 + 200 + 400 + 800


def claim(seed: int = 0, *, seeds: int = 5) -> Outcome:
    """AutoLRS ends far below every constant rate, near a tuned linear decay, without a rate or schedule given.

    Args:
        seed: start of the sequence of seeds for the noise and the search.
        seeds: number of runs behind every mean.

    Raises:
        ImportError: scikit-learn is missing; the message says what brings it.
    """
    runs = [_searched(1000 * seed + run) for run in range(seeds)]
    curves = torch.stack([torch.tensor(losses) for _, losses, _ in runs]).mean(dim=0)
    scheduled = {
        "best constant rate": _scheduled(1000 * seed, seeds, torch.ones(STEPS)),
        "best linear decay": _scheduled(1000 * seed, seeds, 1 - torch.arange(STEPS) / STEPS),
    }
    best = {name: losses[:, int(losses[-1].nan_to_num(torch.inf).argmin())] for name, losses in scheduled.items()}
    stages = [history for history, _, _ in runs]
    final = float(curves[-1])
    constant, linear = (float(losses[-1]) for losses in best.values())
    falls = sum(history[-1].lr < history[0].lr for history in stages) / seeds
    search = max(search for _, _, search in runs)
    checks = [
        Check("final loss of AutoLRS / best of 8 constant rates", final / constant, "<=", 0.7, 1.0),
        Check("final loss of AutoLRS / best of 8 linear decays", final / linear, "<=", 2.5, 1.0),
        Check("share of runs whose last stage has a smaller rate than the first", falls, ">=", 0.8),
        Check("steps of search per applied step", search / STEPS, "<=", 1.0, 0.0),
    ]
    steps = list(range(STEPS + 1))
    marks = [stage.start for stage in stages[0][1:]]
    return Outcome(
        statement="With neither a rate nor a schedule given, AutoLRS ends below the best of eight constant rates and "
        "near the best linear decay, for as many steps of search as of training.",
        paper="Training is 1.22x, 1.43x and 1.5x faster than with the original schedules of ResNet-50, Transformer and "
        "BERT (abstract).",
        checks=checks,
        panels=[
            Panel(
                f"Loss, mean of {seeds} runs",
                "applied step",
                "loss",
                {"AutoLRS": (steps, curves.tolist()), **{name: (steps, y.tolist()) for name, y in best.items()}},
                log_y=True,
                marks=marks,
            ),
            Panel(
                "Rate chosen for each stage",
                "applied step",
                "learning rate",
                {f"run {run}": _steps_of(history) for run, history in enumerate(stages)},
                log_y=True,
                marks=marks,
            ),
            Panel(
                "First run: loss forecast for the end of the stage",
                "rate tried",
                "forecast",
                {f"{stage.tau} steps from {stage.start}": _forecasts_of(stage) for stage in stages[0]},
                log_x=True,
                log_y=True,
                styles={f"{stage.tau} steps from {stage.start}": "points" for stage in stages[0]},
            ),
        ],
    )


def _searched(seed: int) -> tuple[list[Stage], list[float], int]:
    """The stages of one run of AutoLRS, the loss after each applied step, and the steps of search."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.ones(len(CURVATURE), dtype=torch.float64))
    model = nn.ParameterList([weight])
    optimizer = torch.optim.SGD(model.parameters(), lr=LOWEST)
    controller = AutoLRS(
        model,
        optimizer,
        LOWEST,
        HIGHEST,
        val_fn=lambda: _loss(weight.detach()),
        judge="validation",
        tau=TAU,
        tau_max=TAU_MAX,
        seed=seed,
    )
    losses = [float(_loss(weight.detach()))]
    while controller.applied_steps < STEPS:
        applied = controller.phase != "search"
        loss = _loss(weight.detach())
        weight.grad = _noisy_gradient(weight.detach(), generator)
        optimizer.step()
        if applied:
            losses.append(float(_loss(weight.detach())))
        controller.step(loss)
    controller.finish()
    return controller.history, losses, controller.search_steps


def _scheduled(seed: int, seeds: int, factors: Tensor) -> Tensor:
    """The mean loss of SGD before each step and at the end, for each rate of the grid: (STEPS + 1, rates)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.ones(len(RATES), seeds, len(CURVATURE), dtype=torch.float64)
    losses = [_loss(weight).mean(dim=1)]
    for factor in factors.tolist():
        weight = weight - factor * RATES[:, None, None] * _noisy_gradient(weight, generator)
        losses.append(_loss(weight).mean(dim=1))
    return torch.stack(losses)


def _loss(weight: Tensor) -> Tensor:
    return (CURVATURE * weight**2).sum(dim=-1) / 2


def _noisy_gradient(weight: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return CURVATURE * weight + NOISE * CURVATURE.sqrt() * noise


def _steps_of(history: list[Stage]) -> tuple[list[int], list[float]]:
    """The rates over the applied steps, as a staircase."""
    x = [at for stage in history for at in (stage.start, stage.start + stage.tau)]
    return x, [lr for stage in history for lr in (stage.lr, stage.lr)]


def _forecasts_of(stage: Stage) -> tuple[list[float], list[float]]:
    pairs = sorted(zip(stage.rates, stage.forecasts, strict=True))
    return [rate for rate, _ in pairs], [forecast for _, forecast in pairs]
