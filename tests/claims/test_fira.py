from headway.claims.fira import claim


def test_the_claim_holds_in_fewer_steps():
    outcome = claim(steps=240, update_gap=30)
    assert [check.what for check in outcome.checks if not check.holds] == []


def test_without_the_residual_nothing_is_left_to_claim():
    assert not claim(steps=40, update_gap=10, scaling=False).checks[0].holds
