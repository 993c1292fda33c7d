import pytest

from headway.claims import one_epoch


def test_claim_holds_for_one_seed_and_fewer_steps_where_it_is_about_the_gap():
    outcome = one_epoch.claim(steps=600, seeds=1)
    assert len(outcome.checks) == 2 * 3 + 1
    reached = [check for check in outcome.checks if "share of the iterations" in check.what]
    repeated = [check for check in outcome.checks if "ten epochs" in check.what]
    assert all(check.measured < 1 for check in reached)
    assert all(check.holds for check in repeated)
    assert outcome.checks[-1].holds


def test_claim_fails_when_the_one_epoch_repeats_its_data(monkeypatch):
    monkeypatch.setattr(one_epoch, "_one_epoch", one_epoch._epochs)
    outcome = one_epoch.claim(steps=600, seeds=1)
    assert not outcome.holds
    reached = [check.measured for check in outcome.checks if "share of the iterations" in check.what]
    assert reached == pytest.approx([1, 1])


def test_panels_show_training_and_test_loss_of_both():
    outcome = one_epoch.claim(steps=100, seeds=1)
    assert [len(panel.curves) for panel in outcome.panels] == [4, 4]
