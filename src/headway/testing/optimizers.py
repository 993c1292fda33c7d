"""The contract of the optimizer role: what every `torch.optim.Optimizer` has to keep, as a public suite.

`check_optimizer` runs a class through small problems and raises at the first clause that it breaks.
Each clause is a function of this file and is listed in `CLAUSES`.
"""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from headway.constraints import Constraint

__all__ = ["CLAUSES", "check_optimizer"]


def check_optimizer(optimizer_class: type[Optimizer], /, **hyperparameters: Any) -> None:
    """Check that an optimizer class keeps the contract of its role, at the given hyper-parameters.

    The class is built many times, each time on fresh parameters of shapes 0-D, 1-D, 2-D and 4-D
    (the last one in channels-last order), and minimises a noisy quadratic for a few steps. "The same"
    below means bit by bit. Optimizers with `train()` and `eval()` are put in training mode first.

    A class says with the attribute `step_protocol` how one step is driven; clauses that make no sense under a
    protocol are left out:

    - `gradients` (the default): `loss.backward()`, then `step()`; `step(closure)` with a closure that does both.
    - `graph`: `loss.backward(create_graph=True)`, then `step()`; or `step(closure)`, where the closure returns the loss
      and leaves differentiation to the optimizer.
    - `loss`: `step(closure)`, where the closure returns the loss at the parameters' present values.
    - `margins`: `step(closure)`, where the closure returns a vector of margins y_i f(x_i).
    - `outputs`: `step(forward, target_grad)`: the model's outputs, and the gradient of a loss with respect to them.

    A class that wraps another optimizer is built by `from_parameters(params, **hyperparameters)`. One that needs the
    model (`needs_model = True`) is built by `from_parameters(params, module=..., **hyperparameters)`, and is checked on
    a small network in place of the bare parameters.

    The clauses, in the order in which they are checked:

    - `hyperparameters_validated`: for a class that declares `constraints` (name -> `headway.constraints`),
      each constructor keyword whose default is a number has a constraint, defaults lie inside, and each
      value outside raises `ValueError` with the name and the value, from the constructor and, for what
      groups may set, from a group in the constructor and from `add_param_group`.
    - `parameters_move`: finite, and some parameter moves.
    - `bfloat16`: parameters stay bfloat16, finite, and move; or bfloat16 is refused by an error that names it.
    - `deterministic`: two runs are the same, and the global random state of torch is not advanced.
    - `nothing_without_backward`: a step before any backward changes nothing, nor the steps that follow; where
      `step` needs a closure, `step()` raises a `RuntimeError` that says so.
    - `missing_gradients_left_alone`: a parameter whose gradient is None, or that does not require one, is not touched;
      training goes on when gradients come.
    - `zero_gradients_finite`: gradients that are all zero, from the first step or later, leave everything finite.
    - `nonfinite_gradients`: a gradient with a NaN or an infinity raises `FloatingPointError` and changes nothing, or
      makes the parameter itself not finite; it is never hidden in the state.
    - `sparse_gradients`: used, or refused by a `RuntimeError` that says "sparse", before anything changes.
    - `closure`: runs with gradients enabled even under `no_grad`, its loss is returned, and one evaluation
      gives the same step as backward and `step()`.
    - `maximize`: where the constructor has it, the same as minimising the negated loss.
    - `group_learning_rate`: each group follows its own `lr` (and `weight_decay`, where there is one), or different
      values are refused by a `ValueError` that names `lr`. Line searches (`loss`, `outputs`) may have no `lr`.
    - `scheduler`: `LambdaLR` steers the steps, the same as writing `lr` into the groups.
    - `state_dict_round_trip`: loaded into a fresh optimizer of a fresh model, or back into the same one,
      the run continues the same; in float32 and in bfloat16.
    - `state_dict_saved_safely`: so it does through `torch.save` and `torch.load(weights_only=True)`.
    - `copies`: so does a deep copy, and a pickled copy if the hyper-parameters can be pickled.
    - `add_param_group`: a group added in mid-run is trained and the run can be saved and resumed.
    - `memory_bounded`: neither the state's bytes nor the number of live tensors grow with the steps.
    - `evaluation_point`: where there are `train()` and `eval()`: switching never changes the run, also when
      it is saved in between; a second call does nothing; `step()` in evaluation mode raises `RuntimeError`.

    Args:
        optimizer_class: a subclass of `torch.optim.Optimizer`. For `copies`, importable by name.
        **hyperparameters: passed to every construction; copied for each, so that a generator starts afresh.

    Raises:
        AssertionError: names the class, the first clause broken, and what was seen.

    The default device is used: `with torch.device("cuda"): check_optimizer(...)` checks on a GPU.

    >>> check_optimizer(torch.optim.AdamW, lr=0.01)
    >>> class Stubborn(torch.optim.SGD):
    ...     def step(self, closure=None):
    ...         pass
    >>> check_optimizer(Stubborn)
    Traceback (most recent call last):
    ...
    AssertionError: Stubborn breaks the clause 'parameters_move': no parameter moved in 8 steps
    """
    subject = _Subject(optimizer_class, hyperparameters)
    for clause in CLAUSES:
        _check(clause, subject)


