import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.budget.one_epoch import PowerLaw, plan_one_epoch, speedup, transformer_shape
from headway.testing.planners import check_planner

ITERS = np.arange(1, 1001)


def noisy(a=3.0, s=0.4, c=0.0, noise=0.02, seed=0, count=1000):
    i = np.arange(1, count + 1)
    return i, (c + a * i**-s) * np.exp(noise * np.random.default_rng(seed).standard_normal(count))


def test_plan_keeps_the_contract_of_a_planner():
    check_planner(plan_one_epoch, predict=(15e6, 13_500), predict_arguments={"iterations": 65_000})


@pytest.mark.parametrize("floor", [False, True, "auto"])
def test_power_law_keeps_the_contract_of_a_planner(floor):
    i, losses = noisy(c=1.0, count=200)
    data = (i.astype(float), losses)
    check_planner(PowerLaw, fit=data, predict=(np.array([50.0, 5000.0]),), arguments={"floor": floor})


# OneEpochPlan

SIZES = st.floats(1e4, 1e11)


@settings(max_examples=50, deadline=None)
@given(params=SIZES, batch=st.floats(1, 1e6), iterations=st.floats(1e3, 1e7), ratio=st.floats(0.5, 100))
def test_compute_is_kept_and_the_ratio_reached_and_a_second_plan_changes_nothing(params, batch, iterations, ratio):
    if math.sqrt(iterations * batch * ratio * params) / batch < 1:  # fewer iterations than one
        return
    plan = plan_one_epoch(params, batch, iterations=iterations, ratio=ratio)
    assert plan.params * plan.tokens == pytest.approx(params * iterations * batch, rel=1e-9)
    assert plan.ratio == pytest.approx(ratio, rel=1e-9)
    assert plan.multiplier == pytest.approx(math.sqrt(iterations * batch / (ratio * params)), rel=1e-9)
    assert plan.compute_ratio == pytest.approx(1, abs=0.5 / plan.iterations + 1e-9)
    again = plan_one_epoch(plan.params, batch, iterations=plan.tokens / batch, ratio=ratio)
    assert again.multiplier == pytest.approx(1, rel=1e-9)


def test_worked_example():
    plan = plan_one_epoch(15e6, 13_500, iterations=65_000)
    assert plan.multiplier == pytest.approx(math.sqrt(58.5 / 5), rel=1e-12)
    assert plan.params == pytest.approx(5.131e7, rel=1e-4)
    assert plan.iterations == 19_003
    assert plan.tokens == pytest.approx(2.565e8, rel=1e-3)
    assert plan.ratio == pytest.approx(5.0)
    assert (plan.epochs, plan.dropout) == (1.0, 0.0)


def test_multiplier_grows_as_the_root_of_tokens_and_falls_as_the_root_of_parameters():
    base = plan_one_epoch(1e7, 1000, iterations=1e5).multiplier
    assert plan_one_epoch(1e7, 1000, iterations=4e5).multiplier == pytest.approx(2 * base)
    assert plan_one_epoch(4e7, 1000, iterations=1e5).multiplier == pytest.approx(base / 2)


def test_a_run_at_the_ratio_stays_as_it_is():
    plan = plan_one_epoch(1e6, 100, iterations=50_000)
    assert plan.multiplier == 1.0
    assert (plan.params, plan.iterations) == (1e6, 50_000)


def test_epochs_are_replaced_by_unique_tokens_at_the_same_iterations():
    plan = plan_one_epoch(1e6, 100, dataset_tokens=1e6, epochs=10, ratio=None)
    assert plan.iterations == 10 * 1e6 / 100
    assert plan.unique_tokens == 10 * 1e6
    assert (plan.multiplier, plan.compute_ratio, plan.epochs) == (1.0, 1.0, 1.0)


def test_epochs_and_their_iterations_give_the_same_plan():
    assert plan_one_epoch(1e6, 100, dataset_tokens=1e6, epochs=10) == plan_one_epoch(1e6, 100, iterations=1e5)


def test_named_ratios():
    assert plan_one_epoch(1e6, 100, iterations=1e6, ratio="komatsuzaki").ratio == pytest.approx(5)
    assert plan_one_epoch(1e6, 100, iterations=1e6, ratio="chinchilla").ratio == pytest.approx(20)


def test_time_in_proportion_to_the_parameters_gives_the_plan_without_it():
    timed = plan_one_epoch(15e6, 13_500, iterations=65_000, time_per_iter=lambda params: 1e-9 * params)
    assert timed.multiplier == pytest.approx(math.sqrt(58.5 / 5), rel=1e-9)
    assert timed.compute_ratio == pytest.approx(1, abs=1e-4)


