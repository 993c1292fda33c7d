import subprocess
import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.datasets import load_iris, make_blobs
from sklearn.exceptions import ConvergenceWarning
from sklearn.multiclass import OneVsRestClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from headway.estimators import NormalizedLogisticRegressionGD


@parametrize_with_checks([NormalizedLogisticRegressionGD(max_iter=200)])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_contract_of_scikit_learn(estimator, check):
    check(estimator)


def blobs():
    return make_blobs(60, 3, centers=[[0, 0, 5], [3, 0, -5]], random_state=0)


def test_separable_data_are_separated_with_their_labels():
    X, y = blobs()
    names = np.array(["ham", "spam"])[y]
    classifier = NormalizedLogisticRegressionGD().fit(X, names)
    assert classifier.separated_
    assert classifier.score(X, names) == 1.0
    assert list(classifier.classes_) == ["ham", "spam"]
    assert ((classifier.decision_function(X) > 0) == (names == "spam")).all()
    assert classifier.coef_.shape == (1, 3)
    assert classifier.intercept_.shape == (1,)


def test_a_warm_start_that_separates_takes_no_step():
    X, y = blobs()
    classifier = NormalizedLogisticRegressionGD(warm_start=True).fit(X, y)
    before = classifier.coef_.copy()
    assert classifier.n_iter_ > 0
    classifier.fit(X, y)
    assert classifier.n_iter_ == 0
    assert (classifier.coef_ == before).all()


def test_without_intercept_it_is_zero():
    X, y = blobs()
    assert NormalizedLogisticRegressionGD(fit_intercept=False).fit(X, y).intercept_.tolist() == [0.0]


def test_history_is_tracked_before_every_step_and_at_the_end():
    X, y = blobs()
    classifier = NormalizedLogisticRegressionGD(gamma=0.01, track=True).fit(X, y)
    assert {name: len(values) for name, values in classifier.history_.items()} == dict.fromkeys(
        ("loss", "accuracy", "gradient_norm"), classifier.n_iter_ + 1
    )
    assert classifier.history_["accuracy"][-1] == 1.0


def test_data_that_are_not_separable_warn_and_the_pocket_keeps_the_best():
    generator = np.random.default_rng(0)
    X, y = generator.normal(size=(50, 2)), generator.integers(2, size=50)
    with pytest.warns(ConvergenceWarning, match="no separating hyperplane after max_iter=25 steps"):
        last = NormalizedLogisticRegressionGD(max_iter=25, track=True).fit(X, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        best = NormalizedLogisticRegressionGD(max_iter=25, pocket=True).fit(X, y)
    assert not last.separated_
    assert best.score(X, y) >= max(last.history_["accuracy"]) - 1e-12


def test_plain_descent_needs_more_steps_on_imbalanced_data():
    X = np.array([[0.5, -1.0]] + [[-0.5, -1.0]] * 999)
    y = np.array([1] + [-1] * 999)
    options = {"fit_intercept": False, "gamma": 100.0}
    assert NormalizedLogisticRegressionGD(**options).fit(X, y).n_iter_ == 2
    assert NormalizedLogisticRegressionGD(normalized=False, **options).fit(X, y).n_iter_ == 308


def test_one_vs_rest_takes_it_for_more_classes():
    X, y = load_iris(return_X_y=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        many = OneVsRestClassifier(NormalizedLogisticRegressionGD(max_iter=300, pocket=True)).fit(X, y)
    assert many.score(X, y) > 0.8


def test_wrong_arguments_and_data_are_named():
    X, y = blobs()
    with pytest.raises(ValueError, match="gamma must be > 0, got 0"):
        NormalizedLogisticRegressionGD(gamma=0).fit(X, y)
    with pytest.raises(ValueError, match="normalized must be one of False, True, got 'yes'"):
        NormalizedLogisticRegressionGD(normalized="yes").fit(X, y)
    with pytest.raises(ValueError, match="one class"):
        NormalizedLogisticRegressionGD().fit(X, np.ones(len(X)))
    with pytest.raises(ValueError, match="Only binary classification"):
        NormalizedLogisticRegressionGD().fit(X, np.arange(len(X)) % 3)
    with pytest.raises(ValueError, match="row of zeros"):
        NormalizedLogisticRegressionGD(fit_intercept=False).fit(np.zeros((4, 2)), [0, 1, 0, 1])
    with pytest.raises(ValueError, match="NaN"):
        NormalizedLogisticRegressionGD().fit(X * np.nan, y)


def test_probabilities_are_not_offered():
    assert not hasattr(NormalizedLogisticRegressionGD(), "predict_proba")


def test_without_scikit_learn_the_import_says_what_to_install():
    program = "import sys; sys.modules['sklearn'] = None; import headway.estimators"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert 'headway.estimators needs scikit-learn: pip install "headway[estimators]"' in result.stderr
