"""The contract of a learning-rate schedule, for the schedules of this package, of torch and of anybody.

`check_schedule` builds the class again and again on tiny optimizers and holds what it does against
the clauses below, one function each. A clause that fails raises `AssertionError` with its name.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR
from torch.optim.lr_scheduler import ConstantLR as TorchConstantLR

__all__ = ["check_schedule"]

BASE_LRS = (1.0, 0.5, 0.25)
LENGTH = 60
Trace = list[list[float]]


def check_schedule(schedule_class: type[LRScheduler], **arguments: Any) -> None:
    """Check that a class keeps the contract of a learning-rate schedule.

    The clauses: the constructor sets the rate of step 0, once; the closed form, if there is one,
    equals the chained form; every parameter group follows its own base rate, whatever its
    neighbours; rates are finite and >= 0 for every total length from 1 on and far past the end, the
    same for every optimizer, for a tensor `lr` and in every run; a state saved mid-run, also through
    `torch.save` and `torch.load(weights_only=True)`, continues exactly, as do a copy, a pickle and a
    schedule rebuilt with `last_epoch`; it works inside `SequentialLR` and `ChainedScheduler`; stepping
    raises no warning; a parameter group added later is scheduled or refused, never ignored; and, for
    a class that declares `constraints`, each numeric argument has one and every value outside it is
    refused with a `ValueError` that names argument and value and leaves the optimizer untouched.

    Args:
        schedule_class: a class whose constructor takes an optimizer first.
        **arguments: further constructor arguments, valid for optimizers with base rates 1, 0.5 and
            0.25 and runs of 60 steps. `total_steps` (an int) and `checkpoints` (a list of one int) are
            filled in where the constructor has them and they are not given.

    Raises:
        AssertionError: a clause does not hold; the message names class and clause.

    >>> from torch.optim.lr_scheduler import CosineAnnealingLR
    >>> check_schedule(CosineAnnealingLR, T_max=50)
    """
    subject = _Subject(schedule_class, arguments)
    for clause in _CLAUSES:
        name = clause.__name__.removeprefix("_").replace("_", " ")
        try:
            clause(subject)
        except Exception as error:
            detail = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            raise AssertionError(f"{schedule_class.__name__} breaks the clause '{name}': {detail}") from error


@dataclass
class _Subject:
    """The class under test and how to build it."""

    schedule_class: type[LRScheduler]
    arguments: Mapping[str, Any]
    parameters: Mapping[str, inspect.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = inspect.signature(self.schedule_class).parameters

    def filled(self, length: int) -> dict[str, Any]:
        """What stands for the length of the run, where the constructor has it and nobody gave it."""
        known: dict[str, Any] = {"total_steps": length, "checkpoints": [length]}
        return {name: value for name, value in known.items() if name in self.parameters and name not in self.arguments}

    def build(self, optimizer: Optimizer, length: int = LENGTH, **overrides: Any) -> Any:
        """A schedule on `optimizer`; warnings of the constructor are advice and pass."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.schedule_class(optimizer, **{**self.filled(length), **self.arguments, **overrides})

    def trace(self, steps: int, length: int = LENGTH, **optimizer_options: Any) -> Trace:
        """The rates of steps 0 .. `steps` of a new run."""
        optimizer = _optimizer(**optimizer_options)
        schedule = self.build(optimizer, length)
        return [_rates(optimizer), *_advance(optimizer, schedule, steps)]


def _optimizer(
    base_lrs: tuple[float, ...] = BASE_LRS,
    kind: Callable[..., Optimizer] = torch.optim.SGD,
    tensor_lr: bool = False,
    **options: Any,
) -> Optimizer:
    groups = []
    for base in base_lrs:
        parameter = torch.nn.Parameter(torch.ones(2))
        parameter.grad = torch.full((2,), 1e-3)
        groups.append({"params": [parameter], "lr": torch.tensor(base) if tensor_lr else base})
    return kind(groups, **options)


def _rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _advance(optimizer: Optimizer, schedule: Any, steps: int) -> Trace:
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            rates.append(_rates(optimizer))
    return rates


def _close(a: list[float], b: list[float], tolerance: float = 1e-9) -> bool:
    return len(a) == len(b) and all(
        math.isclose(x, y, rel_tol=tolerance, abs_tol=tolerance) for x, y in zip(a, b, strict=True)
    )


def _assert_same(got: Trace, expected: Trace, what: str, first: int = 0, tolerance: float = 0.0) -> None:
    """Compare two traces; without a tolerance they must agree to the last bit."""
    assert len(got) == len(expected), f"{what}: {len(got)} steps instead of {len(expected)}"
    for offset, (a, b) in enumerate(zip(got, expected, strict=True)):
        same = _close(a, b, tolerance) if tolerance else a == b
        assert same, f"{what}: at step {first + offset} the rates are {a}, expected {b}"


