import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.driven import run, sgd

from headway.schedules import ConstantLR, CosineLR, LinearLR, ProfileLR
from headway.schedules.profile import PROFILES, DelayedLinear, Exponential, Increasing, Step


def test_rate_of_step_t_is_the_profile_at_t_over_total():
    assert run(LinearLR(sgd(2.0), 4), 4) == [2.0, 1.5, 1.0, 0.5]


def test_past_the_end_the_rate_is_the_floor():
    assert run(LinearLR(sgd(2.0), 4, lr_min=0.3), 7)[4:] == [0.3, 0.3, 0.3]
    assert run(CosineLR(sgd(2.0), 4), 7)[4:] == [0.0, 0.0, 0.0]


def test_floor_and_peak_are_reached_without_rounding():
    for lr_min in (0.013, 0.07, 0.3):
        schedule = CosineLR(sgd(0.3), 10, lr_min=lr_min)
        assert schedule.lr_at(0) == [0.3]
        assert schedule.lr_at(10) == [lr_min]


def test_cosine_equals_torch():
    ours, theirs = sgd(0.8), sgd(0.8)
    expected = run(torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 50, eta_min=0.1), 51)
    assert run(CosineLR(ours, 50, lr_min=0.1), 51) == pytest.approx(expected, rel=1e-9)


def test_exponential_equals_torch():
    expected = run(torch.optim.lr_scheduler.ExponentialLR(sgd(0.8), math.exp(-3 / 50)), 50)
    assert run(ProfileLR(sgd(0.8), "exponential", 50), 50) == pytest.approx(expected, rel=1e-9)


def test_step_equals_torch_multistep():
    expected = run(torch.optim.lr_scheduler.MultiStepLR(sgd(0.8), [50, 75], gamma=0.1), 100)
    assert run(ProfileLR(sgd(0.8), "step", 100), 100) == pytest.approx(expected, rel=1e-9)


def test_warm_up_equals_torch_linear_from_the_start_rate():
    expected = run(torch.optim.lr_scheduler.LinearLR(sgd(0.8), start_factor=0.25, total_iters=10), 20)
    assert run(ConstantLR(sgd(0.8), warmup_steps=10, warmup_start=0.2), 20) == pytest.approx(expected, rel=1e-9)


def test_warm_up_shifts_the_profile_into_the_rest_of_the_budget():
    warm = LinearLR(sgd(), 30, warmup_steps=10)
    plain = LinearLR(sgd(), 20)
    assert [warm.lr_at(t + 10) for t in range(21)] == [plain.lr_at(t) for t in range(21)]


def test_delayed_linear_is_constant_then_linear():
    profile = DelayedLinear(0.2)
    assert [profile(z) for z in (0.0, 0.1, 0.2)] == [1.0, 1.0, 1.0]
    assert profile(0.6) == pytest.approx(0.5)
    assert profile(1.0) == 0.0
    assert DelayedLinear(0.0)(0.25) == 0.75


def test_constant_needs_no_total_and_ignores_one():
    assert run(ConstantLR(sgd(0.3)), 50) == run(ConstantLR(sgd(0.3), total_steps=5), 50) == [0.3] * 50


@pytest.mark.parametrize("points", [(0.0, 0.5, 0.75), (0.5, 0.75)])
def test_sampling_holds_the_rate_between_points_and_always_reads_at_zero(points):
    rates = run(LinearLR(sgd(), 100, sampling=points), 100)
    assert rates == [1.0] * 50 + [0.5] * 25 + [0.25] * 25


