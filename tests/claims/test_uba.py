import pytest

from headway.claims import uba

pytest.importorskip("sklearn")


def test_claim_holds_at_the_lowest_budget_with_fewer_seeds():
    outcome = uba.claim(budgets=(40,), seeds=2)
    assert len(outcome.checks) == 3 + 2
    assert outcome.holds, [check for check in outcome.checks if not check.holds]


def test_claim_fails_for_phi_of_cosine(monkeypatch):
    monkeypatch.setattr(uba, "PHI", 2.0)
    outcome = uba.claim(budgets=(40,), seeds=1)
    check = next(check for check in outcome.checks if "loss of phi = 2 /" in check.what)
    assert check.measured == pytest.approx(1, abs=1e-3)
    assert not check.holds


def test_claim_fails_for_the_wrong_angles(monkeypatch):
    broken = uba.UBALR
    monkeypatch.setattr(uba, "UBALR", lambda *args, angle="endpoint", **options: broken(*args, **options))
    outcome = uba.claim(budgets=(), seeds=1)
    assert [check.holds for check in outcome.checks[:2]] == [False, False]


def test_claim_fails_for_a_schedule_that_drops_early(monkeypatch):
    monkeypatch.setattr(uba, "PHI", 5.0)
    outcome = uba.claim(budgets=(40,), seeds=1)
    assert not next(check for check in outcome.checks if "loss of phi = 5 /" in check.what).holds


def test_quadratics_do_not_depend_on_the_seed_and_training_does():
    first, second, other = (uba.claim(seed, budgets=(40,), seeds=1).checks for seed in (0, 0, 1))
    assert first == second
    assert first[:3] == other[:3]
    assert first[3:] != other[3:]