def _check(clause: Callable[[_Subject], None], subject: _Subject) -> None:
    try:
        clause(subject)
    except Exception as error:
        seen = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        broken = f"{subject.optimizer_class.__name__} breaks the clause '{clause.__name__}'"
        raise AssertionError(f"{broken}: {seen}") from error


class _Problem:
    """Parameters of every shape under a quadratic with its minimum at 1 and noise that depends on the step alone."""

    module: nn.Module | None = None

    def __init__(self, dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters: list[nn.Parameter] = []
        for shape in shapes or [(), (3,), (4, 3), (2, 3, 2, 2)]:
            value = 0.05 * _normal(shape, generator)  # small, so that a small step is visible in bfloat16
            if len(shape) == 4:
                value = value.to(memory_format=torch.channels_last)
            self.parameters.append(nn.Parameter(value.to(dtype)))

    def loss(self, step: int) -> Tensor:
        z = self.outputs()
        return ((z - 1).square() / 2 + 0.3 * self.noise(step) * z).sum()

    def outputs(self) -> Tensor:
        """The parameters as one vector: a model whose outputs they are."""
        return torch.cat([p.float().reshape(-1) for p in self.parameters])

    def output_gradient(self, step: int, z: Tensor) -> Tensor:
        """The gradient of `loss` with respect to `outputs()`."""
        return z - 1 + 0.3 * self.noise(step)

    def margins(self, step: int) -> Tensor:
        """Of five examples in random directions that differ by step, and a common one that separates them."""
        z = self.outputs()
        directions = _normal((5, z.numel()), torch.Generator().manual_seed(step))
        return (0.3 * directions + 1 / z.numel() ** 0.5) @ z

    def noise(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        return torch.cat([_normal(tuple(p.shape), generator).reshape(-1) for p in self.parameters])

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def assign(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self.parameters, values, strict=True):
            p.copy_(value)

    def halves(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        middle = len(self.parameters) // 2
        return self.parameters[:middle], self.parameters[middle:]


class _NetworkProblem(_Problem):
    """A convolution, a bias and two linear layers, for optimizers that look at a model's layers."""

    def __init__(self, dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.module = nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)
        )
        self.parameters = list(self.module.parameters())
        with torch.no_grad():
            for p in self.parameters:
                p.copy_(0.3 * _normal(tuple(p.shape), generator))
        self.module.to(dtype)

    def loss(self, step: int) -> Tensor:
        assert self.module is not None
        generator = torch.Generator().manual_seed(step)
        inputs = _normal((8, 2, 3, 3), generator) + 1
        targets = inputs.mean((2, 3))
        outputs = self.module(inputs.to(self.parameters[0].dtype)).float()
        return (outputs - targets).square().sum(1).mean()


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Drawn on the CPU, so that every device sees the same problem."""
    return torch.randn(shape, generator=generator, device="cpu").to(torch.get_default_device())


@dataclass(frozen=True)
class _Subject:
    """The class under test with its hyper-parameters."""

    optimizer_class: type[Optimizer]
    hyperparameters: Mapping[str, Any]

    @property
    def protocol(self) -> str:
        return getattr(self.optimizer_class, "step_protocol", "gradients")

    @property
    def leaves_gradients(self) -> bool:
        """Whether the steps start from gradients that are in the parameters."""
        return self.protocol in ("gradients", "graph")

    def problem(self, dtype: torch.dtype = torch.float32) -> _Problem:
        return (_NetworkProblem if getattr(self.optimizer_class, "needs_model", False) else _Problem)(dtype)

    def start(self, problem: _Problem, parameters: Any = None, **override: Any) -> Optimizer:
        """An optimizer of the problem's parameters, or of the given ones (or groups) among them."""
        arguments = {**copy.deepcopy(dict(self.hyperparameters)), **override}
        if problem.module is not None:
            arguments["module"] = problem.module
        build = getattr(self.optimizer_class, "from_parameters", self.optimizer_class)
        optimizer = build(problem.parameters if parameters is None else parameters, **arguments)
        _switch(optimizer, "train")
        return optimizer

    def start_groups(self, problem: _Problem, first: Mapping[str, float], second: Mapping[str, float]) -> Optimizer:
        one, other = problem.halves()
        return self.start(problem, [{"params": one, **first}, {"params": other, **second}])

    def lr(self) -> float | None:
        """The default learning rate; None for a line search that has none."""
        group = self.start(self.problem()).param_groups[0]
        if "lr" not in group and self.protocol in ("loss", "outputs"):
            return None
        _require("lr" in group, "the parameter groups hold no 'lr', which every LRScheduler needs")
        return float(group["lr"])

    def refuses_group_lr(self, lr: float) -> bool:
        try:
            self.start_groups(self.problem(), {"lr": lr}, {"lr": lr / 4})
        except ValueError as error:
            _require("lr" in str(error), f"different learning rates are refused without naming lr: {error}")
            return True
        return False

    def accepts(self, name: str) -> bool:
        return name in inspect.signature(self.optimizer_class).parameters


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def _switch(optimizer: Optimizer, mode: str) -> None:
    method = getattr(optimizer, mode, None)
    if callable(method):
        method()


def _run(problem: _Problem, optimizer: Optimizer, first: int = 0, last: int = 8, scale: float = 1.0) -> None:
    """Steps `first` to `last - 1`; the noise belongs to the step's number, so a resumed run sees the same."""
    for step in range(first, last):
        _one_step(problem, optimizer, step, scale)


def _one_step(problem: _Problem, optimizer: Any, step: int, scale: float = 1.0) -> None:
    """A step on `scale` times the loss, in the way of the optimizer's protocol."""
    protocol = getattr(type(optimizer), "step_protocol", "gradients")
    if protocol == "loss":
        optimizer.step(lambda: scale * problem.loss(step))
    elif protocol == "margins":
        optimizer.step(lambda: scale * problem.margins(step))
    elif protocol == "outputs":
        optimizer.step(problem.outputs, lambda z: scale * problem.output_gradient(step, z))
    else:
        _backward(problem, optimizer, step, scale)
        optimizer.step()


def _backward(problem: _Problem, optimizer: Optimizer, step: int, scale: float = 1.0) -> None:
    optimizer.zero_grad()
    graph = getattr(type(optimizer), "step_protocol", "gradients") == "graph"
    (scale * problem.loss(step)).backward(create_graph=graph)


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a.detach(), b.detach()) for a, b in zip(one, other, strict=True))


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def hyperparameters_validated(subject: _Subject) -> None:
    constraints: Mapping[str, Constraint] | None = getattr(subject.optimizer_class, "constraints", None)
    if constraints is None:
        return
    keywords = inspect.signature(subject.optimizer_class).parameters
    for name, keyword in keywords.items():
        if _is_numeric(keyword.default):
            _require(name in constraints, f"the argument {name} is a number and has no entry in `constraints`")
    for name, constraint in constraints.items():
        _require(name in keywords, f"`constraints` names {name}, which the constructor does not take")
        default = keywords[name].default
        if default is not inspect.Parameter.empty and default is not None:  # None: the method chooses
            _require(constraint.accepts(default), f"the default {name}={default!r} lies outside its constraint")
        for value in constraint.outside():
            _check_refused(subject, name, value)


