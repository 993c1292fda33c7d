import pytest

from headway.budget.scale_rl import ComputePerformanceFit
from headway.claims import scale_rl


def test_claim_holds_with_fewer_seeds():
    outcome = scale_rl.claim(seeds=6)
    assert len(outcome.checks) == 5
    assert outcome.holds, [check for check in outcome.checks if not check.holds]
    assert len(outcome.panels) == 2


@pytest.mark.filterwarnings("ignore:exponent ended at the edge")
def test_a_wrong_performance_before_training_is_caught(monkeypatch):
    monkeypatch.setattr(scale_rl, "estimator", lambda: ComputePerformanceFit(initial=0.0))
    checks = {check.what: check for check in scale_rl.claim(seeds=3).checks}
    assert not checks["95 % interval contains A, share of seeds"].holds


def test_a_fit_that_always_trusts_itself_is_caught(monkeypatch):
    class Sure(ComputePerformanceFit):
        @property
        def identified_(self):
            return True

    monkeypatch.setattr(scale_rl, "estimator", lambda: Sure(initial=scale_rl.INITIAL))
    failing = [check.what for check in scale_rl.claim(seeds=3).checks if not check.holds]
    assert failing == ["window before half the midpoint refused, share of seeds"]
