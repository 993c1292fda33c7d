import pytest
import torch

from headway.claims import adagrad_accelerated as claims
from headway.optim import adagrad_accelerated

STEPS, RUNS = 800, 40


def failed(checks):
    return [check.what for check in checks if not check.holds]


@pytest.fixture(scope="module")
def outcome():
    return claims.claim(seed=0, runs=RUNS, steps=STEPS)


def test_claim_holds_with_fewer_runs_and_steps(outcome):
    assert outcome.holds, [check for check in outcome.checks if not check.holds]
    assert len(outcome.checks) == (2 * 2 + 4) + 2 * (2 * 2 + 2) + (2 * 5 + 2)


def test_sgd_fails_at_both_other_scales(outcome):
    baselines = {check.what: check.baseline for check in outcome.checks if check.baseline is not None}
    assert len(baselines) == 2 * 3
    assert all((baseline > 0.5) == ("times 1:" not in what) for what, baseline in baselines.items())


def test_panels_can_be_drawn_on_logarithmic_axes(outcome):
    assert [len(panel.curves) for panel in outcome.panels] == [2, 4, 5]
    for panel in outcome.panels:
        assert panel.log_x
        assert panel.log_y
        for x, y in panel.curves.values():
            assert len(x) == len(y)
            assert min(x) > 0
            assert min(y) > 0
            assert x[-1] == STEPS


def test_the_seed_sets_the_noise():
    first, again, other = (claims.noisy_gradients(seed, runs=4, steps=160)[0] for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_a_constant_step_fails_with_noise_and_under_rescaling(monkeypatch):
    monkeypatch.setattr(adagrad_accelerated, "_inverse_root", lambda S, eps: torch.full_like(S, 0.1))
    assert any("slope of the median" in what for what in failed(claims.noisy_gradients(0, RUNS, STEPS)[0]))
    assert any("distance of the iterates" in what for what in failed(claims.rescaled_objective(STEPS)[0]))


def test_an_optimizer_that_stands_still_fails_everywhere(monkeypatch):
    monkeypatch.setattr(adagrad_accelerated, "_inverse_root", lambda S, eps: torch.zeros_like(S))
    exact = failed(claims.exact_gradients(STEPS)[0])
    assert any("slope" in what for what in exact)
    assert any("at most the explicit bound" in what for what in exact)
    assert any("slope" in what for what in failed(claims.noisy_gradients(0, 4, STEPS)[0]))
    assert any("at the end" in what for what in failed(claims.rescaled_objective(STEPS)[0]))
