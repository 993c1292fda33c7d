import pytest
from torch.optim import Adam

from headway.claims.diffgrad import BETAS, claim, f1, f2, f3


@pytest.fixture(scope="module")
def outcome():
    return claim()


def test_claim_holds(outcome):
    assert [check.what for check in outcome.checks if not check.holds] == []


def test_claim_fails_for_adam_in_place_of_diffgrad():
    failed = [c.what for c in claim(make=lambda p, lr: Adam(p, lr=lr, betas=BETAS)).checks if not c.holds]
    assert [what.split(":")[0] for what in failed] == ["F1", "constant gradient"]


def test_panels_show_three_runs_on_three_functions(outcome):
    for panel in outcome.panels:
        assert len(panel.curves) == 3
        assert all(len(x) == len(y) == 300 and y[0] == -1 for x, y in panel.curves.values())


@pytest.mark.parametrize(("gradient", "x", "value"), [(f1, -0.3, 0.0), (f1, 0.2, 0.0), (f2, -0.95, -40.0), (f2, 0, 0)])
def test_gradients_are_those_of_the_paper(gradient, x, value):
    assert gradient(x) == pytest.approx(value, abs=1e-12)


def test_third_gradient_is_piecewise():
    assert [f3(x) for x in (-1, -0.45, -0.2, 0.2, 0.45, 1)] == [-2, 1.0, -7 / 8, 7 / 8, -1.0, 2]