def _is_numeric(default: Any) -> bool:
    if isinstance(default, tuple | list):
        return bool(default) and all(_is_numeric(item) for item in default)
    return isinstance(default, int | float) and not isinstance(default, bool)


def _check_refused(subject: _Subject, name: str, value: Any) -> None:
    def constructor() -> None:
        subject.start(subject.problem(), **{name: value})

    def constructor_group() -> None:
        problem = subject.problem()
        subject.start(problem, [{"params": problem.parameters, name: value}])

    optimizer = subject.start(subject.problem())

    def added_group() -> None:
        optimizer.add_param_group({"params": subject.problem().parameters, name: value})

    _check_raises(name, value, "the constructor", constructor)
    if name in optimizer.defaults:
        _check_raises(name, value, "a group in the constructor", constructor_group)
        _check_raises(name, value, "add_param_group", added_group)
    _require(len(optimizer.param_groups) == 1, f"a group refused for {name}={value!r} was added all the same")


def _check_raises(name: str, value: Any, where: str, attempt: Callable[[], None]) -> None:
    try:
        attempt()
    except ValueError as error:
        message = str(error)
        complete = name in message and repr(value) in message
        _require(complete, f"the error for {name}={value!r} in {where} lacks the name or the value: {message!r}")
    else:
        raise AssertionError(f"{name}={value!r} is accepted in {where}")


