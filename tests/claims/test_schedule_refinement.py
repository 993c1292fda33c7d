import numpy as np
import pytest

from headway.claims import schedule_refinement
from headway.schedules.schedule_refinement import ArrayLR, linear_decay

pytest.importorskip("sklearn")


def holding(outcome, words):
    return [check.holds for check in outcome.checks if words in check.what]


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(schedule_refinement, "LENGTHS", (100, 400))
    monkeypatch.setattr(schedule_refinement, "WORST_CASE_SEEDS", 3)


def test_claim_holds_in_a_short_form():
    outcome = schedule_refinement.claim(steps=500, seeds=1)
    assert len(outcome.checks) == 1 + 3 + 4
    assert outcome.holds, [check for check in outcome.checks if not check.holds]


def test_claim_fails_when_the_norms_say_nothing(monkeypatch):
    class Linear:
        from_run = staticmethod(lambda optimizer, recorder, steps: ArrayLR(optimizer, linear_decay(steps)))

    monkeypatch.setattr(schedule_refinement, "RefinedLR", Linear)
    outcome = schedule_refinement.claim(steps=60, seeds=1)
    assert holding(outcome, "refined / linear decay") == [False, False]


def test_claim_fails_for_a_formula_without_the_tail_sums(monkeypatch):
    def weights_only(norms, **_):
        return np.asarray(norms, dtype=float) ** -2

    monkeypatch.setattr(schedule_refinement, "refine_schedule", weights_only)
    outcome = schedule_refinement.claim(steps=40, seeds=1)
    assert holding(outcome, "constant norms") == [False]
    assert holding(outcome, "T = 400: error of constant / linear decay") == [False]


def test_claim_repeats_for_the_same_seed_and_differs_for_another():
    first, second, other = (schedule_refinement.claim(seed, steps=40, seeds=1) for seed in (0, 0, 1))
    assert first.checks == second.checks != other.checks
    assert all(len(panel.curves) >= 2 for panel in first.panels)
