"""REX against linear and step schedules at small fixed budgets, on scikit-learn's digits.

A 64-32-10 ReLU network is trained for T steps of batch 32 with SGD (momentum 0.9) and with Adam, the
peak rate tuned over four values for every schedule and T, all seeds of one schedule at once. The
figure is the mean test cross-entropy at the best peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from headway.claims import Check, Outcome, Panel
from headway.schedules.profile import LinearLR, ProfileLR
from headway.schedules.rex import REXLR, rex_profile

__all__ = ["best_loss", "claim", "digits"]

BUDGETS = (20, 40, 80, 200, 600)
LOW_BUDGETS = (20, 40)
SEEDS = 4
TRAIN_ROWS = 1200
BATCH = 32
WIDTHS = (64, 32, 10)

Schedule: TypeAlias = Callable[[Optimizer, int], LRScheduler]
Groups: TypeAlias = list[dict[str, object]]

OPTIMIZERS: dict[str, tuple[Callable[[Groups], Optimizer], tuple[float, ...]]] = {
    "SGD": (lambda groups: torch.optim.SGD(groups, momentum=0.9), (0.01, 0.03, 0.1, 0.3)),
    "Adam": (torch.optim.Adam, (0.001, 0.003, 0.01, 0.03)),
}
SCHEDULES: dict[str, Schedule] = {
    "REX": lambda optimizer, steps: REXLR(optimizer, steps),
    "linear": lambda optimizer, steps: LinearLR(optimizer, steps),
    "step 50-75": lambda optimizer, steps: ProfileLR(optimizer, "step", steps),
}


def claim(seed: int = 0, *, budgets: Sequence[int] = BUDGETS, seeds: int = SEEDS) -> Outcome:
    """REX beats linear at the lowest budgets and keeps up with a step schedule at all of them.

    Args:
        seed: start of the sequence of seeds for the split, the initial weights and the batch order.
        budgets: T in optimizer steps, increasing; the checks against linear use the ones up to 40.
        seeds: number of runs behind every mean.

    Raises:
        ImportError: scikit-learn is missing; the message says what brings it.
    """
    data = digits(seed)
    losses = {
        (optimizer, schedule, steps): best_loss(data, optimizer, SCHEDULES[schedule], steps, seed, seeds)
        for optimizer in OPTIMIZERS
        for schedule in SCHEDULES
        for steps in budgets
    }
    return _judge(losses, budgets)


def _judge(losses: dict[tuple[str, str, int], float], budgets: Sequence[int]) -> Outcome:
    def ratio(optimizer: str, baseline: str, steps: int) -> float:
        return losses[optimizer, "REX", steps] / losses[optimizer, baseline, steps]

    checks = [
        Check(f"{optimizer}, T = {steps}: loss of REX / linear", ratio(optimizer, "linear", steps), "<=", 0.95, 1.0)
        for optimizer in OPTIMIZERS
        for steps in budgets
        if steps in LOW_BUDGETS
    ]
    checks += [
        Check(f"{optimizer}, T = {steps}: loss of REX / step", ratio(optimizer, "step 50-75", steps), "<=", 1.02, 1.0)
        for optimizer in OPTIMIZERS
        for steps in budgets
    ]
    logs = [math.log(ratio(optimizer, "linear", steps)) for optimizer in OPTIMIZERS for steps in budgets]
    checks.append(Check("mean of log(REX / linear) over all settings", sum(logs) / len(logs), "<=", 0.0, 0.0))

    z = [i / 100 for i in range(101)]
    panels = [
        Panel(
            "Learning rate over the budget",
            "spent fraction of the budget",
            "fraction of the peak",
            {"REX": (z, [rex_profile(point) for point in z]), "linear": (z, [1 - point for point in z])},
        )
    ]
    panels += [
        Panel(
            f"Test loss with {optimizer}, best peak rate",
            "budget in steps",
            "test cross-entropy",
            {name: (list(budgets), [losses[optimizer, name, steps] for steps in budgets]) for name in SCHEDULES},
            log_x=True,
            log_y=True,
        )
        for optimizer in OPTIMIZERS
    ]
    return Outcome(
        statement="With few steps, REX reaches a lower loss than a linear or step schedule, with no new setting.",
        paper="Over seven settings with SGD and Adam, REX beats linear at low budgets and matches or beats linear, "
        "step, exponential, cosine, plateau and OneCycle at all budgets (abstract).",
        checks=checks,
        panels=panels,
    )


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train and test rows and labels, split by the seed: x in [0, 1] of shape (rows, 64)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('these digits need scikit-learn: pip install "headway[estimators]"') from error
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(bunch.data, dtype=torch.float32)[order] / 16
    y = torch.tensor(bunch.target, dtype=torch.long)[order]
    return x[:TRAIN_ROWS], y[:TRAIN_ROWS], x[TRAIN_ROWS:], y[TRAIN_ROWS:]


def best_loss(
    data: tuple[Tensor, Tensor, Tensor, Tensor], optimizer: str, schedule: Schedule, steps: int, seed: int, seeds: int
) -> float:
    """The mean test loss over the seeds, at the best peak rate of the grid."""
    x, y, x_test, y_test = data
    make, peaks = OPTIMIZERS[optimizer]
    generators = [torch.Generator().manual_seed(1000 * seed + run) for run in range(seeds)]
    # One parameter group per peak rate; each of its tensors stacks the seeds in front: (seeds, in, out).
    initial = _initial_weights(generators)
    groups = [[torch.nn.Parameter(tensor.clone()) for tensor in initial] for _ in peaks]
    trainer = make([{"params": group, "lr": peak} for group, peak in zip(groups, peaks, strict=True)])
    scheduler = schedule(trainer, steps)
    batches = torch.stack([_batches(generator, len(x), steps) for generator in generators], dim=1)
    for rows in batches:  # (seeds, batch)
        inputs, labels = x[rows].repeat(len(peaks), 1, 1), y[rows].repeat(len(peaks), 1)
        # Summed over the runs, so that each gets the gradient of its own mean loss.
        loss = _losses(groups, inputs, labels).sum()
        trainer.zero_grad(set_to_none=True)
        loss.backward()
        trainer.step()
        scheduler.step()
    with torch.no_grad():
        runs = len(peaks) * seeds
        losses = _losses(groups, x_test.expand(runs, -1, -1), y_test.expand(runs, -1))
    mean = losses.view(len(peaks), seeds).mean(dim=1)
    return float(torch.nan_to_num(mean, nan=math.inf).min())


def _initial_weights(generators: Sequence[torch.Generator]) -> list[Tensor]:
    tensors = []
    for fan_in, fan_out in pairwise(WIDTHS):
        bound = 1 / math.sqrt(fan_in)
        for shape in ((fan_in, fan_out), (1, fan_out)):
            draws = [torch.rand(shape, generator=generator) for generator in generators]
            tensors.append((2 * torch.stack(draws) - 1) * bound)
    return tensors


def _batches(generator: torch.Generator, rows: int, steps: int) -> Tensor:
    """Row numbers of shape (steps, batch): whole batches of one shuffled pass after another."""
    per_epoch = rows // BATCH
    epochs = -(-steps // per_epoch)
    passes = [torch.randperm(rows, generator=generator)[: per_epoch * BATCH] for _ in range(epochs)]
    return torch.cat(passes).view(-1, BATCH)[:steps]


def _losses(groups: Sequence[Sequence[Tensor]], inputs: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of every run, shape (runs,), of inputs (runs, rows, 64) and labels (runs, rows)."""
    w1, b1, w2, b2 = (torch.cat(tensors) for tensors in zip(*groups, strict=True))
    hidden = torch.relu(torch.baddbmm(b1, inputs, w1))
    logits = torch.baddbmm(b2, hidden, w2)
    each = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return each.view(labels.shape).mean(dim=1)
