from headway.claims.fira import claim, spike


def test_the_claim_holds_in_fewer_steps():
    outcome = claim(steps=240, update_gap=30)
    assert [check.what for check in outcome.checks if not check.holds] == []


def test_without_the_residual_nothing_is_left_to_claim():
    assert not claim(steps=40, update_gap=10, scaling=False).checks[0].holds


def test_without_the_limiter_the_spike_is_seen():
    assert spike(0, 1.01) <= 1.01 * (1 + 1e-6) < 2 <= spike(0, None)
