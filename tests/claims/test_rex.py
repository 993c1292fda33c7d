import sys

import pytest

from headway.claims import rex
from headway.schedules import ProfileLR

pytest.importorskip("sklearn")


def test_claim_holds_at_the_lowest_budget_with_fewer_seeds():
    outcome = rex.claim(budgets=(20,), seeds=3)
    assert len(outcome.checks) == 2 + 2 + 1
    assert outcome.holds, [check for check in outcome.checks if not check.holds]


def test_claim_fails_for_a_schedule_that_decays_early(monkeypatch):
    monkeypatch.setitem(rex.SCHEDULES, "REX", lambda optimizer, steps: ProfileLR(optimizer, "exponential", steps))
    outcome = rex.claim(budgets=(20,), seeds=3)
    against_linear = [check for check in outcome.checks if "linear" in check.what]
    assert len(against_linear) == 3
    assert not any(check.holds for check in against_linear)


def test_equal_schedules_give_ratio_one_and_do_not_pass_as_better(monkeypatch):
    monkeypatch.setitem(rex.SCHEDULES, "REX", rex.SCHEDULES["linear"])
    outcome = rex.claim(budgets=(20,), seeds=1)
    assert outcome.checks[0].measured == 1.0
    assert not outcome.holds


def test_panels_show_the_profile_and_one_loss_curve_per_optimizer():
    outcome = rex.claim(budgets=(20, 30), seeds=1)
    assert len(outcome.panels) == 3
    for panel in outcome.panels[1:]:
        assert set(panel.curves) == {"REX", "linear", "step 50-75"}
        assert all(list(x) == [20, 30] and len(y) == 2 for x, y in panel.curves.values())


def test_claim_repeats_for_the_same_seed_and_differs_for_another():
    first, second, other = (rex.claim(seed, budgets=(20,), seeds=1) for seed in (0, 0, 1))
    assert first.checks == second.checks != other.checks


def test_missing_scikit_learn_is_named_with_the_line_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "headway\[estimators\]"'):
        rex.claim(budgets=(20,), seeds=1)
