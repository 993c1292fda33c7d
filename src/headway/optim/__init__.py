"""Optimizers: each a `torch.optim.Optimizer`."""

from headway.optim.adagrad_accelerated import AdaGradAGD
from headway.optim.frugal import Frugal, frugal_param_groups

__all__ = ["AdaGradAGD", "Frugal", "frugal_param_groups"]
