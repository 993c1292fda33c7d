"""Optimizers: each a `torch.optim.Optimizer`."""

from headway.optim.adagrad_accelerated import (
    AdaGradAGD,
    adagrad_bound,
)
from headway.optim.adagrad_norm import (
    AdaGradNorm,
)
from headway.optim.adahessian import (
    AdaHessian,
)
from headway.optim.blockwise_8bit import (
    Adagrad8bit,
    Adam8bit,
    AdamW8bit,
    Lion8bit,
    RMSprop8bit,
    SGD8bit,
    StableEmbedding,
)
from headway.optim.consensus import (
    CBO,
    cbo_minimize,
)
from headway.optim.consensus_based_optimization import (
    ConsensusBasedOptimizer,
    ModuleCBO,
)
from headway.optim.coordinate_clipping import (
    CoordinateClip,
    clip_top_coordinates_,
    compare_directions,
    directional_sharpness,
)
from headway.optim.diffgrad import (
    DiffGrad,
)
from headway.optim.fira import (
    Fira,
    fira_param_groups,
)
from headway.optim.frugal import (
    Frugal,
    frugal_param_groups,
)
from headway.optim.gradient_normalized_smoothness import (
    GNSNewton,
    exact_hessian,
    fisher,
    gns_minimize,
    power_norm,
    weighted_gauss_newton,
)
from headway.optim.last_iterate_mirror_descent import (
    CompositeMirrorDescent,
    LastIterateLR,
    StepSize,
    last_iterate_lambda,
    suggest_eta,
)
from headway.optim.mkor import (
    MKOR,
    HybridSwitch,
    update_inverse,
)
from headway.optim.normalized_logistic_gd import (
    NormalizedLogisticGD,
    separate,
)
from headway.optim.opposing_pairs import (
    OpposingSignals,
    Pair,
)
from headway.optim.opposing_signals import (
    SplitSGD,
)
from headway.optim.optimistic_mirror_descent import (
    OptimisticEnsemble,
    OptimisticOMD,
    SEAOptimizer,
)
from headway.optim.perpgrad_stablemax import (
    PerpGrad,
    StableMaxCrossEntropyLoss,
    log_stablemax,
    project_orthogonal_gradients_,
    softmax_collapse_fraction,
    stablemax,
    stablemax_cross_entropy,
)
from headway.optim.spam import (
    SPAM,
    GradientSpikeMonitor,
    GradientSpikes,
    spam_param_groups,
)
from headway.optim.swan import (
    SWAN,
    grad_norm,
    grad_whiten,
    swan_param_groups,
)
from headway.optim.target_surrogate import (
    TargetSurrogate,
    autograd_target_grad,
)
from headway.optim.wrapper import (
    OptimizerWrapper,
)

__all__ = [
    "CBO",
    "MKOR",
    "SPAM",
    "SWAN",
    "AdaGradAGD",
    "AdaGradNorm",
    "AdaHessian",
    "Adagrad8bit",
    "Adam8bit",
    "AdamW8bit",
    "CompositeMirrorDescent",
    "ConsensusBasedOptimizer",
    "CoordinateClip",
    "DiffGrad",
    "Fira",
    "Frugal",
    "GNSNewton",
    "GradientSpikeMonitor",
    "GradientSpikes",
    "HybridSwitch",
    "LastIterateLR",
    "Lion8bit",
    "ModuleCBO",
    "NormalizedLogisticGD",
    "OpposingSignals",
    "OptimisticEnsemble",
    "OptimisticOMD",
    "OptimizerWrapper",
    "Pair",
    "PerpGrad",
    "RMSprop8bit",
    "SEAOptimizer",
    "SGD8bit",
    "SplitSGD",
    "StableEmbedding",
    "StableMaxCrossEntropyLoss",
    "StepSize",
    "TargetSurrogate",
    "adagrad_bound",
    "autograd_target_grad",
    "cbo_minimize",
    "clip_top_coordinates_",
    "compare_directions",
    "directional_sharpness",
    "exact_hessian",
    "fira_param_groups",
    "fisher",
    "frugal_param_groups",
    "gns_minimize",
    "grad_norm",
    "grad_whiten",
    "last_iterate_lambda",
    "log_stablemax",
    "power_norm",
    "project_orthogonal_gradients_",
    "separate",
    "softmax_collapse_fraction",
    "spam_param_groups",
    "stablemax",
    "stablemax_cross_entropy",
    "suggest_eta",
    "swan_param_groups",
    "update_inverse",
    "weighted_gauss_newton",
]
