import pytest
import torch

from headway.claims.last_iterate_mirror_descent import SCHEDULES, claim, lower_bound_values
from headway.optim.last_iterate_mirror_descent import StepSize

SHORT = {"sizes": (100, 400), "horizons": (100, 1600), "runs": 200}


@pytest.fixture(scope="module")
def outcome():
    return claim(**SHORT)


def test_claim_holds_on_smaller_problems(outcome):
    assert [check.what for check in outcome.checks if not check.holds] == []
    assert outcome.holds


def test_claim_fails_with_another_schedule_or_without_the_power_map():
    failed = [check.what for check in claim(**SHORT, method="1/sqrt(T)", power=False).checks if not check.holds]
    assert any("linear decay" in what for what in failed)
    assert any("0.4 of that" in what for what in failed)


def test_oracle_is_that_of_the_definition():
    T = 6
    a = [1 / (8 * (T - j + 1)) for j in range(1, T + 1)]
    h = torch.zeros(T + 1, T, dtype=torch.float64)
    for i in range(1, T + 2):
        for j in range(1, T + 1):
            h[i - 1, j - 1] = a[j - 1] if j < i else -(i**0.5) / (2 * T**0.5) if j == i else 0.0
    x, values = torch.zeros(T, dtype=torch.float64), []
    for t in range(1, T + 2):
        products = h @ x
        values.append(T**0.5 * float(products.max()))
        i = int((products >= products.max() - 1e-15).nonzero()[0])
        x = x - h[i] / t**0.5
        x = x / max(1.0, float(x.norm()))
    assert lower_bound_values(StepSize.convex(eta=1.0), T) == pytest.approx(values, abs=1e-12)


def test_panels_show_every_schedule(outcome):
    for panel in outcome.panels[:2]:
        assert list(panel.curves) == list(SCHEDULES)
    assert all(len(x) == 401 for x, _ in outcome.panels[0].curves.values())


def test_claim_is_a_function_of_its_seed_and_leaves_the_threads_alone():
    threads = torch.get_num_threads()
    first, second, other = (
        claim(seed, sizes=(50, 100), horizons=(10, 20), runs=10).checks[4].measured for seed in (3, 3, 4)
    )
    assert first == second != other
    assert torch.get_num_threads() == threads
