import math

import pytest
import torch

from headway.claims.optimistic_mirror_descent import START, X, claim, convex, descent_regret, jumping, regret, still
from headway.optim.optimistic_mirror_descent import OptimisticOMD


@pytest.fixture(scope="module")
def outcome():
    return claim(rounds=1600)


def test_claim_holds_in_fewer_rounds(outcome):
    assert [check.what for check in outcome.checks if not check.holds] == []
    assert outcome.holds


def test_claim_fails_with_a_hint_that_misleads():
    def misled(s):
        hint = torch.tensor([-1.0, 0, 0, 0, 0])
        return OptimisticOMD(START, D=2.0, G=1.5 + s, L=1.0, project=X, hint=lambda t: hint)

    failed = [check.what for check in claim(rounds=320, moves=200, method=misled).checks if not check.holds]
    assert any("no noise: regret at" in what for what in failed)


def test_regret_without_noise_is_the_reference_value():
    quiet = torch.zeros(300, 5, dtype=torch.float64)
    assert float(regret(convex(0.0), still(300), quiet)[-1]) == pytest.approx(0.213, abs=1e-3)
    curved = OptimisticOMD(START, mode="strongly_convex", lam=1.0, project=X)
    assert float(regret(curved, still(300), quiet)[-1]) == pytest.approx(0.398, abs=1e-3)


def test_regret_of_worst_case_descent_is_the_reference_value():
    for T, expected in ((1000, 1.51), (4000, 3.00)):
        quiet = torch.zeros(T, 5, dtype=torch.float64)
        measured = descent_regret(lambda t, T=T: 2 / (1.5 * math.sqrt(T)), still(T), quiet)[-1]
        assert float(measured) == pytest.approx(expected, abs=0.006)


def test_target_jumps_every_200_rounds_to_norm_08():
    targets = jumping(500, seed=0)
    changes = [t for t in range(1, 500) if not torch.equal(targets[t], targets[t - 1])]
    assert changes == [200, 400]
    torch.testing.assert_close(targets.norm(dim=1), torch.full((500,), 0.8, dtype=torch.float64))


def test_claim_is_a_function_of_its_seed_and_leaves_the_threads_alone():
    threads = torch.get_num_threads()
    first, second, other = (claim(seed, rounds=160, moves=200).checks[2].measured for seed in (3, 3, 4))
    assert first == second != other
    assert torch.get_num_threads() == threads
