"""Fira: full-rank steps under a low-rank state, by the scale that Adam has inside the subspace.

    R = G P^T;  psi = m / (sqrt(v) + eps) of R;  phi_i = |psi_i| / |R_i|
    W <- W - lr_t (alpha psi P + limited(phi * (G - alpha R P)))

Without the last part it is GaLore. Source: arXiv 2410.01623.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.optim.adam_rule import adam_steps
from headway.optim.checks import gradients, refuse_complex, refuse_sharded
from headway.optim.grouping import split_parameters
from headway.optim.state import ExactStateOptimizer
from headway.optim.subspace import Basis, svd_basis

__all__ = ["Fira", "fira_param_groups"]

# Where |S|_F^2 is below this part of what it is the difference of, the difference has lost its digits.
_CANCELLED = 1e-2


class Fira(ExactStateOptimizer):
    """Adam in the top singular directions of the gradient, and the rest of the gradient at the scale of Adam's step.

    For a *projected* weight W (m x n) with gradient G and projector P, r x n on the right side or m x r on the left;
    the formulas are those of the right side, where rows are scaled, and the left side is their transpose::

        every update_proj_gap steps, starting with the first: P = the top r singular directions of G
        R = G P^T
        m = beta1 m + (1 - beta1) R;  v = beta2 v + (1 - beta2) R^2
        psi = m / (sqrt(v) + eps)
        phi_i = |psi_i| / (|R_i| + 1e-8)                          one number per row; 0 where |R_i| < 1e-12
        S = phi * (G - alpha R P)
        S = S / (max(|S|_F / (prev + 1e-8), limiter) / limiter);  prev = |S|_F        not at the first step
        W = W - lr sqrt(1 - beta2^t) / (1 - beta1^t) (alpha psi P + S)
        W = (1 - lr weight_decay) W

    m, v and t go on when P changes. The limiter lets |S|_F grow by 1 % a step, so that a spike of the gradient does not
    reach W. After a step with a very small residual (a zero gradient, or one of rank r) it also holds S back, for
    log(ratio) / log(limiter) steps; `limiter=None` does not. All other parameters follow AdamW with the same formula on
    G itself.

    A parameter group says with the key `projected` which are projected: True (all), False (none), or None, the default:
    matrices whose shorter side is longer than `rank`. `for_model` and `fira_param_groups` project the linear layers
    but the output head, which is the paper's setting.

    Cost of a step: two products of 2 m n r operations, the norms of G's rows, and an SVD every `update_proj_gap` steps;
    a third product where the residual is less than 1 % of the energy, and on accelerators.
    State in bytes: 4 (2 m r + r n + 1) on the right side, 4 (2 r n + m r + 1) on the left, without the 1 if there is no
    limiter; two numbers per entry for other parameters.

    Args:
        params: parameters or parameter groups; every argument below may differ by group.
        lr: learning rate, > 0. Default 1e-3 (official code).
        betas: decay of m and v, each in [0, 1). Default (0.9, 0.999) (official code).
        eps: added to sqrt(v), > 0. Default 1e-6 (official code).
        weight_decay: decoupled, after the step, >= 0. Default 0 (official code).
        rank: r, >= 1. Default 8.
        update_proj_gap: steps between projectors, >= 1. Default 200 (official scripts).
        alpha: factor of the low-rank step, > 0. Default 1.
        proj_type: `std` (default): right if m >= n, else left; `reverse_std`, `right`, `left`.
        limiter: largest growth of |S|_F per step, >= 1, or None for none. Default 1.01 (official code).
        residual: with alpha != 1, `code` (default) subtracts alpha R P as the official code does, `orthogonal` R P.
        scaling: False drops S: this is GaLore with AdamW. Default True.
        correct_bias: use the factors of t above. Default True (official code).
        maximize: ascend instead of descend.

    Raises:
        ValueError: an argument outside its range, also in a group; in a group with `projected=True` a tensor that is
            not 2-D, has a shorter side than `rank`, or is sharded over ranks; complex parameters.
        RuntimeError: sparse gradients.
        FloatingPointError: a gradient that is not finite; nothing is changed.

    Source: Chen et al., arXiv 2410.01623, and the authors' code (xichen-fy/Fira at 5c28b13). Departures from the code:
    the scaled side is that of the projector, also for an r x r projection; phi is 0 where |R_i| < 1e-12; the step is
    formed as (alpha psi - alpha phi R) P + phi G, and |S|_F from |G_i - alpha R_i P|^2 = |G_i|^2 - (2 alpha - alpha^2)
    |R_i|^2, the same up to rounding; P is float32 for 16-bit weights. GaLore is arXiv 2403.03507.

    >>> weight = torch.nn.Parameter(torch.zeros(4, 3))
    >>> optimizer = Fira([{"params": [weight], "projected": True}], rank=1)
    >>> weight.grad = torch.ones(4, 3)
    >>> optimizer.step()
    >>> optimizer.state_bytes()  # two moments 4 x 1, the projector 1 x 3, and prev
    48
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Range(low=0, low_open=True),
        "betas": Range(low=0, high=1, high_open=True, length=2),
        "eps": Range(low=0, low_open=True),
        "weight_decay": Range(low=0),
        "rank": Range(low=1, integer=True),
        "update_proj_gap": Range(low=1, integer=True),
        "alpha": Range(low=0, low_open=True),
        "proj_type": OneOf("std", "reverse_std", "right", "left"),
        "limiter": Range(low=1, optional=True),
        "residual": OneOf("code", "orthogonal"),
        "scaling": OneOf(True, False),
        "correct_bias": OneOf(True, False),
        "maximize": OneOf(False, True),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int = 8,
        update_proj_gap: int = 200,
        alpha: float = 1.0,
        proj_type: str = "std",
        limiter: float | None = 1.01,
        residual: str = "code",
        scaling: bool = True,
        correct_bias: bool = True,
        maximize: bool = False,
    ) -> None:
        arguments = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "alpha": alpha,
            "proj_type": proj_type,
            "limiter": limiter,
            "residual": residual,
            "scaling": scaling,
            "correct_bias": correct_bias,
            "maximize": maximize,
        }
        check_arguments(self.constraints, **arguments)
        super().__init__(params, {**arguments, "projected": None})

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        target_modules: str | Sequence[str] | None = None,
        rank: int = 8,
        **hyperparameters: Any,
    ) -> Fira:
        """An optimizer for `model` with the grouping of `fira_param_groups`.

        >>> optimizer = Fira.for_model(torch.nn.TransformerEncoderLayer(16, 2, 32), rank=4)
        >>> [group["projected"] for group in optimizer.param_groups]
        [True, False]
        """
        return cls(fira_param_groups(model, target_modules, rank), rank=rank, **hyperparameters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; hyper-parameters of the group are checked like the constructor's."""
        group = {**self.defaults, **param_group}
        check_arguments(self.constraints, **{name: group[name] for name in self.constraints})
        check_arguments({"projected": OneOf(None, False, True)}, projected=group["projected"])
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            refuse_complex(group["params"])
            projected = [p for p in group["params"] if _is_projected(group, p)]
            for p in projected:
                if p.ndim != 2:
                    raise ValueError(f"params must be 2-D with projected=True, got shape {tuple(p.shape)}")
                if min(p.shape) < group["rank"]:
                    raise ValueError(
                        f"rank must be <= the shorter side of each projected weight, "
                        f"got {group['rank']} for shape {tuple(p.shape)}"
                    )
            refuse_sharded("Fira", projected, "the projector needs whole matrices")
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
        for group, ready in zip(self.param_groups, gradients("Fira", self.param_groups), strict=True):
            for p in ready:
                if _is_projected(group, p):
                    self._projected_step(group, p)
            adam_steps(
                self,
                [p for p in ready if not _is_projected(group, p)],
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
                correct_bias=group["correct_bias"],
                early=False,
            )
        return loss

    def _projected_step(self, group: dict[str, Any], p: Tensor) -> None:
        # One weight at a time: W and G stay in the caches from one product to the next.
        state, side = self.state[p], _side(group, p)
        G, W = _wide(cast(Tensor, p.grad)), _wide(p)
        if group["maximize"]:
            G = -G
        t = state.get("step", 0)
        if t % group["update_proj_gap"] == 0:
            state["projector"] = svd_basis(G, group["rank"], side).tensor
        state["step"] = t + 1
        basis = Basis(side, state["projector"])
        R = basis.down(G)
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(R), torch.zeros_like(R)
        beta1, beta2 = group["betas"]
        m = state["exp_avg"].mul_(beta1).add_(R, alpha=1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(R, R, value=1 - beta2)
        psi = m / v.sqrt().add_(group["eps"])
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2 ** (t + 1)) / (1 - beta1 ** (t + 1))

        low_rank = group["alpha"] * psi
        if group["scaling"]:
            kappa = group["alpha"] if group["residual"] == "code" else 1.0
            scale = _limited_scale(group["limiter"], state, basis, G, R, psi, kappa)
            # alpha psi P + scale (G - kappa R P), with one product
            low_rank.addcmul_(scale, R, value=-kappa)
            W.addcmul_(G, scale, value=-size)
        decay = 1 - group["lr"] * group["weight_decay"]
        basis.merge_(W, low_rank, alpha=-size * decay, beta=decay)
        if W is not p:
            p.copy_(W)


def fira_param_groups(
    model: nn.Module, target_modules: str | Sequence[str] | None = None, rank: int = 8
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into a projected and a regular group for `Fira`.

    Projected: the weights of linear layers other than the output head, in a transformer those of attention and MLP,
    whose shorter side is longer than `rank`.

    Args:
        model: any module; Hugging Face models included.
        target_modules: name or names; linear layers whose qualified name contains one of them, and no others.
        rank: of the projection.

    Returns:
        The groups that are not empty, `{"params": [...], "projected": True}` first.

    Raises:
        ValueError: no linear layer's name contains any of `target_modules`; none of them is larger than `rank`.

    >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4))
    >>> [[tuple(p.shape) for p in group["params"]] for group in fira_param_groups(model, rank=2)]
    [[(4, 4)], [(10, 4), (4,)]]
    """
    chosen, _ = split_parameters(model, target_modules)
    large = {id(p) for p in chosen if p.ndim == 2 and min(p.shape) > rank}
    if not large:
        raise ValueError(f"rank must be < the shorter side of some linear layer of the model, got {rank}")
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) in large], "projected": True},
        {"params": [p for p in trainable if id(p) not in large], "projected": False},
    ]
    return [group for group in groups if group["params"]]


def _is_projected(group: dict[str, Any], p: Tensor) -> bool:
    if group["projected"] is None:
        return p.ndim == 2 and min(p.shape) > group["rank"]
    return group["projected"]


def _side(group: dict[str, Any], p: Tensor) -> str:
    kind = group["proj_type"]
    if kind in ("right", "left"):
        return kind
    return "right" if (p.shape[0] >= p.shape[1]) == (kind == "std") else "left"


def _limited_scale(
    limiter: float | None, state: dict[str, Any], basis: Basis, G: Tensor, R: Tensor, psi: Tensor, kappa: float
) -> Tensor:
    """The factors phi after the limiter: those of the residual's rows (right side) or columns (left side)."""
    dim = 1 if basis.side == "right" else 0
    inside = _squares(R, dim)
    length = inside.sqrt()
    phi = torch.where(length < 1e-12, 0, _squares(psi, dim).sqrt_() / (length + 1e-8))
    if limiter is None:
        return phi
    whole, gain = _squares(G, dim), phi.square()
    square = (gain * (whole - (2 * kappa - kappa**2) * inside)).sum()
    # Asking an accelerator whether it cancelled would wait for it; there the product costs less.
    if square.device.type != "cpu" or square <= _CANCELLED * (gain * whole).sum():
        square = (gain * _squares(basis.merge_(G.clone(), R, alpha=-kappa), dim)).sum()
    norm = square.sqrt()
    if "residual_norm" in state:
        limit = (norm / (state["residual_norm"] + 1e-8)).clamp_min_(limiter) / limiter
        norm, phi = norm / limit, phi / limit
    state["residual_norm"] = norm
    return phi


def _squares(matrix: Tensor, dim: int) -> Tensor:
    """Sums of squares of rows (dim 1, as n x 1) or columns; on processors `vector_norm` over columns is slow."""
    if dim == 1:
        return torch.linalg.vector_norm(matrix, dim=1, keepdim=True).square_()
    return matrix.square().sum(0, keepdim=True)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
