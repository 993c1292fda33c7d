from headway.claims.coordinate_clipping import claim


def test_the_sharpness_ratio_holds():
    outcome = claim(steps=20, runs=1)
    assert outcome.checks[0].holds


def test_without_clipping_nothing_is_left_to_claim():
    outcome = claim(steps=20, runs=1, fraction=0.0)
    assert not outcome.checks[0].holds


def test_the_claim_holds_for_one_seed():
    assert claim(runs=1).holds
