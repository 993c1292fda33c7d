"""Schedules of the learning rate and of the batch size, and controllers that set the rate from measurements.

A learning-rate schedule is a `torch.optim.lr_scheduler.LRScheduler`; its length is a number of steps or a `Budget`
of steps, tokens or seconds.

>>> import torch
>>> from headway.schedules import REXLR
>>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
>>> schedule = REXLR(optimizer, total_steps=1000)  # then schedule.step() after every optimizer.step()
"""

from headway.schedules.adadagrad import AdaptiveBatchController, GrowingBatchSampler, propose_batch
from headway.schedules.autolrs import AutoLRS, Stage, drive
from headway.schedules.batch_ramp import BatchRamp
from headway.schedules.batch_schedule import BatchSchedule, split_batch
from headway.schedules.batch_size_scaling import (
    SpectralLRController,
    batch_hessian_edge,
    calibrate_noise,
    estimate_noise,
    hessian_matvec,
    max_learning_rate,
    polyak_pair,
    scale_learning_rate,
)
from headway.schedules.fixed_batch import FixedBatch
from headway.schedules.gradient_noise import (
    NoiseStats,
    chunk_stats,
    gram_stats,
    noise_stats,
    per_sample_grads,
    pool_noise_stats,
)
from headway.schedules.gradient_norms import GradNormRecorder
from headway.schedules.loss_forecast import ExponentialForecaster
from headway.schedules.profile import ConstantLR, CosineLR, LinearLR, ProfileLR
from headway.schedules.rex import REXLR, rex_profile
from headway.schedules.schedule_refinement import (
    ArrayLR,
    RefinedLR,
    last_iterate_bound,
    linear_decay,
    refine_schedule,
)
from headway.schedules.uba import UBALR, chebyshev_steps, phi_from_condition_number, uba_profile
from headway.schedules.wsd_s import WSDLR, WSDSLR, DecayBranchPlanner
from headway.spending import Budget

__all__ = [
    "REXLR",
    "UBALR",
    "WSDLR",
    "WSDSLR",
    "AdaptiveBatchController",
    "ArrayLR",
    "AutoLRS",
    "BatchRamp",
    "BatchSchedule",
    "Budget",
    "ConstantLR",
    "CosineLR",
    "DecayBranchPlanner",
    "ExponentialForecaster",
    "FixedBatch",
    "GradNormRecorder",
    "GrowingBatchSampler",
    "LinearLR",
    "NoiseStats",
    "ProfileLR",
    "RefinedLR",
    "SpectralLRController",
    "Stage",
    "batch_hessian_edge",
    "calibrate_noise",
    "chebyshev_steps",
    "chunk_stats",
    "drive",
    "estimate_noise",
    "gram_stats",
    "hessian_matvec",
    "last_iterate_bound",
    "linear_decay",
    "max_learning_rate",
    "noise_stats",
    "per_sample_grads",
    "phi_from_condition_number",
    "polyak_pair",
    "pool_noise_stats",
    "propose_batch",
    "refine_schedule",
    "rex_profile",
    "scale_learning_rate",
    "split_batch",
    "uba_profile",
]
