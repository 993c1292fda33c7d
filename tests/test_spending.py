import pytest
import torch

from headway.schedules import REXLR, WSDSLR, CosineLR
from headway.spending import Budget


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("640", {"steps": 640}),
        ("640 steps", {"steps": 640}),
        ("10k", {"steps": 10_000}),
        ("2M tokens", {"tokens": 2_000_000}),
        ("1.5M tokens", {"tokens": 1_500_000}),
        ("3B tokens", {"tokens": 3_000_000_000}),
        ("0.00051M tokens", {"tokens": 510}),
        ("90s", {"seconds": 90}),
        ("10 min", {"seconds": 600}),
        ("1.5h", {"seconds": 5400}),
    ],
)
def test_a_text_names_a_budget(text, expected):
    assert Budget.parse(text) == Budget(**expected)


@pytest.mark.parametrize("text", ["", "ten", "-5", "5 parsecs", "5 k min", "1e3", "10 min 5", "nan"])
def test_other_texts_are_refused_with_examples(text):
    with pytest.raises(ValueError, match="a budget is written like '640'"):
        Budget.parse(text)


@pytest.mark.parametrize("text", ["0", "0 tokens", "0min"])
def test_a_budget_of_nothing_is_refused(text):
    with pytest.raises(ValueError, match="must be > 0 in exactly one of steps, tokens and seconds, got none"):
        Budget.parse(text)


def test_two_budgets_at_once_are_refused():
    with pytest.raises(ValueError, match="exactly one of steps, tokens and seconds, got steps and tokens"):
        Budget(steps=1, tokens=2)
    with pytest.raises(ValueError, match="a budget in steps must be a whole number"):
        Budget.parse("0.5 steps")


def test_tokens_and_seconds_become_steps_by_what_a_step_costs():
    assert Budget(steps=7).total_steps == 7
    assert Budget(tokens=10_000, tokens_per_step=2048).total_steps == 4
    assert Budget(seconds=60, seconds_per_step=0.5).total_steps == 120
    with pytest.raises(ValueError, match="a budget must pay for at least one step, 2048 tokens, got 5 tokens"):
        _ = Budget(tokens=5, tokens_per_step=2048).total_steps
    with pytest.raises(ValueError, match="tokens_per_step must be given to turn 5 tokens into steps, got None"):
        _ = Budget(tokens=5).total_steps


def test_the_spent_fraction_counts_the_unit_of_the_budget_and_ends_at_one():
    spent = {"steps": 3, "tokens": 50, "seconds": 9.0}
    assert Budget(steps=12).spent(**spent) == 0.25
    assert Budget(tokens=100).spent(**spent) == 0.5
    assert Budget(seconds=3).spent(**spent) == 1.0


def rates(schedule, steps):
    return [schedule.lr_at(step)[0] for step in range(steps)]


@pytest.mark.parametrize("schedule_class", [CosineLR, REXLR])
def test_schedules_take_a_budget_for_their_length(schedule_class):
    def optimizer():
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

    budget = Budget(tokens=1000, tokens_per_step=10)
    assert rates(schedule_class(optimizer(), budget), 110) == rates(schedule_class(optimizer(), 100), 110)
    with pytest.raises(ValueError, match="seconds_per_step must be given"):
        schedule_class(optimizer(), Budget(seconds=10))


def test_the_checkpoints_of_wsd_s_may_be_budgets():
    def optimizer():
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

    a = WSDSLR(optimizer(), [Budget(tokens=4000, tokens_per_step=10), 800])
    b = WSDSLR(optimizer(), [400, 800])
    assert rates(a, 800) == rates(b, 800)
    a.extend(Budget(seconds=600, seconds_per_step=0.5))
    assert a.checkpoints == (400, 800, 1200)
