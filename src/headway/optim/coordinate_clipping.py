"""Coordinate-wise clipping: the largest fraction of a gradient's coordinates is cut to the magnitude of the next one.

    g_i <- sign(g_i) min(|g_i|, tau),   tau = the (int(n q) + 1)-th largest |g_i| over all n coordinates

A few coordinates carry most of the curvature along a gradient; without them larger steps are
stable. Source: arXiv 2306.00204.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.kernels.select import clamp_magnitude_
from headway.numerics.curvature import hvp
from headway.optim.checks import dense_gradients, local, require_finite, require_finite_gradients
from headway.optim.inner_adam import inner_adam_step, kernel_takes_step, why_not_adam
from headway.optim.quantile import magnitude_quantile, quantile_and_largest
from headway.optim.wrapper import OptimizerWrapper

__all__ = ["CoordinateClip", "clip_top_coordinates_", "compare_directions", "directional_sharpness"]

_RANGES: dict[str, Constraint] = {
    "fraction": Range(low=0, high=1, high_open=True),
    "scale": Range(low=0, low_open=True),
    "scope": OneOf("global", "group", "tensor"),
    "target": OneOf("gradient", "first_moment", "update"),
}


def clip_top_coordinates_(
    parameters: Iterable[Tensor],
    fraction: float,
    scale: float = 1.0,
    scope: str = "global",
    process_group: dist.ProcessGroup | None = None,
    error_if_nonfinite: bool = True,
) -> float:
    """Clip the largest `fraction` of the coordinates of all gradients together, in place; for loops of one's own.

    With q = fraction and n coordinates, tau is the (int(n q) + 1)-th largest |g_i|, so that int(n q) coordinates lie
    above it (ties aside), and g_i <- sign(g_i) min(|g_i|, scale tau).

    Args:
        parameters: parameters; those without gradient are left out.
        fraction: q in [0, 1); 0 changes nothing. The authors use 0.1 for SGD and 0.5 for Adam.
        scale: > 0, default 1.
        scope: `global` (default, the paper's): one tau for all tensors. `tensor`: one for each.
        process_group: where gradients are sharded (FSDP2), the group over which coordinates are counted together.
        error_if_nonfinite: raise for a gradient that is not finite. Default True; with False such gradients
            are left as they are, and tau is NaN.

    Returns:
        scale * tau, of the last tensor for `tensor`. A warning says when it is 0, so that the step vanishes.

    Raises:
        ValueError: an argument outside its range; no gradient at all; sharded gradients without process group.
        FloatingPointError: a gradient that is not finite.

    >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
    >>> weight.grad = torch.tensor([[3.0, -1.0], [0.5, -7.0]])
    >>> clip_top_coordinates_([weight], fraction=0.5)
    1.0
    >>> weight.grad
    tensor([[ 1.0000, -1.0000],
            [ 0.5000, -1.0000]])
    """
    check_arguments({**_RANGES, "scope": OneOf("global", "tensor")}, fraction=fraction, scale=scale, scope=scope)
    group = {"params": [p for p in parameters if p.grad is not None]}
    if not group["params"]:
        raise ValueError("parameters must have gradients, got none")
    ready = dense_gradients("clip_top_coordinates_", [group])
    parts = _parts([[g for p in ready[0] if (g := p.grad) is not None]], scope)
    try:
        taus = _thresholds(
            parts,
            fraction,
            scale,
            process_group,
            lambda: require_finite_gradients("clip_top_coordinates_", [group], ready),
        )
    except FloatingPointError:
        if error_if_nonfinite:
            raise
        return float("nan")
    if fraction > 0 or scale < 1:
        for part, tau in zip(parts, taus, strict=True):
            clamp_magnitude_(local(part), tau)
    return min(taus)


class CoordinateClip(OptimizerWrapper):
    """An optimizer whose gradients, first moments or updates are clipped coordinate by coordinate.

    Before each step, over all n coordinates of the scope, with q = fraction::

        tau = scale * the (int(n q) + 1)-th largest |u_i|
        u_i <- sign(u_i) min(|u_i|, tau)

    where u is what `target` names:

    - `gradient`: the gradient, in place in `p.grad`, as `torch.nn.utils.clip_grad_norm_` does. For any optimizer.
    - `first_moment`: what enters the first moment of `torch.optim.Adam` or `AdamW`; the second moment sees the gradient
      as it is, and `p.grad` stays. tau is of the gradient with the coupled decay of Adam, if there is one.
    - `update`: the change of the parameters that the wrapped step makes, weight decay included. For any optimizer; a
      copy of the parameters is held during the step.

    With momentum or Adam the clipped gradient is what they average. Clip before, or in place of, clipping by norm. With
    a GradScaler, unscale first if the wrapped optimizer needs it: clipping itself does not depend on the scale.

    Cost: one pass that selects tau and one that clips. `first_moment`, and `gradient` around Adam or AdamW with float32
    parameters on the CPU (not with `foreach=True` or `fused=False`), clip inside the step's own pass. No state.

    Args:
        optimizer: the optimizer to wrap.
        fraction: q in [0, 1). Default 0.1, the authors' for SGD; they use 0.5 for Adam, Adafactor and Lion.
        target: `gradient` (default), `first_moment` or `update`.
        scale: factor on tau, > 0. Default 1.
        scope: `global` (default, the paper's): one tau for all parameters; `group`: one for each parameter group;
            `tensor`: one for each tensor.
        process_group: where parameters are sharded (FSDP2), the group over which coordinates are counted together;
            every rank of it must step. Default None.

    Raises:
        ValueError: an argument outside its range; `first_moment` with another optimizer, or with `amsgrad`,
            `capturable` or `differentiable`; sharded gradients without `process_group`, at the step.
        RuntimeError: sparse gradients.
        FloatingPointError: a gradient that is not finite; nothing is changed.

    Source: Pan and Li, arXiv 2306.00204, and the authors' code (panyan7/adam-vs-sgd at d85d3a1), with which
    `gradient` around SGD and `first_moment` around Adam agree; there a parameter group is the scope, and clipping
    happens only with foreach=True. `fraction` 1, the zero gradient there, is refused.

    >>> weight = torch.nn.Parameter(torch.zeros(4))
    >>> optimizer = CoordinateClip(torch.optim.SGD([weight], lr=1.0), fraction=0.25)
    >>> weight.grad = torch.tensor([100.0, -2.0, 1.0, 0.0])
    >>> optimizer.step(); weight.tolist()
    [-2.0, 2.0, -1.0, 0.0]
    """

    constraints: ClassVar[Mapping[str, Constraint]] = _RANGES

    def __init__(
        self,
        optimizer: Optimizer,
        fraction: float = 0.1,
        target: str = "gradient",
        *,
        scale: float = 1.0,
        scope: str = "global",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_arguments(self.constraints, fraction=fraction, target=target, scale=scale, scope=scope)
        super().__init__(optimizer)
        self.fraction = fraction
        self.target = target
        self.scale = scale
        self.scope = scope
        self.process_group = process_group
        if target == "first_moment":
            self._require_adam()

    def _require_adam(self) -> None:
        reason = why_not_adam(self.optimizer)
        if reason:
            raise ValueError(f"target must be 'gradient' or 'update' {reason}, got 'first_moment'")

    def wrapped_step(self) -> None:
        """Clip, and step."""
        ready = dense_gradients("CoordinateClip", self.param_groups)
        grads = [[g for p in group if (g := p.grad) is not None] for group in ready]
        if self.target == "first_moment":
            self._require_adam()
            self._adam_step(ready, grads)
        elif self.target == "gradient":
            self._clipped_step(ready, grads)
        else:
            require_finite_gradients("CoordinateClip", self.param_groups, ready)
            before = [[p.detach().clone() for p in group] for group in ready]
            self.optimizer.step()
            updates = [
                list(torch._foreach_sub(group, old)) if group else [] for group, old in zip(ready, before, strict=True)
            ]
            for part, tau in zip(*self._thresholds(updates, ready, updates, "update"), strict=True):
                clamp_magnitude_(local(part), tau)
            for group, old, update in zip(ready, before, updates, strict=True):
                if group:
                    torch._foreach_copy_(group, torch._foreach_add(old, update))

    def _thresholds(
        self, tensors: list[list[Tensor]], ready: list[list[Any]], values: list[list[Tensor]], what: str = "gradient"
    ) -> tuple[list[list[Tensor]], list[float]]:
        """The lists of `tensors` that share a threshold, and their thresholds, once `values` are known to be finite."""
        parts = _parts(tensors, self.scope)
        return parts, _thresholds(
            parts,
            self.fraction,
            self.scale,
            self.process_group,
            lambda: require_finite("CoordinateClip", self.param_groups, ready, values, what),
        )

    def _clipped_step(self, ready: list[list[Any]], grads: list[list[Tensor]]) -> None:
        """The wrapped optimizer's step after clipping, or with clipping in it."""
        parts, taus = self._thresholds(grads, ready, grads)
        clips = self.fraction > 0 or self.scale < 1
        if clips and kernel_takes_step(self.optimizer, (p for group in ready for p in group)):
            bounds = {id(g): tau for part, tau in zip(parts, taus, strict=True) for g in part}
            for group, ps, gs in zip(self.param_groups, ready, grads, strict=True):
                inner_adam_step(
                    self.optimizer,
                    group,
                    ps,
                    gs,
                    l2=0.0 if group["decoupled_weight_decay"] else group["weight_decay"],
                    bounds=[bounds[id(g)] for g in gs],
                    maximize=group["maximize"],
                )
            return
        if clips:
            for part, tau in zip(parts, taus, strict=True):
                clamp_magnitude_(local(part), tau)
        self.optimizer.step()

    def _adam_step(self, ready: list[list[Any]], grads: list[list[Tensor]]) -> None:
        """The step of torch.optim.Adam and AdamW, on their own state, with a clipped numerator."""
        signed = []
        for group, gs, ps in zip(self.param_groups, grads, ready, strict=True):
            gs = list(torch._foreach_neg(gs)) if group["maximize"] and gs else gs
            if group["weight_decay"] and not group["decoupled_weight_decay"] and gs:
                gs = list(torch._foreach_add(gs, ps, alpha=group["weight_decay"]))
            signed.append(gs)
        parts, bounds = self._thresholds(signed, ready, grads)
        taus = {id(g): tau for part, tau in zip(parts, bounds, strict=True) for g in part}
        for group, ps, gs in zip(self.param_groups, ready, signed, strict=True):
            batches: dict[float, list[int]] = {}
            for index, g in enumerate(gs):
                batches.setdefault(taus[id(g)], []).append(index)
            for tau, indices in batches.items():
                inner_adam_step(self.optimizer, group, [ps[i] for i in indices], [gs[i] for i in indices], clip=tau)


def _parts(grads: Sequence[list[Tensor]], scope: str) -> list[list[Tensor]]:
    """The lists of tensors that share a threshold."""
    if scope == "tensor":
        return [[g] for group in grads for g in group]
    if scope == "group":
        return [group for group in grads if group]
    together = [g for group in grads for g in group]
    return [together] if together else []


def _thresholds(
    parts: list[list[Tensor]],
    fraction: float,
    scale: float,
    process_group: dist.ProcessGroup | None,
    require_finite: Callable[[], None],
) -> list[float]:
    """Scale * tau of each part. `require_finite` raises where one is not finite, which selecting tau finds by the way.

    Over ranks it comes first: a rank that raises between two all-reduces would leave the others waiting.
    """
    if process_group is not None:
        require_finite()
        taus = [scale * magnitude_quantile(part, fraction, process_group) for part in parts]
    else:
        if any(p.is_shard() for part in parts for t in part for p in getattr(t, "placements", ())):
            raise ValueError(
                "process_group must be given for sharded gradients, whose coordinates count together, got None"
            )
        found = [quantile_and_largest(part, fraction) for part in parts]
        if not all(math.isfinite(largest) for _, largest in found):
            require_finite()
        taus = [scale * tau for tau, _ in found]
    if 0 in taus:
        warnings.warn(
            f"coordinate clipping: at least the fraction {1 - fraction:g} of the coordinates are zero, "
            "so the threshold is zero and so is the step",
            stacklevel=4,
        )
    return taus


def directional_sharpness(
    loss_fn: Callable[[], Tensor], params: Iterable[Tensor], direction: Sequence[Tensor]
) -> float:
    """v^T H v with v = direction / |direction| and H the Hessian of `loss_fn()` with respect to `params`.

    Args:
        loss_fn: evaluates the loss at the present parameters; differentiable twice.
        params: parameters.
        direction: a tensor per parameter, of its shape; not all zero.

    Raises:
        ValueError: shapes that differ; a zero direction.
        RuntimeError: a loss without graph.

    Source: arXiv 2306.00204.

    >>> x = torch.nn.Parameter(torch.ones(2))
    >>> h = torch.tensor([3.0, 1.0])
    >>> directional_sharpness(lambda: (h * x.square()).sum() / 2, [x], [torch.tensor([2.0, 0.0])])
    3.0
    """
    params, direction = list(params), [d.detach() for d in direction]
    if [p.shape for p in params] != [d.shape for d in direction]:
        raise ValueError(
            f"direction must have the parameters' shapes {[tuple(p.shape) for p in params]}, "
            f"got {[tuple(d.shape) for d in direction]}"
        )
    squared = sum(float(d.double().square().sum()) for d in direction)
    if squared == 0:
        raise ValueError("direction must not be zero")
    with torch.enable_grad():
        grads = torch.autograd.grad(loss_fn(), params, create_graph=True)
        products = hvp(grads, params, direction)
    return sum(float((d.double() * h.double()).sum()) for d, h in zip(direction, products, strict=True)) / squared


def compare_directions(
    model: nn.Module, loss_fn: Callable[[nn.Module], Tensor], optimizers: Mapping[str, Optimizer]
) -> dict[str, dict[str, float]]:
    """Sharpness and best local loss reduction of the step that each optimizer would take from where the model is.

    Each optimizer, built on the model's parameters, takes one step in trial (a pseudo-update): its state advances, the
    parameters are put back. Called along one trajectory this compares all directions on the same states.

    For the direction -u of a step with gradient g: sharpness s = u^T H u / |u|^2, and the reduction
    (g.u)^2 / (2 u^T H u) of the quadratic model at its best step length (infinite where u^T H u <= 0 and g.u > 0,
    and 0 where g.u <= 0).

    Args:
        model: the model, in the mode in which it is to be differentiated.
        loss_fn: loss of the model on a fixed batch.
        optimizers: by name.

    Returns:
        For each name `sharpness`, `reduction` and `cosine`, that of u with the gradient.

    Source: arXiv 2306.00204.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> table = compare_directions(
    ...     model, lambda m: m.weight.square().sum(), {"sgd": torch.optim.SGD(model.parameters(), lr=0.1)}
    ... )
    >>> round(table["sgd"]["sharpness"], 5), round(table["sgd"]["cosine"], 5)
    (2.0, 1.0)
    """
    params = [p for p in model.parameters() if p.requires_grad]
    kept = [p.grad for p in params]
    with torch.enable_grad():
        grads = [g.detach() for g in torch.autograd.grad(loss_fn(model), params)]
    table = {}
    try:
        for name, optimizer in optimizers.items():
            before = [p.detach().clone() for p in params]
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
            with torch.no_grad():
                u = [old - p for old, p in zip(before, params, strict=True)]
                for p, old in zip(params, before, strict=True):
                    p.copy_(old)
            along = sum(float((g.double() * d.double()).sum()) for g, d in zip(grads, u, strict=True))
            u_norm, g_norm = (sum(float(t.double().square().sum()) for t in ts) ** 0.5 for ts in (u, grads))
            sharpness = directional_sharpness(lambda: loss_fn(model), params, u)
            curvature = sharpness * u_norm**2
            reduction = 0.0 if along <= 0 else float("inf") if curvature <= 0 else along**2 / (2 * curvature)
            table[name] = {"sharpness": sharpness, "reduction": reduction, "cosine": along / (u_norm * g_norm)}
    finally:
        for p, gradient in zip(params, kept, strict=True):
            p.grad = gradient
    return table
