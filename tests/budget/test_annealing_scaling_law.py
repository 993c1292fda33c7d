import json
import warnings

import numpy as np
import pytest

from headway.budget.annealing_scaling_law import AnnealingLaw, Run, annealing_area, best_decay_fraction, forward_area
from headway.testing.planners import check_planner

TRUTH = {"L0": 2.0, "A": 1.5, "alpha": 0.5, "C": 0.3}
LAM, WARMUP, STEPS = 0.95, 20, 800


def schedule(kind, steps=STEPS, warmup=WARMUP, peak=0.1):
    z = np.arange(steps - warmup) / (steps - warmup)
    shape = {
        "constant": np.ones_like(z),
        "cosine": 0.1 + 0.45 * (1 + np.cos(np.pi * z)),
        "linear": 1 - 0.9 * z,
        "late": np.where(z < 0.8, 1.0, 1 - 4.5 * (z - 0.8)),
    }[kind]
    return peak * np.r_[np.arange(warmup) / warmup, shape]


def curve(lrs, lam=LAM, warmup=WARMUP, **changes):
    numbers = TRUTH | changes
    with np.errstate(divide="ignore"):
        power = forward_area(lrs) ** -numbers["alpha"]
    return numbers["L0"] + numbers["A"] * power - numbers["C"] * annealing_area(lrs, lam, warmup)


def run(kind, noise=0.0, seed=0, every=2, **options):
    lrs = schedule(kind)
    steps = np.arange(WARMUP + 5, STEPS + 1, every)
    factor = np.exp(noise * np.random.default_rng(seed).standard_normal(len(steps)))
    return Run(lrs, steps, curve(lrs, **options)[steps - 1] * factor)


@pytest.fixture(scope="module")
def law():
    return AnnealingLaw(lam=LAM).fit([run("cosine"), run("constant")])


def close(law, relative):
    for name, value in TRUTH.items():
        assert law.params_[name] == pytest.approx(value, rel=relative), name


def test_law_keeps_the_contract_of_a_planner():
    data = [run("cosine", noise=0.01, every=10), run("constant", noise=0.01, every=10, seed=1)]
    check_planner(AnnealingLaw, fit=(data,), predict=(schedule("late"), [100, 800]), arguments={"lam": LAM})


# Areas


def test_constant_rate_has_no_annealing_area_and_a_linear_forward_area():
    lrs = np.full(50, 0.25)
    assert (annealing_area(lrs) == 0).all()
    np.testing.assert_allclose(forward_area(lrs), 0.25 * np.arange(1, 51), rtol=1e-12)


def test_lam_zero_gives_the_drop_from_the_first_rate():
    lrs = np.random.default_rng(0).uniform(size=40)
    np.testing.assert_allclose(annealing_area(lrs, lam=0.0), lrs[0] - lrs, atol=1e-14)


def test_lam_zero_gives_the_drop_from_the_first_rate_after_the_warmup():
    lrs = schedule("cosine")
    np.testing.assert_allclose(annealing_area(lrs, 0.0, WARMUP)[WARMUP:], lrs[WARMUP] - lrs[WARMUP:], atol=1e-14)
    assert (annealing_area(lrs, 0.0, WARMUP)[:WARMUP] == 0).all()


def test_lam_near_one_tends_to_the_sum_of_the_drops():
    lrs = np.random.default_rng(1).uniform(size=40)
    np.testing.assert_allclose(annealing_area(lrs, lam=1 - 1e-12), np.cumsum(lrs[0] - lrs), atol=1e-9)


def test_a_single_drop_has_the_closed_form():
    a, b, k, lam = 1.0, 0.25, 10, 0.9
    lrs = np.r_[np.full(k - 1, a), np.full(30, b)]  # step k is the first at b
    s = np.arange(1, len(lrs) + 1)
    expected = np.where(s >= k, (a - b) * (1 - lam ** (s - k + 1.0)) / (1 - lam), 0)
    np.testing.assert_allclose(annealing_area(lrs, lam), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.99])
def test_recursion_equals_the_double_sum(lam):
    lrs = np.random.default_rng(2).uniform(size=60)
    drops = np.r_[0.0, lrs[:-1] - lrs[1:]]
    double = [sum(drops[k] * lam ** (i - k) for i in range(s + 1) for k in range(i + 1)) for s in range(60)]
    np.testing.assert_allclose(annealing_area(lrs, lam), double, rtol=1e-12, atol=1e-13)


def test_areas_scale_with_the_rate():
    lrs = schedule("cosine")
    np.testing.assert_allclose(forward_area(3 * lrs), 3 * forward_area(lrs), rtol=1e-12)
    np.testing.assert_allclose(annealing_area(3 * lrs, LAM), 3 * annealing_area(lrs, LAM), rtol=1e-9, atol=1e-14)


