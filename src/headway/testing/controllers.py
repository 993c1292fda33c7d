"""The contract of a controller: an object that watches a run and sets its learning rate, for ours and anybody's.

`check_controller` builds the controller again and again on a tiny problem and holds what it does against the clauses
below, one function each. A clause that fails raises `AssertionError` with its name.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from headway.snapshot import rng_state

__all__ = ["Run", "check_controller"]

BASE_LRS = (0.2, 0.05)
ROWS, BATCH, WIDTH = 32, 16, 4

Make: TypeAlias = Callable[..., Any]
Drive: TypeAlias = Callable[[Any, "Run"], None]
Trace: TypeAlias = list[list[float]]


class Run:
    """A regression on 32 rows, for a controller to watch; the same in every run, and free of random numbers.

    `model` is Linear(4, 6), BatchNorm1d, Tanh, Linear(6, 1); `optimizer` is SGD with momentum 0.5 and two groups, the
    two layers with rates 0.2 and 0.05, the normalisation with the first; `step` counts the calls of `backward`.
    """

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))
        first = [*self.model[0].parameters(), *self.model[1].parameters()]
        groups = [
            {"params": params, "lr": lr}
            for params, lr in zip((first, list(self.model[3].parameters())), BASE_LRS, strict=True)
        ]
        self.optimizer: Optimizer = SGD(groups, momentum=0.5)
        self.step = 0
        generator = torch.Generator().manual_seed(0)
        self._x = torch.randn(ROWS, WIDTH, generator=generator)
        noise = torch.randn(ROWS, 1, generator=generator)
        self._y = (self._x[:, :1] * self._x[:, 1:2]).tanh() + 0.1 * noise

    def batch(self, step: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs (16, 4) and targets (16, 1) of a step, of the next one by default."""
        generator = torch.Generator().manual_seed(self.step if step is None else step)
        rows = torch.randperm(ROWS, generator=generator)[:BATCH]
        return self._x[rows], self._y[rows]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The mean squared error of a batch, with its graph."""
        x, y = batch
        return (self.model(x) - y).square().mean()

    def backward(self) -> float:
        """Gradients and loss of the next batch; then `optimizer.step()` is the caller's."""
        self.optimizer.zero_grad()
        loss = self.loss(self.batch())
        loss.backward()
        self.step += 1
        return loss.item()


def check_controller(
    make: Make,
    drive: Drive,
    *,
    steps: int = 40,
    stops: Sequence[int] = (0, 1, 13, 39),
    bounds: tuple[float, float] | None = None,
    changes: Sequence[str] = ("lr",),
) -> None:
    """Check that a controller keeps the contract of its role.

    The clauses: in `steps` steps it changes the learning rate at least once; the rates stay finite, > 0, the first
    group's within `bounds`, and in the ratio of the initial ones; in the groups nothing changes but `changes` (and
    `initial_lr`, which torch's schedulers add), and the model keeps its training modes and `requires_grad`; two runs
    are equal to the bit; the global random generators stay where they are; building it, and reading its state, change
    neither model nor optimizer nor the run; a state saved in mid-run holds plain values and tensors (through
    `torch.save` and `torch.load(weights_only=True)`), does not change later, and continues in new objects to the bit,
    together with model and optimizer; and each numeric argument of the constructor has an entry in the class's
    `constraints`, outside of which it is refused with a `ValueError` that names argument and value and leaves the
    optimizer untouched.

    Args:
        make: (run, **arguments) -> a new controller of `run.model` and `run.optimizer`; must pass the arguments on to
            the constructor, over its own.
        drive: (controller, run) -> None, one training step with all that belongs to it, as in::

                def drive(controller, run):
                    loss = run.backward()
                    run.optimizer.step()
                    controller.step(loss)

        steps: length of a run. Default 40.
        stops: after which steps a state is saved and continued. Default (0, 1, 13, 39). A controller that restarts
            something when it is loaded names the steps at which nothing is under way.
        bounds: (lowest, highest) rate that `make` gives its controllers. Default: none to check.
        changes: what the controller says that it changes in the optimizer's groups.

    Raises:
        AssertionError: a clause does not hold; the message names class and clause.

    >>> class Halving:
    ...     constraints = {}
    ...     def __init__(self, optimizer):
    ...         self.optimizer, self.steps = optimizer, 0
    ...     def step(self):
    ...         self.steps += 1
    ...         if self.steps % 10 == 0:
    ...             for group in self.optimizer.param_groups:
    ...                 group["lr"] /= 2
    ...     def state_dict(self):
    ...         return {"steps": self.steps}
    ...     def load_state_dict(self, state):
    ...         self.steps = state["steps"]
    >>> def drive(controller, run):
    ...     run.backward()
    ...     run.optimizer.step()
    ...     controller.step()
    >>> check_controller(lambda run: Halving(run.optimizer), drive)
    """
    subject = _Subject(make, drive, steps, tuple(stops), bounds, tuple(changes))
    name = type(make(Run())).__name__
    for clause in _CLAUSES:
        words = clause.__name__.removeprefix("_").replace("_", " ")
        try:
            clause(subject)
        except Exception as error:
            detail = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            raise AssertionError(f"{name} breaks the clause '{words}': {detail}") from error


