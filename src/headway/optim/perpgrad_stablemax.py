"""perpGrad and StableMax: training on after a classifier fits its data, without the softmax's collapse.

Once every example is classified, gradient descent mostly scales the logits up, until in finite precision
the softmax is exactly 1, loss and gradient are exactly 0, and learning ends. `PerpGrad` takes the
part of each gradient that lies along its weight away; `stablemax` replaces exp by a function that grows
linearly. Source: arXiv 2501.04697.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.kernels.finite import first_nonfinite
from headway.kernels.project import Projection, orthogonal_projections, project_orthogonal_
from headway.optim.checks import dense_gradients, gradients, local, refuse_sharded, require_finite_gradients
from headway.optim.inner_adam import inner_adam_step, kernel_takes_step
from headway.optim.wrapper import OptimizerWrapper

__all__ = [
    "PerpGrad",
    "StableMaxCrossEntropyLoss",
    "log_stablemax",
    "project_orthogonal_gradients_",
    "softmax_collapse_fraction",
    "stablemax",
    "stablemax_cross_entropy",
]

_NONE = Projection(0.0, 1.0, 0)
_SHARDED = "the projection needs the inner product of a whole weight with its gradient"


class PerpGrad(OptimizerWrapper):
    """An optimizer whose gradients are first made orthogonal to their weights, tensor by tensor.

    Before each step, for each weight w (flattened) with gradient g, in place in `p.grad`::

        g_perp = g - (w.g) / (w.w + 1e-30) * w
        g <- g_perp * |g| / (|g_perp| + 1e-30)        renormalize=True
        g <- g_perp                                   renormalize=False

    A gradient that is parallel to its weight (|g_perp| < 1e-6 |g|) becomes zero. Under SGD the norm of a weight then
    grows by the steps alone, |w_{t+1}|^2 = |w_t|^2 + lr^2 |g_t|^2; momentum and Adam's preconditioning bring a
    radial part back. Weight decay of the wrapped optimizer acts on the norm as ever. Layers followed by a
    normalisation have orthogonal gradients already.

    With a GradScaler, unscaled gradients are not needed: the projection is linear, and the restored norm is
    that of the gradient. Clip by norm before or after: the direction is the same.

    Cost: a pass over weights and gradients, and one that writes the gradients: the step's own pass around Adam or AdamW
    with float32 parameters on the CPU (not with `foreach=True` or `fused=False`). No state.

    Args:
        optimizer: the optimizer to wrap; any that is driven by `backward()` and `step()`.
        renormalize: give the projected gradient the norm of the gradient. Default True (official code); the
            paper's rule is False.
        exclude: leave a parameter as it is where `exclude(name, p)` is true; the name is the one in the group's
            `param_names` (torch's named parameters), or "" without. Default None: no parameter.
        min_numel: smaller tensors are left as they are, >= 2. Default 2: a scalar has no orthogonal direction.

    Raises:
        ValueError: `min_numel` out of range; sharded parameters, at the step: the projection needs whole tensors.
        RuntimeError: sparse gradients.
        FloatingPointError: a gradient that is not finite; nothing is changed.

    Source: Prieto, Barsbey, Mediano, Birdal, arXiv 2501.04697, and the authors' code
    (LucasPrietoAl/grokking-at-the-edge-of-numerical-stability at 0cc9e8d). Departures from the code: a parallel
    gradient becomes zero, where the code blows rounding noise up to a full step; one-element tensors are left alone;
    `state_dict()` is the wrapped optimizer's, where that of the code is empty.

    >>> weight = torch.nn.Parameter(torch.tensor([2.0, 0.0]))
    >>> optimizer = PerpGrad(torch.optim.SGD([weight], lr=1.0))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> optimizer.step(); weight.tolist()
    [2.0, -5.0]
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "renormalize": OneOf(True, False),
        "min_numel": Range(low=2, integer=True),
    }

    def __init__(
        self,
        optimizer: Optimizer,
        renormalize: bool = True,
        exclude: Callable[[str, Tensor], bool] | None = None,
        min_numel: int = 2,
    ) -> None:
        check_arguments(self.constraints, renormalize=renormalize, min_numel=min_numel)
        super().__init__(optimizer)
        self.renormalize = renormalize
        self.exclude = exclude
        self.min_numel = min_numel

    def wrapped_step(self) -> None:
        """Project, and step; in the step's own pass where the kernel can do that."""
        ready = dense_gradients("PerpGrad", self.param_groups)
        chosen = [self._projected(group, params) for group, params in zip(self.param_groups, ready, strict=True)]
        refuse_sharded("PerpGrad", [p for params in chosen for p in params], _SHARDED)
        if kernel_takes_step(self.optimizer, (p for params in ready for p in params)):
            self._step_with_projection(ready, chosen)
        else:
            require_finite_gradients("PerpGrad", self.param_groups, ready)
            _project([p for params in chosen for p in params], self.renormalize)
            self.optimizer.step()

    def _projected(self, group: Mapping[str, Any], params: Iterable[Tensor]) -> list[Tensor]:
        """Those of `params` that are projected."""
        names = group.get("param_names", [""] * len(group["params"]))
        excluded = {
            id(p)
            for name, p in zip(names, group["params"], strict=True)
            if p.numel() < self.min_numel or (self.exclude is not None and self.exclude(name, p))
        }
        return [p for p in params if id(p) not in excluded]

    def _step_with_projection(self, ready: list[list[Any]], chosen: list[list[Any]]) -> None:
        together = [p for params in chosen for p in params]
        projections = dict(
            zip(
                map(id, together),
                orthogonal_projections([p.grad for p in together], together, renormalize=self.renormalize),
                strict=True,
            )
        )
        unseen = [p.grad for params in ready for p in params if id(p) not in projections]
        # A gradient that is not finite shows in its inner product with the weight.
        if not all(math.isfinite(own.along) for own in projections.values()) or first_nonfinite(unseen) is not None:
            require_finite_gradients("PerpGrad", self.param_groups, ready)
        for group, params in zip(self.param_groups, ready, strict=True):
            inner_adam_step(
                self.optimizer,
                group,
                params,
                [p.grad for p in params],
                l2=0.0 if group["decoupled_weight_decay"] else group["weight_decay"],
                projections=[projections.get(id(p), _NONE) for p in params],
                maximize=group["maximize"],
            )


