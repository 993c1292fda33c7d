"""Estimators: methods in scikit-learn's interface. They need the extra `estimators`."""

try:
    import sklearn as _sklearn  # noqa: F401
except ImportError as error:
    raise ImportError('headway.estimators needs scikit-learn: pip install "headway[estimators]"') from error

from headway.estimators.normalized_logistic_gd import NormalizedLogisticRegressionGD

__all__ = ["NormalizedLogisticRegressionGD"]
