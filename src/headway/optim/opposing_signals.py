"""SplitSGD: SGD where the momentum is small, a step of fixed size where it is large.

    p = p - lr m_hat          where |m_hat| <= r
    p = p - sign_lr sign(m_hat)    elsewhere

Source: Rosenfeld and Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network
Optimization", ICLR 2024, arXiv 2311.04163. `headway.optim.opposing_pairs` finds the outlier groups themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.optim import Optimizer

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.optim.checks import gradients, local, refuse_complex, refuse_sharded
from headway.optim.opposing_pairs import OpposingSignals, Pair
from headway.optim.quantile import magnitude_quantile
from headway.optim.state import restore_state

__all__ = ["OpposingSignals", "Pair", "SplitSGD"]


class SplitSGD(Optimizer):
    """SGD with momentum for ordinary coordinates and sign steps for the few whose momentum is large.

    Small groups of outliers with opposing signals give a few coordinates large gradients that cancel most of the time.
    SGD has to be slow enough for those; here they move by a fixed size, and lr can suit the rest. From m = 0,
    step t = 1, 2, ... of a parameter p with gradient g does, entry by entry::

        g     = g + weight_decay p
        m     = momentum m + (1 - dampening) g
        m_hat = m / (1 - dampening^t)
        r     = threshold, or the largest number with at most int(quantile n) of all n |m_hat| above it
        p     = p - lr m_hat                          where |m_hat| <= r
        p     = p - sign_lr (lr / lr_0) sign(m_hat)   elsewhere

    lr_0 is the `lr` that the group was made with, so that a scheduler, which acts on `lr`, scales both steps. With
    `quantile`, r is recomputed at every step over the entries of all groups that have the same quantile. With
    `threshold`, gradients that shrink in training leave ever fewer entries above it: `sign_fraction()` tells how many.
    The division is exact only for dampening = momentum, where m_hat is a weighted mean of the gradients;
    other values are allowed, as in torch.optim.SGD.

    Cost per step: about twelve passes over the parameters, and with `quantile` an exact selection, which reads one
    number from the device. State: one number per entry, in fp32 for 16-bit parameters. The same on all DDP ranks. On
    the shards of FSDP2 `threshold` works as it is, and `quantile` with the `process_group` of the shards.

    Args:
        params: parameters or parameter groups; all arguments below but `process_group` may differ by group.
        lr: step on the entries whose momentum is small, > 0. Default 1.0, of the order of SGD's largest stable one.
        sign_lr: step on all others, >= 0. Default 1e-3, a usual lr for Adam, whose steps have the same size.
        momentum: in [0, 1). Default 0.9 (the paper's, from memory).
        dampening: in [0, 1). Default 0.9, so that m_hat has the scale of a gradient.
        threshold: r, >= 0, the paper's form. Default None.
        quantile: fraction of entries that take the sign step, in (0, 1). Default 0.1. One of `threshold` and
            `quantile` must be None.
        weight_decay: L2 penalty, coupled as in torch.optim.SGD, >= 0. Default 0.
        maximize: ascend instead of descend. Default False.
        process_group: where parameters are sharded, the ranks that hold the shards; all of them must call `step`.
            Default None.

    Raises:
        ValueError: an argument outside its range, also in a group; `threshold` and `quantile` both given or both None;
            sharded parameters with `quantile` and no `process_group`; complex parameters.
        RuntimeError: from `step`, sparse gradients.
        FloatingPointError: from `step`, a gradient that is not finite; nothing was changed.

    Source: arXiv 2311.04163, appendix. There is no official code, and the pseudocode is rendered from memory.
    `quantile`, the scaling of `sign_lr` by schedulers and weight decay are additions.

    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> optimizer = SplitSGD([weight], lr=1.0, sign_lr=0.01, threshold=0.5, quantile=None)
    >>> weight.grad = torch.tensor([0.1, -0.5, 8.0])
    >>> optimizer.step()
    >>> weight
    Parameter containing:
    tensor([-0.1000,  0.5000, -0.0100], requires_grad=True)
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Range(low=0, low_open=True),
        "sign_lr": Range(low=0),
        "momentum": Range(low=0, high=1, high_open=True),
        "dampening": Range(low=0, high=1, high_open=True),
        "threshold": Range(low=0, optional=True),
        "quantile": Range(low=0, high=1, low_open=True, high_open=True, optional=True),
        "weight_decay": Range(low=0),
        "maximize": OneOf(False, True),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        sign_lr: float = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.9,
        threshold: float | None = None,
        quantile: float | None = 0.1,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        arguments = {
            "lr": lr,
            "sign_lr": sign_lr,
            "momentum": momentum,
            "dampening": dampening,
            "threshold": threshold,
            "quantile": quantile,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        check_arguments(self.constraints, **arguments)
        self.process_group = process_group
        super().__init__(params, arguments)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group is checked like the constructor's arguments."""
        group = {**self.defaults, **param_group}
        check_arguments(self.constraints, **{name: group[name] for name in self.constraints})
        if (group["threshold"] is None) == (group["quantile"] is None):
            raise ValueError(
                "one of threshold and quantile must be None, "
                f"got threshold={group['threshold']!r} and quantile={group['quantile']!r}"
            )
        super().add_param_group({**group, "lr_0": group["lr"]})
        added = self.param_groups[-1]
        try:
            refuse_complex(added["params"])
            if added["quantile"] is not None and self.process_group is None:
                reason = "the quantile is over all entries of all ranks; give process_group, or a threshold instead"
                refuse_sharded("SplitSGD", added["params"], reason)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. `closure` re-evaluates the model; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = gradients("SplitSGD", self.param_groups)
        momenta = [self._momenta(group, params) for group, params in zip(self.param_groups, ready, strict=True)]
        bounds = self._bounds(momenta)
        for group, params, debiased in zip(self.param_groups, ready, momenta, strict=True):
            if params:
                _split_step(group, local(params), local(debiased), bounds[_rule(group)])
        return loss

    def sign_fraction(self) -> float:
        """The fraction of entries (this rank's, if sharded) whose |m_hat| is above r; NaN before the first step."""
        with_state = [[p for p in group["params"] if p in self.state] for group in self.param_groups]
        momenta = [self._debiased(group, params) for group, params in zip(self.param_groups, with_state, strict=True)]
        bounds = self._bounds(momenta)
        count = above = 0
        for group, debiased in zip(self.param_groups, momenta, strict=True):
            for m_hat in local(debiased):
                count += m_hat.numel()
                above += int((m_hat.abs() > bounds[_rule(group)]).sum())
        return above / count if count else float("nan")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the momentum of 16-bit parameters stays in fp32."""
        super().load_state_dict(state_dict)
        restore_state(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "process_group": self.process_group}

    def _momenta(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """Advance m; return m_hat in new memory."""
        if not params:
            return []
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["momentum_buffer"] = torch.zeros_like(p, dtype=_compute_dtype(p), requires_grad=False)
            state["step"] += 1
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grads = [p.grad.to(m.dtype) for p, m in zip(params, buffers, strict=True)]  # type: ignore[union-attr]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        if group["weight_decay"]:
            points = [p.to(m.dtype) for p, m in zip(params, buffers, strict=True)]
            grads = list(torch._foreach_add(grads, points, alpha=group["weight_decay"]))
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads, alpha=1 - group["dampening"])
        return self._debiased(group, params)

    def _debiased(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        if not params:
            return []
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        return list(torch._foreach_div(buffers, [1 - group["dampening"] ** self.state[p]["step"] for p in params]))

    def _bounds(self, momenta: list[list[Tensor]]) -> dict[tuple[float | None, float | None], float]:
        """What r is for every pair (threshold, quantile) among the groups."""
        bounds: dict[tuple[float | None, float | None], float] = {}
        for rule in dict.fromkeys(_rule(group) for group in self.param_groups):
            threshold, quantile = rule
            groups = zip(self.param_groups, momenta, strict=True)
            pool = [m_hat for group, debiased in groups if _rule(group) == rule for m_hat in debiased]
            if threshold is not None:
                bounds[rule] = threshold
            elif quantile is not None and any(m_hat.numel() for m_hat in pool):
                bounds[rule] = magnitude_quantile(pool, quantile, self.process_group)
            else:
                bounds[rule] = 0.0  # nothing to split
        return bounds


def _rule(group: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return group["threshold"], group["quantile"]


def _compute_dtype(p: Tensor) -> torch.dtype:
    return torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype


def _split_step(group: Mapping[str, Any], params: list[Tensor], m_hat: list[Tensor], bound: float) -> None:
    """The last two lines of the rule; overwrites `m_hat`."""
    # 1.0 where |m_hat| > bound and 0.0 elsewhere: there are no foreach comparisons.
    large = torch._foreach_abs(m_hat)
    torch._foreach_sub_(large, bound)
    torch._foreach_clamp_min_(large, 0)
    torch._foreach_sign_(large)
    signs = torch._foreach_sign(m_hat)
    torch._foreach_mul_(signs, large)
    torch._foreach_sub_(large, 1)
    torch._foreach_mul_(m_hat, large)  # -m_hat where it is small, 0 elsewhere
    points = [p.to(m.dtype) for p, m in zip(params, m_hat, strict=True)]
    torch._foreach_add_(points, m_hat, alpha=group["lr"])
    torch._foreach_add_(points, signs, alpha=-group["sign_lr"] * (group["lr"] / group["lr_0"]))
    if any(point is not p for point, p in zip(points, params, strict=True)):
        torch._foreach_copy_(params, points)
