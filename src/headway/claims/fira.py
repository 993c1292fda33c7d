"""Fira's point: at GaLore's state, the rest of the gradient is worth having, at the scale of Adam's step.

1. The matrix regression of FRUGAL's claim: a full-rank target, 64 x 48, rank 8, a new projector every 50 steps. Fira
   against the same class without the residual, which is GaLore, each at the best learning rate of one grid.
2. A spike: one gradient, multiplied by 1000 after 50 steps, lets the residual's norm grow by one percent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from headway.claims import Check, Outcome, Panel
from headway.claims.frugal import COLUMNS, LEARNING_RATES, RANK, ROWS, run
from headway.optim.fira import Fira

__all__ = ["claim"]


def spike(seed: int, limiter: float | None) -> float:
    """Growth of |S|_F at a gradient 1000 times as large as the 50 before it, seen in how far W moves outside of P."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.zeros(ROWS, COLUMNS, dtype=torch.float64))
    groups = [{"params": [weight], "projected": True}]
    optimizer = Fira(groups, lr=1.0, rank=RANK, limiter=limiter, correct_bias=False)
    norms = []
    for step in range(51):
        before = weight.detach().clone()
        gradient = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
        weight.grad = gradient * (1000 if step == 50 else 1)
        optimizer.step()
        P = optimizer.state[weight]["projector"]  # [rank, columns]
        moved = weight.detach() - before
        norms.append((moved - moved @ P.T @ P).norm().item())
    return norms[-1] / norms[-2]


def claim(seed: int = 0, steps: int = 400, update_gap: int = 50, scaling: bool = True) -> Outcome:
    """Measure the claim. Without `scaling` Fira is GaLore and there is nothing left to claim."""

    def fira(scaled: bool) -> Callable[[nn.Parameter, float], Optimizer]:
        return lambda weight, lr: Fira(
            [{"params": [weight], "projected": True}], lr=lr, rank=RANK, update_proj_gap=update_gap, scaling=scaled
        )

    makers: dict[str, Callable[[nn.Parameter, float], Optimizer]] = {
        "Fira": fira(scaling),
        "GaLore": fira(False),
        "AdamW": lambda weight, lr: AdamW([weight], lr=lr, weight_decay=0.0),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = {name: {lr: run(make, lr, steps, seed) for lr in LEARNING_RATES} for name, make in makers.items()}
        growth, unlimited = spike(seed, 1.01), spike(seed, None)
    finally:
        torch.set_num_threads(threads)
    best = {name: min(grid, key=lambda lr: grid[lr].losses[-1]) for name, grid in runs.items()}
    final = {name: runs[name][best[name]].losses[-1] for name in runs}
    at_one = {name: runs[name][0.01].losses[-1] for name in runs}
    state = {name: runs[name][best[name]].state_bytes for name in runs}
    shown = [float(step) for step in range(steps + 1)]

    def curves(rate: Callable[[str], float]) -> dict[str, tuple[list[float], list[float]]]:
        return {f"{name}, lr {rate(name):g}": (shown, runs[name][rate(name)].losses) for name in runs}

    return Outcome(
        statement="At the same low-rank state Fira reaches the full-rank target that GaLore misses, and its limiter "
        "holds a spike of the gradient to one percent.",
        paper="No figure in the abstract: better than LoRA and GaLore, and comparable to or better than full-rank "
        "training.",
        checks=[
            Check(
                "final relative loss at its best learning rate, against a tenth of GaLore's",
                final["Fira"],
                "<=",
                0.1 * final["GaLore"],
                baseline=final["GaLore"],
            ),
            Check(
                "final relative loss at lr 0.01, against a tenth of GaLore's",
                at_one["Fira"],
                "<=",
                0.1 * at_one["GaLore"],
                baseline=at_one["GaLore"],
            ),
            Check(
                "bytes of state of matrices, as those of GaLore",
                float(state["Fira"]),
                "<=",
                float(state["GaLore"]),
                baseline=float(state["AdamW"]),
            ),
            Check(
                "growth of the residual step's norm at a spike of 1000, against the same without limiter",
                growth,
                "<=",
                1.01 * (1 + 1e-6),
                baseline=unlimited,
            ),
            Check("the same without limiter", unlimited, ">=", 2.0),
        ],
        panels=[
            Panel(
                "Each at its best learning rate", "step", "relative loss", curves(lambda name: best[name]), log_y=True
            ),
            Panel("All at learning rate 0.01", "step", "relative loss", curves(lambda name: 0.01), log_y=True),
        ],
    )
