"""The contract of a batch schedule: a batch size that grows during a run, by a ramp or by a test.

`check_batch_schedule` builds the class again and again, drives it as a training loop would, with random
statistics and progress, and holds what it does against the clauses below, one function each. A clause
that fails raises `AssertionError` with its name.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch

__all__ = ["CLAUSES", "check_batch_schedule"]

STEPS = 40
SEEDS = 5
ATTRIBUTES = ("size", "split", "lr_factor", "needs")
METHODS = ("due", "update", "advance", "state_dict", "load_state_dict")


def check_batch_schedule(make: Callable[..., Any], /, **arguments: Any) -> None:
    """Check that a class keeps the contract of a batch schedule (`headway.schedules.BatchSchedule`).

    The clauses, in the order in which they are checked:

    1. `interface`: the attributes `size`, `split`, `lr_factor` and `needs` and the methods `due`, `update`, `advance`,
       `state_dict` and `load_state_dict` are there; `size` starts at `initial`.
    2. `arguments_validated`: each numeric argument of the constructor has an entry in `constraints`, and every value
       outside is refused by a `ValueError` with its name and the value; so is a `max_batch` below `initial`.
    3. `size_within_bounds`: under random statistics and progress `size` is a whole number in [initial, max_batch].
    4. `never_shrinks`: nor when progress goes back.
    5. `grows`: pure noise and a whole budget bring it nearer to `max_batch`, where there is one.
    6. `multiple_of`: where the constructor has it, `size` is a multiple of it.
    7. `split_covers_size`: `split`, which `update` returns, is (micro, accumulation, total) with total = world_size *
       micro * accumulation, size <= total < size + world_size * accumulation, and micro <= max_micro_batch.
    8. `asks_no_more_at_the_end`: `due` returns a bool, and False at `max_batch`.
    9. `deterministic`: two schedules given the same do the same, and draw nothing from the global random state.
    10. `state_dict_resumes`: a state saved in mid-run and sent through JSON goes on exactly.
    11. `state_dict_is_a_snapshot`: later steps do not change it, and it is not kept by the one that loads it.
    12. `nonfinite_statistics_skipped`: with a warning, and as if they had not come; where statistics are asked for.
    13. `lr_factor_positive`: finite and > 0 throughout.

    Args:
        make: the class; or a function that returns a schedule, where clause 2 has nothing to go by.
        **arguments: passed to every construction. `initial` (16) and `max_batch` (512) are filled in where `make`
            has them and they are not given.

    Raises:
        AssertionError: names the class, the first clause broken, and what was seen.

    >>> class Fixed:
    ...     def __init__(self, initial, max_batch): self.size = initial
    >>> check_batch_schedule(Fixed)
    Traceback (most recent call last):
    ...
    AssertionError: Fixed breaks the clause 'interface': there is no split
    """
    subject = _Subject(make, arguments)
    for clause in CLAUSES:
        try:
            clause(subject)
        except Exception as error:
            seen = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            broken = f"{getattr(make, '__name__', repr(make))} breaks the clause '{clause.__name__}'"
            raise AssertionError(f"{broken}: {seen}") from error


class _Statistics(NamedTuple):
    """The fields of `headway.schedules.NoiseStats`."""

    batch: int
    var_l1: float
    grad_sq: float
    var_ip: float | None = None
    var_orth: float | None = None
    var_coord_ratio: float | None = None


class _Event(NamedTuple):
    """What happens at a step: the progress, and the noise in relation to the gradient."""

    progress: float
    noise: float
    grad_sq: float
    along: float  # share of the variance that lies along the gradient


class _Seen(NamedTuple):
    size: int
    split: tuple[int, int, int]
    lr_factor: float


@dataclass
class _Subject:
    """The class under test and how to build it."""

    make: Callable[..., Any]
    arguments: Mapping[str, Any]
    parameters: Mapping[str, inspect.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = inspect.signature(self.make).parameters

    def settings(self, **overrides: Any) -> dict[str, Any]:
        known = {name: value for name, value in {"initial": 16, "max_batch": 512}.items() if name in self.parameters}
        return {**known, **self.arguments, **overrides}

    def build(self, **overrides: Any) -> Any:
        return self.make(**self.settings(**overrides))

    def bounds(self) -> tuple[float, float]:
        settings = self.settings()
        return settings.get("initial", 1), settings.get("max_batch", math.inf)

    def runs(self, **overrides: Any) -> Iterator[tuple[Any, list[_Seen]]]:
        """Schedules with what they did under several random runs; overrides the constructor lacks are left out."""
        present = {name: value for name, value in overrides.items() if name in self.parameters}
        for seed in range(SEEDS):
            schedule = self.build(**present)
            yield schedule, _drive(schedule, _events(seed))


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def _events(seed: int, steps: int = STEPS) -> list[_Event]:
    """A run whose noise grows from little to much, with outliers; its progress steps back now and then."""
    generator = random.Random(seed)
    events = []
    for step in range(steps):
        progress = max(0.0, (step + 1) / steps - 0.1 * (generator.random() < 0.2))
        noise = 10 ** (generator.gauss(0.0, 0.7) + 4 * step / steps - 1)
        events.append(_Event(progress, noise, 10 ** generator.gauss(-1.0, 1.0), generator.random()))
    return events


def _statistics(schedule: Any, event: _Event) -> _Statistics:
    variance = event.noise * event.grad_sq
    batch = schedule.split[2]
    if schedule.needs == "chunks":
        return _Statistics(batch, variance, event.grad_sq)
    along = event.along * variance
    return _Statistics(batch, variance, event.grad_sq, along * event.grad_sq, variance - along, 3 * event.noise)


def _drive(schedule: Any, events: Sequence[_Event], first: int = 0) -> list[_Seen]:
    """As a training loop does: statistics where they are due."""
    seen = []
    for step, event in enumerate(events, start=first):
        schedule.advance(event.progress)
        if schedule.due(step):
            schedule.update(_statistics(schedule, event))
        seen.append(_look(schedule))
    return seen


def _look(schedule: Any) -> _Seen:
    return _Seen(schedule.size, tuple(schedule.split), schedule.lr_factor)


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


# The clauses, in the order in which they are checked.


def interface(subject: _Subject) -> None:
    schedule = subject.build()
    for name in (*ATTRIBUTES, *METHODS):
        _require(hasattr(schedule, name), f"there is no {name}")
    for name in METHODS:
        _require(callable(getattr(schedule, name)), f"{name} cannot be called")
    known = ("chunks", "samples", "nothing")
    _require(schedule.needs in known, f"needs is {schedule.needs!r}, expected one of {known}")
    initial = subject.settings().get("initial", schedule.size)
    _require(schedule.size == initial, f"size is {schedule.size} at the start, expected initial = {initial}")


def arguments_validated(subject: _Subject) -> None:
    constraints = getattr(subject.make, "constraints", None)
    if constraints is None:
        return
    for name, parameter in subject.parameters.items():
        numeric = _is_numeric(parameter.default) or name in ("initial", "max_batch")
        _require(not numeric or name in constraints, f"the numeric argument {name} has no entry in `constraints`")
    for name, constraint in constraints.items():
        _require(name in subject.parameters, f"`constraints` names {name}, which the constructor does not take")
        for value in constraint.outside():
            _check_refused(subject, name, value, {name: value})
    if {"initial", "max_batch"} <= set(subject.parameters):
        initial = subject.settings()["initial"]
        _check_refused(subject, "max_batch", initial // 2, {"max_batch": initial // 2})


def _is_numeric(default: Any) -> bool:
    if isinstance(default, tuple | list):
        return bool(default) and all(_is_numeric(item) for item in default)
    return isinstance(default, int | float) and not isinstance(default, bool)


def _check_refused(subject: _Subject, name: str, value: Any, overrides: Mapping[str, Any]) -> None:
    try:
        subject.build(**overrides)
    except ValueError as error:
        message = str(error)
        _require(name in message and repr(value) in message, f"the error for {name}={value!r} lacks name or value")
    else:
        raise AssertionError(f"{name}={value!r} is accepted")


def size_within_bounds(subject: _Subject) -> None:
    low, high = subject.bounds()
    for _, seen in subject.runs():
        for size in (each.size for each in seen):
            _require(_is_whole(size), f"size is {size!r}, which is not a whole number")
            _require(low <= size <= high, f"size is {size}, outside [{low}, {high}]")


def never_shrinks(subject: _Subject) -> None:
    for schedule, seen in subject.runs():
        before = schedule.size
        schedule.advance(0.0)
        sizes = [*(each.size for each in seen), schedule.size]
        for old, new in pairwise(sizes):
            _require(new >= old, f"size went from {old} to {new}")
        if schedule.due(0):
            schedule.update(_statistics(schedule, _Event(0.0, 1e-9, 1.0, 0.5)))
        _require(schedule.size >= before, f"size went from {before} to {schedule.size} when there was no noise")


def grows(subject: _Subject) -> None:
    if "max_batch" not in subject.settings():
        return
    schedule = subject.build()
    start = schedule.size
    _drive(schedule, [_Event((step + 1) / STEPS, 1e9, 1.0, 0.5) for step in range(STEPS)])
    _require(schedule.size > start, f"size is {schedule.size} after a whole run of pure noise, as at the start")


def multiple_of(subject: _Subject) -> None:
    low, high = subject.bounds()
    if "multiple_of" in subject.arguments or "multiple_of" not in subject.parameters or high == math.inf:
        multiples = {subject.arguments.get("multiple_of", 1)}
    else:
        multiples = {1, math.gcd(int(low), int(high))}
    for multiple in multiples:
        for _, seen in subject.runs(multiple_of=multiple):
            for each in seen:
                _require(each.size % multiple == 0, f"size is {each.size} with multiple_of={multiple}")


def split_covers_size(subject: _Subject) -> None:
    for world, most in ((1, None), (1, 5), (3, 7), (4, 1)):
        for schedule, seen in subject.runs(world_size=world, max_micro_batch=most):
            ranks = world if "world_size" in subject.parameters else subject.arguments.get("world_size", 1)
            limit = most if "max_micro_batch" in subject.parameters else subject.arguments.get("max_micro_batch")
            for each in seen:
                _check_split(each, ranks, limit)
            returned = schedule.update(_statistics(schedule, _Event(1.0, 1.0, 1.0, 0.5)))
            _require(tuple(returned) == tuple(schedule.split), f"update returns {returned}, split is {schedule.split}")


def _check_split(seen: _Seen, ranks: int, limit: int | None) -> None:
    size, (micro, accumulation, total), _ = seen
    text = f"the split of {size} over {ranks} ranks is {seen.split}"
    _require(min(micro, accumulation) >= 1, text)
    _require(total == ranks * micro * accumulation, f"{text}, whose total is not its product")
    _require(size <= total < size + ranks * accumulation, f"{text}, which does not cover it with little excess")
    _require(limit is None or micro <= limit, f"{text}, with max_micro_batch={limit}")


def asks_no_more_at_the_end(subject: _Subject) -> None:
    _, high = subject.bounds()
    schedule = subject.build()
    _require(isinstance(schedule.due(0), bool), f"due(0) is {schedule.due(0)!r}, expected a bool")
    _drive(schedule, [_Event((step + 1) / STEPS, 1e9, 1.0, 0.5) for step in range(STEPS)])
    if schedule.size == high:
        asked = [step for step in range(STEPS) if schedule.due(step)]
        _require(not asked, f"at max_batch due is still True, for step {asked[:1]}")


def deterministic(subject: _Subject) -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    first = [seen for _, seen in subject.runs()]
    second = [seen for _, seen in subject.runs()]
    untouched = torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    _require(first == second, "two schedules given the same differ")
    _require(untouched, "the global random state is advanced")


def state_dict_resumes(subject: _Subject) -> None:
    for seed in range(SEEDS):
        events = _events(seed)
        for stop in (0, 1, STEPS // 3, STEPS // 2, STEPS - 1):
            schedule = subject.build()
            _drive(schedule, events[:stop])
            state = schedule.state_dict()
            carried = json.loads(json.dumps(state))
            _require(carried == state, f"the state_dict is not what JSON gives back: {state}")
            resumed = subject.build()
            resumed.load_state_dict(carried)
            at = f"resumed at step {stop}"
            _require(_look(resumed) == _look(schedule), f"{at}: {_look(resumed)} instead of {_look(schedule)}")
            expected, got = (_drive(each, events[stop:], stop) for each in (schedule, resumed))
            _require(got == expected, f"{at}, the run goes on differently")


def state_dict_is_a_snapshot(subject: _Subject) -> None:
    events = _events(0)
    schedule, resumed = subject.build(), subject.build()
    _drive(schedule, events[: STEPS // 2])
    state = schedule.state_dict()
    before = copy.deepcopy(state)
    resumed.load_state_dict(state)
    for each in (schedule, resumed):
        _drive(each, events[STEPS // 2 :], STEPS // 2)
        _require(state == before, "a state_dict has changed in later steps")


def nonfinite_statistics_skipped(subject: _Subject) -> None:
    for bad in (math.nan, math.inf):
        schedule, reference = subject.build(), subject.build()
        events = _events(0)
        for step, event in enumerate(events):
            if schedule.due(step):
                _check_skipped(schedule, bad)
            _drive(schedule, [event], step)
            _drive(reference, [event], step)
            _require(_look(schedule) == _look(reference), f"after statistics of {bad} the run goes on differently")


def _check_skipped(schedule: Any, bad: float) -> None:
    before = _look(schedule)
    stats = _statistics(schedule, _Event(0.0, 1.0, 1.0, 0.5))
    spoilt = [bad if value is not None else None for value in stats[1:]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        schedule.update(_Statistics(stats.batch, bad, bad, *spoilt[2:]))
    _require(bool(caught), f"statistics of {bad} raise no warning")
    _require(_look(schedule) == before, f"statistics of {bad} change {before} to {_look(schedule)}")


def lr_factor_positive(subject: _Subject) -> None:
    for _, seen in subject.runs():
        for each in seen:
            factor = each.lr_factor
            _require(math.isfinite(factor) and factor > 0, f"lr_factor is {factor} at size {each.size}")


CLAUSES: tuple[Callable[[_Subject], None], ...] = (
    interface,
    arguments_validated,
    size_within_bounds,
    never_shrinks,
    grows,
    multiple_of,
    split_covers_size,
    asks_no_more_at_the_end,
    deterministic,
    state_dict_resumes,
    state_dict_is_a_snapshot,
    nonfinite_statistics_skipped,
    lr_factor_positive,
)
