"""Estimators and planners: measurements and a budget in, a prediction or a plan out.

>>> from headway.budget import PowerLaw
>>> law = PowerLaw().fit(range(1, 101), [3.0 * i**-0.25 for i in range(1, 101)])
>>> round(law.iterations_to(0.5))
1296
"""

from headway.budget.annealing_scaling_law import (
    AnnealingLaw,
    Run,
    annealing_area,
    best_decay_fraction,
    forward_area,
)
from headway.budget.distillation import MixedDataset, distillation_loss, sample_teachers
from headway.budget.fresh_data import DataExhausted, EpochGuard, NoRepeatSampler, epoch_guard
from headway.budget.inference_plan import InferencePlan, pass_at_k, plan_inference
from headway.budget.infinite_compute import PowerLawAsymptote, data_multiplier, ensemble_recipe, joint_asymptote
from headway.budget.kinetics import BlockTopK, Dense, KineticsCostModel, ModelSpec, TopK, device_intensity
from headway.budget.learning_curve_prediction import LearningCurve, NotConvergedWarning
from headway.budget.local_search import LocalSearch
from headway.budget.logit_ensemble import LogitEnsemble, ensemble_curve, train_ensemble
from headway.budget.one_epoch import OneEpochPlan, PowerLaw, plan_one_epoch, speedup, transformer_shape
from headway.budget.scale_rl import ComputePerformanceFit, compare_recipes, sigmoid_curve
from headway.spending import Budget

__all__ = [
    "AnnealingLaw",
    "BlockTopK",
    "Budget",
    "ComputePerformanceFit",
    "DataExhausted",
    "Dense",
    "EpochGuard",
    "InferencePlan",
    "KineticsCostModel",
    "LearningCurve",
    "LocalSearch",
    "LogitEnsemble",
    "MixedDataset",
    "ModelSpec",
    "NoRepeatSampler",
    "NotConvergedWarning",
    "OneEpochPlan",
    "PowerLaw",
    "PowerLawAsymptote",
    "Run",
    "TopK",
    "annealing_area",
    "best_decay_fraction",
    "compare_recipes",
    "data_multiplier",
    "device_intensity",
    "distillation_loss",
    "ensemble_curve",
    "ensemble_recipe",
    "epoch_guard",
    "forward_area",
    "joint_asymptote",
    "pass_at_k",
    "plan_inference",
    "plan_one_epoch",
    "sample_teachers",
    "sigmoid_curve",
    "speedup",
    "train_ensemble",
    "transformer_shape",
]
