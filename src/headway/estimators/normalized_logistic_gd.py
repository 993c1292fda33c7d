"""Normalized LR+GD as a scikit-learn classifier.

Source: Tyurin, "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large
Step Sizes", AAAI 2025, arXiv 2412.08424.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, validate_data

from headway.constraints import OneOf, Range, check_arguments
from headway.optim.normalized_logistic_gd import separate

__all__ = ["NormalizedLogisticRegressionGD"]


class NormalizedLogisticRegressionGD(ClassifierMixin, BaseEstimator):
    """A linear classifier that separates two separable classes in few passes, without a learning rate to tune.

    `headway.optim.normalized_logistic_gd.separate` on the rows y_i x_i, y_i = +-1, with a 1 attached to x_i for the
    intercept: steps gamma sum_i w_i y_i x_i, w_i in proportion to 1 / (1 + exp(y_i x_i . theta)), until all examples
    are on their side. The result is a separator, not the one of largest margin, and its scale is arbitrary: there is no
    `predict_proba`; `sklearn.calibration.CalibratedClassifierCV` calibrates `decision_function`. Use it in
    `OneVsRestClassifier` for more than two classes. Data that are not separable use up `max_iter` steps, with a
    warning; `pocket=True` then keeps the best of the iterates.

    Cost per step: two products of X with a vector, in fp64.

    Args:
        gamma: step size, > 0. Default 100 (see `NormalizedLogisticGD`).
        normalized: False for plain gradient descent on the mean logistic loss. Default True.
        fit_intercept: default True.
        max_iter: largest number of steps, >= 1. Default 10,000.
        warm_start: start from the last fit. Default False.
        pocket: keep the iterate of the best training accuracy, not the last. Default False.
        track: fill `history_`. Default False.

    Attributes: `coef_` (1, d), `intercept_` (1,), `classes_`, `n_iter_`, `separated_` (whether all training examples
    are on their side), `history_` (lists `loss`, `accuracy`, `gradient_norm`, before each step and at the end).

    Raises:
        ValueError: from `fit`, an argument outside its range, other than two classes, X that is not finite, a row of
            zeros without intercept.

    Source: arXiv 2412.08424.

    >>> from headway.estimators import NormalizedLogisticRegressionGD
    >>> classifier = NormalizedLogisticRegressionGD().fit([[0.0], [1.0], [2.0], [3.0]], ["a", "a", "b", "b"])
    >>> classifier.separated_, list(classifier.predict([[0.5], [2.5]]))
    (True, [np.str_('a'), np.str_('b')])
    """

    coef_: np.ndarray
    intercept_: np.ndarray

    def __init__(
        self,
        gamma: float = 100.0,
        normalized: bool = True,
        fit_intercept: bool = True,
        max_iter: int = 10_000,
        warm_start: bool = False,
        pocket: bool = False,
        track: bool = False,
    ) -> None:
        self.gamma = gamma
        self.normalized = normalized
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.warm_start = warm_start
        self.pocket = pocket
        self.track = track

    def fit(self, X: Any, y: Any) -> NormalizedLogisticRegressionGD:
        """Fit to X (n, d) and two classes y (n,)."""
        flag = OneOf(False, True)
        ranges = {"gamma": Range(low=0, low_open=True), "max_iter": Range(low=1, integer=True)}
        flags = ("normalized", "fit_intercept", "warm_start", "pocket", "track")
        check_arguments({**ranges, **dict.fromkeys(flags, flag)}, **self.get_params())
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        if kind != "binary":
            raise ValueError(f"Only binary classification is supported. The type of the target is {kind}.")
        classes, sides = np.unique(y, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(f"y must hold two classes, got one class: {classes[0]!r}")
        signs = 2.0 * sides - 1
        rows = np.hstack([X, np.ones((len(X), 1))]) if self.fit_intercept else X
        start = None
        if self.warm_start and hasattr(self, "coef_"):
            start = torch.from_numpy(np.append(self.coef_[0], self.intercept_) if self.fit_intercept else self.coef_[0])
        found = separate(
            torch.from_numpy(signs[:, None] * rows),
            "normalized" if self.normalized else "logistic",
            float(self.gamma),
            int(self.max_iter),
            theta=start,
            pocket=self.pocket,
            track=self.track,
        )
        theta = found.theta.numpy()
        self.classes_ = classes
        self.coef_ = theta[None, : X.shape[1]].copy()
        self.intercept_ = theta[X.shape[1] :].copy() if self.fit_intercept else np.zeros(1)
        self.n_iter_ = found.iterations
        self.separated_ = found.separated
        self.history_ = found.history
        if not found.separated:
            message = f"no separating hyperplane after max_iter={self.max_iter} steps; the classes may not be separable"
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """The score x . coef_ + intercept_ of each row, shape (n,); positive for `classes_[1]`."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return X @ self.coef_[0] + self.intercept_[0]

    def predict(self, X: Any) -> np.ndarray:
        """The class of each row, shape (n,)."""
        positive = self.decision_function(X) > 0
        return self.classes_[positive.astype(int)]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags
