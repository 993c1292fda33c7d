"""SWAN: matrix weights trained without optimizer state, by gradients that are normalised and whitened.

    D = sqrt(m n) P / |P|_F,   P = polar(N),   N_ij = (G_ij - mu_i) / s_i
    W <- W - lr alpha D

Rows are standardised, then all singular values are set to one, and the step has a fixed root mean square.
Source: arXiv 2412.13148.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.optim.adam_rule import adam_steps
from headway.optim.checks import gradients, refuse_complex, refuse_sharded
from headway.optim.grouping import batches_of_one_shape, split_parameters
from headway.optim.polar import POLAR_RANGES, polar_factor
from headway.optim.state import ExactStateOptimizer

__all__ = ["SWAN", "grad_norm", "grad_whiten", "swan_param_groups"]


class SWAN(ExactStateOptimizer):
    """Stateless steps of normalised, whitened gradients for matrices, AdamW for everything else.

    For each *whitened* parameter W, seen as a matrix m x n of its first dimension against all others, with gradient G,
    in float32::

        N = grad_norm(G)                     rows: mean 0 and mean square 1, so that |N|_F = sqrt(m n)
        P = grad_whiten(N)                   singular values 1 (polar factor)
        D = sqrt(m n) P / (|P|_F + eps)      entries: mean square 1
        W = (1 - lr alpha weight_decay) W - lr alpha D

    Multiplying G or single rows of it by positive numbers, or adding a constant to a row, changes nothing.

    A parameter group says with the key `whitened` which of its parameters these are: True (all), False (none), or None,
    the default: all with two rows and two columns or more. `for_model` and `swan_param_groups` leave embeddings, the
    output head and norms to AdamW, which is the paper's setting.

    There is no momentum: very noisy gradients of tiny batches need a warm-up. A fused attention weight is whitened as
    one matrix; split it for the paper's per-matrix step.

    Cost of a step: `ns_steps` x 6 k^3 operations per weight, k the smaller side and n the larger, or `ns_steps` x
    4 k^2 n where that is less. State: none for whitened weights; AdamW's two numbers (fp32 for 16-bit parameters) per
    entry of the others.

    Args:
        params: parameters or parameter groups; every argument below may differ by group.
        lr: learning rate, > 0. Default 1e-3.
        alpha: factor on lr for whitened parameters, > 0: lr alpha is the root mean square of a step's entries.
            Default 0.05 (a public implementation; the paper's pair of learning rates is not verified).
        ns_steps: Newton-Schulz iterations, >= 1. Default 10 (re-implementations of the paper's second version).
        ns_beta: their coefficient, in (1/3, 2/3). Default 0.5, the quadratically convergent one; the 0.8 that is quoted
            for the paper does not converge.
        method: `ns` (default) or `svd`, exact and slower.
        center: subtract the mean of each row. Default True (second version of the paper); a later one has only
            the division by the rows' root mean square.
        weight_decay: decoupled weight decay, >= 0. Default 0.
        adamw_lr_scale: learning rate of the other parameters relative to lr, > 0. Default 1.
        betas: AdamW's, each in [0, 1). Default (0.9, 0.999).
        eps: added to s_i, to |P|_F and to AdamW's denominator, > 0. Default 1e-8.
        maximize: ascend instead of descend.

    Raises:
        ValueError: an argument outside its range, also in a group; a tensor with fewer than two rows or columns, or
            sharded over ranks, in a group with `whitened=True`; complex parameters.
        RuntimeError: sparse gradients.
        FloatingPointError: a gradient that is not finite; nothing is changed.

    Source: Ma, Gong, Scetbon, Meeds, arXiv 2412.13148. There is no official code; k, beta, alpha and learning rates are
    those of public re-implementations. Rows that are constant to rounding count as zero, so that their noise
    is not blown up. AdamW's rate is a factor, not a rate of its own, so that schedules act on both.

    >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = SWAN([weight], lr=1.0, alpha=1.0, center=False, method="svd")
    >>> weight.grad = torch.tensor([[1e-3, 0.0], [0.0, 1e3]])
    >>> optimizer.step()
    >>> weight.detach().round(decimals=3)  # entries of mean square one
    tensor([[-1.4140,  0.0000],
            [ 0.0000, -1.4140]])
    >>> optimizer.state_bytes()
    0
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Range(low=0, low_open=True),
        "alpha": Range(low=0, low_open=True),
        "ns_steps": POLAR_RANGES["steps"],
        "ns_beta": POLAR_RANGES["beta"],
        "method": POLAR_RANGES["method"],
        "center": OneOf(True, False),
        "weight_decay": Range(low=0),
        "adamw_lr_scale": Range(low=0, low_open=True),
        "betas": Range(low=0, high=1, high_open=True, length=2),
        "eps": Range(low=0, low_open=True),
        "maximize": OneOf(False, True),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        alpha: float = 0.05,
        ns_steps: int = 10,
        ns_beta: float = 0.5,
        method: str = "ns",
        center: bool = True,
        weight_decay: float = 0.0,
        *,
        adamw_lr_scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
    ) -> None:
        arguments = {
            "lr": lr,
            "alpha": alpha,
            "ns_steps": ns_steps,
            "ns_beta": ns_beta,
            "method": method,
            "center": center,
            "weight_decay": weight_decay,
            "adamw_lr_scale": adamw_lr_scale,
            "betas": betas,
            "eps": eps,
            "maximize": maximize,
        }
        check_arguments(self.constraints, **arguments)
        super().__init__(params, {**arguments, "whitened": None})

    @classmethod
    def for_model(cls, model: nn.Module, **hyperparameters: Any) -> SWAN:
        """An optimizer for `model` with the grouping of `swan_param_groups`.

        >>> optimizer = SWAN.for_model(torch.nn.TransformerEncoderLayer(16, 2, 32), lr=1e-3)
        >>> [group["whitened"] for group in optimizer.param_groups]
        [True, False]
        """
        return cls(swan_param_groups(model), **hyperparameters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; hyper-parameters of the group are checked like the constructor's."""
        group = {**self.defaults, **param_group}
        check_arguments(self.constraints, **{name: group[name] for name in self.constraints})
        check_arguments({"whitened": OneOf(None, False, True)}, whitened=group["whitened"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            refuse_complex(group["params"])
            whitened = [p for p in group["params"] if _is_whitened(group, p)]
            if any(not _is_matrix(p) for p in whitened):
                shape = next(tuple(p.shape) for p in whitened if not _is_matrix(p))
                raise ValueError(f"params must have two rows and columns or more with whitened=True, got shape {shape}")
            refuse_sharded("SWAN", whitened, "whitening needs whole matrices")
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. `closure` re-evaluates the model; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = gradients("SWAN", self.param_groups)
        for group, params in zip(self.param_groups, ready, strict=True):
            self._whitened_steps(group, [p for p in params if _is_whitened(group, p)])
            adam_steps(
                self,
                [p for p in params if not _is_whitened(group, p)],
                lr=group["lr"] * group["adamw_lr_scale"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
            )
        return loss

    def _whitened_steps(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr = group["lr"] * group["alpha"]
        if group["weight_decay"] and params:
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        for batch in batches_of_one_shape(params):
            G = torch.stack([_matrix(p.grad) for p in batch])  # [batch, m, n]
            N = grad_norm(G, group["center"], group["eps"])
            P = grad_whiten(N, group["ns_steps"], group["ns_beta"], group["method"])
            rms = torch.linalg.matrix_norm(P, keepdim=True) / math.sqrt(P[0].numel())
            D = P.div_(rms + group["eps"])
            sign = -1.0 if group["maximize"] else 1.0
            for p, d in zip(batch, D, strict=True):
                p.sub_(d.view(p.shape).to(p.dtype), alpha=sign * lr)


def grad_norm(G: Tensor, center: bool = True, eps: float = 1e-8) -> Tensor:
    """Rows standardised: N_ij = (G_ij - mu_i) / (s_i + eps), with mu_i and s_i the mean and root mean square of row i.

    Args:
        G: matrices (..., m, n).
        center: subtract mu_i (default); without, mu_i is 0.
        eps: > 0. Default 1e-8.

    A row with s_i <= 1e-6 |mu_i| is constant to rounding and gives zeros.

    >>> grad_norm(torch.tensor([[1.0, 3.0], [5.0, 5.0]]))
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """
    mu = G.mean(-1, keepdim=True)
    N = G - mu if center else G.clone()
    s = N.square().mean(-1, keepdim=True).sqrt()
    inverse = 1 / (s + eps)
    if center:
        inverse = torch.where(s <= 1e-6 * mu.abs(), 0, inverse)
    return N.mul_(inverse)


def grad_whiten(N: Tensor, steps: int = 10, beta: float = 0.5, method: str = "ns") -> Tensor:
    """The polar factor of matrices (..., m, n): `headway.optim.polar.polar_factor`.

    >>> grad_whiten(torch.tensor([[2.0, 0.0], [0.0, 0.5]]), method="svd")
    tensor([[1., 0.],
            [0., 1.]])
    """
    return polar_factor(N, method, steps, beta)


def swan_param_groups(model: nn.Module, target_modules: str | Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into a whitened and a regular group for `SWAN`.

    Whitened: the weights of linear layers other than the output head, in a transformer those of attention and MLP, with
    two rows and two columns or more.

    Args:
        model: any module; Hugging Face models included.
        target_modules: name or names; linear layers whose qualified name contains one of them, and no others.

    Returns:
        The groups that are not empty, `{"params": [...], "whitened": True}` first.

    Raises:
        ValueError: no linear layer's name contains any of `target_modules`.

    >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4))
    >>> [[tuple(p.shape) for p in group["params"]] for group in swan_param_groups(model)]
    [[(4, 4)], [(10, 4), (4,)]]
    """
    chosen, rest = split_parameters(model, target_modules)
    small = {id(p) for p in chosen if not _is_matrix(p)}
    order = {id(p): i for i, p in enumerate(model.parameters())}
    rest = sorted([*rest, *(p for p in chosen if id(p) in small)], key=lambda p: order[id(p)])
    groups = [
        {"params": [p for p in chosen if id(p) not in small], "whitened": True},
        {"params": rest, "whitened": False},
    ]
    return [group for group in groups if group["params"]]


def _is_matrix(p: Tensor) -> bool:
    return p.ndim >= 2 and p.shape[0] >= 2 and p.numel() >= 2 * p.shape[0]


def _is_whitened(group: dict[str, Any], p: Tensor) -> bool:
    return _is_matrix(p) if group["whitened"] is None else group["whitened"]


def _matrix(gradient: Any) -> Tensor:
    """A gradient as a matrix of its first dimension against the others, in float32 or float64."""
    matrix = gradient.reshape(gradient.shape[0], -1)
    return matrix if matrix.dtype == torch.float64 else matrix.float()