# The clauses, in the order in which they are checked: the ones that explain the others come first.


def _is_an_lr_scheduler(subject: _Subject) -> None:
    assert issubclass(subject.schedule_class, LRScheduler), "not a subclass of torch.optim.lr_scheduler.LRScheduler"
    assert "last_epoch" in subject.parameters, "the constructor has no argument last_epoch"


def _the_constructor_sets_the_rate_of_step_0_once(subject: _Subject) -> None:
    optimizer = _optimizer()
    schedule = subject.build(optimizer)
    assert schedule.last_epoch == 0, f"last_epoch is {schedule.last_epoch} after the constructor, expected 0"
    assert schedule.optimizer is optimizer, "schedule.optimizer is another optimizer"
    _check_rates_agree(schedule, optimizer)
    for step in range(1, 4):
        _advance(optimizer, schedule, 1)
        assert schedule.last_epoch == step, f"last_epoch is {schedule.last_epoch} after {step} steps"
        _check_rates_agree(schedule, optimizer)


def _check_rates_agree(schedule: Any, optimizer: Optimizer) -> None:
    initial = [float(group["initial_lr"]) for group in optimizer.param_groups]
    base = [float(lr) for lr in schedule.base_lrs]
    assert base == initial, f"base_lrs are {base}, the groups' initial_lr are {initial}"
    last = [float(lr) for lr in schedule.get_last_lr()]
    assert last == _rates(optimizer), f"get_last_lr() is {last}, the groups' lr are {_rates(optimizer)}"


def _rates_are_finite_and_not_negative(subject: _Subject) -> None:
    _check_finite(subject.trace(3 * LENGTH))


def _check_finite(trace: Trace) -> None:
    for step, rates in enumerate(trace):
        for rate in rates:
            assert math.isfinite(rate), f"the rate is {rate} at step {step}"
            assert rate >= 0, f"the rate is {rate} at step {step}"


def _works_for_every_total_length(subject: _Subject) -> None:
    if not subject.filled(1):
        return
    for length in (1, 2, 3, 7, 10 * LENGTH):
        optimizer = _optimizer()
        try:
            schedule = subject.build(optimizer, length)
        except ValueError:
            # Other arguments, a warm-up for one, may rightly need room.
            if subject.arguments:
                continue
            raise
        _check_finite([_rates(optimizer), *_advance(optimizer, schedule, 2 * min(length, LENGTH) + 2)])


def _closed_form_equals_chained_form(subject: _Subject) -> None:
    if not hasattr(subject.schedule_class, "_get_closed_form_lr"):
        return
    optimizer = _optimizer()
    schedule = subject.build(optimizer)
    for step in range(2 * LENGTH):
        closed = [float(lr) for lr in schedule._get_closed_form_lr()]
        chained = _rates(optimizer)
        assert _close(closed, chained, 1e-7), f"at step {step} the closed form gives {closed}, the chained {chained}"
        _advance(optimizer, schedule, 1)


def _each_group_follows_its_own_base_rate(subject: _Subject) -> None:
    together = subject.trace(2 * LENGTH)
    for group, base in enumerate(BASE_LRS):
        alone = subject.trace(2 * LENGTH, base_lrs=(base,))
        expected = [[rates[group]] for rates in together]
        _assert_same(alone, expected, f"group {group} alone against group {group} of {len(BASE_LRS)}", tolerance=1e-9)
    for step, rates in enumerate(together):
        # Through the first and last group goes the line lr = slope * base + offset: the offset is what an
        # absolute minimum adds, and a proportional schedule has none.
        slope = (rates[0] - rates[-1]) / (BASE_LRS[0] - BASE_LRS[-1])
        offset = rates[0] - slope * BASE_LRS[0]
        expected_rates = [slope * base + offset for base in BASE_LRS]
        assert _close(rates, expected_rates, 1e-7), f"at step {step} the rates {rates} are not affine in {BASE_LRS}"
        assert slope >= -1e-9, f"at step {step} a larger base rate gets a smaller rate: {rates}"
        assert offset >= -1e-9, f"at step {step} the rates {rates} are not a multiple of {BASE_LRS} plus a minimum >= 0"


def _two_runs_are_equal_and_draw_no_random_numbers(subject: _Subject) -> None:
    before = torch.get_rng_state()
    first = subject.trace(LENGTH)
    assert torch.equal(torch.get_rng_state(), before), "the global random generator has moved"
    _assert_same(subject.trace(LENGTH), first, "second run against the first")