def project_orthogonal_gradients_(parameters: Iterable[Tensor], renormalize: bool = True) -> None:
    """The projection of `PerpGrad` on the gradients in `p.grad`, in place, for loops of one's own.

    Parameters without gradient and one-element tensors are left as they are. Raises as `PerpGrad` does.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> weight.grad = torch.tensor([2.0, 0.0])
    >>> project_orthogonal_gradients_([weight], renormalize=False)
    >>> weight.grad
    tensor([ 1., -1.])
    """
    (ready,) = gradients("project_orthogonal_gradients_", [{"params": list(parameters)}])
    _project([p for p in ready if p.numel() >= 2], renormalize)


@torch.no_grad()
def _project(params: list[Any], renormalize: bool) -> None:
    refuse_sharded("PerpGrad", params, _SHARDED)
    whole = local(params)
    grads = local(p.grad for p in params)
    wide = [g if g.dtype not in (torch.bfloat16, torch.float16) else g.float() for g in grads]
    project_orthogonal_(wide, [w.to(g.dtype) for w, g in zip(whole, wide, strict=True)], renormalize=renormalize)
    for g, projected in zip(grads, wide, strict=True):
        if g is not projected:
            g.copy_(projected)


def stablemax(x: Tensor, dim: int = -1) -> Tensor:
    """A softmax whose exp is s(x) = x + 1 for x >= 0 and 1 / (1 - x) for x < 0.

        stablemax(x)_i = s(x_i) / sum_j s(x_j)

    It orders entries as softmax does, but a constant added to all of them changes it.

    Source: arXiv 2501.04697. The code's 1e-30 in the denominator of s is left out: 1 - x >= 1 there.

    >>> stablemax(torch.tensor([1.0, 0.0, -1.0]))
    tensor([0.5714, 0.2857, 0.1429])
    """
    return log_stablemax(x, dim).exp()


