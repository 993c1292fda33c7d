"""AdaGradNorm: gradient descent whose one step size is the inverse root of all squared gradient norms so far.

Source: the optimizer of "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods", Lau, Liu,
Kolar, arXiv 2402.11215; the rule itself is older (Streeter and McMahan; Ward, Wu, Bottou, arXiv 1806.01811).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch import distributed as dist

from headway.constraints import Constraint, Range, check_arguments
from headway.optim.adagrad_accelerated import AdaGradAGD

__all__ = ["AdaGradNorm"]

_PER_GROUP = ("lr", "eps", "weight_decay")


class AdaGradNorm(AdaGradAGD):
    """One scalar accumulator over all parameters, from v_0 = v_init:

        v_{k+1} = v_k + ||g_k||^2
        x_{k+1} = x_k - lr g_k / (sqrt(v_{k+1}) + eps)

    It needs no knowledge of smoothness or noise; the step only shrinks. It is `AdaGradAGD(variant="adagrad",
    mode="norm", initial_accumulator=v_init)` under the paper's name and defaults.

    v is kept in float64 (float32 on MPS) in `param_groups[0]["sum_of_squares"]`, and is all the state there is.
    Under data parallelism g_k is the averaged gradient.

    Args:
        params: parameters, or groups of them, which may set `lr`, `eps` and `weight_decay` but share v.
        lr: > 0. Default 1.0 (the authors' code).
        v_init: v_0 >= 0. Default 1e-2 (the authors' code).
        eps: added to the root, >= 0. Default 1e-10, as in torch.optim.Adagrad.
        weight_decay: >= 0; weight_decay * x_k is added to g_k. Default 0.0.
        process_group: where parameters are sharded (FSDP), the group over which ||g_k||^2 is summed; every rank
            of it must call `step`. Not for replicas as in DDP. Default None.

    Raises:
        ValueError: for a value outside its range, or a group that sets anything else.
        RuntimeError: from `step()`, for a sparse gradient.
        FloatingPointError: from `step()`, for a gradient that is not finite; nothing is changed.

    Source: arXiv 2402.11215. The authors' `adagradnorm.py` departs from it and is not followed: it keeps one
    accumulator per output row of matrices and kernels, one per entry of vectors, and its weight decay pushes
    parameters along the gradient.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    >>> weight.grad = torch.tensor([3.0, -4.0])
    >>> optimizer = AdaGradNorm([weight], v_init=0.0)
    >>> optimizer.step()
    >>> weight.tolist(), float(optimizer.v)
    ([2.4000000953674316, -3.200000047683716], 25.0)
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Range(low=0, low_open=True),
        "v_init": Range(low=0),
        "eps": Range(low=0),
        "weight_decay": Range(low=0),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        v_init: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_arguments(self.constraints, lr=lr, v_init=v_init, eps=eps, weight_decay=weight_decay)
        super().__init__(
            params,
            lr=lr,
            initial_accumulator=v_init,
            eps=eps,
            weight_decay=weight_decay,
            process_group=process_group,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Raises `ValueError` as the constructor does."""
        for name in param_group:
            if name == "v_init" or (name in self.defaults and name not in _PER_GROUP):
                raise ValueError(f"a parameter group may set {', '.join(_PER_GROUP)}, got {name}")
        super().add_param_group(param_group)

    @property
    def v(self) -> float | Tensor:
        """The accumulator: a scalar tensor, or `v_init` before the first step."""
        owner = self.param_groups[0]
        return owner.get("sum_of_squares", owner["initial_accumulator"])
