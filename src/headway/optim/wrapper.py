"""Optimizers around an optimizer: what changes the gradients before another optimizer's step.

The wrapper has no groups and no state of its own. `param_groups`, `state` and `state_dict()` are those of
the wrapped optimizer, so that schedulers, checkpoints and gradient scalers meet what they know, and
a run can be continued with the wrapper or without.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from headway.catalogue import get
from headway.config.methods import build_optimizer
from headway.config.schema import MethodSection

__all__ = ["OptimizerWrapper"]


class OptimizerWrapper(Optimizer):
    """Base of wrappers: a subclass says in `before_step` what happens to the gradients, or overrides `wrapped_step`.

    Args:
        optimizer: any optimizer that is driven by `backward()` and `step()`.

    Raises:
        TypeError: `optimizer` is not an optimizer.
        ValueError: `optimizer` differentiates or evaluates the loss itself, so that there is no gradient to change.

    >>> class Halved(OptimizerWrapper):
    ...     def before_step(self):
    ...         for p in self.parameters():
    ...             p.grad.div_(2)
    >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = Halved(torch.optim.SGD([weight], lr=1.0))
    >>> weight.grad = torch.tensor([1.0])
    >>> optimizer.step(); weight.item()
    0.5
    """

    inner_default: ClassVar[str] = "adamw"
    # Fused optimizers undo a GradScaler's scale themselves, once it has set it on them. It would set it on the wrapper,
    # where they do not look.
    _step_supports_amp_scaling: ClassVar[bool] = False

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        protocol = getattr(optimizer, "step_protocol", "gradients")
        if protocol != "gradients" or isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                f"optimizer must step from gradients that are there, got {type(optimizer).__name__}, "
                "which evaluates or differentiates the loss itself"
            )
        # Not Optimizer.__init__, which would build groups of its own; __setstate__ sets up the hooks of a step.
        self.__setstate__({"optimizer": optimizer})

    @classmethod
    def from_parameters(cls, params: Iterable[Any], *, inner: str | type[Optimizer] = "sgd", **options: Any) -> Any:
        """The wrapper around a new optimizer: `inner` is a slug of the catalogue or a class; options go to both."""
        inner_class = get(inner, "optimizer").load() if isinstance(inner, str) else inner
        own = {name: options.pop(name) for name in list(options) if name in _own_arguments(cls)}
        return cls(inner_class(params, **options), **own)

    @classmethod
    def for_model(cls, model: nn.Module, *, inner: str = "adamw", **options: Any) -> Any:
        """The same for a model's parameters, grouped as the inner optimizer wants them; what `headway train` builds.

        Args:
            model: any module.
            inner: slug of the optimizer to wrap (`headway methods --role optimizer`). Default `adamw`.
            **options: arguments of the wrapper and of the inner optimizer.
        """
        own = {name: options.pop(name) for name in list(options) if name in _own_arguments(cls)}
        return cls(build_optimizer(MethodSection.model_validate({"name": inner, **options}), model), **own)

    def before_step(self) -> None:
        """Change the gradients in `p.grad`."""
        raise NotImplementedError

    def wrapped_step(self) -> None:
        """`before_step`, and the wrapped optimizer's step."""
        self.before_step()
        self.optimizer.step()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` re-evaluates the model, once, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.wrapped_step()
        return loss

    def parameters(self) -> list[Any]:
        """The parameters that have a gradient."""
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of the wrapped optimizer."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """That of the wrapped optimizer."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Those of the wrapped optimizer."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """That of the wrapped optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in the wrapped optimizer."""
        self.optimizer.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        """What the wrapper lacks, as `train()` and `eval()` of averaging methods, is the wrapped optimizer's."""
        if name.startswith("__") or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        hooks = ("_optimizer_", "_warned_")
        return {name: value for name, value in self.__dict__.items() if name != "step" and not name.startswith(hooks)}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optimizer!r})"


def _own_arguments(cls: type) -> set[str]:
    return set(inspect.signature(cls).parameters) - {"optimizer"}
