"""Conformance suites, one per role, for the methods of this package and for anybody's own.

>>> import torch
>>> from headway.testing import check_optimizer
>>> check_optimizer(torch.optim.SGD)  # raises AssertionError, naming the clause, if the contract is broken
"""

from headway.testing.batch_schedules import check_batch_schedule
from headway.testing.controllers import check_controller
from headway.testing.optimizers import check_optimizer
from headway.testing.planners import check_planner
from headway.testing.schedules import check_schedule

__all__ = ["check_batch_schedule", "check_controller", "check_optimizer", "check_planner", "check_schedule"]
