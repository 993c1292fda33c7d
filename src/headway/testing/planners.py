"""The contract of a planner: a fitted object (`fit`, `predict`, `interval`, `panels`) or a function.

`check_planner` holds what it does against the clauses below, one function each. A clause that fails
raises `AssertionError` with its name.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Number
from typing import Any

import numpy as np

from headway.plots import Panel

__all__ = ["check_planner"]


def check_planner(
    planner: Callable[..., Any],
    *,
    fit: Sequence[Any] | None = None,
    predict: Sequence[Any] = (),
    arguments: Mapping[str, Any] | None = None,
    predict_arguments: Mapping[str, Any] | None = None,
) -> None:
    """Check that a planner keeps the contract of its role.

    The clauses, for a class with `fit`: every argument of the constructor with a constraint refuses
    the values outside it with a one-line `ValueError` that names argument and value; `predict` before
    `fit` raises `RuntimeError` that says "fit"; `fit` returns the object itself and leaves the data
    alone; fitted attributes end in an underscore; the same data give the same prediction, with global
    random generators neither read nor moved; a second `fit` forgets the first; `interval` brackets
    `predict`; `panels` is a non-empty list of `headway.plots.Panel`; `to_dict` goes through JSON and
    `from_dict` predicts the same; data with a NaN are refused with a `ValueError`.

    For a function or a plain class with another method (`planner` is then the bound call): the same
    arguments give the same result, the arguments are left alone, and the result is a number, or its
    `to_dict` goes through JSON.

    Args:
        planner: a class whose constructor takes options only, or a function.
        fit: the arguments of `fit`, for a class that has it.
        predict: the arguments of `predict`, or of the function.
        arguments: options for the constructor. Default: none.
        predict_arguments: keyword arguments of `predict`, or of the function. Default: none.

    Raises:
        AssertionError: a clause does not hold; the message names planner and clause.

    >>> check_planner(lambda tokens, params: tokens / params, predict=(1e6, 1e5))
    """
    subject = _Subject(planner, fit, tuple(predict), arguments or {}, predict_arguments or {})
    fitted = inspect.isclass(planner) and hasattr(planner, "fit")
    for clause in _FITTED if fitted else _FUNCTION:
        try:
            clause(subject)
        except Exception as error:
            detail = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            name = clause.__name__.removeprefix("_").replace("_", " ")
            raise AssertionError(
                f"{getattr(planner, '__name__', planner)} breaks the clause '{name}': {detail}"
            ) from error


@dataclass
class _Subject:
    planner: Any
    fit: Sequence[Any] | None
    arguments_of_predict: tuple[Any, ...]
    arguments: Mapping[str, Any]
    keywords_of_predict: Mapping[str, Any]

    def fitted(self) -> Any:
        assert self.fit is not None, "check_planner needs fit=(...), the arguments of fit"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.planner(**self.arguments).fit(*copy.deepcopy(list(self.fit)))

    def predict(self, planner: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return planner.predict(*copy.deepcopy(self.arguments_of_predict), **self.keywords_of_predict)

    def call(self, *arguments: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.planner(*arguments, **self.arguments, **self.keywords_of_predict)


def _plain(value: Any) -> Any:
    """A value in a form that can be compared: arrays as lists, objects as their fields."""
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _same(a: Any, b: Any) -> bool:
    return bool(repr(_plain(a)) == repr(_plain(b)))


def _refusal(kind: type[Exception], call: Callable[[], Any]) -> str:
    """The one-line message of the exception of this kind that `call` raises, or empty."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except kind as error:
        text = str(error)
    else:
        return ""
    assert "\n" not in text, f"the message has more than one line: {text}"
    return text


def _bad_arguments_are_refused(subject: _Subject) -> None:
    constraints = getattr(subject.planner, "constraints", {})
    known = inspect.signature(subject.planner).parameters
    for name, constraint in constraints.items():
        assert name in known, f"constraints names {name!r}, which the constructor does not take"
        for value in constraint.outside():
            text = _refusal(ValueError, partial(subject.planner, **{**subject.arguments, name: value}))
            assert text, f"{name} = {value!r} is accepted"
            assert name in text, f"the message for {name} = {value!r} does not name it: {text}"


def _prediction_needs_a_fit(subject: _Subject) -> None:
    text = _refusal(RuntimeError, lambda: subject.predict(subject.planner(**subject.arguments)))
    assert text, "predict before fit does not raise RuntimeError"
    assert "fit" in text, f"the message does not say what to do: {text}"


def _fit_returns_the_object(subject: _Subject) -> None:
    planner = subject.planner(**subject.arguments)
    before = set(vars(planner))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert planner.fit(*copy.deepcopy(list(subject.fit or ()))) is planner, "fit does not return self"
    new = {name for name in set(vars(planner)) - before if not name.startswith("_")}
    wrong = sorted(name for name in new if not name.endswith("_"))
    assert not wrong, f"attributes that fit sets must end in an underscore: {wrong}"


