import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.driven import run, sgd

from headway.schedules import REXLR, LinearLR, rex_profile

unit = st.floats(0, 1)
betas = st.floats(0, 0.99)


@given(beta=betas)
def test_profile_runs_from_one_to_zero(beta):
    assert rex_profile(0.0, beta) == pytest.approx(1, abs=1e-15)
    assert rex_profile(1.0, beta) == 0


@given(beta=st.floats(0.01, 0.99))
def test_profile_is_strictly_decreasing_concave_and_above_linear(beta):
    z = torch.linspace(0, 1, 201, dtype=torch.float64)
    p = rex_profile(z, beta)
    slopes = p.diff()
    assert bool((slopes < 0).all())
    assert bool((slopes.diff() < 0).all())
    assert bool((p >= 1 - z - 1e-15).all())


@given(z=unit, beta=betas)
def test_profile_is_its_own_inverse(z, beta):
    assert rex_profile(rex_profile(z, beta), beta) == pytest.approx(z, abs=1e-12)


def test_largest_gap_to_linear_is_at_two_minus_root_two():
    z = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    gap = rex_profile(z) - (1 - z)
    at = float(z[gap.argmax()])
    assert at == pytest.approx(2 - math.sqrt(2), abs=1e-5)
    assert float(gap.max()) == pytest.approx(3 - 2 * math.sqrt(2), abs=1e-9)
    assert rex_profile(2 - math.sqrt(2)) == pytest.approx(2 - math.sqrt(2), abs=1e-15)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_mean_rate_has_the_closed_form(beta):
    z = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    expected = 1 / beta + (1 - beta) * math.log(1 - beta) / beta**2
    assert float(torch.trapezoid(rex_profile(z, beta), z)) == pytest.approx(expected, abs=1e-8)
    if beta == 0.5:
        assert expected == pytest.approx(2 * (1 - math.log(2)), abs=1e-12)


def test_hand_computed_rates():
    assert run(REXLR(sgd(), 4), 6) == pytest.approx([1, 6 / 7, 2 / 3, 2 / 5, 0, 0])
    assert run(REXLR(sgd(), 4, beta=0.9), 4) == pytest.approx([1, 0.75 / 0.775, 0.5 / 0.55, 0.25 / 0.325])


def test_the_last_training_step_is_small_but_not_zero():
    assert REXLR(sgd(), 100).lr_at(99)[0] == pytest.approx(0.01 / 0.505)


def test_beta_zero_equals_linear_here_and_in_torch():
    theirs = torch.optim.lr_scheduler.LinearLR(sgd(0.3), start_factor=1, end_factor=0, total_iters=50)
    rates = run(REXLR(sgd(0.3), 50, beta=0.0), 51)
    assert rates == run(LinearLR(sgd(0.3), 50), 51)
    assert rates == pytest.approx(run(theirs, 51), abs=1e-12)


def test_beta_near_one_is_constant_with_a_drop_at_the_end():
    schedule = REXLR(sgd(), 100, beta=1 - 1e-9)
    assert [schedule.lr_at(t)[0] for t in range(100)] == pytest.approx([1.0] * 100, abs=1e-6)
    assert schedule.lr_at(100) == [0.0]


def test_rates_do_not_depend_on_how_steps_are_split_into_epochs():
    once = run(REXLR(sgd(), 24), 24)
    schedule = REXLR(sgd(), 24)
    assert [rate for _ in range(4) for rate in run(schedule, 6)] == once


def test_closed_form_equals_chained_to_the_bit_and_resumes_exactly():
    schedule = REXLR(sgd(), 40, warmup_steps=7, lr_min=0.01)
    rates = run(schedule, 40)
    assert rates == [schedule.lr_at(t)[0] for t in range(40)]
    first = REXLR(sgd(), 40, warmup_steps=7, lr_min=0.01)
    run(first, 25)
    resumed = REXLR(sgd(), 40, warmup_steps=7, lr_min=0.01)
    resumed.load_state_dict(first.state_dict())
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    assert run(resumed, 15) == rates[25:]


def test_three_sampling_points_give_three_values():
    rates = run(REXLR(sgd(), 100, sampling=(0, 0.5, 0.75)), 100)
    assert sorted(set(rates), reverse=True) == [1.0, rex_profile(0.5), rex_profile(0.75)]


def test_warm_up_then_profile_of_the_rest():
    schedule = REXLR(sgd(), 30, warmup_steps=10)
    assert [schedule.lr_at(t)[0] for t in range(10)] == pytest.approx([t / 10 for t in range(10)])
    assert schedule.lr_at(10) == [1.0]
    assert schedule.lr_at(20)[0] == rex_profile(0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps must be a whole number >= 1, got 0"),
        ({"total_steps": 10, "beta": 1.0}, r"beta must be in \[0, 1\), got 1.0"),
        ({"total_steps": 10, "beta": -0.1}, r"beta must be in \[0, 1\), got -0.1"),
        ({"total_steps": 10, "warmup_steps": 10}, "warmup_steps must be < total_steps = 10, got 10"),
        ({"total_steps": 10, "lr_min": 2.0}, "lr_min must be <= the smallest base lr = 1, got 2.0"),
        ({"total_steps": 10, "sampling": (0.5, 0.25)}, "sampling must be"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        REXLR(sgd(), **arguments)


def test_profile_refuses_beta_one():
    with pytest.raises(ValueError, match="beta must be"):
        rex_profile(0.5, beta=1.0)