def parameters_move(subject: _Subject) -> None:
    problem = subject.problem()
    before = problem.values()
    _run(problem, subject.start(problem))
    _require(_finite(problem.parameters), "a parameter is not finite after 8 steps")
    _require(not _same(before, problem.parameters), "no parameter moved in 8 steps")


def bfloat16(subject: _Subject) -> None:
    problem = subject.problem(torch.bfloat16)
    before = problem.values()
    try:
        _run(problem, subject.start(problem))
    except (TypeError, ValueError, RuntimeError) as error:
        if "bfloat16" in str(error):
            return
        raise
    _require(all(p.dtype == torch.bfloat16 for p in problem.parameters), "a bfloat16 parameter changed its dtype")
    _require(_finite(problem.parameters), "a bfloat16 parameter is not finite after 8 steps")
    _require(not _same(before, problem.parameters), "no bfloat16 parameter moved in 8 steps")


def deterministic(subject: _Subject) -> None:
    first, second = subject.problem(), subject.problem()
    random_state = torch.get_rng_state()
    _run(first, subject.start(first))
    untouched = torch.equal(random_state, torch.get_rng_state())
    _run(second, subject.start(second))
    _require(_same(first.parameters, second.parameters), "two identical runs differ")
    _require(untouched, "the global random state of torch is advanced")


def nothing_without_backward(subject: _Subject) -> None:
    problem, reference = subject.problem(), subject.problem()
    optimizer = subject.start(problem)
    before = problem.values()
    if subject.protocol in ("loss", "margins"):
        try:
            optimizer.step()
        except RuntimeError as error:
            _require("closure" in str(error), f"the error of step() without closure does not say so: {error}")
        else:
            raise AssertionError("step() without closure is accepted")
    elif subject.leaves_gradients:
        optimizer.step()
    _require(_same(before, problem.parameters), "step() before any backward changed a parameter")
    _run(problem, optimizer)
    _run(reference, subject.start(reference))
    _require(
        _same(problem.parameters, reference.parameters), "step() before any backward changed the steps that follow"
    )


