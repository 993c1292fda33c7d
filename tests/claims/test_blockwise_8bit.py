import pytest

from headway.claims.blockwise_8bit import claim


@pytest.fixture(scope="module")
def outcome():
    return claim()


def test_the_claim_holds(outcome):
    assert [check.what for check in outcome.checks if not check.holds] == []


def test_with_one_scale_for_all_outliers_cost_everybody(outcome):
    assert not claim(steps=1, block_size=2**20).checks[2].holds
