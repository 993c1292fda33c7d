import sys

import pytest

from headway.claims import autolrs
from headway.schedules import autolrs as method
from headway.schedules.loss_forecast import ExponentialForecaster

pytest.importorskip("sklearn")


def test_claim_holds_with_two_runs():
    outcome = autolrs.claim(seeds=2)
    assert len(outcome.checks) == 4
    assert outcome.holds, [check for check in outcome.checks if not check.holds]
    assert outcome.checks[-1].measured == 1.0
    loss, rates, forecasts = outcome.panels
    assert set(loss.curves) == {"AutoLRS", "best constant rate", "best linear decay"}
    assert all(len(x) == len(y) == autolrs.STEPS + 1 for x, y in loss.curves.values())
    assert list(rates.curves) == ["run 0", "run 1"]
    assert [len(x) for x, _ in forecasts.curves.values()] == [10, 10, 10, 10]


def test_claim_fails_when_the_worst_forecast_is_chosen(monkeypatch):
    class Reversed(ExponentialForecaster):
        def predict(self, x):
            return -super().predict(x)

    monkeypatch.setattr(method, "ExponentialForecaster", Reversed)
    outcome = autolrs.claim(seeds=1)
    assert not any(check.holds for check in outcome.checks[:2])


def test_claim_fails_when_the_rate_of_the_first_stage_is_kept(monkeypatch):
    def first_only(rates, *rest):
        return 0.3 * 0.99 ** len(rates)

    monkeypatch.setattr(method, "_propose", first_only)
    outcome = autolrs.claim(seeds=1)
    assert not any(check.holds for check in outcome.checks[:2])


def test_missing_scikit_learn_is_named_with_the_line_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.gaussian_process", None)
    with pytest.raises(ImportError, match=r'pip install "headway\[estimators\]"'):
        autolrs.claim(seeds=1)
