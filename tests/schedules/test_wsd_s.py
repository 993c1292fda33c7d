import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.driven import run, sgd
from torch.nn import functional

from headway.schedules import WSDLR, WSDSLR, DecayBranchPlanner, LinearLR
from headway.schedules.wsd_s import DECAYS, decay_factor

pytestmark = pytest.mark.filterwarnings("ignore:the decay .* fewer than 20:UserWarning")


# decay shapes


@given(
    decay=st.sampled_from(DECAYS),
    start=st.floats(0.01, 1),
    part=st.floats(0.01, 1),
    u=st.floats(0, 1),
    v=st.floats(0, 1),
)
def test_every_decay_falls_from_start_to_floor(decay, start, part, u, v):
    floor = part * start
    assert decay_factor(decay, 0, start, floor) == pytest.approx(start)
    assert decay_factor(decay, 1, start, floor) == pytest.approx(floor)
    low, high = sorted((u, v))
    assert decay_factor(decay, high, start, floor) <= decay_factor(decay, low, start, floor) * (1 + 1e-12)


@given(u=st.floats(0, 1), floor=st.floats(0.001, 1))
def test_inverse_decay_is_the_published_formula(u, floor):
    assert decay_factor("inverse", u, 1.0, floor) == pytest.approx(1 / (1 + u * (1 / floor - 1)))


def test_unknown_decay_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"decay must be one of 'inverse', 'linear'.*got 'sqrt'"):
        decay_factor("sqrt", 0.5, 1.0, 0.1)


# WSD-S


def test_phases_and_rates_of_two_cycles_computed_by_hand():
    schedule = WSDSLR(sgd(), [10, 20], warmup_steps=2, decay_fraction=0.3, decay="linear", min_lr_ratio=0.1)
    cycle = [1.0] * 7 + [0.7, 0.4, 0.1]
    assert run(schedule, 23) == pytest.approx([0.0, 0.5, *cycle[2:], *cycle, 1.0, 1.0, 1.0])
    phases = [schedule.phase(t) for t in range(12)]
    assert phases == ["warmup"] * 2 + ["stable"] * 5 + ["decay"] * 3 + ["stable"] * 2


def test_one_over_rate_is_affine_inside_an_inverse_decay():
    schedule = WSDSLR(sgd(0.3), [1000])
    inverse = torch.tensor([1 / schedule.lr_at(t)[0] for t in range(899, 1000)], dtype=torch.float64)
    assert inverse.diff().tolist() == pytest.approx([(1 / 0.03 - 1 / 0.3) / 100] * 100)


@pytest.mark.parametrize(
    ("decay", "torch_schedule"),
    [
        ("linear", lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=30)),
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30, eta_min=0.1)),
        ("exponential", lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.1 ** (1 / 30))),
    ],
)
def test_decay_shapes_equal_their_torch_counterparts(decay, torch_schedule):
    expected = run(torch_schedule(sgd()), 31)[1:]
    schedule = WSDSLR(sgd(), [100], decay_fraction=0.3, decay=decay)
    assert [schedule.lr_at(t)[0] for t in range(70, 100)] == pytest.approx(expected, rel=1e-9)


def test_the_step_before_each_checkpoint_runs_at_the_floor_and_the_next_one_at_the_peak():
    schedule = WSDSLR(sgd(0.5), [200, 500, 900])
    for checkpoint in schedule.checkpoints:
        assert schedule.lr_at(checkpoint - 1)[0] == pytest.approx(0.05, abs=1e-17)
        assert schedule.lr_at(checkpoint)[0] == 0.5


def test_one_checkpoint_equals_wsd_to_the_bit():
    single = run(WSDSLR(sgd(0.3), [300], warmup_steps=20), 300)
    wsd = WSDLR(sgd(0.3), warmup_steps=20)
    rates = run(wsd, 270)
    wsd.begin_decay(30)
    assert rates + run(wsd, 30) == single


