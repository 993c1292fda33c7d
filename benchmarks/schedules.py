"""All schedules at short and long budgets, each with its best peak rate.

    python benchmarks/schedules.py [--write docs/benchmarks] [--seeds 4]

Two problems, the same grid of peak rates for every schedule and budget:

- `digits`: a network 64-32-10 on scikit-learn's digits, Adam, batch 32: mean test cross-entropy over the seeds (the
  code of the claim of `rex`).
- `regression`: least squares in 400 dimensions with eigenvalues k^-1.3 under SGD with label noise, in expectation:

      v <- (1 - eta lam)^2 v + eta^2 lam (2 L + 0.2),   L = 1/2 sum lam v      (excess loss; no sampling)

`schedule-refinement` gets the gradient norms of the linear schedule at its best peak rate on the same problem and
budget, which that run has to pay for. `wsd-s` decays once, at the end. Losers are in the table.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from headway.claims.rex import OPTIMIZERS, best_loss, digits
from headway.plots import Panel, save
from headway.schedules import REXLR, WSDSLR, CosineLR, LinearLR, ProfileLR
from headway.schedules.gradient_norms import GradNormRecorder
from headway.schedules.profile import ConstantLR
from headway.schedules.schedule_refinement import RefinedLR
from headway.schedules.uba import UBALR
from machine import describe

Build = Callable[[Optimizer, int], LRScheduler]

SCHEDULES: dict[str, Build] = {
    "constant": lambda optimizer, steps: ConstantLR(optimizer, steps),
    "step 50-75": lambda optimizer, steps: ProfileLR(optimizer, "step", steps),
    "exponential": lambda optimizer, steps: ProfileLR(optimizer, "exponential", steps),
    "delayed linear": lambda optimizer, steps: ProfileLR(optimizer, "delayed-linear", steps),
    "linear": lambda optimizer, steps: LinearLR(optimizer, steps),
    "cosine": lambda optimizer, steps: CosineLR(optimizer, steps),
    "rex": lambda optimizer, steps: REXLR(optimizer, steps),
    "uba, phi 0.5": lambda optimizer, steps: UBALR(optimizer, steps, phi=0.5),
    "uba, phi 1": lambda optimizer, steps: UBALR(optimizer, steps, phi=1.0),
    "wsd-s, decay 0.2": lambda optimizer, steps: WSDSLR(optimizer, [steps], decay_fraction=0.2, min_lr_ratio=0.01),
}
REFINED = "schedule-refinement"
# Wider than the claim's, so that no schedule's best rate stands at the end of the grid.
OPTIMIZERS["Adam, wide grid"] = (torch.optim.Adam, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1))
ADAM = "Adam, wide grid"
BUDGETS = {"digits": (20, 40, 80, 160, 320, 640, 1280), "regression": (50, 100, 200, 400, 800, 1600, 3200, 6400)}
PEAKS = tuple(2.0**power for power in np.arange(-4, 1.01, 0.5))


def digits_losses(seeds: int) -> dict[str, list[float]]:
    data = digits(0)
    losses: dict[str, list[float]] = {name: [] for name in (*SCHEDULES, REFINED)}
    for steps in BUDGETS["digits"]:
        for name, build in SCHEDULES.items():
            losses[name].append(best_loss(data, ADAM, build, steps, 0, seeds))
        losses[REFINED].append(best_loss(data, ADAM, refined_by(data, steps, seeds), steps, 0, seeds))
    return losses


def refined_by(data: tuple, steps: int, seeds: int) -> Build:
    """The refined schedule from the norms of the best linear run."""
    recorders: list[GradNormRecorder] = []

    def linear(optimizer: Optimizer, total: int) -> LRScheduler:
        recorders.extend(GradNormRecorder(group["params"], norm="l1") for group in optimizer.param_groups)
        optimizer.register_step_pre_hook(lambda *_: [recorder.record() for recorder in recorders] and None)
        return LinearLR(optimizer, total)

    best_loss(data, ADAM, linear, steps, 0, seeds)
    middle = recorders[len(OPTIMIZERS[ADAM][1]) // 2]
    return lambda optimizer, total: RefinedLR(optimizer, total, norms=middle.norms, norm="l1")


def factors(build: Build, steps: int) -> list[float]:
    """The schedule as fractions of the peak."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build(optimizer, steps)
    return [float(schedule.lr_at(step)[0]) for step in range(steps)]


