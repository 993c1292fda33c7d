from headway.claims.perpgrad_stablemax import claim


def test_the_claim_holds():
    assert claim().holds


def test_without_the_projection_the_network_stays_at_what_it_memorised():
    outcome = claim(steps=100, project=False)
    assert [check.holds for check in outcome.checks] == [False, True, True, True]
