"""Learning-rate schedules: each a `torch.optim.lr_scheduler.LRScheduler`.

>>> import torch
>>> from headway.schedules import REXLR
>>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
>>> schedule = REXLR(optimizer, total_steps=1000)  # then schedule.step() after every optimizer.step()
"""

from headway.schedules.profile import ConstantLR, CosineLR, LinearLR, ProfileLR
from headway.schedules.rex import REXLR, rex_profile
from headway.schedules.wsd_s import WSDLR, WSDSLR, DecayBranchPlanner

__all__ = [
    "REXLR",
    "WSDLR",
    "WSDSLR",
    "ConstantLR",
    "CosineLR",
    "DecayBranchPlanner",
    "LinearLR",
    "ProfileLR",
    "rex_profile",
]
