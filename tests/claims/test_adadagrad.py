from headway.claims import adadagrad
from headway.schedules.adadagrad import propose_batch

SHORT = {"batches": (16, 64), "draws": 100, "seeds": 1}
QUICK = {"batches": (16,), "draws": 10, "seeds": 1, "large": 512}


def broken(outcome):
    return [check.what for check in outcome.checks if not check.holds]


def test_claim_holds_in_a_shortened_run_and_draws_its_curves():
    outcome = adadagrad.claim(**SHORT)
    assert outcome.holds, broken(outcome)
    assert len(outcome.checks) == 2 + 2 + 3
    assert [set(panel.curves) for panel in outcome.panels[1:]] == [{"growing", "fixed 4096", "fixed 2"}] * 2


def test_claim_fails_for_a_proposal_without_the_square(monkeypatch):
    monkeypatch.setattr(adadagrad, "propose_batch", lambda stats, eta: propose_batch(stats, eta=eta**0.5))
    outcome = adadagrad.claim(**{**QUICK, "draws": 100})
    proposals = [check for check in outcome.checks if "relative distance" in check.what]
    assert [check.holds for check in proposals] == [False, False, True]  # 1 / 0.9 is near 1 / 0.9^2


def test_claim_fails_for_a_batch_that_never_grows(monkeypatch):
    monkeypatch.setattr(adadagrad.AdaptiveBatchController, "due", lambda self, step: False)
    assert any("samples to the final loss" in what for what in broken(adadagrad.claim(**QUICK)))


def test_claim_fails_for_a_batch_that_is_large_from_the_start(monkeypatch):
    monkeypatch.setattr(adadagrad, "SMALL", QUICK["large"])
    failed = broken(adadagrad.claim(**QUICK))
    assert any("samples to the final loss" in what for what in failed)
    assert any("loss after 200 steps" in what for what in failed)


def test_claim_repeats_for_the_same_seed_and_differs_for_another():
    first, second, other = (adadagrad.claim(seed, **QUICK) for seed in (0, 0, 1))
    assert first.checks == second.checks != other.checks
