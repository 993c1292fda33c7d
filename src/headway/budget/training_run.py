"""A training run as a planner reads it: the learning rate of every step and losses after some of them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = ["FEWEST_POINTS", "Run", "checked_rates", "checked_steps", "warmup_length"]

FEWEST_POINTS = 8


@dataclass(frozen=True, eq=False)
class Run:
    """A training run: the rate of every optimizer step, and losses after some of the steps.

    Args:
        lrs: eta_1 ... eta_T >= 0, one rate per optimizer step.
        steps: whole numbers in 1 ... T, increasing or not: after how many steps each loss was measured.
        losses: as many losses, finite and > 0. A validation loss is best; a training loss should be averaged around
            its step.

    Raises:
        ValueError: a value out of its range, or lengths that differ.

    >>> Run(lrs=[0.1, 0.1, 0.05], steps=[2, 3], losses=[2.0, 1.8]).steps
    [2, 3]
    """

    lrs: ArrayLike
    steps: ArrayLike
    losses: ArrayLike

    def __post_init__(self) -> None:
        self.arrays()

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Checked copies of `lrs` (float), `steps` (int) and `losses` (float)."""
        rates = checked_rates(self.lrs)
        losses = np.array(self.losses, dtype=float)
        steps = checked_steps(self.steps, len(rates))
        if losses.ndim != 1 or losses.shape != steps.shape:
            raise ValueError(
                f"losses and steps must be sequences of one length, got shapes {losses.shape} and {steps.shape}"
            )
        wrong = np.flatnonzero(~(np.isfinite(losses) & (losses > 0)))
        if len(wrong):
            raise ValueError(f"losses must be finite and > 0, got {losses[wrong[0]]:g} at position {wrong[0]}")
        return rates, steps, losses

    @classmethod
    def from_metrics(cls, path: str | Path) -> Run:
        """Read a run folder's `metrics.jsonl`.

        The losses are the validation losses where at least 8 of them lie after the warm-up. Otherwise they are means
        of the training loss over consecutive windows of 2 (n // 200) + 1 of the n steps after the warm-up, each at the
        middle of its window; the training loss of step n, taken before the update, counts for the model after n - 1
        steps. Rates of steps that are not in the file lie on a line between their neighbours.

        Args:
            path: the file, or the folder that holds it. Lines of `{"step", "lr", "loss"}` (training) and
                `{"step", "validation_loss"}` (evaluation); others, and unreadable ones, are passed over. A record
                whose step is not above that of the one before it (a resumed run) replaces the records from there on.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds no training record with a rate, or too few losses.
        """
        path = Path(path)
        path = path / "metrics.jsonl" if path.is_dir() else path
        training: list[tuple[int, float, float]] = []
        validation: list[tuple[int, float]] = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                step = int(record["step"])
                if "validation_loss" in record:
                    _supersede(validation, (step, float(record["validation_loss"])))
                elif step > 0:
                    _supersede(training, (step, float(record["lr"]), float(record["loss"])))
            except (ValueError, KeyError, TypeError):
                continue
        if not training:
            raise ValueError(f"path must hold training records with step, lr and loss, got none in {path}")
        at, rates, losses = (np.array(column, dtype=float) for column in zip(*training, strict=True))
        lrs = np.interp(np.arange(1, int(at[-1]) + 1), at, rates)
        start = warmup_length(lrs)
        held_out = [(step, loss) for step, loss in validation if start < step <= len(lrs) and 0 < loss < math.inf]
        if len(held_out) >= FEWEST_POINTS:
            points = held_out
        else:
            after, losses = at - 1, losses
            kept = (after > start) & np.isfinite(losses) & (losses > 0)
            after, losses = after[kept], losses[kept]
            width = 2 * (len(losses) // 200) + 1
            windows = range(0, len(losses) - width + 1, width)
            points = [(int(after[i + width // 2]), float(losses[i : i + width].mean())) for i in windows]
        if len(points) < FEWEST_POINTS:
            raise ValueError(
                f"path must hold at least {FEWEST_POINTS} losses after the warm-up, got {len(points)} in {path}"
            )
        steps, values = zip(*points, strict=True)
        return cls(lrs, np.array(steps), np.array(values))


def warmup_length(rates: np.ndarray) -> int:
    """The number of steps before a strictly rising start has reached its top."""
    rises = np.diff(rates) > 0
    return int(len(rises) if rises.all() else rises.argmin())


def checked_rates(lrs: ArrayLike) -> np.ndarray:
    """A copy of `lrs` as a non-empty float64 array of finite values >= 0, or a `ValueError`."""
    rates = np.array(lrs, dtype=float)
    if rates.ndim != 1 or not len(rates):
        raise ValueError(f"lrs must be a sequence of at least one rate, got shape {rates.shape}")
    wrong = np.flatnonzero(~(np.isfinite(rates) & (rates >= 0)))
    if len(wrong):
        raise ValueError(f"lrs must be finite and >= 0, got {rates[wrong[0]]:g} at position {wrong[0]}")
    return rates


def checked_steps(steps: ArrayLike, length: int) -> np.ndarray:
    """`steps` as whole numbers in 1 ... length, or a `ValueError`."""
    values = np.asarray(steps, dtype=float)
    if values.ndim != 1:
        raise ValueError(f"steps must be a sequence of whole numbers, got shape {values.shape}")
    wrong = np.flatnonzero(~((values >= 1) & (values <= length) & (values == np.floor(values))))
    if len(wrong):
        raise ValueError(
            f"steps must be whole numbers in [1, {length}], got {values[wrong[0]]:g} at position {wrong[0]}"
        )
    return values.astype(int)


def _supersede(records: list[Any], record: tuple[Any, ...]) -> None:
    while records and records[-1][0] >= record[0]:
        records.pop()
    records.append(record)
