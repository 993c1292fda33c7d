import hashlib
import io
import math
import sys

import numpy as np
import pytest
import torch
from tests.ranks import run_ranks
from torch import nn

from headway.schedules.autolrs import AutoLRS, Stage, drive
from headway.schedules.loss_forecast import ExponentialForecaster
from headway.testing.controllers import check_controller

pytest.importorskip("sklearn")

SMALL = {"tau": 8, "tau_max": 8, "trials": 2, "ratio": 1.0}


class Problem:
    """Regression with a normalised layer, momentum, two parameter groups and a sampler that has a state."""

    def __init__(self, lr: float = 0.05, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        generator.manual_seed(100)
        self.x = torch.randn(64, 4, generator=generator)
        self.y = self.x[:, :1] + 0.3 * torch.randn(64, 1, generator=generator)
        groups = [
            {"params": self.model[0].parameters(), "lr": lr},
            {"params": [*self.model[1].parameters(), *self.model[2].parameters()], "lr": lr / 4},
        ]
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)
        self.generator = torch.Generator().manual_seed(seed + 1)

    def state_dict(self):
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])

    def train_step(self) -> torch.Tensor:
        rows = torch.randint(64, (16,), generator=self.generator)
        self.optimizer.zero_grad()
        loss = (self.model(self.x[rows]) - self.y[rows]).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss

    def validation(self) -> torch.Tensor:
        self.model.eval()
        with torch.no_grad():
            loss = (self.model(self.x) - self.y).square().mean()
        self.model.train()
        return loss

    def controller(self, **options) -> AutoLRS:
        options = {"tau": 10, "tau_max": 20, "trials": 3, "ratio": 0.8, "extra_state": [self], **options}
        return AutoLRS(self.model, self.optimizer, 1e-3, 0.5, **options)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        states = [state.values() for state in self.optimizer.state.values()]
        for tensor in [*self.model.state_dict().values(), *(t for values in states for t in values)]:
            if isinstance(tensor, torch.Tensor):
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def scripted(loss_of, *, steps: int = 400, lr_min: float = 1e-3, lr_max: float = 1.0, **options) -> AutoLRS:
    """A run whose loss is loss_of(lr, steps since the snapshot), whatever the model does."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=lr_min)
    weight.grad = torch.ones(1)
    controller = AutoLRS(
        nn.ParameterList([weight]), optimizer, lr_min, lr_max, **{"tau": 100, "tau_max": 100, "trials": 6, **options}
    )
    while controller.applied_steps < steps:
        at = controller._count
        optimizer.step()
        controller.step(loss_of(controller.lr, at))
    controller.finish()
    return controller


def bowl(lr: float, step: int) -> float:
    return (1 + (math.log(lr) + 3) ** 2) * math.exp(-step / 50) + 0.1 * (math.log(lr) + 3) ** 2


def test_keeps_the_contract_of_a_controller():
    def drive_once(controller, run):
        loss = run.backward()
        run.optimizer.step()
        controller.step(loss)

    def make(run, lr_min=0.001, lr_max=0.3, **arguments):
        return AutoLRS(run.model, run.optimizer, lr_min, lr_max, **{**SMALL, **arguments})

    # The first step, then 16 of search and 8 of training: in a search a resume restarts the stage.
    check_controller(make, drive_once, steps=40, stops=(0, 17, 20, 25), bounds=(0.001, 0.3))


# The forecaster.


@pytest.mark.parametrize(("a", "b", "c", "n"), [(2, -0.03, 0.5, 100), (0.1, -0.2, 3, 50), (5, -0.01, -1, 200)])
def test_forecaster_recovers_a_clean_exponential(a, b, c, n):
    x = np.arange(n)
    forecaster = ExponentialForecaster().fit(a * np.exp(b * x) + c, x)
    assert (forecaster.a, forecaster.b, forecaster.c) == pytest.approx((a, b, c), rel=1e-4)
    assert forecaster.predict(10 * n) == pytest.approx(a * math.exp(10 * b * n) + c, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_forecaster_stays_within_two_percent_with_three_outliers(seed):
    rng = np.random.default_rng(seed)
    x = np.arange(100)
    y = 2 * np.exp(-0.03 * x) + 0.5 + 0.01 * rng.standard_normal(100)
    y[[10, 40, 70]] += [0.1, -0.1, 0.1]
    assert ExponentialForecaster().fit(y).predict(1000) == pytest.approx(0.5, rel=0.02)


def test_the_official_spline_does_not_recover_a_clean_exponential():
    x = np.arange(100)
    forecaster = ExponentialForecaster("spline-official").fit(2 * np.exp(-0.03 * x) + 0.5)
    assert (forecaster.a, forecaster.b, forecaster.c) == pytest.approx((1.76, -0.0208, 0.347), rel=2e-3)


def test_a_rising_series_is_not_forecast_below_its_last_value():
    x = np.arange(30)
    y = 3 - 2 * np.exp(-0.05 * x)
    forecaster = ExponentialForecaster().fit(y)
    assert forecaster.a < 0
    assert forecaster.predict(300) >= y[-1]


@pytest.mark.parametrize("seed", range(5))
def test_noise_without_a_trend_is_forecast_near_its_mean(seed):
    y = 1 + 0.1 * np.random.default_rng(seed).standard_normal(20)
    assert ExponentialForecaster().fit(y).predict(200) == pytest.approx(1.0, abs=0.1)


def test_a_constant_series_is_its_own_forecast():
    assert ExponentialForecaster().fit([2.5] * 10).predict(1e6) == 2.5


@pytest.mark.parametrize("values", [[1e300, 1, 1, 1, 1, 1e299, 3, 4], [1e-300, 0, 0, 1e-300, 0, 0, 0, 0]])
def test_forecasts_of_wild_series_are_finite(values):
    assert math.isfinite(ExponentialForecaster().fit(values).predict(1e4))


@pytest.mark.parametrize(
    ("y", "x", "message"),
    [
        ([1, 2, 3], None, "length >= 4"),
        ([1, 2, 3, math.nan], None, "must be finite"),
        ([4, 3, 2, 1], [0, 1, 1, 2], "x must be increasing"),
    ],
)
def test_forecaster_refuses_bad_series(y, x, message):
    with pytest.raises(ValueError, match=message):
        ExponentialForecaster().fit(y, x)


def test_forecast_before_fit_is_refused():
    with pytest.raises(RuntimeError, match=r"ExponentialForecaster has not been fitted: call fit\(\) first"):
        ExponentialForecaster().predict(1)


# Snapshots and accounting.


@pytest.mark.parametrize("in_file", [False, True])
def test_after_each_trial_the_snapshot_is_back_bit_for_bit(in_file, tmp_path):
    problem = Problem()
    controller = problem.controller(snapshot=tmp_path / "stage.pt" if in_file else "memory")
    controller.step(problem.train_step())
    at_start = problem.fingerprint()
    seen = []
    for _ in range(3):
        for _ in range(controller.trial_steps):
            seen.append(problem.fingerprint())
            controller.step(problem.train_step())
        assert problem.fingerprint() == at_start
    assert controller.phase == "train"
    assert len(set(seen)) == 1 + 3 * (controller.trial_steps - 1)
    assert list(tmp_path.iterdir()) == []


def test_with_the_sampler_in_the_snapshot_all_trials_see_the_same_batches():
    shown = []
    for extra in (True, False):
        problem = Problem()
        controller = problem.controller(extra_state=[problem] if extra else [])
        controller.step(problem.train_step())
        firsts = []
        for _ in range(3 * controller.trial_steps):
            if controller._count == 0:
                firsts.append(tuple(problem.generator.get_state().tolist()))
            controller.step(problem.train_step())
        shown.append(len(set(firsts)))
    assert shown == [1, 3]


def test_each_stage_costs_trials_times_trial_steps_and_applies_tau():
    problem = Problem()
    controller = problem.controller(trials=4, warmup_steps=5)
    total, boundaries = 0, []
    while controller.applied_steps < 5 + 10 + 20 + 20:
        before = controller.phase
        controller.step(problem.train_step())
        total += 1
        if before != controller.phase:
            boundaries.append((before, controller.applied_steps, controller.search_steps))
    assert boundaries == [
        ("warmup", 5, 0),
        ("search", 5, 4 * 8),
        ("train", 15, 4 * 8),
        ("search", 15, 4 * (8 + 16)),
        ("train", 35, 4 * (8 + 16)),
        ("search", 35, 4 * (8 + 16 + 16)),
        ("train", 55, 4 * (8 + 16 + 16)),
    ]
    assert total == controller.applied_steps + controller.search_steps
    assert [(stage.start, stage.tau, stage.trial_steps) for stage in controller.history] == [
        (5, 10, 8),
        (15, 20, 16),
        (35, 20, 16),
    ]


def test_the_default_search_takes_as_many_steps_as_the_training():
    controller = scripted(bowl, steps=101, trials=10)
    assert controller.search_steps == 100


def test_stages_double_up_to_tau_max_and_then_use_the_validation_loss():
    controller = scripted(bowl, steps=1201, tau=80, tau_max=400, trials=2, val_fn=lambda: 0.5)
    assert [stage.tau for stage in controller.history] == [80, 160, 320, 400, 400]
    assert [stage.validation for stage in controller.history] == [False, False, False, False, True]


def test_validation_takes_about_sixteen_losses_of_a_trial():
    calls = []
    scripted(bowl, steps=2, tau=800, tau_max=800, trials=2, judge="validation", val_fn=lambda: calls.append(0) or 1.0)
    assert len(calls) == 2 * 16


def test_warm_up_starts_at_the_optimizers_own_rate_and_ends_at_warmup_lr():
    problem = Problem(lr=0.02)
    controller = problem.controller(warmup_steps=4, warmup_lr=0.4)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in problem.optimizer.param_groups])
        controller.step(problem.train_step())
    assert rates == [pytest.approx([lr, lr / 4]) for lr in (0.02, 0.2, 0.3, 0.4)]
    assert controller.phase == "search"


def test_groups_keep_their_ratio_and_tensor_rates_are_filled_in_place():
    problem = Problem()
    first = problem.optimizer.param_groups[0]
    first["lr"] = torch.tensor(0.05)
    controller = problem.controller()
    for _ in range(40):
        tensor = first["lr"]
        controller.step(problem.train_step())
        first, second = problem.optimizer.param_groups
        assert isinstance(first["lr"], torch.Tensor)
        assert first["lr"] is tensor
        assert second["lr"] == pytest.approx(float(first["lr"]) / 4)


# Choices.


def test_the_best_forecast_is_chosen_within_the_range():
    controller = scripted(bowl, steps=102, trials=10)
    for stage in controller.history:
        assert stage.lr == stage.rates[int(np.argmin(stage.forecasts))]
        assert abs(math.log(stage.lr) + 3) < 0.5
        assert all(1e-3 <= rate <= 1 for rate in stage.rates)
        assert len(set(stage.rates)) == len(stage.rates)


def test_the_forecasts_of_clean_exponentials_are_their_losses_after_tau_steps():
    (stage,) = scripted(bowl, steps=2, tau=500, tau_max=500).history
    assert list(stage.forecasts) == pytest.approx([bowl(rate, 500) for rate in stage.rates], rel=1e-3)


def test_a_small_kappa_searches_near_the_best_and_a_large_one_spreads():
    def width(kappa):
        rates = scripted(bowl, steps=2, trials=10, kappa=kappa).history[0].rates[4:]
        return float(np.ptp(np.log(rates)))

    assert width(1.0) < 0.7 * width(1000.0)


@pytest.mark.parametrize(("scale", "shift"), [(0.3, 0.0), (1.0, 7.0), (123.0, -55.0)])
@pytest.mark.parametrize("kappa", [1.0, 1000.0])
def test_scaling_and_shifting_all_losses_changes_no_choice(scale, shift, kappa):
    plain = scripted(bowl, steps=102, trials=5, kappa=kappa).history
    moved = scripted(lambda lr, step: scale * bowl(lr, step) + shift, steps=102, trials=5, kappa=kappa).history
    assert [stage.rates for stage in moved] == [stage.rates for stage in plain]
    assert [stage.lr for stage in moved] == [stage.lr for stage in plain]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rates_that_diverge_are_never_chosen(bad):
    limit = 0.02
    # Larger rates look better and better until they diverge.
    controller = scripted(lambda lr, step: bad if lr > limit and step > 5 else math.exp(-lr * step), steps=102)
    for stage in controller.history:
        assert stage.lr <= limit
        assert all(math.isinf(loss) == (rate > limit) for rate, loss in zip(stage.rates, stage.forecasts, strict=True))


def test_when_every_trial_diverges_the_smallest_rate_is_taken_with_a_warning():
    with pytest.warns(UserWarning, match="no trial of the stage stayed finite"):
        controller = scripted(lambda lr, step: math.nan, steps=2)
    assert controller.history[0].lr == min(controller.history[0].rates)


def test_losses_that_do_not_depend_on_the_rate_are_no_problem():
    (stage,) = scripted(lambda lr, step: 1.0, steps=2, trials=6).history
    assert stage.forecasts == (1.0,) * 6
    assert len(set(stage.rates)) == 6


def test_a_validation_series_that_climbs_to_the_first_loss_counts_with_its_last_value():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    values = iter([*np.linspace(3, 2, 16), *np.linspace(0.9, 0.5, 16)])
    options = {"tau": 160, "tau_max": 160, "trials": 2, "judge": "validation", "val_fn": lambda: next(values)}
    controller = AutoLRS(nn.ParameterList([weight]), optimizer, 0.01, 1.0, **options)
    while controller.phase != "train":
        controller.step(1.0)
    falling, fallen = controller.history[0].forecasts
    assert falling == 2.0
    assert fallen < 0.5


def test_the_first_loss_of_a_trial_does_not_count():
    plain = scripted(bowl, steps=2).history
    assert scripted(lambda lr, step: bowl(lr, step) if step else 1e6, steps=2).history == plain


def test_runs_depend_on_the_seed_alone():
    first, same, other = (scripted(bowl, steps=2, seed=seed).history for seed in (0, 0, 1))
    assert first == same != other


# State.


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("stop", [2, 3, 9, 27, 30, 37, 60, 100])
def test_a_fresh_process_continues_from_any_step_as_if_nothing_had_happened(stop, in_file, tmp_path):
    options = {"warmup_steps": 3, "snapshot": tmp_path / "stage.pt" if in_file else "memory"}
    problem = Problem()
    controller = problem.controller(**options)
    for step in range(120):
        if step == stop:
            file = io.BytesIO()
            parts = {"model": problem.model, "optimizer": problem.optimizer, "sampler": problem, "lr": controller}
            torch.save({name: part.state_dict() for name, part in parts.items()}, file)
            applied = controller.applied_steps
        controller.step(problem.train_step())
    end = controller.applied_steps
    controller.finish()

    resumed = Problem(seed=7)
    continued = resumed.controller(**options)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for name, part in {"model": resumed.model, "optimizer": resumed.optimizer, "sampler": resumed}.items():
        part.load_state_dict(saved[name])
    continued.load_state_dict(saved["lr"])
    assert continued.applied_steps == applied
    while (continued.applied_steps, continued.search_steps) != (end, controller.search_steps):
        continued.step(resumed.train_step())
    continued.finish()
    assert continued.history == controller.history
    assert all(isinstance(stage, Stage) for stage in continued.history)
    assert resumed.fingerprint() == problem.fingerprint()


def test_a_state_of_another_number_of_groups_is_refused():
    state = Problem().controller().state_dict()
    state["ratios"] = [1.0]
    with pytest.raises(ValueError, match="the state belongs to 1 parameter groups, the optimizer has 2"):
        Problem().controller().load_state_dict(state)


def test_finish_in_a_search_leaves_the_last_applied_step():
    problem = Problem()
    controller = problem.controller()
    controller.step(problem.train_step())
    before, rate = problem.fingerprint(), 0.05
    for _ in range(5):
        controller.step(problem.train_step())
    assert problem.fingerprint() != before
    controller.finish()
    assert problem.fingerprint() == before
    assert controller.lr == rate
    assert controller.search_steps == 0
    with pytest.raises(RuntimeError, match="after finish"):
        controller.step(1.0)


def test_drive_returns_the_stages_of_the_run():
    problem = Problem()
    stages = drive(
        problem.train_step, problem.validation, problem.model, problem.optimizer, 1e-3, 0.5, total_steps=100, tau=80
    )
    assert [(stage.start, stage.tau, len(stage.rates)) for stage in stages] == [(1, 80, 10), (81, 160, 10)]


def test_overhead_is_the_share_of_time_outside_the_steps():
    now = [0.0]

    def clock():
        now[0] += 1.0
        return now[0]

    problem = Problem()
    controller = problem.controller(clock=clock)
    assert controller.overhead == 0
    for _ in range(100):
        controller.step(problem.train_step())
    # A reading takes a second: one for each snapshot, proposal and restore, out of all readings.
    before = now[0]
    own = len(controller.history) * (1 + 3 + 3) + (2 if controller.phase == "search" else 0)
    assert controller.overhead == pytest.approx(own / before)


# Ranks.


def _two_ranks(rank: int, folder: str) -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.01)
    controller = AutoLRS(
        nn.ParameterList([weight]),
        optimizer,
        1e-3,
        1.0,
        tau=100,
        tau_max=100,
        trials=4,
        seed=rank,
        snapshot=f"{folder}/snapshot.pt",
    )
    while controller.applied_steps < 2:
        # The mean over the ranks is the bowl; each rank alone would choose an end of the range.
        tilt = (1 if rank else -1) * 10 * math.log(controller.lr)
        loss = bowl(controller.lr, controller._count) + tilt
        controller.step(loss)
    controller.finish()
    torch.save(controller.state_dict(), f"{folder}/rank{rank}.pt")


def test_ranks_average_their_losses_and_follow_the_first(tmp_path):
    run_ranks(_two_ranks, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)["history"] for rank in (0, 1))
    assert first == second
    alone = scripted(bowl, steps=2, trials=4).history
    assert [stage["rates"] for stage in first] == [stage.rates for stage in alone]
    assert [stage["lr"] for stage in first] == [stage.lr for stage in alone]


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_min": 0.0}, "lr_min must be > 0, got 0.0"),
        ({"lr_min": 0.5, "lr_max": 0.5}, "lr_max must be > lr_min = 0.5, got 0.5"),
        ({"trials": 1}, "trials must be a whole number in .*, got 1"),
        ({"ratio": 0.0}, r"ratio must be in \(0, 1\], got 0.0"),
        ({"ratio": 1.1}, r"ratio must be in \(0, 1\], got 1.1"),
        ({"tau": 70}, "tau \\* ratio must be >= 8 trial steps, got 7"),
        ({"tau": 100, "tau_max": 99}, "tau_max must be >= tau = 100, got 99"),
        ({"judge": "validation"}, "judge must be 'auto' or 'training' without a val_fn, got 'validation'"),
        ({"warmup_steps": 0}, "warmup_steps must be a whole number >= 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    problem = Problem()
    with pytest.raises(ValueError, match=message):
        AutoLRS(problem.model, problem.optimizer, **{"lr_min": 0.01, "lr_max": 1.0, **arguments})


def test_a_group_added_later_is_refused():
    problem = Problem()
    controller = problem.controller()
    problem.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1})
    with pytest.raises(ValueError, match="3 parameter groups, AutoLRS was built for 2"):
        controller.step(problem.train_step())


def test_missing_scikit_learn_is_named_with_the_line_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.gaussian_process", None)
    with pytest.raises(ImportError, match=r'AutoLRS needs scikit-learn: pip install "headway\[estimators\]"'):
        Problem().controller()