def missing_gradients_left_alone(subject: _Subject) -> None:
    _check_frozen(subject)
    if not subject.leaves_gradients:
        return
    problem = subject.problem()
    optimizer = subject.start(problem)
    _run(problem, optimizer, 0, 2)
    for p in problem.parameters:
        before = problem.values()
        _backward(problem, optimizer, 2)
        p.grad = None
        optimizer.step()
        index = next(i for i, other in enumerate(problem.parameters) if other is p)
        _require(torch.equal(before[index], p.detach()), f"a parameter without gradient ({p.dim()}-D) was changed")

    late = subject.problem()
    optimizer = subject.start(late)
    absent, present = late.halves()
    before = late.values()
    for step in range(3):
        _backward(late, optimizer, step)
        for p in absent:
            p.grad = None
        optimizer.step()
    _require(_same(before[: len(absent)], absent), "a parameter that never had a gradient was changed")
    before = late.values()
    _run(late, optimizer, 3, 11)
    _require(
        not _same(before[: len(absent)], absent) or not _same(before[len(absent) :], present),
        "nothing moves after parameters had no gradient for a while",
    )
    _require(_finite(late.parameters), "a parameter whose first gradient came late is not finite")


def _check_frozen(subject: _Subject) -> None:
    problem = subject.problem()
    frozen, free = problem.halves()
    for p in frozen:
        p.requires_grad_(False)
    before = problem.values()
    _run(problem, subject.start(problem), 0, 3)
    _require(_same(before[: len(frozen)], frozen), "a parameter that does not require a gradient was changed")
    _require(not _same(before[len(frozen) :], free), "nothing moves when some parameters do not require a gradient")


def zero_gradients_finite(subject: _Subject) -> None:
    for trained in (0, 4):
        problem = subject.problem()
        optimizer = subject.start(problem)
        _run(problem, optimizer, 0, trained)
        _run(problem, optimizer, trained, trained + 3, scale=0.0)
        _require(
            _finite(problem.parameters), f"zero gradients after {trained} steps give a parameter that is not finite"
        )
        _run(problem, optimizer, trained, trained + 4)
        _require(_finite(problem.parameters), "a parameter is not finite in the steps after zero gradients")


def nonfinite_gradients(subject: _Subject) -> None:
    if not subject.leaves_gradients:
        _check_nonfinite_refused(subject)
        return
    for bad in (float("nan"), float("inf")):
        for trained in (0, 4):
            problem = subject.problem()
            optimizer = subject.start(problem)
            _run(problem, optimizer, 0, trained)
            state, before = copy.deepcopy(optimizer.state_dict()), problem.values()
            _backward(problem, optimizer, trained)
            last = problem.parameters[-1]
            assert last.grad is not None
            with torch.no_grad():
                last.grad[(0,) * last.grad.ndim] = bad
            try:
                optimizer.step()
            except FloatingPointError:
                _require(_same(before, problem.parameters), f"a gradient with {bad} was refused after parameters moved")
                # Groups without state may come to hold empty state: only numbers that were there have to stay.
                for old, new in zip(_tensors(state), _tensors(optimizer.state_dict()), strict=False):
                    _require(torch.equal(old, new), f"a gradient with {bad} was refused after the state had changed")
                continue
            poisoned = any(not _finite([t]) for t in _tensors(optimizer.state_dict()) if t.is_floating_point())
            _require(
                not poisoned or not _finite([last]),
                f"a gradient with {bad} left its mark in the state while the parameter stayed finite",
            )


def _check_nonfinite_refused(subject: _Subject) -> None:
    problem = subject.problem()
    optimizer = subject.start(problem)
    _run(problem, optimizer, 0, 4)
    before = problem.values()
    try:
        _one_step(problem, optimizer, 4, scale=float("nan"))
    except FloatingPointError:
        _require(_same(before, problem.parameters), "a value that is not finite was refused after parameters moved")
    else:
        raise AssertionError("a loss, margin or output gradient that is not finite is accepted")


