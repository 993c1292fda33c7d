"""torch.optim.Adam and AdamW in the native kernel: for wrappers whose change of the gradient fits into its pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from headway.kernels import library
from headway.kernels.adam import adam_
from headway.kernels.project import Projection
from headway.optim.checks import local

__all__ = ["inner_adam_step", "kernel_takes_step", "why_not_adam"]


def why_not_adam(optimizer: Optimizer) -> str:
    """Why `inner_adam_step` cannot stand for the optimizer's step, as `around SGD` or `with amsgrad=True`; or empty."""
    if type(optimizer) not in (Adam, AdamW):
        return f"around {type(optimizer).__name__}"
    for option in ("amsgrad", "capturable", "differentiable"):
        if any(group[option] for group in optimizer.param_groups):
            return f"with {option}=True"
    return ""


def kernel_takes_step(optimizer: Optimizer, params: Iterable[Tensor]) -> bool:
    """Whether the kernel can take the step in the optimizer's place, and nobody is to notice or asked for another way.

    That is a plain Adam or AdamW on float32 parameters on the CPU, without step hooks and without `foreach=True` or
    `fused=False`.
    """
    watched = (
        "step" in vars(optimizer)
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )
    return (
        not watched
        and not why_not_adam(optimizer)
        and not any(group["foreach"] or group["fused"] is False for group in optimizer.param_groups)
        and all(
            library.takes(p) and p.grad is not None and library.takes(p.grad) and library.dense_alike(p, p.grad)
            for p in params
        )
    )


def inner_adam_step(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    params: Sequence[Any],
    grads: Sequence[Any],
    *,
    l2: float = 0.0,
    clip: float | None = None,
    projections: Sequence[Projection] | None = None,
    bounds: Sequence[float] | None = None,
    maximize: bool = False,
) -> None:
    """The optimizer's step for `params` of `group`, on its own state, with these changes of the gradient (`adam_`).

    Coupled decay and ascent are the caller's, by `l2` and `maximize` or in `grads`.
    """
    beta1, beta2 = (float(beta) for beta in group["betas"])
    lr = float(group["lr"])
    states = [_state(optimizer, group, p) for p in params]
    if not states:
        return
    torch._foreach_add_([state["step"] for state in states], 1)
    steps = [float(state["step"]) for state in states]
    adam_(
        local(params),
        local(grads),
        local(state["exp_avg"] for state in states),
        local(state["exp_avg_sq"] for state in states),
        step_sizes=[lr / (1 - beta1**t) for t in steps],
        root_scales=[(1 - beta2**t) ** -0.5 for t in steps],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        decay_before=1 - lr * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0,
        l2=l2,
        clip=clip,
        projections=projections,
        bounds=bounds,
        maximize=maximize,
        native=False if group["foreach"] else None,
    )


def _state(optimizer: Optimizer, group: Mapping[str, Any], p: Tensor) -> dict[str, Any]:
    state = optimizer.state[p]
    if not state:
        on_device = p.device if group["fused"] else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=on_device)
        state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
    return state
