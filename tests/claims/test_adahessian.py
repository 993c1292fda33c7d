import pytest

from headway.claims import adahessian as claims
from headway.optim import adahessian

pytest.importorskip("sklearn")


def failed(outcome):
    return [check.what for check in outcome.checks if not check.holds]


def test_claim_holds():
    outcome = claims.claim()
    assert not failed(outcome)
    assert len(outcome.checks) == 3 + 2 * 3 + 5 + 3
    for panel in outcome.panels:
        assert all(len(x) == len(y) == 9 for x, y in panel.curves.values())


def test_with_the_gradient_in_place_of_curvature_the_claim_fails(monkeypatch):
    """The statistic of Adam: steps lose the units of their parameters."""
    monkeypatch.setattr(adahessian, "hessian_diagonal", lambda grads, params, probes: [g.detach() + 0 for g in grads])
    names = failed(claims.claim(epochs=2))
    assert any("rescaled coordinates" in name for name in names)
    assert any("after one full step" in name for name in names)
    assert any("digits" in name for name in names)


def test_passes_are_counted():
    assert claims.backward_passes(n_samples=2) == 3.0
