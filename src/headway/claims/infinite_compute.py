"""Few data, much compute: strong weight decay, ensembles and their asymptote, on 150 of scikit-learn's digits.

A 64-h-10 ReLU network, Adam with decoupled decay on its matrices, lr 0.01 to zero along a cosine, batch 30; 15 % of all
labels are random. The decay of every width is found by `LocalSearch` on validation rows, from the standard 0.1; all
losses reported are of test rows. All runs of one width are trained at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from headway.budget.distillation import distillation_loss
from headway.budget.infinite_compute import PowerLawAsymptote
from headway.budget.local_search import LocalSearch
from headway.budget.logit_ensemble import ensemble_curve
from headway.claims import Check, Outcome, Panel

__all__ = ["claim"]

DECAYS = (0.0, 0.1, 1.0, 3.0, 10.0, 30.0)
STANDARD = 0.1
WIDTHS = (16, 64, 256)
SEEDS = 2
MEMBERS = 8
STUDENTS = 8
EPOCHS = 40
TRAIN_ROWS, VALIDATION_ROWS = 150, 600
NOISE = 0.15
BATCH = 30
LR = 0.01

Objective = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Split:
    """Rows x in [0, 1] of shape (rows, 64) and their labels."""

    x: Tensor
    y: Tensor
