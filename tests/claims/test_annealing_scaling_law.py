import numpy as np

from headway.budget import annealing_scaling_law as law
from headway.claims import annealing_scaling_law


def test_claim_holds():
    outcome = annealing_scaling_law.claim()
    assert len(outcome.checks) == 5
    assert outcome.holds, [check for check in outcome.checks if not check.holds]


def test_claim_fails_for_an_annealing_area_that_is_not_smoothed(monkeypatch):
    def unsmoothed(lrs, lam=0.999, warmup_steps=0):
        return np.cumsum(np.asarray(lrs))[-1] - np.cumsum(np.asarray(lrs))

    monkeypatch.setattr(law, "annealing_area", unsmoothed)
    assert not annealing_scaling_law.claim(steps=1500).holds


def test_claim_fails_without_an_annealing_area(monkeypatch):
    monkeypatch.setattr(law, "annealing_area", lambda lrs, lam=0.999, warmup_steps=0: np.zeros(len(lrs)))
    outcome = annealing_scaling_law.claim(steps=1500)
    assert not outcome.checks[-1].holds
    assert not outcome.holds


def test_panels_show_the_rates_and_both_unseen_curves():
    outcome = annealing_scaling_law.claim(steps=1000)
    assert [len(panel.curves) for panel in outcome.panels] == [4, 3, 3]
