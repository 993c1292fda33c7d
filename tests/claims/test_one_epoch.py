from headway.claims import one_epoch


def test_claim_holds_for_a_third_of_the_steps_and_one_seed():
    outcome = one_epoch.claim(steps=1000, seeds=1)
    assert len(outcome.checks) == 2 * 3 + 1
    assert outcome.holds, [check for check in outcome.checks if not check.holds]


def test_claim_fails_when_the_one_epoch_repeats_its_data(monkeypatch):
    monkeypatch.setattr(one_epoch, "_one_epoch", one_epoch._epochs)
    outcome = one_epoch.claim(steps=600, seeds=1)
    gaps = [check for check in outcome.checks if "|test - train|" in check.what]
    assert len(gaps) == 2
    assert not any(check.holds for check in gaps)


def test_panels_show_training_and_test_loss_of_both():
    outcome = one_epoch.claim(steps=100, seeds=1)
    assert [len(panel.curves) for panel in outcome.panels] == [4, 4]
