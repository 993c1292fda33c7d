import pytest
import torch
from torch.optim import Adam

from headway.claims.spam import claim, recovery, train
from headway.optim.spam import SPAM

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def outcome():
    return claim(steps=600, converged=3000)


def test_claim_holds_in_half_the_steps(outcome):
    assert [check.what for check in outcome.checks if not check.holds] == []


def test_claim_fails_without_clipping_and_resets():
    failed = [
        check.measured
        for check in claim(steps=50, threshold=0.0, reset_interval=0, converged=3000).checks
        if not check.holds
    ]
    assert len(failed) == 2
    assert failed[0] > 5000


def test_a_reset_ends_the_effect_of_a_spike():
    """The spike comes 100 steps before a reset, whose warm-up of 150 steps is above 1/2 of lr after about 30."""
    after, _ = recovery(lambda params: SPAM(params, threshold=0.0, reset_interval=500), converged=899, limit=400)
    assert 100 < after <= 135


def test_without_a_spike_nothing_has_to_recover():
    def spikeless(params):
        return SPAM(params, betas=(0.0, 0.0), threshold=0.0, reset_interval=0)

    steps, sizes = recovery(spikeless, converged=10, limit=20)
    assert steps == 0
    assert sizes == pytest.approx([1.0] * 21, rel=1e-5)


def test_panels_show_both_methods(outcome):
    assert [len(panel.curves) for panel in outcome.panels] == [2, 4]
    for panel in outcome.panels:
        assert all(len(x) == len(y) for x, y in panel.curves.values())


def test_runs_are_functions_of_their_seed_and_leave_global_state_alone():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    runs = [train(lambda params: Adam(params), 50, seed, True) for seed in (3, 3, 4)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