def test_measured_time_is_kept_and_the_ratio_reached():
    def seconds(params):
        return 0.01 + 1e-9 * params

    plan = plan_one_epoch(15e6, 13_500, iterations=65_000, time_per_iter=seconds)
    assert seconds(plan.params) * plan.tokens / 13_500 == pytest.approx(seconds(15e6) * 65_000, rel=1e-9)
    assert plan.tokens / plan.params == pytest.approx(5, rel=1e-9)
    assert plan.multiplier > math.sqrt(58.5 / 5)  # a larger model is cheaper than in proportion


def test_missing_tokens_are_refused_or_reported():
    needed = plan_one_epoch(15e6, 13_500, iterations=65_000).tokens
    with pytest.raises(ValueError, match=r"available_tokens must be >= 2.56539e\+08 for one epoch"):
        plan_one_epoch(15e6, 13_500, iterations=65_000, available_tokens=needed / 2)
    twice = plan_one_epoch(15e6, 13_500, iterations=65_000, available_tokens=needed / 2, strict=False)
    assert twice.epochs == pytest.approx(2)
    assert twice.unique_tokens == needed / 2
    assert twice.dropout is None
    with pytest.warns(UserWarning, match="repeats its data 5 times"):
        plan_one_epoch(15e6, 13_500, iterations=65_000, available_tokens=needed / 5, strict=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": 0}, "params must be > 0, got 0"),
        ({"tokens_per_iter": -1}, "tokens_per_iter must be > 0, got -1"),
        ({"iterations": 0}, "iterations must be > 0"),
        ({"ratio": 0}, "ratio must be > 0"),
        ({"ratio": "galileo"}, "ratio must be one of 'komatsuzaki', 'chinchilla'"),
        ({"iterations": None}, "give either iterations or epochs"),
        ({"epochs": 2, "dataset_tokens": 1e6}, "give either iterations or epochs"),
        ({"dataset_tokens": 1e6}, "epochs and dataset_tokens go together"),
        ({"iterations": None, "epochs": 2}, "epochs and dataset_tokens go together"),
        ({"iterations": 1e-9}, "at least 1 is needed"),
        ({"time_per_iter": lambda params: -1.0}, "time_per_iter must return seconds > 0"),
        ({"time_per_iter": lambda params: params**-2.0}, "time_per_iter allows no size"),
    ],
    ids=[
        "params",
        "batch",
        "iterations",
        "ratio",
        "ratio-name",
        "neither",
        "both",
        "tokens-alone",
        "epochs-alone",
        "too-few",
        "time-sign",
        "time-falls",
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    arguments = {"params": 1e6, "tokens_per_iter": 100, "iterations": 1000} | changes
    with pytest.raises(ValueError, match=message):
        plan_one_epoch(**arguments)


# Shape


@pytest.mark.parametrize("multiplier", [0.1, 0.7, 1.0, 3.42, 50.0])
def test_shape_reports_the_parameters_it_has(multiplier):
    shape = transformer_shape(12, 768, multiplier)
    assert shape.width == 64 * shape.heads
    assert shape.params == 12 * shape.layers * shape.width**2
    assert shape.multiplier == shape.params / (12 * 12 * 768**2)
    assert shape.multiplier == pytest.approx(multiplier, rel=0.15)


def test_shape_keeps_depth_over_width():
    shape = transformer_shape(12, 768, 64.0)
    assert (shape.layers, shape.width) == (48, 4 * 768)


def test_shape_refuses_a_width_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="width must be a multiple of head_size = 64, got 100"):
        transformer_shape(4, 100, 2.0)


# Power law


@pytest.mark.parametrize("c", [0.0, 1.7])
def test_clean_losses_give_the_law_back(c):
    law = PowerLaw(floor=c > 0).fit(ITERS, c + 3 * ITERS**-0.4)
    assert (law.a_, law.s_, law.c_) == pytest.approx((3, 0.4, c), rel=1e-6)


def test_many_points_are_averaged_without_moving_the_law():
    i = np.arange(1, 50_001)
    law = PowerLaw(floor=True).fit(i, 1.7 + 3 * i**-0.4)
    assert law.predict(1e6) == pytest.approx(1.7 + 3 * 1e6**-0.4, rel=1e-5)


def test_iterations_to_inverts_predict():
    law = PowerLaw(floor=True).fit(*noisy(c=1.0))
    for iterations in (20.0, 1000.0, 1e5):
        assert law.iterations_to(law.predict(iterations)) == pytest.approx(iterations, rel=1e-9)
    assert law.iterations_to(law.c_ / 2) == math.inf


