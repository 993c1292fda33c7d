import sys

import pytest

from headway.claims import learning_curve_prediction
from headway.claims.learning_curve_prediction import LearningCurve

pytest.importorskip("sklearn")


SIZES = (*range(50, 501, 50), 1400)


def test_claim_holds_with_fewer_sizes():
    outcome = learning_curve_prediction.claim(sizes=SIZES)
    assert len(outcome.checks) == 6
    assert outcome.holds, [check for check in outcome.checks if not check.holds]
    assert len(outcome.panels) == 2


def test_the_last_value_carried_forward_fails(monkeypatch):
    class Carry(LearningCurve):
        def predict(self, x):
            return self._y[-1] + 0 * x

    monkeypatch.setattr(learning_curve_prediction, "predictor", Carry)
    failing = [
        check.what for check in learning_curve_prediction.claim(permutations=2, sizes=SIZES).checks if not check.holds
    ]
    assert "3 nearest neighbours: error at 1400 examples in points, from 500" in failing


def test_an_anchor_without_effect_fails(monkeypatch):
    def predictor(anchor=True):
        return LearningCurve(anchor=False)

    monkeypatch.setattr(learning_curve_prediction, "predictor", predictor)
    moved = learning_curve_prediction.claim(permutations=1, sizes=SIZES).checks[-1]
    assert moved.measured == 1.0
    assert not moved.holds


def test_missing_scikit_learn_is_named_with_the_line_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "headway\[estimators\]"'):
        learning_curve_prediction.claim(permutations=1, sizes=SIZES)
