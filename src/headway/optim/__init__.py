"""Optimizers: each a `torch.optim.Optimizer`."""

from headway.optim.frugal import Frugal, frugal_param_groups

__all__ = ["Frugal", "frugal_param_groups"]
