"""Conformance suites, one per role, for the methods of this package and for anybody's own.

>>> import torch
>>> from headway.testing import check_optimizer
>>> check_optimizer(torch.optim.SGD)  # raises AssertionError, naming the clause, if the contract is broken
"""

from headway.testing.optimizers import check_optimizer
from headway.testing.planners import check_planner
from headway.testing.schedules import check_schedule

__all__ = ["check_optimizer", "check_planner", "check_schedule"]
