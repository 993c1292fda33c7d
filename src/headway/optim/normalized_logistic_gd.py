"""Normalized LR+GD: a separating hyperplane from large gradient steps on the logistic loss.

    w = softmax(-softplus(m));  theta = theta + lr sum_i w_i z_i,   m_i = z_i . theta

Source: Tyurin, "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large
Step Sizes", AAAI 2025, arXiv 2412.08424.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F
from torch.optim import Optimizer

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.optim.checks import refuse_complex, refuse_sharded, require_finite

__all__ = ["NormalizedLogisticGD", "Separation", "example_weights", "separate"]

_RULES = ("normalized", "logistic", "batch_perceptron", "normalized_batch_perceptron", "perceptron")


class NormalizedLogisticGD(Optimizer):
    """Gradient descent on the logistic loss, divided by the mean weight of the examples.

    `step(closure)` takes margins m_i = y_i f(x_i), y_i = +-1, and does::

        sigma_i = 1 / (1 + exp(m_i))                      the weight of example i in the gradient
        w_i     = sigma_i / sum_j sigma_j                 = softmax(-softplus(m))_i, in fp64
        p       = p + lr sum_i w_i grad m_i

    For a linear f without regularisation, on separable data, from p = 0 and with all data in every step, it reaches
    a separating hyperplane in at most R^2/mu^2 + 2 log(2n-1)/(lr mu^2) steps, R the largest norm of an example and mu
    the largest margin: unlike plain descent, whose number grows with n. It also runs for other f and on
    mini-batches, without any guarantee. Stop when `(margins > 0).all()`: a margin of 0 counts as an error, the loss may
    rise on the way, and on data that are not separable the steps never settle. The result is a separator, not
    the one of largest margin; a small lr comes closer to that.

    Gradients are taken by the optimizer; `p.grad` is neither read nor written. Data that are spread over ranks take
    the steps of all data together if `process_group` is given: normalisation and gradients are summed over it. The
    closure must then use the bare module, not DistributedDataParallel. Without it, ranks must see the same margins.

    Cost per step: one evaluation and one gradient, and n numbers in fp64. State: none.

    Args:
        params: parameters or parameter groups; groups may set lr.
        lr: the paper's gamma, > 0. Default 100, best or equal in the paper's worst case; the theory prefers large.
        process_group: ranks that hold parts of the data. Default None.

    Raises:
        ValueError: lr outside its range; complex or sharded parameters; margins that are not a vector.
        RuntimeError: from `step`, no closure; margins without a graph.
        FloatingPointError: from `step`, a margin or a gradient that is not finite; nothing was changed.

    Source: arXiv 2412.08424; the form as a closure-driven optimizer is an addition. There is no official code.

    >>> z = torch.tensor([[1.0, -1.0], [1.0, 4.0]])  # y_i x_i
    >>> theta = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = NormalizedLogisticGD([theta], lr=10.0)
    >>> while not bool((z @ theta > 0).all()):
    ...     _ = optimizer.step(lambda: z @ theta)
    >>> theta
    Parameter containing:
    tensor([20.,  5.], requires_grad=True)
    """

    step_protocol: ClassVar[str] = "margins"
    constraints: ClassVar[Mapping[str, Constraint]] = {"lr": Range(low=0, low_open=True)}

    def __init__(
        self, params: Iterable[Any], lr: float = 100.0, *, process_group: dist.ProcessGroup | None = None
    ) -> None:
        check_arguments(self.constraints, lr=lr)
        self.process_group = process_group
        super().__init__(params, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group is checked like the constructor's arguments."""
        check_arguments(self.constraints, lr=param_group.get("lr", self.defaults["lr"]))
        super().add_param_group(param_group)
        try:
            refuse_complex(self.param_groups[-1]["params"])
            reason = "gradients are taken here, without FSDP's reduction"
            refuse_sharded("NormalizedLogisticGD", self.param_groups[-1]["params"], reason)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One step; `closure` returns the margins, shape (n,), with their graph. Returns them without it."""
        if closure is None:
            raise RuntimeError("NormalizedLogisticGD.step needs a closure that returns the margins y_i f(x_i)")
        with torch.enable_grad():
            margins = closure()
        if margins.ndim != 1 or not margins.numel():
            raise ValueError(f"margins must be a vector of one or more numbers, got shape {tuple(margins.shape)}")
        if not margins.requires_grad:
            raise RuntimeError("margins must have a graph: the closure has to run with gradients enabled")
        bad = (~margins.isfinite()).sum()
        if self.process_group is not None:
            dist.all_reduce(bad, group=self.process_group)  # one rank alone must not raise: the others would wait
        if bad:
            raise FloatingPointError(f"NormalizedLogisticGD: {int(bad)} margins are not finite; nothing was changed")
        weights = example_weights(margins, process_group=self.process_group).to(margins.dtype)
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        ascent = dict(zip(params, torch.autograd.grad(margins, params, weights, allow_unused=True), strict=True))
        if self.process_group is not None:
            for p, gradient in ascent.items():
                ascent[p] = torch.zeros_like(p) if gradient is None else gradient.contiguous()
                dist.all_reduce(ascent[p], group=self.process_group)
        moving = [[p for p in group["params"] if ascent.get(p) is not None] for group in self.param_groups]
        gradients = [[ascent[p] for p in group] for group in moving]
        require_finite("NormalizedLogisticGD", self.param_groups, moving, gradients)
        for group, parameters, directions in zip(self.param_groups, moving, gradients, strict=True):
            if parameters:
                torch._foreach_add_(parameters, directions, alpha=group["lr"])
        return margins.detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "process_group": self.process_group}


def example_weights(margins: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """The weights sigma_i / sum_j sigma_j in fp64, sigma_i = 1 / (1 + exp(m_i)): parts of 1 for all finite margins.

    Weights below the range of fp64 are 0. With `process_group`, the sum is over the margins of all its ranks.

    >>> example_weights(torch.tensor([0.0, -1000.0, 1000.0]))
    tensor([0.3333, 0.6667, 0.0000], dtype=torch.float64)
    """
    log_sigma = -F.softplus(margins.detach().double())
    if process_group is None:
        return log_sigma.softmax(0)
    largest = log_sigma.max()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=process_group)
    relative = (log_sigma - largest).exp()
    total = relative.sum()
    dist.all_reduce(total, group=process_group)
    return relative / total


@dataclass(frozen=True)
class Separation:
    """What `separate` reached: `theta` (d,), the number of steps, and whether all margins are > 0.

    `history`, if tracked: logistic loss, accuracy and norm of the loss's gradient, before each step and at the end.
    """

    theta: Tensor
    iterations: int
    separated: bool
    history: dict[str, list[float]] = field(default_factory=dict)


@torch.no_grad()
def separate(
    z: Tensor,
    rule: str = "normalized",
    gamma: float = 100.0,
    max_iter: int = 10_000,
    *,
    theta: Tensor | None = None,
    pocket: bool = False,
    track: bool = False,
) -> Separation:
    """Step until all margins m = z theta are > 0, by one of five rules; with S = {i: m_i <= 0}:

        normalized                   theta += gamma sum_i w_i z_i,     w = example_weights(m)
        logistic                     theta += gamma/n sum_i sigma_i z_i
        batch_perceptron             theta += 1/n sum_S z_i            the first step from 0: 1/(2n) sum_i z_i
        normalized_batch_perceptron  theta += 1/|S| sum_S z_i
        perceptron                   theta += z_j, j the first of S

    `batch_perceptron` is the limit of `logistic`'s theta / gamma for gamma to infinity. In fp64.

    Args:
        z: y_i x_i, shape (n, d), y_i = +-1; for an intercept, x_i with a 1 attached.
        rule: one of the above. Default `normalized`.
        gamma: step size of the first two rules, > 0. Default 100 (see `NormalizedLogisticGD`).
        max_iter: largest number of steps, >= 0. Default 10,000. Data that are not separable use them all.
        theta: start, shape (d,). Default 0, as the bounds on the number of steps need.
        pocket: return the theta of the best accuracy on the way, not the last. Default False.
        track: fill `history`. Default False.

    Raises:
        ValueError: an argument outside its range; z without rows, not finite, or with a row of zeros,
            which nothing separates.

    Source: arXiv 2412.08424.

    >>> z = torch.tensor([[0.5, -1.0]] + [[0.5, 1.0]] * 999)  # the paper's worst case
    >>> [separate(z, rule).iterations for rule in ("normalized", "logistic")]
    [2, 308]
    """
    ranges: dict[str, Constraint] = {
        "rule": OneOf(*_RULES),
        "gamma": Range(low=0, low_open=True),
        "max_iter": Range(low=0, integer=True),
    }
    check_arguments(ranges, rule=rule, gamma=gamma, max_iter=max_iter)
    z = z.double()
    if z.ndim != 2 or not len(z) or not bool(z.isfinite().all()):
        raise ValueError(f"z must be a matrix of finite numbers with one row or more, got shape {tuple(z.shape)}")
    if bool((z == 0).all(1).any()):
        raise ValueError(f"z must have no row of zeros, which nothing separates, got one in row {_first_zero_row(z)}")
    point = z.new_zeros(z.shape[1]) if theta is None else theta.to(z).clone()
    history: dict[str, list[float]] = {"loss": [], "accuracy": [], "gradient_norm": []} if track else {}
    best, best_right = point, -1
    iterations = 0
    while True:
        margins = z @ point
        wrong = margins <= 0
        right = len(z) - int(wrong.sum())
        if track:
            history["loss"].append(float(F.softplus(-margins).mean()))
            history["accuracy"].append(right / len(z))
            history["gradient_norm"].append(float((torch.sigmoid(-margins) @ z).norm()) / len(z))
        if right > best_right:
            best, best_right = point, right
        if right == len(z) or iterations == max_iter:
            break
        point = point + _direction(z, margins, wrong, rule, gamma)
        iterations += 1
    separated = right == len(z)
    return Separation(best if pocket else point, iterations, separated, history)


def _direction(z: Tensor, margins: Tensor, wrong: Tensor, rule: str, gamma: float) -> Tensor:
    if rule == "normalized":
        return gamma * (example_weights(margins) @ z)
    if rule == "logistic":
        return gamma / len(z) * (torch.sigmoid(-margins) @ z)
    if rule == "perceptron":
        return z[int(wrong.to(torch.uint8).argmax())]
    if rule == "normalized_batch_perceptron":
        return z[wrong].mean(0)
    # From 0 all margins are 0, where sigma is 1/2; later, a margin of exactly 0 counts in full.
    return z[wrong].sum(0) / (2 * len(z) if bool((margins == 0).all()) else len(z))


def _first_zero_row(z: Tensor) -> int:
    return int((z == 0).all(1).to(torch.uint8).argmax())
