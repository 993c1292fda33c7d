"""diffGrad: Adam whose step is damped, entry by entry, where the gradient does not change.

    p = p - lr * sigmoid(|g_prev - g|) * m_hat / (sqrt(v_hat) + eps)

Source: Dubey et al., "diffGrad: An Optimization Method for Convolutional Neural Networks", arXiv 1909.11015.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.kernels.adam import adam_
from headway.optim.checks import gradients, local, refuse_complex, refuse_sharded
from headway.optim.quantized_state import SHARDED, STATE_BITS, batches, create, read, write
from headway.optim.state import ExactStateOptimizer

__all__ = ["DiffGrad"]


class DiffGrad(ExactStateOptimizer):
    """Adam times a friction coefficient: near 1/2 where the gradient stays the same, towards 1 where it changes fast.

    From m = v = g_prev = 0, step t = 1, 2, ... of a parameter p with gradient g does, entry by entry::

        g      = g + weight_decay p                   unless decoupled, then p = (1 - lr weight_decay) p
        m      = beta1 m + (1 - beta1) g
        v      = beta2 v + (1 - beta2) g^2
        xi     = sigmoid(|g_prev - g|)                in [1/2, 1)
        g_prev = g
        p      = p - lr xi (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Use it in place of Adam where Adam overshoots, and compare with Adam at **lr / 2**: a step is between half of Adam's
    and Adam's, and near an optimum, or for small gradients, it is half of Adam's. xi depends on the scale of the loss,
    which Adam's step does not: unscale gradients before `step` under mixed precision, or xi saturates at 1. With
    gradient accumulation the difference is that of the accumulated gradients. `p.grad` is only read. A parameter
    without a gradient keeps its state.

    Cost per step: Adam's and one more pass over the gradients. State: 3 numbers per entry, in fp32 for 16-bit
    parameters; with `state_bits=8` 6.03 bytes per entry in place of 12. Entry-wise, so 32-bit state works on the
    shards of FSDP2.

    Args:
        params: parameters or parameter groups; every argument below may differ by group.
        lr: learning rate, >= 0. Default 1e-3 (official code; the paper's one-dimensional study has 0.1).
        betas: decay of m and v, each in [0, 1). Default (0.9, 0.999) (official code).
        eps: added to the root, >= 0. Default 1e-8 (official code).
        weight_decay: >= 0, default 0 (official code).
        decoupled: False (default, official code): the decay is part of g, and so of xi. True: as in AdamW.
        state_bits: 32 (default), or 8: m and v of 4096 and more entries are kept as block-wise 8-bit codes
            (`headway.optim.quantized_state`). g_prev is not: a constant gradient would seem to change by its rounding.
        maximize: ascend instead of descend. Default False.
        fused: None (default): the native kernel for the tensors that it takes; True: the kernel or a `RuntimeError`
            with the reason; False: foreach operations.

    Raises:
        ValueError: an argument outside its range, also in a parameter group; complex parameters; sharded ones with
            `state_bits=8`.
        RuntimeError: from `step`, sparse gradients.
        FloatingPointError: from `step`, a gradient that is not finite; nothing was changed.

    Source: arXiv 1909.11015 and the authors' diffGrad_v2.py (shivram1987/diffGrad at 73233ba). Departures: eps is
    added after the bias correction, as torch.optim.Adam does, a relative difference below 1e-7 unless gradients are
    near eps; `p.grad` is not overwritten by the decay; `decoupled` is an addition. The authors' first version, with
    which the paper's results were made, kept g_prev by reference: with gradients that are overwritten in place
    its xi is 1/2 at every step after the first.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = DiffGrad([weight], lr=0.1)
    >>> for _ in range(2):
    ...     weight.grad = torch.tensor([0.0, 100.0])
    ...     optimizer.step()
    >>> weight  # the first step is Adam's, as the gradient came from zero; the second is half of it
    Parameter containing:
    tensor([ 0.0000, -0.1500], requires_grad=True)
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Range(low=0),
        "betas": Range(low=0, high=1, high_open=True, length=2),
        "eps": Range(low=0),
        "weight_decay": Range(low=0),
        "decoupled": OneOf(False, True),
        "state_bits": STATE_BITS,
        "maximize": OneOf(False, True),
        "fused": OneOf(None, False, True),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        *,
        state_bits: int = 32,
        maximize: bool = False,
        fused: bool | None = None,
    ) -> None:
        arguments = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "state_bits": state_bits,
            "maximize": maximize,
            "fused": fused,
        }
        check_arguments(self.constraints, **arguments)
        super().__init__(params, arguments)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; hyper-parameters of the group are checked like the constructor's."""
        group = {**self.defaults, **param_group}
        check_arguments(self.constraints, **{name: group[name] for name in self.constraints})
        super().add_param_group(group)
        try:
            refuse_complex(self.param_groups[-1]["params"])
            if group["state_bits"] == 8:
                refuse_sharded("DiffGrad", self.param_groups[-1]["params"], SHARDED)
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
        for group, ready in zip(self.param_groups, gradients("DiffGrad", self.param_groups), strict=True):
            kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in ready:
                kinds.setdefault((p.device, p.dtype), []).append(p)
            for kind in kinds.values():
                for batch in batches(kind, group["state_bits"]):
                    self._advance(group, batch)
        return loss

    def _advance(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """The step for parameters of one device and dtype."""
        beta1, beta2 = group["betas"]
        lr, decay, decoupled = group["lr"], group["weight_decay"], group["decoupled"]
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                wide = torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype
                state["step"] = 0
                create(state, "exp_avg", p, group["state_bits"])
                create(state, "exp_avg_sq", p, group["state_bits"], signed=False)
                state["previous_grad"] = torch.zeros_like(p, dtype=wide, memory_format=torch.preserve_format)
            state["step"] += 1
        means = [read(state, "exp_avg", like=p) for state, p in zip(states, params, strict=True)]
        squares = [read(state, "exp_avg_sq", signed=False, like=p) for state, p in zip(states, params, strict=True)]
        adam_(
            local(params),
            local(p.grad for p in params),
            local(means),
            local(squares),
            step_sizes=[lr / (1 - beta1 ** state["step"]) for state in states],
            root_scales=[(1 - beta2 ** state["step"]) ** -0.5 for state in states],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            decay_before=1 - lr * decay if decoupled else 1.0,
            l2=0.0 if decoupled else decay,
            previous_grads=local(state["previous_grad"] for state in states),
            maximize=group["maximize"],
            native=group["fused"],
        )
        for state, mean, square in zip(states, means, squares, strict=True):
            write(state, "exp_avg", mean)
            write(state, "exp_avg_sq", square, signed=False)