def log_stablemax(x: Tensor, dim: int = -1) -> Tensor:
    """The logarithm of `stablemax`: log s(x) - log sum_j s(x_j), with log s(x) = sign(x) log(1 + |x|).

    >>> log_stablemax(torch.tensor([1.0, 0.0])).exp()
    tensor([0.6667, 0.3333])
    """
    # Both branches of a where get gradients: each keeps to the half line on which it is finite.
    up, down = x.clamp_min(0), x.clamp_max(0)
    log_s = torch.where(x >= 0, torch.log1p(up), -torch.log1p(-down))
    s = torch.where(x >= 0, up + 1, 1 / (1 - down))
    return log_s - s.sum(dim, keepdim=True).log()


def stablemax_cross_entropy(
    logits: Tensor,
    target: Tensor,
    reduction: str = "mean",
    ignore_index: int = -100,
    weight: Tensor | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> Tensor:
    """Cross-entropy with `stablemax` in place of the softmax.

        loss = log sum_j s(x_j) - log s(x_y),    s as in `stablemax`

    Args:
        logits: (N, C) or (N, C, d1, ...), as in `torch.nn.functional.cross_entropy`.
        target: class indices (N,) or (N, d1, ...), or class probabilities in the shape of `logits`.
        reduction: `mean` (default; weighted where there are weights), `sum` or `none`.
        ignore_index: targets with this index do not count. Default -100.
        weight: one factor per class, (C,). Default None.
        dtype: precision of the evaluation, as in the official code float64; None is that of the logits. float32 is
            exact enough for logits up to about 1e7.

    Returns:
        The loss in the dtype of the evaluation.

    Raises:
        ValueError: unknown reduction; and as `torch.nn.functional.cross_entropy` does for shapes.

    Source: arXiv 2501.04697.

    >>> logits = torch.tensor([[20.0, 0.0, 0.0]])
    >>> round(stablemax_cross_entropy(logits, torch.tensor([0])).item(), 5)
    0.09097
    """
    check_arguments({"reduction": OneOf("mean", "sum", "none")}, reduction=reduction)
    class_dim = 0 if logits.ndim == 1 else 1
    log_probabilities = log_stablemax(logits if dtype is None else logits.to(dtype), class_dim)
    if weight is not None:
        weight = weight.to(log_probabilities.dtype)
    if target.is_floating_point():
        weighted = log_probabilities * target.to(log_probabilities.dtype)
        if weight is not None:
            weighted = weighted * weight.view([-1 if d == class_dim else 1 for d in range(logits.ndim)])
        losses = -weighted.sum(class_dim)
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.sum() / max(losses.numel(), 1)
    return nn.functional.nll_loss(
        log_probabilities, target, weight=weight, ignore_index=ignore_index, reduction=reduction
    )


class StableMaxCrossEntropyLoss(nn.Module):
    """`stablemax_cross_entropy` as a module, with the arguments of `torch.nn.CrossEntropyLoss`.

    >>> loss = StableMaxCrossEntropyLoss()
    >>> round(loss(torch.zeros(2, 4), torch.tensor([0, 3])).item(), 4)
    1.3863
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        dtype: torch.dtype | None = torch.float64,
    ) -> None:
        super().__init__()
        check_arguments({"reduction": OneOf("mean", "sum", "none")}, reduction=reduction)
        self.register_buffer("weight", weight)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.dtype = dtype

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return stablemax_cross_entropy(logits, target, self.reduction, self.ignore_index, self.weight, self.dtype)


def softmax_collapse_fraction(logits: Tensor, target: Tensor) -> float:
    """The fraction of examples whose cross-entropy is exactly 0 in the precision of the logits.

    From there on an example has no gradient. With p significant bits and one competitor it begins at a lead of about
    p log 2: 5.5 in bfloat16, 7.6 in float16, 16.6 in float32, 36.7 in float64.

    Args:
        logits: (N, C).
        target: class indices (N,).

    Source: arXiv 2501.04697.

    >>> softmax_collapse_fraction(torch.tensor([[20.0, 0.0], [10.0, 0.0]]), torch.tensor([0, 0]))
    0.5
    """
    z = logits.detach()
    shifted = z - z.max(dim=-1, keepdim=True).values
    total = shifted.exp().sum(-1)
    own = shifted.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return ((total.log() - own) == 0).double().mean().item()