def test_sampling_every_tenth_reads_at_the_exact_step_despite_rounding():
    rates = run(LinearLR(sgd(), 30, sampling=[0.1 * i for i in range(10)]), 30)
    assert rates == pytest.approx([1 - (t // 3) / 10 for t in range(30)])


@given(total=st.integers(1, 200), tenth=st.integers(0, 9), name=st.sampled_from(sorted(PROFILES)))
def test_sampled_rate_equals_the_last_sampled_iteration_rate(total, tenth, name):
    points = [i / 10 for i in range(tenth + 1)]
    sampled = ProfileLR(sgd(), name, total, sampling=points)
    for t in range(total):
        point = max(i for i in range(tenth + 1) if i * total <= 10 * t) / 10
        assert sampled.lr_at(t)[0] == pytest.approx(PROFILES[name](point), rel=1e-9)


@given(
    total=st.integers(1, 100),
    warmup=st.integers(0, 99),
    ratio=st.floats(0, 1),
    name=st.sampled_from(sorted(PROFILES)),
)
def test_rates_lie_between_floor_and_peak(total, warmup, ratio, name):
    warmup = min(warmup, total - 1)
    schedule = ProfileLR(sgd(0.7, 0.1), name, total, warmup_steps=warmup, lr_min_ratio=ratio)
    for t in range(warmup, total + 3):
        for base, rate in zip((0.7, 0.1), schedule.lr_at(t), strict=True):
            assert ratio * base * (1 - 1e-12) <= rate <= base * (1 + 1e-12)


def test_a_ratio_floor_is_proportional_to_each_base_rate_and_an_absolute_one_is_not():
    assert LinearLR(sgd(1.0, 0.5), 10, lr_min_ratio=0.1).lr_at(10) == [0.1, 0.05]
    assert LinearLR(sgd(1.0, 0.5), 10, lr_min=0.1).lr_at(10) == [0.1, 0.1]


def test_lr_at_changes_nothing():
    schedule = LinearLR(sgd(), 10)
    schedule.lr_at(7)
    assert schedule.last_epoch == 0
    assert schedule.optimizer.param_groups[0]["lr"] == 1.0


def test_a_group_added_later_is_refused_with_the_way_out():
    optimizer = sgd()
    schedule = LinearLR(optimizer, 10)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    optimizer.step()
    with pytest.raises(ValueError, match="2 parameter groups, the schedule was built for 1: build a new schedule"):
        schedule.step()


def test_the_profile_is_not_part_of_the_state():
    assert "profile" not in LinearLR(sgd(), 10).state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 10, "warmup_steps": 10}, "warmup_steps must be < total_steps = 10, got 10"),
        ({"total_steps": 10, "lr_min": 1.5}, "lr_min must be <= the smallest base lr = 1, got 1.5"),
        ({"total_steps": 10, "warmup_start": 1.5}, "warmup_start must be <= the smallest base lr = 1, got 1.5"),
        ({"total_steps": 10, "lr_min": 0.1, "lr_min_ratio": 0.1}, "lr_min_ratio must be None when lr_min = 0.1"),
        ({"total_steps": 10, "sampling": (0.5, 0.5)}, "sampling must be 'iteration' or a strictly increasing"),
        ({"total_steps": 10, "sampling": (0.5, 1.0)}, "sampling must be"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearLR(sgd(), **arguments)


def test_a_profile_that_goes_negative_is_reported_with_the_step():
    schedule = ProfileLR(sgd(), lambda z: 0.5 - z, 10)
    assert schedule.lr_at(5) == [0.0]
    with pytest.raises(ValueError, match=r"profile must return finite values >= 0, got -0.09.* for step 6"):
        schedule.lr_at(6)


def test_not_an_optimizer_is_a_type_error():
    with pytest.raises(TypeError, match="not an Optimizer"):
        LinearLR([1.0], 10)


def test_profile_parameters_are_checked():
    with pytest.raises(ValueError, match="gamma must be < 0, got 1"):
        Exponential(1)
    with pytest.raises(ValueError, match="delay must be in"):
        DelayedLinear(1.0)
    with pytest.raises(ValueError, match="at must be"):
        Step(at=(0.7, 0.5))


def test_increasing_accepts_what_it_describes_and_nothing_of_outside():
    whole = Increasing(low=1, integer=True)
    assert whole.accepts([1, 2, 5])
    assert whole.accepts((3,))
    assert not any(whole.accepts(value) for value in whole.outside())
    points = Increasing(low=0, high=1, high_open=True, word="iteration")
    assert points.accepts("iteration")
    assert points.accepts([0, 0.5])
    assert not any(points.accepts(value) for value in points.outside())