@dataclass
class _Subject:
    """The controller under test, and how to build and drive it."""

    make: Make
    drive: Drive
    steps: int
    stops: tuple[int, ...]
    bounds: tuple[float, float] | None
    changes: tuple[str, ...]

    def new(self) -> tuple[Any, Run]:
        run = Run()
        return self.make(run), run

    def trace(self, controller: Any, run: Run, steps: int) -> Trace:
        """What is set after each step, and where the parameters are."""
        rows = []
        for _ in range(steps):
            self.drive(controller, run)
            rows.append(_settings(run, self.changes))
        return rows


def _settings(run: Run, names: Sequence[str]) -> list[float]:
    values = [float(group[name]) for group in run.optimizer.param_groups for name in names]
    return values + torch.cat([p.detach().flatten() for p in run.model.parameters()]).tolist()


def _rates(run: Run) -> list[float]:
    return [float(group["lr"]) for group in run.optimizer.param_groups]


def _everything(run: Run) -> dict[str, Any]:
    """Copies of all that a controller could have changed in model and optimizer."""
    return {
        "the model's state": copy.deepcopy(run.model.state_dict()),
        "gradients": [None if p.grad is None else p.grad.clone() for p in run.model.parameters()],
        "the optimizer's state": copy.deepcopy(run.optimizer.state_dict()["state"]),
        "the parameter groups": _groups(run, but=("initial_lr",)),
        **_modes(run),
    }


def _groups(run: Run, but: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {name: copy.deepcopy(value) for name, value in group.items() if name not in ("params", *but)}
        for group in run.optimizer.param_groups
    ]