def descend(rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Final excess losses [peaks] and squared gradient norms [steps, peaks] of rates [steps, peaks]."""
    k = np.arange(1, 401)
    lam, v = k**-1.3, (k**-0.6)[:, None].repeat(rates.shape[1], axis=1)
    lam = lam[:, None]
    norms = np.empty_like(rates)
    with np.errstate(over="ignore", invalid="ignore"):
        for step, eta in enumerate(rates):
            loss = 0.5 * (lam * v).sum(axis=0)
            noise = lam * (2 * loss + 0.2)
            norms[step] = (lam**2 * v + noise).sum(axis=0)
            v = (1 - eta * lam) ** 2 * v + eta**2 * noise
        return 0.5 * (lam * v).sum(axis=0), norms


def regression_losses() -> dict[str, list[float]]:
    losses: dict[str, list[float]] = {name: [] for name in (*SCHEDULES, REFINED)}
    peaks = np.array(PEAKS)
    for steps in BUDGETS["regression"]:
        norms: list[float] = []
        for name, build in SCHEDULES.items():
            final, squares = descend(np.array(factors(build, steps))[:, None] * peaks)
            losses[name].append(float(np.nanmin(np.where(np.isfinite(final), final, np.inf))))
            if name == "linear":
                norms = np.sqrt(squares[:, np.nanargmin(np.where(np.isfinite(final), final, np.inf))]).tolist()
        refined = factors(lambda optimizer, total, norms=norms: RefinedLR(optimizer, total, norms=norms), steps)
        final, _ = descend(np.array(refined)[:, None] * peaks)
        losses[REFINED].append(float(np.nanmin(np.where(np.isfinite(final), final, np.inf))))
    return losses


def report(results: dict[str, dict[str, list[float]]], machine: str, seeds: int) -> str:
    lines = [
        "<!-- made by benchmarks/schedules.py -->",
        "",
        f"Loss over that of linear decay at the same budget, each at its best peak; digits: {seeds} seeds. {machine}.",
        "",
    ]
    for problem, losses in results.items():
        budgets = BUDGETS[problem]
        lines += [f"### {problem}", "", f"| schedule | {' | '.join(f'T = {steps}' for steps in budgets)} | mean |"]
        lines.append("| --- |" + " ---: |" * (len(budgets) + 1))
        rows = {
            name: [loss / base for loss, base in zip(values, losses["linear"], strict=True)]
            for name, values in losses.items()
        }
        for name, ratios in sorted(rows.items(), key=lambda row: statistics.fmean(map(math.log, row[1]))):
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            lines.append(f"| {name} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} | {mean:.2f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=4)
    options.add_argument("--write", type=Path, help="folder for the table, the figures and the picture")
    arguments = options.parse_args()
    warnings.simplefilter("ignore")
    results = {"digits": digits_losses(arguments.seeds), "regression": regression_losses()}
    text = report(results, describe(), arguments.seeds)
    print(text)
    if arguments.write:
        arguments.write.mkdir(parents=True, exist_ok=True)
        (arguments.write / "schedules.md").write_text(text)
        (arguments.write / "schedules.json").write_text(
            json.dumps({"machine": describe(), "budgets": BUDGETS, "losses": results}, indent=1)
        )
        panels = [
            Panel(
                f"Final loss by budget: {problem}",
                "budget in steps",
                "over that of linear decay",
                {
                    name: (
                        list(BUDGETS[problem]),
                        [loss / base for loss, base in zip(values, losses["linear"], strict=True)],
                    )
                    for name, values in losses.items()
                },
                log_x=True,
            )
            for problem, losses in results.items()
        ]
        save(panels, arguments.write / "schedules.svg", height=4.4)


if __name__ == "__main__":
    main()
