"""What a plan predicted against what its run did."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headway.plots import Panel
from headway.train import TrainError
from headway.train.run import RunFolder

__all__ = ["LOSS", "Comparison", "compare"]

LOSS = "validation loss, nats per token"


@dataclass(frozen=True)
class Comparison:
    """Predicted and actual figures of a run by name, and the curves.

    `inside`: whether the final loss lies in its interval; None where no loss was predicted.
    """

    predicted: dict[str, float]
    actual: dict[str, float]
    inside: bool | None
    curve: tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    measured: tuple[tuple[int, ...], tuple[float, ...]]

    def errors(self) -> dict[str, float]:
        """(predicted - actual) / actual."""
        return {name: (self.predicted[name] - value) / value for name, value in self.actual.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "errors": self.errors()}

    def panels(self) -> list[Panel]:
        """The predicted and the measured validation loss."""
        steps, losses, lower, upper = (list(part) for part in self.curve)
        return [
            Panel(
                "Validation loss",
                "step",
                "nats per token",
                {
                    "upper end": (steps, upper),
                    "lower end": (steps, lower),
                    "predicted": (steps, losses),
                    "measured": (list(self.measured[0]), list(self.measured[1])),
                },
                styles={"upper end": "faint", "lower end": "faint", "measured": "points"},
            )
        ]


def compare(path: str | Path) -> Comparison:
    """Read a finished run that was planned.

    Raises:
        TrainError: no run is there, it was not planned, or it is not finished; one line.
    """
    run, config = RunFolder.open(path)
    plan = config.plan
    if not plan.total_steps:
        raise TrainError(f"{run.path} was not planned: its config.toml has no [plan] (headway plan --write writes one)")
    if not run.complete:
        raise TrainError(f"{run.path} is not finished: headway train --resume {run.path}")
    records = [json.loads(line) for line in run.metrics_file.read_text(encoding="utf-8").splitlines()]
    losses = {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}
    environment = json.loads(run.environment_file.read_text(encoding="utf-8"))
    last = max(losses)
    if plan.total_steps != last:
        raise TrainError(f"{run.path} was planned for {plan.total_steps:,} steps and did {last:,}: another run")
    predicted = {"time, s": plan.seconds, "peak memory, MB": plan.memory_mb}
    actual = {
        "time, s": environment["whole command, seconds"],
        "peak memory, MB": max(record.get("peak_memory_mb", 0.0) for record in records),
    }
    if plan.losses:
        predicted[LOSS], actual[LOSS] = plan.losses[-1], losses[last]
    return Comparison(
        predicted=predicted,
        actual=actual,
        inside=plan.lower[-1] <= losses[last] <= plan.upper[-1] if plan.losses else None,
        curve=(plan.steps, plan.losses, plan.lower, plan.upper),
        measured=(tuple(losses), tuple(losses.values())),
    )
