import pytest
import torch

from headway.claims.consensus_based_optimization import BOX, claim, rastrigin, search, success_rate


@pytest.fixture(scope="module")
def outcome():
    return claim(steps=800, runs=4, quadratic_hops=2)


def test_claim_holds_in_fewer_runs(outcome):
    assert [check.what for check in outcome.checks if not check.holds] == []
    assert len(outcome.checks) == 7


def test_panels_are_complete(outcome):
    searches, hops = outcome.panels
    assert all(len(x) == len(y) and x[-1] == 799 for x, y in searches.curves.values())
    assert all(len(x) == len(y) == 200 for x, y in hops.curves.values())


def test_claim_fails_without_exploration():
    assert success_rate(5, 100, 600, range(4), sigma=0.0) == 0


def test_the_minimum_is_at_zero_inside_the_box():
    assert float(rastrigin(torch.zeros(3))) == 0
    assert BOX[0] < 0 < BOX[1]
    assert float(rastrigin(torch.ones(3))) == pytest.approx(3.0, abs=1e-5)


def test_a_run_is_a_function_of_its_seed_and_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    first, second, other = (search(3, 20, 10, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
