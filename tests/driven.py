"""Optimizers that do nothing, and the rates that a schedule gives them."""

import torch


def sgd(*lrs: float) -> torch.optim.SGD:
    """One parameter group per rate; one of rate 1 without any."""
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs or (1.0,)])


def run(schedule, steps: int) -> list[float]:
    """The first group's rate in each of `steps` steps."""
    rates = []
    for _ in range(steps):
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return rates
