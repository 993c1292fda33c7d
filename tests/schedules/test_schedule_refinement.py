import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.driven import run, sgd

from headway.schedules.gradient_norms import GradNormRecorder
from headway.schedules.profile import LinearLR
from headway.schedules.schedule_refinement import (
    ArrayLR,
    RefinedLR,
    last_iterate_bound,
    linear_decay,
    refine_schedule,
)
from headway.testing import check_schedule

T = np.arange(200)
NORMS = (2 + 3 * np.exp(-T / 20) + 0.3 * np.sin(7.0 * T)).tolist()  # large at first
norm_lists = st.lists(st.floats(0.1, 10), min_size=2, max_size=60)
kinds = st.sampled_from(["l2", "l1"])
windows = st.floats(0, 0.49)


def metrics(path, norms):
    lines = (json.dumps({"step": step, "grad_norm": norm}) + "\n" for step, norm in enumerate(norms, start=1))
    path.write_text("".join(lines))


@pytest.mark.parametrize(
    "arguments",
    [{}, {"norms": NORMS}, {"norms": NORMS, "norm": "l1", "warmup_steps": 5, "final": 0.1}],
    ids=["nothing known", "norms", "warm-up and floor"],
)
def test_contract(arguments):
    check_schedule(RefinedLR, **arguments)


def test_contract_of_a_given_array():
    check_schedule(ArrayLR, multipliers=np.linspace(1, 0.1, 50).tolist())


# the formula


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("length", [2, 3, 100, 5000])
def test_constant_norms_give_linear_decay(norm, length):
    s = refine_schedule([3.0] * length, norm=norm)
    np.testing.assert_allclose(s, (length - np.arange(1, length + 1)) / (length - 1), atol=1e-12, rtol=0)


