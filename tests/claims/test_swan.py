import pytest

from headway.claims.swan import claim


@pytest.fixture(scope="module")
def outcome():
    return claim()


def test_the_claim_holds(outcome):
    assert [check.what for check in outcome.checks if not check.holds] == []


def test_without_whitening_one_step_does_not_reach_the_minimum():
    assert not claim(steps=10, whiten=False).checks[0].holds