def sparse_gradients(subject: _Subject) -> None:
    if not subject.leaves_gradients:
        return
    problem = subject.problem()
    weight = next(p for p in problem.parameters if p.ndim == 2)
    before = weight.detach().clone()
    optimizer = subject.start(problem)
    indices = torch.tensor([[0, 3]], device=weight.device)
    rows = torch.ones(2, weight.shape[1], device=weight.device)
    weight.grad = torch.sparse_coo_tensor(indices, rows, weight.shape, check_invariants=True)
    try:
        optimizer.step()
    except RuntimeError as error:
        _require("sparse" in str(error).lower(), f"the error for a sparse gradient does not say so: {error}")
        _require(torch.equal(before, weight.detach()), "a sparse gradient was refused after the parameter had changed")
    else:
        _require(_finite([weight]), "a sparse gradient gives a parameter that is not finite")
        _require(not torch.equal(before, weight.detach()), "a sparse gradient was accepted and had no effect")


def closure(subject: _Subject) -> None:
    if subject.protocol in ("margins", "outputs"):
        return
    problem, reference = subject.problem(), subject.problem()
    optimizer = subject.start(problem)
    evaluations: list[Tensor] = []
    step = 0

    def evaluate() -> Tensor:
        if subject.protocol == "gradients":
            optimizer.zero_grad()
        loss = problem.loss(step)
        if subject.leaves_gradients:
            _require(torch.is_grad_enabled(), "the closure runs with gradients disabled")
        if subject.protocol == "gradients":
            loss.backward()
        evaluations.append(loss.detach())
        return loss

    steps = 3
    while step < steps:
        first = len(evaluations)
        with torch.no_grad():
            returned = optimizer.step(evaluate)  # type: ignore[arg-type]  # torch's stub wants a float, its own code a tensor
        _require(len(evaluations) > first, "the closure was not called")
        _require(returned is not None, "step(closure) does not return the closure's loss")
        value, losses = float(torch.as_tensor(returned).detach()), [float(loss) for loss in evaluations[first:]]
        _require(value in losses, f"step(closure) returned {value}, the closure {losses}")
        step += 1
    if subject.leaves_gradients and len(evaluations) == steps:
        _run(reference, subject.start(reference), 0, steps)
        _require(_same(problem.parameters, reference.parameters), "step(closure) differs from backward and step()")


def maximize(subject: _Subject) -> None:
    if not subject.accepts("maximize"):
        return
    problem, negated = subject.problem(), subject.problem()
    _run(problem, subject.start(problem, maximize=False))
    _run(negated, subject.start(negated, maximize=True), scale=-1.0)
    _require(_same(problem.parameters, negated.parameters), "maximising -f differs from minimising f")


def group_learning_rate(subject: _Subject) -> None:
    lr = subject.lr()
    if lr is None or subject.refuses_group_lr(lr):
        return
    large, small = {"lr": lr}, {"lr": lr / 4}

    def after(steps: int, first: Mapping[str, float], second: Mapping[str, float]) -> tuple[Any, Any]:
        problem = subject.problem()
        _run(problem, subject.start_groups(problem, first, second), 0, steps)
        return problem.halves()

    # One step: later ones may differ where groups share statistics of gradients that depend on all parameters.
    mixed, all_large, all_small = after(1, large, small), after(1, large, large), after(1, small, small)
    _require(_same(mixed[0], all_large[0]), "the first group's step depends on the second group's lr")
    _require(_same(mixed[1], all_small[1]), "the second group does not follow its own lr")
    _require(
        not _same(after(8, large, small)[1], after(8, large, large)[1]), "the second group's own lr makes no difference"
    )
    if "weight_decay" in subject.start(subject.problem()).defaults:
        _require(
            not _same(after(8, large, {"weight_decay": 0.25})[1], after(8, large, {"weight_decay": 0.5})[1]),
            "the second group's own weight_decay makes no difference",
        )


