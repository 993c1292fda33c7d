import functools

import pytest
import torch

pytest.importorskip("sklearn")

from headway.claims import target_surrogate
from headway.claims.target_surrogate import INNER_STEPS, claim, data, run


@pytest.fixture(scope="module")
def outcome():
    return claim()


def test_claim_holds(outcome):
    assert [check.what for check in outcome.checks if not check.holds] == []
    assert outcome.holds


def test_counts_are_the_reference_counts(outcome):
    good, bad = outcome.panels
    assert [len(x) - 1 for x, _ in good.curves.values()] == [351, 153, 111, 88]
    assert [len(x) - 1 for x, _ in bad.curves.values()] == [654, 144, 54, 26]
    assert len(good.curves) == len(INNER_STEPS)


def test_one_inner_step_is_gradient_descent():
    X, y = data(seed=0, badly_scaled=False)
    losses = run(X, y, inner_steps=1, target=0.2).losses
    theta, step = torch.zeros(X.shape[1], dtype=X.dtype), float(4 * len(X) / torch.linalg.matrix_norm(X, 2) ** 2)
    for loss in losses:
        assert loss == pytest.approx(float(torch.nn.functional.softplus(-y * (X @ theta)).mean()), abs=1e-12)
        theta = theta + step * X.T @ (y * torch.sigmoid(-y * (X @ theta))) / len(X)


def test_the_order_of_the_samples_does_not_matter():
    first, second = (run(*data(seed, badly_scaled=False), inner_steps=20, target=0.1).losses for seed in (0, 5))
    assert first == pytest.approx(second, abs=1e-10)


def test_claim_fails_where_only_the_first_inner_step_is_taken(monkeypatch):
    @functools.cache
    def broken(badly_scaled, target):
        return run(*data(0, badly_scaled), 1, target)

    monkeypatch.setattr(target_surrogate, "run", lambda X, y, m, target: broken(target == 0.1, target))
    outcome = claim()
    assert [check.holds for check in outcome.checks] == [False, False, False, True, False]