@given(norms=norm_lists, norm=kinds)
def test_without_smoothing_it_is_the_closed_form_in_its_own_scale(norms, norm):
    w = np.array(norms) ** (-2.0 if norm == "l2" else -1.0)
    expected = [w[t] * w[t + 1 :].sum() / w.sum() for t in range(len(w))]
    eta = refine_schedule(norms, norm=norm, smoothing=0, normalize=False)
    np.testing.assert_allclose(eta, expected, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(refine_schedule(norms, norm=norm, smoothing=0), eta / eta.max(), rtol=1e-9, atol=1e-15)


def test_values_computed_by_hand():
    assert refine_schedule([1.0, 0.5], smoothing=0).tolist() == [1.0, 0.0]
    # w = 1, 4, 1 of sum 6: eta = 1 * 5/6, 4 * 1/6, 0
    assert refine_schedule([2.0, 1.0, 2.0], smoothing=0, normalize=False) == pytest.approx([5 / 24, 1 / 6, 0])


@given(norms=norm_lists, norm=kinds, smoothing=windows)
def test_values_lie_between_zero_and_one_reach_one_and_end_at_zero(norms, norm, smoothing):
    s = refine_schedule(norms, norm=norm, smoothing=smoothing)
    assert s.shape == (len(norms),)
    assert s.dtype == np.float64
    assert s.min() >= 0
    assert s.max() == 1
    assert s[-1] == 0


@given(norms=norm_lists, norm=kinds, smoothing=windows, scale=st.floats(1e-8, 1e8))
def test_scaling_all_norms_changes_nothing(norms, norm, smoothing, scale):
    scaled = refine_schedule([scale * value for value in norms], norm=norm, smoothing=smoothing)
    np.testing.assert_allclose(scaled, refine_schedule(norms, norm=norm, smoothing=smoothing), rtol=1e-9, atol=1e-12)


@given(norms=norm_lists, smoothing=windows)
def test_l1_on_norms_is_l2_on_their_square_roots(norms, smoothing):
    # A median of an odd number of values commutes with the root.
    roots = refine_schedule(np.sqrt(norms), norm="l2", smoothing=smoothing)
    np.testing.assert_allclose(roots, refine_schedule(norms, norm="l1", smoothing=smoothing), rtol=1e-9, atol=1e-12)


def test_large_norms_early_give_a_warm_up():
    s = refine_schedule(NORMS)
    assert s[0] < 0.3
    assert 10 < s.argmax() < 100


def test_norms_growing_at_the_end_give_a_faster_decay_than_linear():
    norms = np.where(T < 150, 1.0, 1 + (T - 150) / 10)
    s = refine_schedule(norms)
    assert (s[160:-1] < (1 - T / 199)[160:-1]).all()


def test_a_single_spike_changes_next_to_nothing_when_smoothed():
    quiet = 2 + 3 * np.exp(-T / 20) + 0.05 * np.sin(7.0 * T)
    spiked = np.where(T == 120, 100 * quiet, quiet)

    def largest_change(smoothing):
        return np.abs(refine_schedule(spiked, smoothing=smoothing) - refine_schedule(quiet, smoothing=smoothing)).max()

    assert largest_change(0.1) <= 0.02
    assert largest_change(0.0) > 0.3


def test_the_median_extends_the_start_and_reflects_the_end():
    # Width 3 of 20 values: at the start the window is 5 5 1, at the end 1 9 1.
    norms = [5.0, *[1.0] * 18, 9.0]
    expected = refine_schedule([5.0, *[1.0] * 19], smoothing=0)
    np.testing.assert_allclose(refine_schedule(norms, smoothing=0.1), expected, rtol=1e-12)


def test_norms_that_are_not_finite_are_filled_in():
    broken = [1.0, math.nan, 3.0, math.inf, 5.0]
    whole = refine_schedule([1.0, 2.0, 3.0, 4.0, 5.0], smoothing=0)
    np.testing.assert_array_equal(refine_schedule(broken, smoothing=0), whole)


def test_the_largest_weight_may_be_beyond_all_numbers():
    assert refine_schedule([1e-200, 1e-200, 1e-200], smoothing=0).tolist() == [1.0, 0.5, 0.0]
    assert refine_schedule([1.0, 1e-160, 1e-160], smoothing=0) == pytest.approx([0, 1, 0], abs=1e-300)
    with pytest.raises(ValueError, match="norms must span fewer orders of magnitude, got values from 1e-200 to 1"):
        refine_schedule([1.0, 1.0, 1e-200], smoothing=0)


# lengths


@given(norms=norm_lists, norm=kinds)
def test_resampling_to_the_same_length_is_the_identity(norms, norm):
    same = refine_schedule(norms, norm=norm, length=len(norms))
    np.testing.assert_array_equal(same, refine_schedule(norms, norm=norm))


@pytest.mark.parametrize("length", [1, 2, 7, 199, 1000])
def test_another_length_keeps_first_and_last_and_reaches_one(length):
    s = refine_schedule(NORMS, length=length)
    assert len(s) == length
    assert s.max() == 1
    if length > 1:
        assert s[-1] == 0


def test_linear_stays_linear_at_every_length():
    np.testing.assert_allclose(refine_schedule([1.0] * 40, length=7), np.linspace(1, 0, 7), atol=1e-12)


def test_the_input_is_not_changed_and_arrays_and_tensors_do():
    array = np.array(NORMS)
    expected = refine_schedule(NORMS)
    np.testing.assert_array_equal(refine_schedule(array), expected)
    np.testing.assert_array_equal(array, NORMS)
    np.testing.assert_array_equal(refine_schedule(torch.tensor(NORMS, dtype=torch.float64)), expected)


@pytest.mark.parametrize(
    ("norms", "options", "message"),
    [
        ([1.0], {}, r"norms must hold at least 2 finite numbers, got \[1.0\]"),
        ([1.0, -2.0], {}, r"norms must be > 0, got -2 at position 1 of \[1.0, -2.0\]"),
        ([1.0, 2.0], {"smoothing": 0.5}, r"smoothing must be in \[0, 0.5\), got 0.5"),
        ([1.0, 2.0], {"norm": "linf"}, "norm must be one of 'l2', 'l1', got 'linf'"),
        ([1.0, 2.0], {"length": 0}, "length must be a whole number >= 1 or None, got 0"),
    ],
    ids=["one", "negative", "smoothing", "norm", "length"],
)
def test_bad_arguments_are_refused(norms, options, message):
    with pytest.raises(ValueError, match=message):
        refine_schedule(norms, **options)


# linear decay and the bound


def test_linear_decay_is_the_linear_schedule_of_the_package():
    schedule = LinearLR(sgd(), 30, warmup_steps=7)
    assert linear_decay(30, warmup=7) == pytest.approx([schedule.lr_at(t)[0] for t in range(30)], abs=1e-15)
    assert linear_decay(1).tolist() == [1.0]
    with pytest.raises(ValueError, match="warmup must be < total_steps = 3, got 3"):
        linear_decay(3, warmup=3)


def test_the_bound_of_equal_norms_is_distance_times_norm_over_root_steps():
    assert last_iterate_bound([2.0] * 400, distance=3.0) == pytest.approx(3 * 2 / 20)
    with pytest.raises(ValueError, match="distance must be > 0, got 0"):
        last_iterate_bound([2.0, 2.0], distance=0)


@given(seed=st.integers(0, 1000))
def test_the_last_iterate_of_a_convex_run_keeps_the_bound(seed):
    rng = np.random.default_rng(seed)
    rows, solution = rng.standard_normal((12, 4)), rng.standard_normal(4)
    D, G = np.linalg.norm(solution), np.linalg.norm(rows, axis=1).max()
    norms = np.full(50, G)
    x = np.zeros(4)
    for eta in refine_schedule(norms, normalize=False) * last_iterate_bound(norms, D):
        residuals = rows @ (x - solution)
        i = np.abs(residuals).argmax()
        x = x - eta * np.sign(residuals[i]) * rows[i]
    assert np.abs(rows @ (x - solution)).max() <= last_iterate_bound(norms, D)


# the schedulers


def test_an_array_is_played_step_by_step_and_its_last_value_holds():
    schedule = ArrayLR(sgd(2.0, 0.5), [0.25, 1.0, 0.5])
    assert [schedule.lr_at(t) for t in range(5)] == [[0.5, 0.125], [2.0, 0.5], [1.0, 0.25], [1.0, 0.25], [1.0, 0.25]]


def test_the_state_of_an_array_brings_its_multipliers():
    rates = run(ArrayLR(sgd(), linear_decay(30)), 30)
    first = ArrayLR(sgd(), linear_decay(30))
    run(first, 12)
    resumed = ArrayLR(sgd(), [1.0])
    resumed.load_state_dict(first.state_dict())
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    assert run(resumed, 18) == rates[12:]


def test_nothing_known_is_linear_decay():
    assert run(RefinedLR(sgd(), 20), 20) == linear_decay(20).tolist()


def test_norms_give_the_refined_schedule_of_the_new_length():
    assert run(RefinedLR(sgd(), 80, norms=NORMS), 80) == refine_schedule(NORMS, length=80).tolist()
    assert run(RefinedLR(sgd(), 200, norms=NORMS, norm="l1", smoothing=0), 200) == (
        refine_schedule(NORMS, norm="l1", smoothing=0).tolist()
    )


def test_the_last_step_stands_still_unless_final_is_set():
    assert RefinedLR(sgd(), 50, norms=NORMS).multipliers[-1] == 0
    floored = RefinedLR(sgd(), 50, norms=NORMS, final=0.1)
    assert floored.multipliers[-1] == pytest.approx(0.1)
    assert max(floored.multipliers) == 1
    assert floored.lr_at(1000) == [floored.multipliers[-1]]


def test_an_explicit_warm_up_rises_to_where_the_refined_schedule_starts():
    schedule = RefinedLR(sgd(), 60, norms=NORMS, warmup_steps=10)
    shape = refine_schedule(NORMS, length=50)
    assert schedule.multipliers == pytest.approx([*(shape[0] * t / 10 for t in range(10)), *shape])


@pytest.mark.parametrize("as_text", [True, False])
def test_the_norms_of_a_run_are_read_from_its_folder(tmp_path, as_text):
    metrics(tmp_path / "metrics.jsonl", NORMS)
    path = str(tmp_path) if as_text else tmp_path
    assert RefinedLR(sgd(), 80, norms=path).multipliers == RefinedLR(sgd(), 80, norms=NORMS).multipliers


def test_a_missing_run_is_one_line_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"^norms must be the path of .*, got 'no/such/run': No such file") as caught:
        RefinedLR(sgd(), 80, norms="no/such/run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        (np.exp(-T / 44.0), "has its maximum in the last tenth"),
        (np.where(T < 190, 1.0, 0.2), "has a mean of 0.0"),
    ],
    ids=["vanishing", "collapse at the end"],
)
def test_a_run_that_interpolates_warns_and_gets_linear_decay(norms, message):
    with pytest.warns(UserWarning, match=f"the refined schedule {message}.* linear decay is used instead") as caught:
        schedule = RefinedLR(sgd(), 50, norms=norms, smoothing=0)
    assert caught[0].filename == __file__
    assert schedule.multipliers == tuple(linear_decay(50).tolist())


