"""Checks a method's section against the constructor that it names, by really constructing it.

The signature tells which keys exist and of which type they are; building the method on a toy
parameter runs the constructor's own checks, so that nothing wrong survives until training starts.
"""

from __future__ import annotations

import inspect
import typing
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headway.catalogue import ROLES, get, nearest
from headway.constraints import Constraint, Range

if TYPE_CHECKING:
    import torch

    from headway.config.schema import BatchSection, MethodSection

__all__ = [
    "MethodError",
    "build_batch_schedule",
    "build_optimizer",
    "build_schedule",
    "check_batch",
    "check_method",
    "not_trained",
]

# Arguments that the training loop supplies, or that a file cannot express.
_RESERVED = {"self", "params", "param_groups", "model", "optimizer", "total_steps", "last_epoch", "generator"} | {
    "process_group",
    "named_parameters",
    "initial",
    "max_micro_batch",
    "world_size",
    "multiple_of",
}

# torch's own optimizers state no constraints and name no argument in their messages.
_COMMON: dict[str, Constraint] = {
    "lr": Range(low=0, low_open=True),
    "betas": Range(low=0, high=1, high_open=True, length=2),
    "eps": Range(low=0),
    "weight_decay": Range(low=0),
    "momentum": Range(low=0),
    "dampening": Range(),
    "lr_decay": Range(low=0),
    "initial_accumulator_value": Range(low=0),
}


# Ways to drive an optimizer that the training loop does not have.
_PROTOCOLS = {
    "loss": "evaluates the loss itself, several times a step",
    "margins": "steps from the margins of a linear classifier",
    "outputs": "asks for the gradient with respect to the model's outputs",
}


class MethodError(ValueError):
    """A method's section that its constructor does not accept."""


def not_trained(role: str, cls: Any) -> str:
    """What keeps `headway train` from driving a class, as a phrase; empty if nothing does."""
    return _PROTOCOLS.get(getattr(cls, "step_protocol", "gradients"), "") if role == "optimizer" else ""


def check_method(role: str, section: MethodSection, total_steps: int = 1) -> None:
    """Raise `MethodError` unless the section's method exists and accepts the section's options."""
    where = ROLES[role].section
    try:
        cls = get(section.name, role).load()
    except KeyError as error:
        raise MethodError(f"{where}.name: {error.args[0]}") from error
    except ImportError as error:
        raise MethodError(f"{where}.name: {error}") from error
    reason = not_trained(role, cls)
    if reason:
        raise MethodError(
            f"{where}.name: '{section.name}' {reason}, which `headway train` does not do: "
            f"use {cls.__name__} in a loop of your own (`headway methods show {section.name}`)"
        )
    hints = _parameters(cls)
    if _wraps(cls):  # its section also holds the options of the optimizer that it wraps
        inner = section.options.get("inner", inspect.signature(cls.for_model).parameters["inner"].default)
        try:
            wrapped = get(inner, role).load()
        except (KeyError, ImportError) as error:
            raise MethodError(f"{where}.inner: {error.args[0]}") from error
        if getattr(wrapped, "step_protocol", "gradients") != "gradients" or _wraps(wrapped):
            raise MethodError(f"{where}.inner must be an optimizer that steps from gradients, got {inner!r}")
        hints = {**_parameters(wrapped), **hints}
        constraints = {**getattr(wrapped, "constraints", _COMMON), **getattr(cls, "constraints", {})}
        constraints.pop("inner", None)  # the wrapper's own is a slug
    else:
        constraints = getattr(cls, "constraints", _COMMON)
    for key, value in section.options.items():
        if key not in hints:
            raise MethodError(f"unknown key '{where}.{key}' for {section.name}{nearest(key, hints)}")
        constraint = constraints.get(key)
        if constraint is not None and not constraint.accepts(_value(value)):
            raise MethodError(f"{where}.{key} must be {constraint.describe()}, got {value!r}")
        if not _fits(value, hints[key]):
            raise MethodError(f"{where}.{key} must be {_name(hints[key])}, got {value!r}")

    for key, parameter in inspect.signature(getattr(cls, "for_model", cls)).parameters.items():
        given = {*section.options, *_RESERVED, "checkpoints"}  # the last one stands for the run's length
        if parameter.default is parameter.empty and key not in given and parameter.kind != parameter.VAR_KEYWORD:
            raise MethodError(f"{where}.{key} must be given for {section.name}")

    import torch

    toy = torch.nn.Linear(1024, 1024)  # large enough for a rank
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about the toy says nothing about the model
            _construct(role, section, toy, total_steps)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise MethodError(f"{where} '{section.name}': {error}") from error


