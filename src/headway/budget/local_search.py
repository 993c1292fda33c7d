"""Hyper-parameters tuned jointly on a grid, down to a point that none of its neighbours beats.

Source: "Pre-training under infinite compute", Kim, Kotha, Liang, Hashimoto, arXiv 2509.14786.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Protocol

from headway.constraints import Constraint, Range, check_arguments

__all__ = ["RECIPE_GRIDS", "LocalSearch", "SearchResult"]

#: The grids of the paper's search; the optima at 200M tokens were 8-16 epochs, lr 0.001-0.003, decay 0.8-3.2.
RECIPE_GRIDS: Mapping[str, Sequence[float]] = {
    "lr": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "weight_decay": (0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4),
    "epochs": (1, 2, 4, 8, 16, 32, 64),
}


class Evaluate(Protocol):
    """Hyper-parameters by name in, validation loss out."""

    def __call__(self, **point: Any) -> float: ...


@dataclass(frozen=True)
class SearchResult:
    """The `best` point and its `loss`; `certificate`: the losses of its neighbours; `history`: all evaluations.

    `certified` says that every neighbour was evaluated and none is better: a local optimum of the grid.
    """

    best: dict[str, Any]
    loss: float
    certified: bool
    certificate: list[tuple[dict[str, Any], float]]
    history: list[tuple[dict[str, Any], float]]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain values."""
        lists = {name: [[point, loss] for point, loss in getattr(self, name)] for name in ("certificate", "history")}
        return {"best": self.best, "loss": self.loss, "certified": self.certified, **lists}


class LocalSearch:
    """Coordinate descent on a grid that ends with a certificate of local optimality.

    One coordinate after the other goes step by step to the better neighbour; the search ends at a point none of whose
    neighbours (one step in one coordinate) has a lower loss. Every point is evaluated once. The end is the global
    minimum of the grid for a loss that is convex in every coordinate without interaction; otherwise start elsewhere
    to see.

    Args:
        grids: name -> increasing values, at least one.
        evaluate: called with a point as keyword arguments; returns its validation loss. NaN counts as infinite.
        known: evaluations already made, as in `SearchResult.history`; they are not made again.
        max_evaluations: stop after this many calls of `evaluate`, without a certificate if it needs more. Default
            None: no limit.

    Raises:
        ValueError: an empty or unordered grid, max_evaluations < 1, or a point that is not on the grids.

    Source: arXiv 2509.14786: neighbours and certificate. The order of the steps is ours.

    >>> search = LocalSearch({"lr": [1, 2, 3], "decay": [1, 2, 3]}, lambda lr, decay: (lr - 3) ** 2 + (decay - 2) ** 2)
    >>> result = search.run({"lr": 1, "decay": 1})
    >>> result.best, result.certified, len(result.certificate)
    ({'lr': 3, 'decay': 2}, True, 3)
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {"max_evaluations": Range(low=1, integer=True, optional=True)}

    def __init__(
        self,
        grids: Mapping[str, Sequence[Any]],
        evaluate: Evaluate,
        *,
        known: Iterable[tuple[Mapping[str, Any], float]] = (),
        max_evaluations: int | None = None,
    ) -> None:
        check_arguments(self.constraints, max_evaluations=max_evaluations)
        self.grids = {name: list(values) for name, values in grids.items()}
        if not self.grids:
            raise ValueError("grids must name at least one coordinate, got none")
        for name, values in self.grids.items():
            if not values or any(not a < b for a, b in pairwise(values)):
                raise ValueError(f"grids[{name!r}] must hold increasing values, got {values}")
        self.evaluate = evaluate
        self.max_evaluations = max_evaluations
        # Where each point stands on the grids -> its loss, in the order of evaluation.
        self._losses = {self._index(point): _ordered(loss) for point, loss in known}
        self._calls = 0

    def run(self, start: Mapping[str, Any]) -> SearchResult:
        """Search from `start`, a value of every grid."""
        place = self._index(start)
        self._calls = 0
        axis = settled = 0
        while settled < len(place):
            lower = next((near for near in self._neighbours(place, axis) if self._loss(near) < self._loss(place)), None)
            if lower is None:
                axis, settled = (axis + 1) % len(place), settled + 1
            else:
                place, settled = lower, 0
        around = [near for axis in range(len(place)) for near in self._neighbours(place, axis)]
        certificate = [(self._point(near), self._losses[near]) for near in around if near in self._losses]
        loss = self._loss(place)
        certified = len(certificate) == len(around) and math.isfinite(loss)
        history = [(self._point(index), value) for index, value in self._losses.items()]
        return SearchResult(self._point(place), loss, certified, certificate, history)

    def _index(self, point: Mapping[str, Any]) -> tuple[int, ...]:
        if set(point) != set(self.grids):
            raise ValueError(f"a point must name {sorted(self.grids)}, got {sorted(point)}")
        for name, values in self.grids.items():
            if point[name] not in values:
                raise ValueError(f"{name} must be one of the grid {values}, got {point[name]!r}")
        return tuple(values.index(point[name]) for name, values in self.grids.items())

    def _point(self, index: Sequence[int]) -> dict[str, Any]:
        return {name: values[i] for i, (name, values) in zip(index, self.grids.items(), strict=True)}

    def _neighbours(self, place: tuple[int, ...], axis: int) -> list[tuple[int, ...]]:
        size = len(list(self.grids.values())[axis])
        steps = (place[axis] + 1, place[axis] - 1)
        return [(*place[:axis], step, *place[axis + 1 :]) for step in steps if 0 <= step < size]

    def _loss(self, index: tuple[int, ...]) -> float:
        """The loss at a grid point, evaluated at most once; infinite, and not kept, when the calls are spent."""
        if index not in self._losses:
            if self._calls == self.max_evaluations:
                return math.inf
            self._calls += 1
            self._losses[index] = _ordered(self.evaluate(**self._point(index)))
        return self._losses[index]


def _ordered(loss: float) -> float:
    return math.inf if math.isnan(loss) else float(loss)