def _modes(run: Run) -> dict[str, Any]:
    return {
        "training modes": [module.training for module in run.model.modules()],
        "requires_grad": [p.requires_grad for p in run.model.parameters()],
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def _assert_same(got: Mapping[str, Any], expected: Mapping[str, Any], when: str) -> None:
    for name, value in expected.items():
        assert _same(got[name], value), f"{when} changes {name}"


def _assert_continues(got: Trace, expected: Trace, what: str, first: int = 0) -> None:
    for offset, (a, b) in enumerate(zip(got, expected, strict=True)):
        groups = len(BASE_LRS)
        assert a == b, (
            f"{what}: differs first at step {first + offset + 1}, where it sets {a[:groups]}, not {b[:groups]}"
        )


# The clauses, in the order in which they are checked: the ones that explain the others come first.


def _the_rates_change_and_stay_finite_positive_and_within_their_bounds(subject: _Subject) -> None:
    controller, run = subject.new()
    seen = {tuple(BASE_LRS)}
    for step in range(1, subject.steps + 1):
        subject.drive(controller, run)
        rates = _rates(run)
        assert all(math.isfinite(rate) and rate > 0 for rate in rates), f"the rates are {rates} at step {step}"
        seen.add(tuple(rates))
        if subject.bounds is not None and len(seen) > 1:
            low, high = subject.bounds
            slack = 1e-6 * high
            assert low - slack <= rates[0] <= high + slack, (
                f"the rate {rates[0]} of step {step} is outside [{low}, {high}]"
            )
    assert len(seen) > 1, f"the rates are the initial ones, {list(BASE_LRS)}, for all of {subject.steps} steps"


def _groups_keep_the_ratio_of_their_initial_rates(subject: _Subject) -> None:
    controller, run = subject.new()
    for step in range(1, subject.steps + 1):
        subject.drive(controller, run)
        first, second = _rates(run)
        same = math.isclose(second * BASE_LRS[0], first * BASE_LRS[1], rel_tol=1e-6)
        assert same, f"the rates are {first} and {second} at step {step}, for initial ones of {list(BASE_LRS)}"


def _nothing_else_of_groups_and_model_is_changed(subject: _Subject) -> None:
    controller, run = subject.new()
    but = (*subject.changes, "initial_lr")
    before = {"the parameter groups": _groups(run, but), **_modes(run)}
    for step in range(1, subject.steps + 1):
        subject.drive(controller, run)
        _assert_same({"the parameter groups": _groups(run, but), **_modes(run)}, before, f"step {step}")


def _two_runs_are_equal(subject: _Subject) -> None:
    first, second = (subject.trace(*subject.new(), subject.steps) for _ in range(2))
    _assert_continues(second, first, "the second run")


def _the_global_random_generators_stay_where_they_are(subject: _Subject) -> None:
    before = rng_state()
    controller, run = subject.new()
    subject.trace(controller, run, subject.steps)
    controller.load_state_dict(controller.state_dict())
    for name, state in rng_state().items():
        assert _same(state, before[name]), f"the global generator of {name} has moved"


def _building_it_and_reading_its_state_change_nothing(subject: _Subject) -> None:
    run = Run()
    run.backward()
    run.optimizer.step()
    before = _everything(run)
    controller = subject.make(run)
    _assert_same(_everything(run), before, "the constructor")
    controller.state_dict()
    _assert_same(_everything(run), before, "state_dict()")

    expected = subject.trace(*subject.new(), subject.steps)
    controller, run = subject.new()
    got = []
    for step in range(subject.steps):
        got += subject.trace(controller, run, 1)
        before = _everything(run) if step in subject.stops else {}
        controller.state_dict()
        if before:
            _assert_same(_everything(run), before, "state_dict()")
    _assert_continues(got, expected, "a run whose state is read")


def _a_state_saved_mid_run_continues_exactly(subject: _Subject) -> None:
    expected = subject.trace(*subject.new(), subject.steps)
    for stop in subject.stops:
        controller, run = subject.new()
        subject.trace(controller, run, stop)
        file = io.BytesIO()
        parts = {"model": run.model, "optimizer": run.optimizer, "controller": controller}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed, new_run = subject.new()
        new_run.step = run.step
        new_run.model.load_state_dict(saved["model"])
        new_run.optimizer.load_state_dict(saved["optimizer"])
        resumed.load_state_dict(saved["controller"])
        got = subject.trace(resumed, new_run, subject.steps - stop)
        _assert_continues(got, expected[stop:], f"resumed after step {stop}", first=stop)


def _a_state_is_not_changed_by_later_steps(subject: _Subject) -> None:
    controller, run = subject.new()
    subject.trace(controller, run, subject.steps // 2)
    state = controller.state_dict()
    before = copy.deepcopy(state)
    subject.trace(controller, run, subject.steps - subject.steps // 2)
    assert _same(state, before), f"the state of step {subject.steps // 2} has changed at step {subject.steps}"


def _every_argument_out_of_range_is_refused(subject: _Subject) -> None:
    controller, _ = subject.new()
    constraints = getattr(controller, "constraints", None)
    assert constraints is not None, "the class has no `constraints`"
    parameters = inspect.signature(type(controller)).parameters
    for name, parameter in parameters.items():
        if isinstance(parameter.default, int | float) and not isinstance(parameter.default, bool):
            assert name in constraints, f"the numeric argument {name} has no constraint"
    for name, constraint in constraints.items():
        assert name in parameters, f"the constraint {name} is not an argument of the constructor"
        for value in constraint.outside():
            run = Run()
            before = _everything(run)
            try:
                subject.make(run, **{name: value})
            except ValueError as error:
                message = str(error)
            else:
                raise AssertionError(f"{name}={value!r} is accepted; it must be {constraint.describe()}")
            assert name in message, f"{name}={value!r} is refused without naming the argument: {message}"
            assert repr(value) in message, f"{name}={value!r} is refused without naming the value: {message}"
            _assert_same(_everything(run), before, f"{name}={value!r}, although refused,")


_CLAUSES: tuple[Callable[[_Subject], None], ...] = (
    _the_rates_change_and_stay_finite_positive_and_within_their_bounds,
    _groups_keep_the_ratio_of_their_initial_rates,
    _nothing_else_of_groups_and_model_is_changed,
    _two_runs_are_equal,
    _the_global_random_generators_stay_where_they_are,
    _building_it_and_reading_its_state_change_nothing,
    _a_state_saved_mid_run_continues_exactly,
    _a_state_is_not_changed_by_later_steps,
    _every_argument_out_of_range_is_refused,
)
