"""What the optimizers ask of gradients and parameters before they change anything.

A method calls `gradients` at the start of `step`, and `refuse_sharded` in `add_param_group` if
its rule needs whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from headway.kernels.finite import first_nonfinite

__all__ = [
    "dense_gradients",
    "gradients",
    "local",
    "refuse_complex",
    "refuse_sharded",
    "require_finite",
    "require_finite_gradients",
]


def gradients(method: str, param_groups: Sequence[dict[str, Any]]) -> list[list[Tensor]]:
    """The parameters of each group that have a gradient, once all of these gradients are known to be usable.

    The check for NaN and infinities is one pass over the gradients and one number read from the device.

    Args:
        method: the optimizer's name, for messages.
        param_groups: the optimizer's groups.

    Raises:
        RuntimeError: a gradient is sparse, or complex.
        FloatingPointError: a gradient holds a NaN or an infinity.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([1.0, float("nan")])
    >>> gradients("Method", [{"params": [weight]}])
    Traceback (most recent call last):
    ...
    FloatingPointError: Method: the gradient of parameter 0 of group 0, shape (2,), is not finite; nothing was changed
    """
    ready = dense_gradients(method, param_groups)
    require_finite_gradients(method, param_groups, ready)
    return ready


def dense_gradients(method: str, param_groups: Sequence[dict[str, Any]]) -> list[list[Tensor]]:
    """`gradients` without the check for NaN and infinities: for a method whose first pass over them tells."""
    ready = [[p for p in group["params"] if p.grad is not None] for group in param_groups]
    for p in (p for group in ready for p in group):
        if p.grad.layout != torch.strided:
            raise RuntimeError(f"{method} does not support sparse gradients")
        if p.grad.is_complex():
            raise RuntimeError(f"{method} does not support complex gradients")
    return ready


def require_finite_gradients(
    method: str, param_groups: Sequence[dict[str, Any]], params: Sequence[Sequence[Tensor]]
) -> None:
    """`require_finite` of the gradients of `params` (by group)."""
    require_finite(method, param_groups, params, [[g for p in group if (g := p.grad) is not None] for group in params])


def require_finite(
    method: str,
    param_groups: Sequence[dict[str, Any]],
    params: Sequence[Sequence[Tensor]],
    values: Sequence[Sequence[Tensor]],
    what: str = "gradient",
) -> None:
    """Raise `FloatingPointError`, naming the parameter, if one of `values` (by group, as `params`) is not finite."""
    flat = [p for group in params for p in group]
    bad = first_nonfinite(local([value for group in values for value in group]))
    if bad is None:
        return
    culprit = flat[bad]
    for number, group in enumerate(param_groups):
        for index, p in enumerate(group["params"]):
            if p is culprit:
                raise FloatingPointError(
                    f"{method}: the {what} of parameter {index} of group {number}, shape {tuple(p.shape)}, "
                    "is not finite; nothing was changed"
                )


def refuse_sharded(method: str, params: Iterable[Any], reason: str) -> None:
    """Raise `ValueError` if a parameter is sharded over ranks (FSDP2, DTensor): `reason` says why that cannot work."""
    for p in params:
        if any(placement.is_shard() for placement in getattr(p, "placements", ())):
            raise ValueError(f"{method} does not take sharded parameters (FSDP2, DTensor): {reason}")


def refuse_complex(params: Iterable[Tensor]) -> None:
    """Raise `ValueError` if a parameter is complex."""
    if any(p.is_complex() for p in params):
        raise ValueError("params must be real, got a complex tensor")


def local(tensors: Iterable[Any]) -> list[Tensor]:
    """The tensors, or this rank's parts of distributed ones: enough for a rule that works entry by entry."""
    return [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
