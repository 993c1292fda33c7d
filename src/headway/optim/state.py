"""An optimizer's state: restored in the precision in which it was saved, and counted in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from headway.optim.checks import local

__all__ = ["ExactStateOptimizer", "restore_state", "state_bytes"]


def restore_state(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Put back what `Optimizer.load_state_dict` has cast to the parameters' dtype; to be called right after it.

    Moments of 16-bit parameters stay float32, codes stay whole numbers, everything gets the parameter's device.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1)
    >>> saved = {**optimizer.state_dict(), "state": {0: {"codes": torch.tensor([3], dtype=torch.uint8)}}}
    >>> optimizer.load_state_dict(saved); optimizer.state[weight]["codes"].dtype
    torch.bfloat16
    >>> restore_state(optimizer, saved); optimizer.state[weight]["codes"].dtype
    torch.uint8
    """
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in zip(saved, parameters, strict=True):
        if index in state_dict["state"]:
            optimizer.state[parameter] = {
                name: value.to(device=parameter.device, copy=True) if isinstance(value, Tensor) else value
                for name, value in state_dict["state"][index].items()
            }


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in an optimizer's state; of distributed tensors, those of this rank's parts.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    >>> weight.grad = torch.ones(3)
    >>> optimizer.step(); state_bytes(optimizer)
    12
    """
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in local(tensors))


class ExactStateOptimizer(Optimizer):
    """Base of optimizers whose state survives `state_dict()` bit for bit, whatever the parameters' dtype."""

    def state_bytes(self) -> int:
        """Bytes of all state tensors, of this rank's parts where parameters are sharded."""
        return state_bytes(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but the state keeps the dtypes in which it was saved."""
        super().load_state_dict(state_dict)
        restore_state(self, state_dict)