def test_a_sound_run_does_not_warn_at_any_length():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (1, 2, 3, 500):
            RefinedLR(sgd(), length, norms=NORMS)


def test_from_run_takes_the_recorder_with_its_kind_of_norm():
    p = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    optimizer = torch.optim.SGD([p], lr=0.1)
    recorder = GradNormRecorder(optimizer, "l1")
    for _ in range(20):
        optimizer.zero_grad()
        p.square().sum().backward()
        optimizer.step()
    recorder.detach()
    schedule = RefinedLR.from_run(sgd(), recorder, 10, smoothing=0)
    assert schedule.multipliers == tuple(refine_schedule(recorder.norms, norm="l1", smoothing=0, length=10).tolist())
    other = RefinedLR.from_run(sgd(), recorder, 10, norm="l2", smoothing=0, final=0.5)
    assert other.multipliers == RefinedLR(sgd(), 10, norms=recorder.norms, smoothing=0, final=0.5).multipliers


def test_from_run_needs_a_run():
    with pytest.raises(ValueError, match=r"norms must be a recorder, a sequence .*, got None"):
        RefinedLR.from_run(sgd(), None, 10)


def test_the_multipliers_of_a_resumed_run_do_not_depend_on_the_file(tmp_path):
    metrics(tmp_path / "metrics.jsonl", NORMS)
    rates = run(RefinedLR(sgd(), 30, norms=str(tmp_path)), 30)
    first = RefinedLR(sgd(), 30, norms=str(tmp_path))
    run(first, 11)
    metrics(tmp_path / "metrics.jsonl", NORMS[::-1])
    resumed = RefinedLR(sgd(), 30, norms=NORMS)
    resumed.load_state_dict(first.state_dict())
    resumed.optimizer.load_state_dict(first.optimizer.state_dict())
    assert run(resumed, 19) == rates[11:]