def _data_are_left_alone(subject: _Subject) -> None:
    data = copy.deepcopy(list(subject.fit or ()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planner = subject.planner(**subject.arguments).fit(*data)
    assert _same(data, list(subject.fit or ())), "fit changes its arguments"
    first = subject.predict(planner)
    for item in data:
        if isinstance(item, np.ndarray):
            item[:] = -7
    assert _same(subject.predict(planner), first), "the object keeps the caller's arrays"


def _the_same_data_give_the_same_prediction(subject: _Subject) -> None:
    random.seed(1)
    np.random.seed(1)
    first = subject.predict(subject.fitted())
    state = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    random.seed(2)
    np.random.seed(2)
    planner = subject.fitted()
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert _same(subject.predict(planner), first), "two fits of the same data predict differently"
    after = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    assert before == after, "predict moves a global random generator"
    random.seed(1)
    np.random.seed(1)
    assert state == (random.getstate(), np.random.get_state()[1].tolist()), (  # type: ignore[index]
        "fit moves a global random generator"
    )


def _a_second_fit_forgets_the_first(subject: _Subject) -> None:
    planner = subject.fitted()
    first = subject.predict(planner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planner.fit(*copy.deepcopy(list(subject.fit or ())))
    assert _same(subject.predict(planner), first), "fit on the same data again predicts differently"


def _the_interval_brackets_the_prediction(subject: _Subject) -> None:
    planner = subject.fitted()
    value = np.asarray(subject.predict(planner), dtype=float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = copy.deepcopy(subject.arguments_of_predict)
        low, high = (
            np.asarray(side, dtype=float) for side in planner.interval(*arguments, **subject.keywords_of_predict)
        )
        assert low.shape == value.shape, f"interval has shape {low.shape}, predict {value.shape}"
        slack = 1e-9 * np.maximum(1.0, np.abs(value))
        assert (low <= value + slack).all(), "the lower end lies above the prediction"
        assert (value <= high + slack).all(), "the upper end lies below the prediction"
        for level in (0.0, 1.0, -1.0, math.nan):
            text = _refusal(
                ValueError, partial(planner.interval, *arguments, **{**subject.keywords_of_predict, "level": level})
            )
            assert text, f"level = {level} is accepted"
            assert "level" in text, f"the message for level = {level} does not name it: {text}"


def _panels_can_be_drawn(subject: _Subject) -> None:
    panels = subject.fitted().panels()
    assert isinstance(panels, list), f"panels() must be a list, got {type(panels).__name__}"
    assert panels, "panels() is empty"
    assert all(isinstance(panel, Panel) for panel in panels), "panels() must hold headway.plots.Panel only"
    assert all(panel.curves for panel in panels), "a panel has no curve"


def _plain_values_hold_the_fit(subject: _Subject) -> None:
    planner = subject.fitted()
    again = subject.planner.from_dict(json.loads(json.dumps(planner.to_dict(), allow_nan=False)))
    assert _same(subject.predict(again), subject.predict(planner)), "from_dict(to_dict()) predicts differently"


def _nan_is_refused(subject: _Subject) -> None:
    data = copy.deepcopy(list(subject.fit or ()))
    spoiled = _spoil(data)
    if spoiled is None:
        return
    refused = _refusal(ValueError, lambda: subject.planner(**subject.arguments).fit(*spoiled))
    assert refused, "data with a NaN are accepted"


def _spoil(data: Any) -> Any:
    """The data with NaN in the last sequence of numbers found; None if there is none."""
    if isinstance(data, np.ndarray) and data.dtype.kind == "f" and data.size:
        data = data.copy()
        data.flat[data.size // 2] = math.nan
        return data
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        for spec in reversed(dataclasses.fields(data)):
            spoiled = _spoil(getattr(data, spec.name))
            if spoiled is not None:
                changed = copy.copy(data)
                object.__setattr__(changed, spec.name, spoiled)
                return changed
        return None
    if isinstance(data, Mapping):
        for key in reversed(list(data)):
            spoiled = _spoil(data[key])
            if spoiled is not None:
                return {**data, key: spoiled}
        return None
    if isinstance(data, list | tuple) and data:
        items = list(data)
        if all(isinstance(item, float) for item in items):
            items[len(items) // 2] = math.nan
            return items
        for index in reversed(range(len(items))):
            spoiled = _spoil(items[index])
            if spoiled is not None:
                items[index] = spoiled
                return items
    return None


def _the_same_arguments_give_the_same_result(subject: _Subject) -> None:
    arguments = copy.deepcopy(subject.arguments_of_predict)
    first = _plain(subject.call(*arguments))
    assert _same(list(arguments), list(subject.arguments_of_predict)), "the arguments are changed"
    assert _same(subject.call(*copy.deepcopy(arguments)), first), "a second call gives another result"


def _the_result_is_plain(subject: _Subject) -> None:
    result = subject.call(*copy.deepcopy(subject.arguments_of_predict))
    if isinstance(result, Number):
        return
    assert hasattr(result, "to_dict") or dataclasses.is_dataclass(result) or isinstance(result, list | dict | tuple), (
        f"the result must be a number, plain values or have to_dict, got {type(result).__name__}"
    )
    json.dumps(_plain(result))


_FITTED = (
    _bad_arguments_are_refused,
    _prediction_needs_a_fit,
    _fit_returns_the_object,
    _data_are_left_alone,
    _the_same_data_give_the_same_prediction,
    _a_second_fit_forgets_the_first,
    _the_interval_brackets_the_prediction,
    _panels_can_be_drawn,
    _plain_values_hold_the_fit,
    _nan_is_refused,
)
_FUNCTION = (_the_same_arguments_give_the_same_result, _the_result_is_plain)