def check_batch(section: BatchSection, workers: int) -> None:
    """Raise `MethodError` unless the batch schedule of `[batch]` suits this many workers and the micro-batch."""
    unit = (section.micro_batch or section.size // workers) * workers
    try:
        schedule = build_batch_schedule(section, size=section.size, workers=workers, unit=unit)
    except (ValueError, TypeError) as error:
        text = str(error).replace("multiple_of =", "launch.workers x micro-batch =").replace("initial", "batch.size")
        raise MethodError(f"batch '{section.name}': {text}") from error
    if schedule.needs == "samples":
        raise MethodError(
            f"batch '{section.name}': these settings need the gradient of every sample; `headway train` has those of "
            "micro-batches, for which batch.test must be 'norm'"
        )
    if schedule.needs == "chunks" and section.size < 2 * (unit // workers):
        raise MethodError(
            f"batch '{section.name}' compares micro-batches: batch.micro_batch must be at most half of batch.size "
            f"({section.size}), got {section.micro_batch or 'the whole share of a worker (0)'}"
        )


def _construct(role: str, section: MethodSection, toy: torch.nn.Module, total_steps: int) -> None:
    import torch

    if role == "optimizer":
        build_optimizer(section, toy)
    elif role == "batch schedule":
        return  # needs the number of workers: check_batch
    else:
        build_schedule(section, torch.optim.SGD(toy.parameters(), lr=1.0), total_steps)


def build_optimizer(section: MethodSection, model: Any) -> Any:
    """The optimizer of a section for a model.

    A class with a `for_model` constructor groups the parameters itself; for all others matrices get
    the section's weight decay, and vectors and scalars (norms, biases) none.
    """
    cls = get(section.name, "optimizer").load()
    options = {key: _value(value) for key, value in section.options.items()}
    if hasattr(cls, "for_model"):
        return cls.for_model(model, **options)
    known = inspect.signature(cls).parameters
    torchs = cls.__module__.startswith("torch.")  # this package's own choose the kernel by themselves
    if torchs and "fused" in known and not ({"fused", "foreach", "differentiable"} & set(options)):
        options["fused"] = True
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not options.get("weight_decay"):
        return cls(parameters, **options)
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in parameters if parameter.ndim >= 2]},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return cls([group for group in groups if group["params"]], **options)


def build_schedule(section: MethodSection, optimizer: Any, total_steps: int) -> Any:
    """The schedule of a section for an optimizer and a number of steps."""
    cls = get(section.name, "schedule").load()
    options = {key: _value(value) for key, value in section.options.items()}
    known = inspect.signature(cls).parameters
    offers: Mapping[str, Any] = {"total_steps": total_steps, "checkpoints": (total_steps,)}
    for name, value in offers.items():
        if name in known:
            options.setdefault(name, value)
    return cls(optimizer, **options)


def build_batch_schedule(section: MethodSection, *, size: int, workers: int, unit: int = 1) -> Any:
    """The batch schedule of a section, starting from `size` and going in multiples of `unit`."""
    cls = get(section.name, "batch schedule").load()
    options = {key: _value(value) for key, value in section.options.items()}
    known = inspect.signature(cls).parameters
    for name, value in {"world_size": workers, "multiple_of": unit}.items():
        if name in known:
            options.setdefault(name, value)
    return cls(size, **options)


def _wraps(cls: Any) -> bool:
    """Whether a class is built around another optimizer, which `for_model` takes by its slug."""
    return hasattr(cls, "from_parameters")


def _parameters(cls: Any) -> dict[str, Any]:
    """The constructor's keyword arguments that a file may set, with their type hints."""
    found: dict[str, Any] = {}
    for function in (getattr(cls, "for_model", None), cls.__init__):
        if function is None:
            continue
        try:
            hints = typing.get_type_hints(function)
        except (NameError, TypeError):
            hints = {}
        for name, parameter in inspect.signature(function).parameters.items():
            if name not in _RESERVED and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                found.setdefault(name, hints.get(name, Any))
    found.pop("cls", None)
    return found


def _value(value: Any) -> Any:
    """TOML's arrays as tuples, which is what constructors take for pairs and sequences."""
    return tuple(_value(item) for item in value) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    import pydantic

    try:
        adapter = pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(arbitrary_types_allowed=True, strict=True))
    except (pydantic.PydanticUserError, TypeError, NameError):
        return True
    for form in (_value(value), value):
        try:
            adapter.validate_python(form)
        except pydantic.ValidationError:
            continue
        return True
    return False


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint).replace("typing.", "")
