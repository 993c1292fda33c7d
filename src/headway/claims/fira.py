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
from headway.claims.frugal import LEARNING_RATES, RANK, run
from headway.optim.fira import Fira

__all__ = ["claim"]


def spike(seed: int) -> float:
    """Growth of |S|_F at a gradient 1000 times as large as the 50 before it."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.zeros(64, 48))
    optimizer = Fira([{"params": [weight], "projected": True}], rank=RANK)
    norm = 0.0
    for step in range(51):
        weight.grad = torch.randn(64, 48, generator=generator) * (1000 if step == 50 else 1)
        if step == 50:
            norm = optimizer.state[weight]["residual_norm"].item()
        optimizer.step()
    return optimizer.state[weight]["residual_norm"].item() / norm


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
        growth = spike(seed)
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
        paper="No figure in the abstract: better than LoRA and GaLore, comparable to or better than full-rank training.",
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
            Check("growth of the residual's norm at a spike of 1000", growth, "<=", 1.01 * (1 + 1e-6), baseline=1000.0),
        ],
        panels=[
            Panel(
                "Each at its best learning rate", "step", "relative loss", curves(lambda name: best[name]), log_y=True
            ),
            Panel("All at learning rate 0.01", "step", "relative loss", curves(lambda name: 0.01), log_y=True),
        ],
    )