def _rates_do_not_depend_on_the_optimizer(subject: _Subject) -> None:
    expected = subject.trace(LENGTH)
    _assert_same(subject.trace(LENGTH, kind=torch.optim.AdamW), expected, "AdamW against SGD")
    _assert_same(subject.trace(LENGTH, momentum=0.9), expected, "SGD with momentum against SGD")


def _a_tensor_lr_is_updated_in_place(subject: _Subject) -> None:
    expected = subject.trace(LENGTH)
    optimizer = _optimizer(tensor_lr=True)
    tensors = [group["lr"] for group in optimizer.param_groups]
    schedule = subject.build(optimizer)
    got = [_rates(optimizer), *_advance(optimizer, schedule, LENGTH)]
    _assert_same(got, expected, "tensor lr against float lr", tolerance=1e-5)
    kept = all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, tensors, strict=True))
    assert kept, "the lr tensor of a group was replaced by another object"


def _a_state_dict_saved_mid_run_continues_exactly(subject: _Subject) -> None:
    _check_resume(subject, lambda state: copy.deepcopy(state))


def _a_state_dict_survives_torch_load_with_weights_only(subject: _Subject) -> None:
    def through_file(state: dict[str, Any]) -> dict[str, Any]:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=True)

    _check_resume(subject, through_file)