def scheduler(subject: _Subject) -> None:
    lr = subject.lr()
    if lr is None:
        return

    def factor(step: int) -> float:
        return 1 / (1 + step)

    scheduled, written, constant = subject.problem(), subject.problem(), subject.problem()
    optimizer, other = subject.start(scheduled), subject.start(written)
    schedule = LambdaLR(optimizer, factor)
    for step in range(8):
        _run(scheduled, optimizer, step, step + 1)
        schedule.step()
        for group in other.param_groups:
            group["lr"] = lr * factor(step)
        _run(written, other, step, step + 1)
    _run(constant, subject.start(constant))
    _require(not _same(scheduled.parameters, constant.parameters), "steps do not follow the lr that a scheduler sets")
    _require(_same(scheduled.parameters, written.parameters), "a scheduler differs from writing lr into the groups")


def state_dict_round_trip(subject: _Subject) -> None:
    lr = subject.lr()
    settings: tuple[dict[str, float], dict[str, float]] = ({}, {})
    if lr is not None and not subject.refuses_group_lr(lr):
        settings = {"lr": lr}, {"lr": lr / 2}
    for dtype, steps in ((torch.float32, (0, 1, 4)), (torch.bfloat16, (4,))):
        for saved_at in steps:
            problem, fresh = subject.problem(dtype), subject.problem(dtype)
            optimizer = subject.start_groups(problem, *settings)
            _run(problem, optimizer, 0, saved_at)
            state, values = copy.deepcopy(optimizer.state_dict()), problem.values()
            _run(problem, optimizer, saved_at, 10)
            reached = problem.values()

            fresh.assign(values)
            loaded = subject.start_groups(fresh, {}, {})
            loaded.load_state_dict(copy.deepcopy(state))
            _run(fresh, loaded, saved_at, 10)
            where = f"saved after {saved_at} steps in {dtype}"
            _require(
                _same(reached, fresh.parameters), f"a fresh optimizer with the state {where} continues differently"
            )

            problem.assign(values)
            optimizer.load_state_dict(copy.deepcopy(state))
            _run(problem, optimizer, saved_at, 10)
            _require(_same(reached, problem.parameters), f"the same optimizer, set back to the state {where}, differs")


def state_dict_saved_safely(subject: _Subject) -> None:
    problem, fresh = subject.problem(), subject.problem()
    optimizer = subject.start(problem)
    _run(problem, optimizer, 0, 4)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "model": problem.values()}, file)
    _run(problem, optimizer, 4, 10)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh.assign(saved["model"])
    loaded = subject.start(fresh)
    loaded.load_state_dict(saved["optimizer"])
    _run(fresh, loaded, 4, 10)
    _require(
        _same(problem.parameters, fresh.parameters), "the run continues differently after torch.save and torch.load"
    )


def copies(subject: _Subject) -> None:
    problem = subject.problem()
    optimizer = subject.start(problem)
    _run(problem, optimizer, 0, 4)
    duplicates = {"a deep copy": copy.deepcopy((problem, optimizer))}
    if _can_pickle(subject.hyperparameters):
        duplicates["a pickled copy"] = pickle.loads(pickle.dumps((problem, optimizer)))  # noqa: S301  # our own bytes
    _run(problem, optimizer, 4, 10)
    for name, (its_problem, its_optimizer) in duplicates.items():
        _run(its_problem, its_optimizer, 4, 10)
        _require(_same(problem.parameters, its_problem.parameters), f"{name} continues differently")


