"""Optimizers whose reported point differs from the point at which they take gradients.

Averaging and accelerated methods leave in the model the point where the next gradient is due, while
the point worth evaluating or keeping is another sequence. Their common part is the switch between the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["EvaluationPointOptimizer"]


class EvaluationPointOptimizer(Optimizer):
    """Base of optimizers with `eval()` and `train()`, which put the reported point into the model and take it back.

    A subclass says what the reported point is in `evaluation_point` and calls `require_training` at the
    start of `step`. The training point is kept aside in `state[p]["training_point"]` for as long as the
    optimizer is in evaluation mode, so that the way back is exact and a checkpoint written in either mode
    is complete; the mode itself is `group["training"]`.

    >>> class LastOfTwo(EvaluationPointOptimizer):  # reports the middle of the last two points
    ...     def __init__(self, params, lr):
    ...         super().__init__(params, {"lr": lr})
    ...     def evaluation_point(self, group, p):
    ...         return (self.state[p]["previous"] + p) / 2
    ...     @torch.no_grad()
    ...     def step(self):
    ...         self.require_training()
    ...         for group in self.param_groups:
    ...             for p in group["params"]:
    ...                 self.state[p]["previous"] = p.clone()
    ...                 p.sub_(p.grad, alpha=group["lr"])
    >>> p = torch.nn.Parameter(torch.tensor([4.0]))
    >>> p.grad = torch.tensor([2.0])
    >>> optimizer = LastOfTwo([p], lr=1.0)
    >>> optimizer.step()
    >>> optimizer.eval(); p.item()
    3.0
    >>> optimizer.train(); p.item()
    2.0
    """

    def evaluation_point(self, group: Mapping[str, Any], p: Tensor) -> Tensor | None:
        """The point to report for a parameter that has state, or None where it is the training point itself."""
        raise NotImplementedError

    @property
    def training(self) -> bool:
        """Whether the parameters stand at the training point."""
        return all(group["training"] for group in self.param_groups)

    def require_training(self) -> None:
        """Raise `RuntimeError` in evaluation mode: a gradient taken at the reported point is the wrong one."""
        if not self.training:
            raise RuntimeError(f"{type(self).__name__} is in evaluation mode: call train() before step()")

    @torch.no_grad()
    def eval(self) -> None:
        """Put the reported point into the parameters; nothing happens in evaluation mode."""
        for group in self.param_groups:
            if not group["training"]:
                continue
            for p in group["params"]:
                point = self.evaluation_point(group, p) if self.state.get(p) else None
                if point is not None:
                    self.state[p]["training_point"] = p.detach().clone()
                    p.copy_(point)
            group["training"] = False

    @torch.no_grad()
    def train(self) -> None:
        """Put the training point back into the parameters; nothing happens in training mode."""
        for group in self.param_groups:
            for p in group["params"]:
                if "training_point" in self.state.get(p, {}):
                    p.copy_(self.state[p].pop("training_point"))
            group["training"] = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group is in the mode of the others."""
        super().add_param_group(param_group)
        self.param_groups[-1]["training"] = all(group["training"] for group in self.param_groups[:-1])