# Fit


@pytest.mark.parametrize("kinds", [("cosine",), ("cosine", "constant"), ("late", "linear")], ids="-".join)
def test_clean_curves_give_their_parameters_back(kinds):
    close(AnnealingLaw(lam=LAM).fit([run(kind) for kind in kinds]), 1e-3)


def test_noise_of_a_fifth_of_a_percent_moves_no_parameter_by_more_than_5_percent():
    data = [run("cosine", 0.002, every=1), run("constant", 0.002, seed=1, every=1)]
    close(AnnealingLaw(lam=LAM).fit(data), 0.05)


def test_auto_finds_the_lam_of_the_curve():
    law = AnnealingLaw(lam="auto").fit([run("cosine", 0.001), run("late", 0.001, seed=1)])
    assert law.lam_ == LAM
    close(law, 0.05)


@pytest.mark.parametrize("factor", [1e-4, 1e3])
def test_fit_does_not_depend_on_the_unit_of_the_rate(law, factor):
    data = [Run(factor * r.lrs, r.steps, r.losses) for r in (run("cosine"), run("constant"))]
    scaled = AnnealingLaw(lam=LAM).fit(data)
    lrs = schedule("late")
    np.testing.assert_allclose(scaled.predict(factor * lrs)[1:], law.predict(lrs)[1:], rtol=1e-4)
    assert scaled.params_["A"] == pytest.approx(law.params_["A"] * factor ** TRUTH["alpha"], rel=1e-2)
    assert scaled.params_["C"] == pytest.approx(law.params_["C"] / factor, rel=1e-2)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_fit_does_not_depend_on_the_unit_of_the_loss(factor):
    original = run("cosine")
    law = AnnealingLaw(lam=LAM).fit([Run(original.lrs, original.steps, factor * original.losses)])
    assert law.params_["L0"] == pytest.approx(factor * TRUTH["L0"], rel=1e-3)
    assert law.params_["alpha"] == pytest.approx(TRUTH["alpha"], rel=1e-3)


def test_a_few_spikes_leave_the_fit_where_it_was():
    spiked = run("cosine", every=4)
    spiked.losses[::20] *= 1.5
    close(AnnealingLaw(lam=LAM).fit([spiked]), 0.02)


def test_order_of_the_runs_and_of_their_points_is_irrelevant():
    first, second = run("cosine", 0.01), run("constant", 0.01, seed=1)
    shuffled = np.random.default_rng(0).permutation(len(second.steps))
    again = Run(second.lrs, second.steps[shuffled], second.losses[shuffled])
    one, other = (AnnealingLaw(lam=LAM).fit(data) for data in ([first, second], [again, first]))
    assert one.params_ == other.params_


def test_limit_loss_may_exceed_the_smallest_loss(law):
    assert law.params_["L0"] > run("cosine").losses.min() + 0.1


def test_points_of_the_warmup_are_left_out():
    lrs, steps = schedule("cosine"), np.arange(2, STEPS + 1)
    losses = curve(lrs)[1:]
    losses[: WARMUP - 1] = 10.0
    close(AnnealingLaw(lam=LAM).fit([Run(lrs, steps, losses)]), 1e-3)


def test_given_warmup_equals_the_one_found(law):
    same = AnnealingLaw(lam=LAM, warmup_steps=WARMUP).fit([run("cosine"), run("constant")])
    assert same.params_ == law.params_


def test_warmup_area_at_peak_counts_the_warmup_as_its_top():
    lrs = schedule("cosine")
    flat = np.r_[np.full(WARMUP, lrs[WARMUP]), lrs[WARMUP:]]
    data = run("cosine")
    law = AnnealingLaw(lam=LAM, warmup_area="peak", warmup_steps=WARMUP).fit([data])
    np.testing.assert_allclose(law.predict(lrs), law.predict(flat), rtol=1e-12)


# Prediction


def test_unseen_schedule_is_predicted(law):
    assert law.score(run("late")) > 0.9999


def test_prediction_of_a_prefix_is_the_prefix_of_the_prediction(law):
    lrs = schedule("late")
    for length in (5, WARMUP + 1, 300):
        np.testing.assert_array_equal(law.predict(lrs[:length]), law.predict(lrs)[:length])


def test_steps_are_counted_from_one(law):
    lrs = schedule("late")
    np.testing.assert_array_equal(law.predict(lrs, [1, 100, STEPS]), law.predict(lrs)[[0, 99, -1]])