def _check_resume(subject: _Subject, carry: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    expected = subject.trace(LENGTH + 10)
    for stop in (0, 1, LENGTH // 2, LENGTH - 1, LENGTH + 3):
        optimizer = _optimizer(momentum=0.9)
        schedule = subject.build(optimizer)
        _advance(optimizer, schedule, stop)
        saved = carry({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})
        resumed_optimizer = _optimizer(momentum=0.9)
        resumed = subject.build(resumed_optimizer)
        resumed_optimizer.load_state_dict(saved["optimizer"])
        resumed.load_state_dict(saved["schedule"])
        assert resumed.last_epoch == stop, f"last_epoch is {resumed.last_epoch} after loading a state of step {stop}"
        _check_rates_agree(resumed, resumed_optimizer)
        got = [_rates(resumed_optimizer), *_advance(resumed_optimizer, resumed, LENGTH + 10 - stop)]
        _assert_same(got, expected[stop:], f"resumed at step {stop}", first=stop)


def _a_state_dict_is_not_changed_by_later_steps(subject: _Subject) -> None:
    optimizer = _optimizer()
    schedule = subject.build(optimizer)
    _advance(optimizer, schedule, 5)
    state = schedule.state_dict()
    assert "optimizer" not in state, "the optimizer is part of the state_dict"
    before = copy.deepcopy(state)
    _advance(optimizer, schedule, 5)
    assert state == before, "the state_dict of step 5 has changed at step 10"


def _last_epoch_and_initial_lr_resume(subject: _Subject) -> None:
    expected = subject.trace(LENGTH)
    for stop in (1, LENGTH // 2, LENGTH - 1):
        optimizer = _optimizer()
        _advance(optimizer, subject.build(optimizer), stop)
        resumed_optimizer = _optimizer()
        resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        # torch's convention: last_epoch names the step before, the constructor makes the move to `stop`.
        resumed = subject.build(resumed_optimizer, last_epoch=stop - 1)
        assert resumed.last_epoch == stop, f"last_epoch is {resumed.last_epoch}, expected {stop}"
        got = [_rates(resumed_optimizer), *_advance(resumed_optimizer, resumed, LENGTH - stop)]
        _assert_same(got, expected[stop:], f"last_epoch={stop - 1}", first=stop, tolerance=1e-7)


def _a_copy_and_a_pickle_continue_exactly(subject: _Subject) -> None:
    expected = subject.trace(LENGTH)
    stop = LENGTH // 2
    optimizer = _optimizer()
    schedule = subject.build(optimizer)
    _advance(optimizer, schedule, stop)
    ways: dict[str, Callable[[Any], Any]] = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),  # noqa: S301 - its own bytes
    }
    for name, way in ways.items():
        twin_optimizer, twin = way((optimizer, schedule))
        assert twin.optimizer is twin_optimizer, f"{name}: the copy is attached to another optimizer"
        _assert_same(_advance(twin_optimizer, twin, LENGTH - stop), expected[stop + 1 :], name, first=stop + 1)
    assert _rates(optimizer) == expected[stop], "stepping a copy has changed the original"


def _works_inside_sequential_lr(subject: _Subject) -> None:
    expected = subject.trace(LENGTH)
    switch = 10

    optimizer = _optimizer()
    flat = TorchConstantLR(optimizer, factor=0.5, total_iters=10**6)
    chain = SequentialLR(optimizer, [flat, subject.build(optimizer)], milestones=[switch])
    got = [_rates(optimizer), *_advance(optimizer, chain, LENGTH)]
    _assert_same(got[switch:], expected[: LENGTH - switch + 1], "second in SequentialLR", first=switch, tolerance=1e-7)

    optimizer = _optimizer()
    schedule = subject.build(optimizer)
    flat = TorchConstantLR(optimizer, factor=0.5, total_iters=10**6)
    chain = SequentialLR(optimizer, [schedule, flat], milestones=[switch])
    got = [_rates(optimizer), *_advance(optimizer, chain, switch - 1)]
    _assert_same(got, expected[:switch], "first in SequentialLR", tolerance=1e-7)


def _works_inside_chained_scheduler(subject: _Subject) -> None:
    optimizer = _optimizer()
    chain = ChainedScheduler([subject.build(optimizer)], optimizer=optimizer)
    got = [_rates(optimizer), *_advance(optimizer, chain, LENGTH)]
    _assert_same(got, subject.trace(LENGTH), "in ChainedScheduler")


def _stepping_raises_no_warning(subject: _Subject) -> None:
    optimizer = _optimizer()
    schedule = subject.build(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(LENGTH + 2):
            optimizer.step()
            schedule.step()


def _a_group_added_later_is_scheduled_or_refused(subject: _Subject) -> None:
    optimizer = _optimizer()
    schedule = subject.build(optimizer)
    _advance(optimizer, schedule, 2)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": BASE_LRS[0]})
    try:
        rates = _advance(optimizer, schedule, LENGTH - 2)
    except (ValueError, LookupError):
        return
    expected = subject.trace(LENGTH)[3:]
    _assert_same([step[:-1] for step in rates], expected, "the older groups, after a new one", first=3)
    _check_finite(rates)
    # torch's chainable schedules scale a new group from where it starts, so its values are its own.
    others_move = any(step[0] != expected[0][0] for step in expected)
    moves = any(step[-1] != rates[0][-1] for step in rates)
    assert moves or not others_move, f"the new group keeps the rate {rates[0][-1]} while the others change"


def _every_argument_out_of_range_is_refused(subject: _Subject) -> None:
    constraints = getattr(subject.schedule_class, "constraints", None)
    if constraints is None:
        return
    for name, parameter in subject.parameters.items():
        if name not in ("optimizer", "last_epoch") and _is_numeric(parameter):
            assert name in constraints, f"the numeric argument {name} has no constraint"
    for name, constraint in constraints.items():
        assert name in subject.parameters, f"the constraint {name} is not an argument of the constructor"
        for value in constraint.outside():
            optimizer = _optimizer()
            message = _refusal(subject, optimizer, name, value)
            assert message is not None, f"{name}={value!r} is accepted; it must be {constraint.describe()}"
            assert name in message, f"{name}={value!r} is refused without naming the argument: {message}"
            assert repr(value) in message, f"{name}={value!r} is refused without naming the value: {message}"
            untouched = _rates(optimizer) == list(BASE_LRS) and "initial_lr" not in optimizer.param_groups[0]
            assert untouched, f"{name}={value!r} is refused, but the optimizer has been changed"


def _refusal(subject: _Subject, optimizer: Optimizer, name: str, value: Any) -> str | None:
    try:
        subject.build(optimizer, **{name: value})
    except ValueError as error:
        return str(error)
    return None


def _is_numeric(parameter: inspect.Parameter) -> bool:
    if isinstance(parameter.default, bool):
        return False
    if isinstance(parameter.default, int | float):
        return True
    annotation = parameter.annotation
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return re.search(r"\b(int|float)\b", text) is not None


_CLAUSES: tuple[Callable[[_Subject], None], ...] = (
    _is_an_lr_scheduler,
    _the_constructor_sets_the_rate_of_step_0_once,
    _rates_are_finite_and_not_negative,
    _works_for_every_total_length,
    _closed_form_equals_chained_form,
    _each_group_follows_its_own_base_rate,
    _two_runs_are_equal_and_draw_no_random_numbers,
    _rates_do_not_depend_on_the_optimizer,
    _a_tensor_lr_is_updated_in_place,
    _a_state_dict_saved_mid_run_continues_exactly,
    _a_state_dict_survives_torch_load_with_weights_only,
    _a_state_dict_is_not_changed_by_later_steps,
    _last_epoch_and_initial_lr_resume,
    _a_copy_and_a_pickle_continue_exactly,
    _works_inside_sequential_lr,
    _works_inside_chained_scheduler,
    _stepping_raises_no_warning,
    _a_group_added_later_is_scheduled_or_refused,
    _every_argument_out_of_range_is_refused,
)