def _can_pickle(hyperparameters: Mapping[str, Any]) -> bool:
    try:
        pickle.dumps(dict(hyperparameters))
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def add_param_group(subject: _Subject) -> None:
    problem, resumed = subject.problem(), subject.problem()
    first, last = problem.halves()
    optimizer = subject.start(problem, first)
    _run(problem, optimizer, 0, 3)
    optimizer.zero_grad()
    optimizer.add_param_group({"params": last})
    before = [p.detach().clone() for p in last]
    _run(problem, optimizer, 3, 8)
    _require(_finite(problem.parameters), "a parameter is not finite after a group was added")
    _require(not _same(before, last), "the parameters of an added group do not move")
    state, values = copy.deepcopy(optimizer.state_dict()), problem.values()
    _run(problem, optimizer, 8, 12)

    resumed.assign(values)
    first, last = resumed.halves()
    optimizer = subject.start(resumed, [{"params": first}, {"params": last}])
    optimizer.load_state_dict(state)
    _run(resumed, optimizer, 8, 12)
    _require(_same(problem.parameters, resumed.parameters), "a run with an added group does not resume the same")


def memory_bounded(subject: _Subject) -> None:
    problem = subject.problem()
    optimizer = subject.start(problem)

    def window(first: int) -> list[tuple[int, int]]:
        """State bytes and live tensors after each of four steps."""
        seen = []
        for step in range(first, first + 4):
            _run(problem, optimizer, step, step + 1)
            optimizer.zero_grad()
            seen.append((_state_bytes(optimizer), _live_tensors()))
        return seen

    _run(problem, optimizer, 0, 8)
    with _older_objects_set_aside():
        early = window(8)
        _run(problem, optimizer, 12, 32)
        late = window(32)
    # State may breathe (another subspace, another block); it has grown when even its low tide tops the old high tide.
    for index, what in enumerate(("bytes of state", "live tensors")):
        before, after = max(seen[index] for seen in early), min(seen[index] for seen in late)
        _require(after <= before, f"{before} {what} after 12 steps have become {after} after 36")


def _state_bytes(optimizer: Optimizer) -> int:
    return sum(t.numel() * t.element_size() for t in _tensors(optimizer.state_dict()))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


@contextmanager
def _older_objects_set_aside() -> Iterator[None]:
    """Keeps the garbage collector from walking over all that existed before: seconds in a process with many modules."""
    if gc.get_freeze_count():  # somebody else's frozen objects would be released with ours
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _live_tensors() -> int:
    gc.collect()
    # By type: isinstance() would ask lazy proxies of other libraries for their __class__ and load them.
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def evaluation_point(subject: _Subject) -> None:
    problem, reference, resumed = subject.problem(), subject.problem(), subject.problem()
    optimizer: Any = subject.start(problem)
    has = [callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")]
    if not any(has):
        return
    _require(all(has), "train() and eval() come together")
    _run(reference, subject.start(reference))

    optimizer.eval()
    optimizer.train()
    _run(problem, optimizer, 0, 4)
    training = problem.values()
    optimizer.train()
    _require(_same(training, problem.parameters), "train() in training mode changes the parameters")
    optimizer.eval()
    evaluation = problem.values()
    optimizer.eval()
    _require(_same(evaluation, problem.parameters), "a second eval() changes the parameters")
    try:
        optimizer.step()
    except RuntimeError:
        pass
    else:
        raise AssertionError("step() in evaluation mode is accepted")
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.train()
    _require(_same(training, problem.parameters), "eval() and train() do not lead back to the training point")
    _run(problem, optimizer, 4, 8)
    _require(_same(problem.parameters, reference.parameters), "a run that was switched to eval() and back differs")

    resumed.assign(evaluation)
    optimizer = subject.start(resumed)
    optimizer.load_state_dict(state)
    optimizer.train()
    _run(resumed, optimizer, 4, 8)
    _require(_same(resumed.parameters, reference.parameters), "a run saved in evaluation mode resumes differently")


CLAUSES: tuple[Callable[[_Subject], None], ...] = (
    hyperparameters_validated,
    parameters_move,
    bfloat16,
    deterministic,
    nothing_without_backward,
    missing_gradients_left_alone,
    zero_gradients_finite,
    nonfinite_gradients,
    sparse_gradients,
    closure,
    maximize,
    group_learning_rate,
    scheduler,
    state_dict_round_trip,
    state_dict_saved_safely,
    copies,
    add_param_group,
    memory_bounded,
    evaluation_point,
)