def test_decay_fraction_one_without_warm_up_is_a_linear_decay():
    schedule = WSDSLR(sgd(0.3), [50], decay_fraction=1.0, decay="linear", min_lr_ratio=0.0)
    linear = LinearLR(sgd(0.3), 50)
    assert [schedule.lr_at(t)[0] for t in range(50)] == pytest.approx([linear.lr_at(t + 1)[0] for t in range(50)])


@pytest.mark.parametrize("decay", DECAYS)
def test_min_lr_ratio_one_is_constant(decay):
    assert run(WSDSLR(sgd(0.3), [100, 200], decay=decay, min_lr_ratio=1.0), 200) == pytest.approx([0.3] * 200)


def test_equally_spaced_checkpoints_are_periodic_after_the_warm_up():
    rates = run(WSDSLR(sgd(), [100, 200, 300], warmup_steps=10), 300)
    assert rates[10:100] == rates[110:200] == rates[210:]
    assert rates[100:110] == rates[200:210] == [1.0] * 10


def test_decay_of_total_takes_a_share_of_all_steps_so_far():
    schedule = WSDSLR(sgd(), [300, 600], decay_of="total")
    assert [t for t in range(600) if schedule.phase(t) == "decay"] == [*range(270, 300), *range(540, 600)]
    cycle = WSDSLR(sgd(), [300, 600], decay_of="cycle")
    assert [t for t in range(600) if cycle.phase(t) == "decay"] == [*range(270, 300), *range(570, 600)]


def test_rewarm_up_is_linear_from_the_floor():
    schedule = WSDSLR(sgd(), [100, 200], rewarmup_steps=4, min_lr_ratio=0.2)
    assert [schedule.lr_at(t)[0] for t in range(100, 106)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert schedule.phase(102) == "warmup"


def test_levanter_convention_repeats_the_first_inverse_step_and_never_uses_the_floor():
    schedule = WSDSLR(sgd(), [100], convention="levanter", min_lr_ratio=0.1)
    expected = [1 / (1 + max(j, 1) / 10 * 9) for j in range(10)]
    assert [schedule.lr_at(t)[0] for t in range(90, 100)] == pytest.approx(expected)
    linear = WSDSLR(sgd(), [100], convention="levanter", decay="linear", min_lr_ratio=0.1)
    assert [linear.lr_at(t)[0] for t in range(90, 100)] == pytest.approx([1 - 0.09 * j for j in range(10)])


def test_every_group_keeps_its_own_peak():
    schedule = WSDSLR(sgd(1.0, 0.01), [100])
    for t in range(100):
        fast, slow = schedule.lr_at(t)
        assert slow == pytest.approx(fast / 100)


def test_extend_alters_no_earlier_value_and_gives_the_stable_phase_an_end():
    schedule = WSDSLR(sgd(), [200])
    rates = run(schedule, 200)
    schedule.extend(400)
    assert [schedule.lr_at(t)[0] for t in range(200)] == rates
    assert rates + run(schedule, 200) == run(WSDSLR(sgd(), [200, 400]), 400)


def test_extend_at_the_first_step_of_the_new_decay_sets_its_rate():
    schedule = WSDSLR(sgd(), [20], decay_fraction=1.0)
    run(schedule, 20)
    schedule.extend(40)
    assert schedule.optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0] == schedule.lr_at(20)[0] < 1


def test_extend_refuses_a_checkpoint_whose_decay_is_already_past():
    schedule = WSDSLR(sgd(), [100])
    run(schedule, 195)
    with pytest.raises(ValueError, match="checkpoint must leave its decay ahead of step 195, got 200"):
        schedule.extend(200)
    with pytest.raises(ValueError, match="checkpoint must be a whole number > 195, got 150"):
        schedule.extend(150)
    with pytest.raises(ValueError, match="checkpoint must be a whole number > 195, got 300"):
        schedule.extend(300.0)
    assert schedule.checkpoints == (100,)


