"""Gradient spikes: entries that are many times larger than they usually are.

Source: the score of Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training",
arXiv 2501.06842.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway.constraints import Range, check_arguments
from headway.optim.checks import local

__all__ = ["GradientSpikeMonitor", "GradientSpikes"]


class GradientSpikes(NamedTuple):
    """What a gradient looks like beside those before: the largest score and the number of entries that spike."""

    largest: float
    entries: int


class GradientSpikeMonitor:
    """Gradient spike scores of each parameter, for logging.

    With t the number of gradients seen of a parameter, the present g included::

        mean  = mean + (|g| - mean) / min(t, window)
        score = |g| / mean                              0 where all gradients were 0

    that is, each entry against its mean over all steps at first, and over about the last `window` steps later. An entry
    spikes where its score is above `threshold`. As a mean contains what it is compared with, scores are at most
    min(t, window). An entry that is not finite scores infinity and is kept out of the mean.

    Cost per update: one pass over the gradients, and two reads from the device for all of them. Memory: one fp32
    number per entry (fp64 for fp64). Of parameters that are sharded over ranks, each rank sees its own part.

    Args:
        window: steps that the mean reaches back, >= 1. Default 1000, our choice: the paper averages over a whole run.
        threshold: score above which an entry counts as a spike, > 0. Default 50 (paper). A window that is not larger
            never reports one.

    Raises:
        ValueError: an argument outside its range.

    Source: arXiv 2501.06842, from a summary of it. Departure: the paper averages over a finished run, this mean is
    known while it goes on.

    >>> monitor = GradientSpikeMonitor(window=100, threshold=5.0)
    >>> weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    >>> for step in range(10):
    ...     weight.grad = torch.tensor([1.0, 1.0 if step < 9 else 91.0]).double()
    ...     report = monitor.update([("weight", weight)])
    >>> report["weight"]  # 91 against a mean of (9 + 91) / 10
    GradientSpikes(largest=9.1, entries=1)
    """

    def __init__(self, window: int = 1000, threshold: float = 50.0) -> None:
        positive = Range(low=0, low_open=True)
        check_arguments(
            {"window": Range(low=1, integer=True), "threshold": positive}, window=window, threshold=threshold
        )
        self.window = window
        self.threshold = threshold
        self._means: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}

    @torch.no_grad()
    def update(self, named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, GradientSpikes]:
        """Count the present gradients in and report on them; parameters without one are left out.

        Args:
            named_parameters: names and parameters, such as `model.named_parameters()`. Call it after the backward pass
                and before clipping.
        """
        names, largest, entries = [], [], []
        for name, parameter in named_parameters:
            if parameter.grad is not None:
                score = self.scores(name, parameter.grad)
                names.append(name)
                largest.append(score.amax() if score.numel() else score.new_zeros(()))
                entries.append((score > self.threshold).sum())
        read = zip(names, _read(largest), _read(entries), strict=True)
        return {name: GradientSpikes(float(top), int(count)) for name, top, count in read}

    @torch.no_grad()
    def scores(self, name: str, gradient: Tensor) -> Tensor:
        """The score of every entry, in the gradient's shape, after counting the gradient in."""
        size = local([gradient.detach()])[0].abs()
        if size.dtype != torch.float64:
            size = size.float()
        finite = size.isfinite()
        t = self._steps[name] = self._steps.get(name, 0) + 1
        mean = self._means.setdefault(name, torch.zeros_like(size))
        mean.lerp_(torch.where(finite, size, mean), 1 / min(t, self.window))
        score = torch.where(mean > 0, size / mean, 0.0)
        return torch.where(finite, score, torch.inf)

    def state_dict(self) -> dict[str, Any]:
        """The means and counts by name, to be saved with the run."""
        return {"means": dict(self._means), "steps": dict(self._steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._means = {name: mean.clone() for name, mean in state["means"].items()}
        self._steps = dict(state["steps"])


def _read(numbers: list[Tensor]) -> list[float]:
    """Numbers from wherever they are, in one read."""
    return torch.stack([n.to(numbers[0]) for n in numbers]).tolist() if numbers else []