def test_auto_fits_a_floor_only_where_there_is_one():
    with_floor = PowerLaw(floor="auto").fit(*noisy(s=0.6, c=2.0, noise=0.005))
    assert with_floor.floor_
    assert with_floor.c_ == pytest.approx(2.0, rel=0.05)
    clean = 3 * ITERS**-0.4
    without = PowerLaw(floor="auto").fit(ITERS, clean)
    assert without.predict(1e5) == pytest.approx(3 * 1e5**-0.4, rel=1e-4)


def test_law_without_floor_underestimates_late_losses():
    plain = PowerLaw().fit(ITERS, 2 + 3 * ITERS**-0.5)
    assert plain.predict(1e6) < 2


def test_start_of_training_is_left_out():
    losses = 3 * ITERS**-0.4
    losses[:99] = 50.0
    assert PowerLaw().fit(ITERS, losses).a_ == pytest.approx(3, rel=1e-6)


def test_order_of_the_points_is_irrelevant():
    i, losses = noisy()
    shuffled = np.random.default_rng(1).permutation(len(i))
    assert PowerLaw().fit(i, losses).to_dict() == PowerLaw().fit(i[shuffled], losses[shuffled]).to_dict()


def test_intervals_hold_the_law_about_as_often_as_they_say():
    held = []
    for seed in range(20):
        low, high = PowerLaw().fit(*noisy(noise=0.05, seed=seed, count=200)).interval([100.0, 1e4], level=0.9)
        truth = 3 * np.array([100.0, 1e4]) ** -0.4
        held += ((low <= truth) & (truth <= high)).tolist()
    assert 0.75 <= np.mean(held) <= 1


def test_interval_of_a_number_is_two_numbers_and_survives_plain_values():
    law = PowerLaw(floor=True).fit(*noisy(c=1.0))
    again = PowerLaw.from_dict(json.loads(json.dumps(law.to_dict())))
    assert all(isinstance(end, float) for end in law.interval(1e4))
    assert again.interval(1e4) == law.interval(1e4)


def test_rising_losses_and_too_few_are_refused():
    with pytest.raises(ValueError, match="iters must hold at least 8 values, got 3"):
        PowerLaw().fit([1, 2, 3], [3, 2, 1])
    with pytest.raises(ValueError, match="at least 8 values after the discarded start, got 1"):
        PowerLaw().fit([*range(1, 9), 1000], np.ones(9))
    with pytest.raises(ValueError, match="losses must be > 0, got 0 at position 9"):
        PowerLaw().fit(range(1, 11), [1.0] * 9 + [0.0])
    with pytest.raises(ValueError, match="losses must fall"):
        PowerLaw(floor=True).fit(ITERS, 5 + 0.001 * ITERS)
    with pytest.raises(ValueError, match="iters must be finite and > 0, got 0"):
        PowerLaw().fit(*noisy()).predict(0)


def test_speedup_is_the_ratio_of_compute_to_the_same_loss():
    slow, fast = PowerLaw().fit(ITERS, 3 * ITERS**-0.5), PowerLaw().fit(ITERS, 1.5 * ITERS**-0.5)
    assert speedup(slow, fast) == pytest.approx(4)
    assert speedup(fast, slow, at_loss=0.5) == pytest.approx(1 / 4)
    stuck = PowerLaw(floor=True).fit(ITERS, 1 + 3 * ITERS**-0.5)
    assert speedup(stuck, fast, at_loss=0.5) == math.inf
    assert speedup(fast, stuck, at_loss=0.5) == 0
    with pytest.raises(ValueError, match=r"at_loss must be reached by one of the curves, got 0\.5"):
        speedup(stuck, stuck, at_loss=0.5)
    with pytest.raises(RuntimeError, match="PowerLaw has not been fitted"):
        speedup(PowerLaw(), fast)


def test_training_loss_on_fresh_data_estimates_the_test_loss():
    generator = torch.Generator().manual_seed(0)
    truth, model = torch.randn(8, 3, generator=generator), torch.randn(8, 3, generator=generator)

    def losses(count):
        x = torch.randn(count, 8, generator=generator)
        y = torch.multinomial((x @ truth).softmax(1), 1, generator=generator).squeeze(1)
        return torch.nn.functional.cross_entropy(x @ model, y, reduction="none")

    fresh, test = losses(20_000), losses(20_000)
    error = math.sqrt(float(fresh.var() + test.var()) / 20_000)
    assert abs(float(fresh.mean() - test.mean())) < 3 * error
