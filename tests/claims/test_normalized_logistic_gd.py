import sys

import pytest

from headway.claims.normalized_logistic_gd import PLAIN, TABLE, claim, digits, worst_case
from headway.optim.normalized_logistic_gd import separate

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def outcome():
    return claim()


def test_claim_holds(outcome):
    assert [check.what for check in outcome.checks if not check.holds] == []
    assert outcome.checks[5].measured == 19
    assert outcome.checks[6].measured == 130


def test_claim_fails_with_plain_descent_in_the_place_of_the_normalized_rule():
    failed = claim(rule="logistic").checks
    assert [check.holds for check in failed] == [False, True, False, True, True, False, True]


@pytest.mark.parametrize(("gamma", "steps"), TABLE.items())
def test_the_papers_table_row_exactly(gamma, steps):
    assert separate(worst_case(1000), "normalized", gamma).iterations == steps


def test_plain_descent_grows_with_the_number_of_examples():
    assert [separate(worst_case(n), "logistic", 100.0).iterations for n in (500, 1000, 2000)] == [154, PLAIN, 616]


def test_digits_have_all_threes_and_five_eights():
    assert digits().shape == (188, 65)
    assert (digits()[:, -1] == -1).sum() == 5


def test_panels_are_complete(outcome):
    assert [len(panel.curves) for panel in outcome.panels] == [2, 4]
    assert all(y[-1] == 1.0 for _, y in outcome.panels[1].curves.values())


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "headway\[estimators\]"'):
        claim()
