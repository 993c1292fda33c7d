import pytest

from headway.claims import mkor as claims


def failed(outcome):
    return [check.what for check in outcome.checks if not check.holds]


@pytest.fixture(autouse=True)
def fewer_rates(monkeypatch):
    monkeypatch.setattr(claims, "RATES", (0.01, 0.03))


def test_claim_holds_with_fewer_steps():
    outcome = claims.claim(control_steps=100)
    assert not failed(outcome)
    assert len(outcome.checks) == 6
    for panel in outcome.panels:
        assert all(len(x) == len(y) for x, y in panel.curves.values())


def test_without_preconditioning_the_claim_fails():
    names = failed(claims.claim(steps=100, control_steps=10, skip=True))
    assert len(names) == 2
    assert all("mean 3" in name for name in names)


def test_the_plus_sign_is_not_an_inverse(monkeypatch):
    def enlarged(P, v, *, decay, variant="official"):
        u = P @ v
        return P + (1 - decay) / (decay + (1 - decay) * (v @ u)) * u.outer(u)

    monkeypatch.setattr(claims, "update_inverse", enlarged)
    assert claims.inverse_error(0) > 1e-2


def test_operations_of_an_update_are_four_per_entry():
    assert claims.update_operations(64) == 4 * 64 * 64 + 2 * 64


def test_a_diverged_run_is_infinite_to_its_end():
    losses = claims.train(lambda model, inner: inner, 3.0, 30.0, seed=0, steps=40)
    assert len(losses) == 5
    assert losses[-1] == float("inf")
