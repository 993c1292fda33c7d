"""Plain Adam steps inside a method whose own rule is for other parameters: its biases, norms and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from headway.kernels.adam import adam_
from headway.optim.checks import local

__all__ = ["adam_steps"]


def adam_steps(
    optimizer: Optimizer,
    params: Sequence[Any],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    correct_bias: bool = True,
    early: bool = True,
) -> None:
    """One step for each of `params`, all of which have a gradient; with a_t = 1 - beta1^t and b_t = 1 - beta2^t::

        early:  p = (1 - lr weight_decay) p;  p = p - lr / a_t m / (sqrt(v / b_t) + eps)        torch.optim.AdamW
        else:   p = p - lr sqrt(b_t) / a_t m / (sqrt(v) + eps);  p = (1 - lr weight_decay) p

    Without `correct_bias`, a_t = b_t = 1. State: `step`, and `exp_avg` and `exp_avg_sq` in the layout of the parameter
    (distributed where it is), float32 for 16-bit ones.
    """
    beta1, beta2 = betas
    decay = 1 - lr * weight_decay
    kinds: dict[Any, list[Any]] = {}
    for p in params:
        kinds.setdefault((p.device, p.dtype), []).append(p)
    for members in kinds.values():
        states = [_advanced_state(optimizer, p) for p in members]
        corrections = [
            (1 - beta1 ** state["step"], (1 - beta2 ** state["step"]) ** 0.5) if correct_bias else (1.0, 1.0)
            for state in states
        ]
        adam_(
            local(members),
            local(p.grad for p in members),
            local(state["exp_avg"] for state in states),
            local(state["exp_avg_sq"] for state in states),
            step_sizes=[lr / first if early else lr * root / first for first, root in corrections],
            root_scales=[1 / root if early else 1.0 for _, root in corrections],
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            decay_before=decay if early else 1.0,
            decay_after=1.0 if early else decay,
            maximize=maximize,
        )


def _advanced_state(optimizer: Optimizer, p: Tensor) -> dict[str, Any]:
    state = optimizer.state[p]
    if not state:
        dtype = torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    state["step"] += 1
    return state
