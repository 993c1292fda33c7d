import math
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.budget.local_search import RECIPE_GRIDS, LocalSearch
from headway.testing.planners import check_planner

GRIDS = {name: list(values) for name, values in RECIPE_GRIDS.items()}
START = {"lr": 3e-2, "weight_decay": 0.0, "epochs": 1}


def bowl(at, weights=(1.0, 1.0, 1.0)):
    """A convex loss in the logarithms of the coordinates, with its minimum at `at`."""

    def evaluate(lr, weight_decay, epochs):
        point = math.log(lr), math.log(weight_decay + 0.1), math.log(epochs)
        return sum(w * (value - target) ** 2 for w, value, target in zip(weights, point, at, strict=True))

    return evaluate


@settings(deadline=None, max_examples=50)
@given(
    at=st.tuples(st.floats(-10, -3), st.floats(-3, 2), st.floats(-1, 5)),
    start=st.tuples(*(st.sampled_from(values) for values in GRIDS.values())),
)
def test_a_convex_loss_ends_at_the_global_minimum_of_the_grid_with_a_certificate(at, start):
    evaluate = bowl(at)
    result = LocalSearch(GRIDS, evaluate).run(dict(zip(GRIDS, start, strict=True)))
    least = min(evaluate(*values) for values in product(*GRIDS.values()))
    assert result.loss == least == evaluate(**result.best)
    assert result.certified


def test_certificate_holds_all_neighbours_and_none_is_better():
    result = LocalSearch(GRIDS, bowl((math.log(3e-3), math.log(0.9), math.log(8)))).run(START)
    assert result.best == {"lr": 3e-3, "weight_decay": 0.8, "epochs": 8}
    assert len(result.certificate) == 6
    for point, loss in result.certificate:
        assert sum(point[name] != result.best[name] for name in GRIDS) == 1
        assert loss >= result.loss


def test_no_point_is_evaluated_twice_not_even_in_a_second_run():
    calls = []

    def evaluate(**point):
        calls.append(tuple(point.values()))
        return bowl((-6, 0, 2))(**point)

    search = LocalSearch(GRIDS, evaluate)
    first = search.run(START)
    assert len(calls) == len(set(calls)) == len(first.history)
    assert len(calls) < 30 < len(list(product(*GRIDS.values())))
    search.run(START)
    assert len(calls) == len(first.history)


def test_known_evaluations_continue_a_search_where_it_stopped():
    evaluate = bowl((-6, 0, 2))
    whole = LocalSearch(GRIDS, evaluate).run(START)
    part = LocalSearch(GRIDS, evaluate, max_evaluations=5).run(START)
    assert not part.certified
    assert len(part.history) == 5
    rest = LocalSearch(GRIDS, evaluate, known=part.history).run(START)
    assert rest == whole


def test_a_local_minimum_is_certified_though_not_global():
    losses = {1: 1.0, 2: 2.0, 3: 0.0}
    search = LocalSearch({"x": [1, 2, 3]}, lambda x: losses[x])
    assert search.run({"x": 1}).best == {"x": 1}
    assert search.run({"x": 1}).certified
    assert search.run({"x": 3}).best == {"x": 3}


def test_equal_losses_do_not_move_the_search():
    result = LocalSearch(GRIDS, lambda **point: 1.0).run(START)
    assert result.best == START
    assert result.certified


def test_a_diverged_run_counts_as_infinite_and_is_never_certified():
    result = LocalSearch({"lr": [1, 2, 3]}, lambda lr: math.nan if lr > 1 else 0.5).run({"lr": 3})
    assert result.loss == math.inf
    assert not result.certified
    search = LocalSearch({"lr": [1, 2, 3]}, lambda lr: 0.5 * lr, known=[({"lr": 3}, math.nan)])
    assert search.run({"lr": 3}).best == {"lr": 1}
    result = LocalSearch({"lr": [1, 2, 3]}, lambda lr: math.nan if lr > 2 else 0.5 * lr).run({"lr": 3})
    assert result.best == {"lr": 1}
    assert result.certified


def test_the_search_is_a_planner_with_a_plain_result():
    check_planner(LocalSearch(GRIDS, bowl((-6, 0, 2))).run, predict=(START,))


def test_wrong_grids_points_and_limits_are_refused():
    with pytest.raises(ValueError, match="grids must name at least one coordinate"):
        LocalSearch({}, lambda: 0.0)
    with pytest.raises(ValueError, match=r"grids\['x'\] must hold increasing values, got \[2, 1\]"):
        LocalSearch({"x": [2, 1]}, lambda x: 0.0)
    with pytest.raises(ValueError, match=r"x must be one of the grid \[1, 2\], got 3"):
        LocalSearch({"x": [1, 2]}, lambda x: 0.0).run({"x": 3})
    with pytest.raises(ValueError, match=r"a point must name \['x'\], got \['y'\]"):
        LocalSearch({"x": [1, 2]}, lambda x: 0.0).run({"y": 1})
    with pytest.raises(ValueError, match="max_evaluations must be"):
        LocalSearch({"x": [1, 2]}, lambda x: 0.0, max_evaluations=0)