def test_an_extended_schedule_resumes_with_its_checkpoints():
    schedule = WSDSLR(sgd(), [100])
    schedule.extend(200)
    resumed = WSDSLR(sgd(), [100])
    resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    assert run(resumed, 200) == run(schedule, 200)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoints": []}, "checkpoints must be a strictly increasing sequence of whole numbers >= 1"),
        ({"checkpoints": [100, 100]}, r"checkpoints must be .* got \[100, 100\]"),
        ({"checkpoints": [100], "warmup_steps": 91}, "warmup_steps must be <= 90, .* got 91"),
        ({"checkpoints": [100, 200], "rewarmup_steps": 91}, "rewarmup_steps must be <= 90, .* checkpoint 200, got 91"),
        (
            {"checkpoints": [1000, 1050], "decay_of": "total"},
            "decay_fraction must keep every decay within its cycle, got 0.1: 105 steps before checkpoint 1050",
        ),
        ({"checkpoints": [100], "min_lr_ratio": 0}, r"min_lr_ratio must be in \(0, 1\] for decay='inverse', got 0"),
        ({"checkpoints": [100], "min_lr_ratio": 0, "decay": "exponential"}, "min_lr_ratio must be"),
        ({"checkpoints": [100], "decay_fraction": 0}, r"decay_fraction must be in \(0, 1\], got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WSDSLR(sgd(), **arguments)


def test_floor_zero_is_fine_for_the_shapes_that_can_reach_it():
    assert WSDSLR(sgd(), [100], decay="1-sqrt", min_lr_ratio=0).lr_at(99) == [0.0]


def test_a_decay_too_short_to_average_the_noise_warns_where_it_was_asked_for():
    with pytest.warns(UserWarning, match="the decay before checkpoint 100 has 10 steps: fewer than 20") as caught:
        WSDSLR(sgd(), [100])
    assert caught[0].filename == __file__
    wsd = WSDLR(sgd(), warmup_steps=0)
    with pytest.warns(UserWarning, match="the decay from step 0 has 5 steps") as caught:
        wsd.begin_decay(5)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WSDSLR(sgd(), [200, 400])


# WSD


def test_main_branch_stays_at_the_peak_for_ever():
    assert run(WSDLR(sgd(0.3), warmup_steps=2), 1000)[2:] == [0.3] * 998


def test_decay_starts_with_the_coming_step_ends_at_the_floor_and_holds_it():
    schedule = WSDLR(sgd(), warmup_steps=0, decay="linear", min_lr_ratio=0.2)
    assert run(schedule, 5) == [1.0] * 5
    schedule.begin_decay(4)
    assert run(schedule, 6) == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    schedule.resume_stable()
    assert run(schedule, 2) == [1.0, 1.0]


def test_a_decay_begun_mid_way_starts_from_the_current_rate():
    schedule = WSDLR(sgd(), warmup_steps=10, decay="linear", min_lr_ratio=0.1)
    run(schedule, 5)
    schedule.begin_decay(4)
    assert run(schedule, 4) == pytest.approx([0.4, 0.3, 0.2, 0.1])
    schedule.resume_stable()
    assert schedule.phase() == "warmup"
    assert run(schedule, 2) == pytest.approx([0.9, 1.0])


def test_a_decay_cannot_begin_below_the_floor():
    schedule = WSDLR(sgd(), warmup_steps=100)
    run(schedule, 5)
    with pytest.raises(RuntimeError, match=r"at step 5: the rate is 0.05 of the peak, below the floor"):
        schedule.begin_decay(30)


def test_begin_decay_needs_a_length_from_somewhere():
    with pytest.raises(ValueError, match="steps must be a whole number >= 1, got None"):
        WSDLR(sgd(), warmup_steps=0).begin_decay()
    schedule = WSDLR(sgd(), warmup_steps=0, decay_steps=40)
    schedule.begin_decay()
    assert schedule.lr_at(39)[0] == pytest.approx(0.1)


def test_state_saved_inside_a_decay_continues_exactly():
    schedule = WSDLR(sgd(), warmup_steps=3)
    run(schedule, 50)
    schedule.begin_decay(20)
    run(schedule, 7)
    resumed = WSDLR(sgd(), warmup_steps=3)
    resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    resumed.optimizer.load_state_dict(copy.deepcopy(schedule.optimizer.state_dict()))
    assert resumed.phase() == "decay"
    assert run(resumed, 30) == run(schedule, 30)


# training


class Run:
    """A small training run whose data position is the step: batch t is drawn from seed t."""

    def __init__(self, schedule):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.schedule = schedule(self.optimizer)
        self.step = 0

    def train(self, until: int) -> "Run":
        while self.step < until:
            generator = torch.Generator().manual_seed(self.step)
            x = torch.randn(16, 4, generator=generator)
            loss = functional.mse_loss(self.model(x), x.sum(dim=1, keepdim=True).sin())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
        return self

    def snapshot(self) -> dict:
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "rng": torch.get_rng_state(),
                "step": self.step,
            }
        )

    def restore(self, saved: dict) -> None:
        saved = copy.deepcopy(saved)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["rng"])
        self.step = saved["step"]

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