def test_constant_runs_alone_warn_when_a_decay_is_predicted():
    law = AnnealingLaw(lam=LAM).fit([run("constant")])
    assert law.params_["C"] == 0
    assert not law.annealing_identified_
    with pytest.warns(UserWarning, match="constant rate"):
        law.predict(schedule("cosine"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        law.predict(schedule("constant", steps=2000))
    with pytest.raises(ValueError, match="law must be fitted to at least one run whose rate decays"):
        best_decay_fraction(law, 800, 0.1)


def test_without_annealing_the_law_is_a_power_law_in_the_forward_area():
    law = AnnealingLaw(lam=LAM, annealing=False).fit([run("cosine")])
    assert law.params_["C"] == 0
    values = law.predict(schedule("cosine"), [400])
    numbers = law.params_
    S1 = forward_area(schedule("cosine"))[399]
    assert values[0] == pytest.approx(numbers["L0"] + numbers["A"] * S1 ** -numbers["alpha"])


def test_intervals_hold_the_true_curve_about_as_often_as_they_say():
    lrs, steps = schedule("late"), np.array([200, 600, 800])
    truth = curve(lrs)[steps - 1]
    noise, held = 0.005, []
    for seed in range(16):
        data = [run("cosine", noise, seed=2 * seed, every=8), run("constant", noise, seed=2 * seed + 1, every=8)]
        low, high = AnnealingLaw(lam=LAM).fit(data).interval(lrs, steps)
        measured = truth * np.exp(noise * np.random.default_rng(1000 + seed).standard_normal(3))
        held += ((low <= measured) & (measured <= high)).tolist()
    assert np.mean(held) >= 0.85


def test_interval_widens_with_its_level_and_with_noise():
    lrs = schedule("late")

    def width(noise, level):
        low, high = AnnealingLaw(lam=LAM).fit([run("cosine", noise)]).interval(lrs, [STEPS], level)
        return (high - low)[0]

    assert width(0.01, 0.5) < width(0.01, 0.99)
    assert width(0.001, 0.95) < width(0.01, 0.95)


def test_interval_survives_plain_values(law):
    again = AnnealingLaw.from_dict(json.loads(json.dumps(law.to_dict())))
    lrs = schedule("linear")
    np.testing.assert_array_equal(again.interval(lrs, [300, 800]), law.interval(lrs, [300, 800]))


def test_comparison_lists_the_final_losses_lowest_first(law):
    rows = law.compare({kind: schedule(kind) for kind in ("constant", "cosine", "late")})
    losses = [row["loss"] for row in rows.values()]
    assert losses == sorted(losses)
    assert list(rows)[-1] == "constant"
    for kind, row in rows.items():
        assert row["loss"] == pytest.approx(curve(schedule(kind))[-1], rel=1e-4)
        assert row["low"] <= row["loss"] <= row["high"]


def test_extrapolation_is_one_for_the_fitted_run_and_more_for_a_longer_one():
    law = AnnealingLaw(lam=LAM).fit([run("linear", every=1)])
    assert law.extrapolation(schedule("linear")) == pytest.approx({"S1": 1.0, "S2": 1.0})
    assert law.extrapolation(schedule("linear", steps=1600))["S1"] > 1.9


def test_best_decay_fraction_is_the_minimum_over_the_grid(law):
    grid = (0.1, 0.3, 0.6, 1.0)
    fraction, loss = best_decay_fraction(law, STEPS, 0.1, grid=grid, floor=0.1)
    losses = [best_decay_fraction(law, STEPS, 0.1, grid=[share], floor=0.1)[1] for share in grid]
    assert fraction == grid[int(np.argmin(losses))]
    assert loss == min(losses)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_decay_over_the_whole_run_predicts_that_schedule(law, shape):
    u = np.arange(1, STEPS + 1) / STEPS
    left = {"linear": 1 - u, "cosine": (1 + np.cos(np.pi * u)) / 2, "1-sqrt": 1 - np.sqrt(u)}[shape]
    _, loss = best_decay_fraction(law, STEPS, 0.1, shape, grid=[1.0])
    assert loss == pytest.approx(law.predict(0.1 * np.maximum(left, 0), [STEPS])[0])


# Refusals


@pytest.mark.parametrize(
    ("lrs", "steps", "losses", "message"),
    [
        ([0.1, -0.1], [1, 2], [1.0, 1.0], "lrs must be finite and >= 0, got -0.1 at position 1"),
        ([0.1, 0.1], [0, 1], [1.0, 1.0], r"steps must be whole numbers in \[1, 2\], got 0 at position 0"),
        ([0.1, 0.1], [1, 3], [1.0, 1.0], r"steps must be whole numbers in \[1, 2\], got 3 at position 1"),
        ([0.1, 0.1], [1, 1.5], [1.0, 1.0], "steps must be whole numbers"),
        ([0.1, 0.1], [1, 2], [1.0, np.nan], "losses must be finite and > 0, got nan at position 1"),
        ([0.1, 0.1], [1, 2], [0.0, 1.0], "losses must be finite and > 0, got 0 at position 0"),
        ([0.1, 0.1], [1, 2], [1.0], "losses and steps must be sequences of one length"),
        ([], [], [], "lrs must be a sequence of at least one rate"),
    ],
    ids=["negative-rate", "step-0", "step-past-end", "half-step", "nan-loss", "zero-loss", "lengths", "empty"],
)
def test_run_refuses_what_is_no_run(lrs, steps, losses, message):
    with pytest.raises(ValueError, match=message):
        Run(lrs, steps, losses)


def test_fit_refuses_fewer_than_eight_points():
    lrs = schedule("cosine")
    with pytest.raises(ValueError, match="at least 8 losses after the warm-up, got 7"):
        AnnealingLaw().fit([Run(lrs, np.arange(WARMUP - 2, WARMUP + 8), np.ones(10))])
    with pytest.raises(ValueError, match="runs must be a sequence of at least one Run"):
        AnnealingLaw().fit([])


@pytest.mark.parametrize("lam", [1.0, -0.1, float("nan"), "automatic"])
def test_lam_outside_its_range_is_refused(lam):
    with pytest.raises(ValueError, match=r"lam must be in \[0, 1\) or 'auto', got"):
        AnnealingLaw(lam=lam)


@pytest.mark.parametrize("warmup_steps", [-1, 1.5, "none"])
def test_warmup_outside_its_range_is_refused(warmup_steps):
    with pytest.raises(ValueError, match="warmup_steps must be a whole number >= 0 or 'auto', got"):
        AnnealingLaw(warmup_steps=warmup_steps)


# Run folders


def write(folder, records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def training(kind="cosine", first=1, last=STEPS, loss=3.0):
    lrs = schedule(kind)
    return [{"step": s, "lr": lrs[s - 1], "loss": loss, "tokens": 7} for s in range(first, last + 1)]


def test_validation_losses_are_read_where_there_are_eight(tmp_path):
    evaluations = [{"step": s, "validation_loss": 2.0 + 1 / (s + 1)} for s in range(0, STEPS + 1, 100)]
    write(tmp_path, training() + evaluations)
    read = Run.from_metrics(tmp_path)
    assert read.steps.tolist() == list(range(100, STEPS + 1, 100))
    np.testing.assert_allclose(read.losses, 2.0 + 1 / (read.steps + 1))
    np.testing.assert_allclose(read.lrs, schedule("cosine"), rtol=1e-12)


def test_with_fewer_evaluations_windows_of_the_training_loss_are_read(tmp_path):
    records = training()
    for record in records:
        record["loss"] = float(record["step"] - 1)  # the loss of step n is that of the model after n - 1 steps
    write(tmp_path, [*records, {"step": 400, "validation_loss": 2.0}, {"step": 800, "event": "checkpoint"}])
    read = Run.from_metrics(tmp_path / "metrics.jsonl")
    assert 80 < len(read.steps) <= 200
    assert read.steps.min() > WARMUP
    np.testing.assert_allclose(read.losses, read.steps)


def test_resumed_run_and_damaged_lines_are_read(tmp_path):
    write(tmp_path, training(last=500, loss=9.0) + training(first=401))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 801, "lo')
    read = Run.from_metrics(tmp_path)
    assert len(read.lrs) == STEPS
    assert read.losses[read.steps < 390].tolist() == [9.0] * int((read.steps < 390).sum())
    assert read.losses[-1] == 3.0


def test_losses_that_are_not_finite_are_passed_over(tmp_path):
    records = training()
    records[100]["loss"] = float("nan")
    write(tmp_path, records)
    assert (Run.from_metrics(tmp_path).losses == 3.0).all()


def test_rates_between_logged_steps_lie_on_a_line(tmp_path):
    write(tmp_path, [{"step": s, "lr": 1 - 1e-3 * s, "loss": 3.0} for s in range(10, 400, 10)])
    np.testing.assert_allclose(Run.from_metrics(tmp_path).lrs[9:], 1 - 1e-3 * np.arange(10, 391))


def test_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        Run.from_metrics(tmp_path)
    write(tmp_path, training(last=WARMUP + 5))
    with pytest.raises(ValueError, match="path must hold at least 8 losses after the warm-up, got 4"):
        Run.from_metrics(tmp_path)
    write(tmp_path, [{"step": 1, "event": "start"}])
    with pytest.raises(ValueError, match="path must hold training records"):
        Run.from_metrics(tmp_path)
