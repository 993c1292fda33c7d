import itertools

import pytest
import torch

from headway.claims.opposing_signals import claim, detect, planted_data


@pytest.fixture(scope="module")
def outcome():
    return claim(steps=300, seeds=1, descent_steps=200)


def test_claim_holds_for_one_seed_in_fewer_steps(outcome):
    assert [check.what for check in outcome.checks if not check.holds] == []
    assert len(outcome.checks) == 5


def test_panels_cover_all_steps(outcome):
    descent, batches = outcome.panels
    assert all(len(x) == len(y) == 200 for x, y in descent.curves.values())
    assert len(batches.curves) == 3
    assert all(x[-1] == 300 for x, _ in batches.curves.values())


def test_claim_fails_without_the_sign_steps():
    outcome = claim(steps=300, seeds=1, descent_steps=20, sign_scale=0.0)
    assert not any(check.holds for check in outcome.checks[3:])


def test_without_a_shared_large_feature_the_pair_is_not_found():
    assert detect(planted_data(0, outlier=0.0), 0.8, 120, 0).precision < 0.5


def test_the_planted_pair_is_what_makes_the_loss_rise():
    x, y = planted_data(0)
    losses = detect((x, y), 0.8, 400, 0).losses
    rises = [later - earlier for earlier, later in itertools.pairwise(losses[50:])]
    assert max(rises) > 0.001
    calm = detect((x[40:], y[40:]), 0.8, 400, 0)
    assert calm.losses[50:] == sorted(calm.losses[50:], reverse=True)


def test_a_detection_is_a_function_of_its_arguments_and_leaves_random_state_and_threads_alone():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second, other = (detect(planted_data(seed), 0.8, 30, seed).losses[-1] for seed in (3, 3, 4))
    assert first == second != other
    claim(steps=1, seeds=1, descent_steps=12)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