def main_branch(optimizer):
    return WSDLR(optimizer, warmup_steps=5)


def test_a_published_branch_equals_a_run_of_its_own_to_the_bit():
    plan = DecayBranchPlanner([40, 80, 160], decay_fraction=0.25)
    main, saved, published = Run(main_branch), None, {}
    for step, event, *rest in plan.events():
        if event == "save_main":
            saved = main.train(step).snapshot()
        elif event == "start_branch":
            main.schedule.begin_decay(plan.decay_steps(rest[0]))
        else:
            published[rest[0]] = main.train(step).weights()
            main.restore(saved)
    assert main.schedule.phase() == "stable"
    main_weights = main.train(160).weights()
    # The main branch is one that has never decayed.
    assert torch.equal(main_weights, Run(main_branch).train(160).weights())
    for k, budget in enumerate(plan.budgets):
        own = Run(lambda optimizer, budget=budget: WSDSLR(optimizer, [budget], warmup_steps=5, decay_fraction=0.25))
        assert torch.equal(own.train(budget).weights(), published[k])
    assert not torch.equal(published[0], published[1])


def test_wsd_s_resumed_from_its_published_checkpoint_equals_the_uninterrupted_run():
    def schedule(optimizer):
        return WSDSLR(optimizer, [40, 80], warmup_steps=5, decay_fraction=0.25)

    published = Run(schedule).train(40).snapshot()
    resumed = Run(schedule)
    resumed.restore(published)
    assert resumed.optimizer.param_groups[0]["lr"] == 1e-2
    assert torch.equal(resumed.train(80).weights(), Run(schedule).train(80).weights())


# planner


def test_costs_of_three_budgets():
    plan = DecayBranchPlanner([250, 500, 1000], 0.1)
    assert (plan.total_steps("separate"), plan.total_steps("wsd"), plan.total_steps("wsd-s")) == (1750, 1075, 1000)


@given(budgets=st.lists(st.integers(1, 5000), min_size=1, max_size=6, unique=True), fraction=st.floats(0.01, 1))
def test_events_walk_the_main_branch_forwards_and_cost_what_is_promised(budgets, fraction):
    plan = DecayBranchPlanner(sorted(budgets), fraction)
    main, cost, forks = 0, 0, {}
    for step, event, *rest in plan.events():
        if event == "save_main":
            assert step >= main
            cost, main = cost + step - main, step
        elif event == "start_branch":
            assert step == main
            forks[rest[0]] = step
        else:
            assert step == plan.budgets[rest[0]]
            cost += step - forks[rest[0]]
    assert sorted(forks) == list(range(len(budgets)))
    assert cost == plan.total_steps("wsd")


@given(steps=st.integers(1, 10**6), percent=st.integers(1, 100))
def test_decay_steps_are_the_whole_part_of_the_exact_product(steps, percent):
    assert DecayBranchPlanner([steps], percent / 100).decay_steps(0) == steps * percent // 100


def test_bad_plans_are_refused():
    with pytest.raises(ValueError, match="budgets must be"):
        DecayBranchPlanner([500, 250])
    with pytest.raises(ValueError, match="decay_fraction must be"):
        DecayBranchPlanner([500], 0.0)
    with pytest.raises(ValueError, match="mode must be one of 'wsd', 'wsd-s', 'separate', got 'both'"):
        DecayBranchPlanner([500]).total_steps("both")
