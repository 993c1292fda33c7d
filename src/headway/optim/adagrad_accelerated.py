"""AdaGrad step sizes in the accelerated-gradient template.

The optimizer keeps two sequences, x and x_tilde, takes gradients at their mixture x_bar and divides
by the root of the running sum of squared gradients, so that no constant of the objective is needed.

Source: Kavis, Levy, Cevher, "High Probability Bounds for a Class of Nonconvex Algorithms with AdaGrad
Stepsize", ICLR 2022, arXiv 2204.02833.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributed as dist

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.kernels.adagrad import adagrad_
from headway.kernels.norm import squared_norms
from headway.optim.checks import dense_gradients, local, require_finite_gradients
from headway.optim.evaluation_point import EvaluationPointOptimizer
from headway.optim.state import restore_state

__all__ = ["AdaGradAGD", "adagrad_bound"]

# gamma_t / eta_t of each variant with a second sequence, as a function of alpha_t.
_RATIO: dict[str, Callable[[float], float]] = {
    "averaging": lambda alpha: 0.0,
    "rsag": lambda alpha: 1 + alpha,
    "accelegrad": lambda alpha: 1.0,
}
_DEFAULT_LR = {"norm": 1.0, "tensor": 1.0, "diag": 1e-2}
_CALLABLE = "callable"  # stands for a callable alpha in a state_dict


class AdaGradAGD(EvaluationPointOptimizer):
    """AdaGrad in plain, averaged and accelerated form: one learning rate for smooth and noisy objectives alike.

    From x_1 = x_tilde_1 = the initial parameters and S_0 = initial_accumulator, step t = 1, 2, ... does

        x_bar_t       = alpha_t x_t + (1 - alpha_t) x_tilde_t        the parameters, where g_t was taken
        S_t           = S_{t-1} + |g_t|^2                            g_t counts before it is divided
        eta_t         = lr / (sqrt(S_t) + eps)                       0 where S_t = 0
        x_{t+1}       = x_t - eta_t g_t
        x_tilde_{t+1} = x_bar_t - gamma_t g_t

    and writes x_bar_{t+1} into the parameters. The variants differ in alpha_t and gamma_t:

    | variant    | alpha_t (default) | gamma_t             | memory  |                                      |
    |------------|-------------------|---------------------|---------|--------------------------------------|
    | adagrad    | 1                 | any                 | S       | plain AdaGrad                        |
    | averaging  | 2/(t+1)           | 0                   | S and x | gradients at the running average     |
    | rsag       | 2/(t+1)           | (1 + alpha_t) eta_t | S and x | accelerated                          |
    | accelegrad | 2/(t+1)           | eta_t               | S and x | accelerated, for convex objectives   |

    where accelegrad adds |g_t / alpha_t|^2 to S and moves x by eta_t g_t / alpha_t.
    With averaging, alpha = 1/t makes x_bar the mean of all x, 2/(t+1) weights them by their number, and a
    constant alpha is heavy ball with momentum 1 - alpha. S is one number over all parameters (`norm`, the
    form of the theorems), one per tensor (`tensor`) or one per coordinate (`diag`). For a parameter, t
    counts the steps in which it had a gradient; without one it stays where it is.

    S and x are kept in float32 for 16-bit parameters and in the parameters' precision otherwise, a scalar S
    in float64 (float32 on MPS); `load_state_dict` keeps these precisions. No step waits for the device. The
    scalar of `norm` is `param_groups[0]["sum_of_squares"]`.

    Clipping before the step is allowed and voids the theory. With a GradScaler, unscale before `step`.
    Bounded stochastic gradients are assumed; the step size only shrinks, so very long non-stationary runs
    and heavy-tailed noise are for other methods.

    Args:
        params: parameters, or groups of them. Groups may set all that follows but `process_group`.
        lr: the paper's c, > 0. Default None: 1.0 for `norm` and `tensor`, where no scale is known, and 1e-2
            for `diag` (torch.optim.Adagrad's).
        variant: `adagrad`, `averaging`, `rsag` or `accelegrad`. Default `adagrad`.
        mode: `norm`, `tensor` or `diag`. Default `norm`. In `norm` all groups share S.
        alpha: alpha_t, as a number in (0, 1] or a function of t = 1, 2, ... that returns one. Default None:
            2/(t+1). Has no place in `adagrad`.
        initial_accumulator: S_0 = b0^2 >= 0, default 0.0. With 0 the steps do not depend on the scale of the
            loss. `norm` uses that of the first group.
        eps: added to the root, >= 0, default 0.0; 1e-10 with `diag` is torch.optim.Adagrad.
        weight_decay: >= 0, default 0.0. Coupled: weight_decay * x_bar_t is added to g_t before it is counted.
        decoupled: decay apart from S instead: eta_t g_t above becomes eta_t g_t + lr * weight_decay * x_bar_t.
            Default False.
        maximize: ascend. Default False.
        final_point: what `eval()` puts into the model: `x_bar` (default), `x` or `x_tilde`. Batch-norm statistics
            belong to x_bar. x_tilde is recovered from the two others; where alpha_{t+1} is 1 it has no part in
            any later point, and x_bar is reported.
        process_group: where parameters are sharded (FSDP), the group over which `norm` and `tensor` sum
            squares; every rank of it must call `step`. Not for replicas as in DDP. Default None.

    Raises:
        ValueError: for a value outside its range, `alpha` with `adagrad`, `process_group` with `diag`, sharded
            parameters without `process_group`.
        RuntimeError: from `step()`, for a sparse gradient or in evaluation mode.
        FloatingPointError: from `step()`, for a gradient that is not finite; nothing is changed.

    A `state_dict` holds x, S, t and all settings, except a callable `alpha`: functions cannot be loaded safely,
    so the optimizer that loads the state has to be built with it.

    Source: arXiv 2204.02833; the template is that of Ghadimi and Lan, arXiv 1310.3787, and `accelegrad` that of
    Levy, Yurtsever, Cevher, arXiv 1809.02864, without projection. There is no official code, and the pair
    (alpha_t, gamma_t) of `rsag` has not been compared with the paper's full text. `tensor`, `diag` with two
    sequences, and weight decay are additions.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    >>> optimizer = AdaGradAGD([weight], lr=1.0, variant="rsag")
    >>> for _ in range(200):
    ...     optimizer.zero_grad()
    ...     weight.square().sum().backward()
    ...     optimizer.step()
    >>> bool(weight.norm() < 1e-3)
    True
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Range(low=0, low_open=True),
        "variant": OneOf("adagrad", *_RATIO),
        "mode": OneOf("norm", "tensor", "diag"),
        "alpha": Range(low=0, low_open=True, high=1, optional=True),
        "initial_accumulator": Range(low=0),
        "eps": Range(low=0),
        "weight_decay": Range(low=0),
        "final_point": OneOf("x_bar", "x", "x_tilde"),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        variant: str = "adagrad",
        mode: str = "norm",
        alpha: float | Callable[[int], float] | None = None,
        initial_accumulator: float = 0.0,
        eps: float = 0.0,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        maximize: bool = False,
        final_point: str = "x_bar",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        settings = {
            "lr": _DEFAULT_LR.get(mode, 1.0) if lr is None else lr,
            "variant": variant,
            "mode": mode,
            "alpha": alpha,
            "initial_accumulator": initial_accumulator,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled": decoupled,
            "maximize": maximize,
            "final_point": final_point,
        }
        self.process_group = process_group
        self._check(settings)
        super().__init__(params, settings)

    def _check(self, settings: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in settings.items() if not (name == "alpha" and callable(value))}
        check_arguments(self.constraints, **numbers)
        if settings["variant"] == "adagrad" and settings["alpha"] is not None:
            raise ValueError(
                f"alpha must be None with variant 'adagrad', which does not use it, got {settings['alpha']!r}"
            )
        if settings["mode"] == "diag" and self.process_group is not None:
            raise ValueError("process_group must be None with mode 'diag', which sums nothing over parameters")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Raises `ValueError` as the constructor does."""
        self._check({**self.defaults, **{name: value for name, value in param_group.items() if name != "params"}})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["mode"] != "diag" and self.process_group is None and _any_sharded(group["params"]):
            self.param_groups.pop()
            raise ValueError(
                f"process_group must be given for sharded parameters with mode {group['mode']!r}, got None"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the gradients that the parameters hold; returns the closure's loss."""
        self.require_training()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = dense_gradients("AdaGradAGD", self.param_groups)
        batches = [
            batch
            for group, params in zip(self.param_groups, ready, strict=True)
            for batch in self._batches(group, params)
        ]
        for batch in batches:
            _measure(batch)
        self._require_finite(ready, batches)
        for batch in batches:
            self._prepare(batch)
        self._accumulate_norm([batch for batch in batches if batch.group["mode"] == "norm"])
        for batch in batches:
            self._advance(batch)
        return loss

    def _batches(self, group: dict[str, Any], ready: list[Any]) -> list[_Batch]:
        """Parameters with a gradient, by device, dtype and step: what one foreach call can take."""
        batches: dict[tuple[torch.device, torch.dtype, int], _Batch] = {}
        for p in ready:
            state = self.state.get(p)
            t = state["step"] + 1 if state else 1
            key = (p.device, p.dtype, t)
            batch = batches.get(key)
            if batch is None:
                batch = batches[key] = _Batch(group, t, _alpha(group, t), _alpha(group, t + 1))
            batch.params.append(p)
            batch.grads.append(p.grad)
        return list(batches.values())

    def _require_finite(self, ready: list[list[Any]], batches: list[_Batch]) -> None:
        """Refuse gradients that are not finite; squared norms that are finite tell that gradients are.

        Norms are read on the CPU only, where nothing is waited for.
        """
        for batch in batches:
            norms = batch.squared_norms
            if norms is None or not norms.is_cpu or not all(map(math.isfinite, norms.tolist())):
                require_finite_gradients("AdaGradAGD", self.param_groups, ready)
                return

    def _prepare(self, batch: _Batch) -> None:
        """Fill in the batch's states, creating them where a parameter takes its first step."""
        group, compute = batch.group, batch.points[0].dtype
        batch.states = [self.state[p] for p in batch.params]
        for p, state in zip(batch.params, batch.states, strict=True):
            if not state:
                if group["variant"] != "adagrad":
                    state["x"] = p.detach().to(compute, copy=True)
                if group["mode"] == "diag":
                    state["sum_of_squares"] = torch.full_like(p, group["initial_accumulator"], dtype=compute)
                elif group["mode"] == "tensor":
                    state["sum_of_squares"] = _scalar(group["initial_accumulator"], p.device)
            state["step"] = batch.t

    def _accumulate_norm(self, batches: list[_Batch]) -> None:
        """Add the squared norm over all parameters to the shared S."""
        sharded = self.process_group is not None and any(group["mode"] == "norm" for group in self.param_groups)
        if not batches and not sharded:
            return
        owner = self.param_groups[0]
        device = owner["params"][0].device
        S = owner.get("sum_of_squares")
        S = _scalar(owner["initial_accumulator"], device) if S is None else S.to(device)
        total = torch.zeros_like(S)
        for batch in batches:
            assert batch.squared_norms is not None
            total += batch.weight * batch.squared_norms.sum().to(device)
        if sharded:
            dist.all_reduce(total, group=self.process_group)
        owner["sum_of_squares"] = S.add_(total)

    def _inverses(self, batch: _Batch) -> Tensor | None:
        """1 / (sqrt(S_t) + eps) for each tensor, shape (tensors,); None where S has an entry per coordinate."""
        group = batch.group
        if group["mode"] == "diag":
            return None
        if group["mode"] == "norm":
            shared = self.param_groups[0]["sum_of_squares"]
            return _inverse_root(shared, group["eps"]).to(batch.points[0].device).expand(len(batch.points))
        assert batch.squared_norms is not None
        squares = batch.weight * batch.squared_norms
        if self.process_group is not None:
            dist.all_reduce(squares, group=self.process_group)
        sums = local([state["sum_of_squares"] for state in batch.states])
        torch._foreach_add_(sums, squares.unbind())
        return _inverse_root(torch.stack(sums), group["eps"])

    def _advance(self, batch: _Batch) -> None:
        """Form x_{t+1} and x_tilde_{t+1}, the latter in place of x_bar_t, and leave x_bar_{t+1} in the parameters."""
        group, points, states = batch.group, batch.points, batch.states
        lr, variant, two = group["lr"], group["variant"], group["variant"] != "adagrad"
        # Where S is 0, so is g, up to squares that underflow: the floor makes 0/0 a zero and keeps |g|/root <= 1.
        floor = math.sqrt(torch.finfo(points[0].dtype).tiny)
        adagrad_(
            points,
            batch.grads,
            local(state["x"] for state in states) if two else None,
            local(state["sum_of_squares"] for state in states) if group["mode"] == "diag" else None,
            self._inverses(batch),
            weight=batch.weight,
            floor=floor if group["eps"] < floor else 0.0,
            eps=group["eps"],
            decay=group["weight_decay"] if group["decoupled"] else 0.0,
            point_step=lr * _RATIO[variant](batch.alpha) if two else lr,
            x_step=lr / batch.alpha if variant == "accelegrad" else lr,
            mix=batch.next_alpha,
        )
        if points[0].dtype != batch.params[0].dtype:
            torch._foreach_copy_(local(batch.params), points)

    def evaluation_point(self, group: Mapping[str, Any], p: Tensor) -> Tensor | None:
        """The sequence that `final_point` names, or None where x_bar is to be reported."""
        final_point, state = group["final_point"], self.state[p]
        if final_point == "x_bar" or group["variant"] == "adagrad":
            return None
        if final_point == "x":
            return state["x"]
        alpha = _alpha(group, state["step"] + 1)
        x_bar = p.to(state["x"].dtype)
        return (x_bar - alpha * state["x"]) / (1 - alpha) if alpha < 1 else None

    def state_dict(self) -> dict[str, Any]:
        """As in torch; a callable `alpha` is left out."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            if callable(group["alpha"]):
                group["alpha"] = _CALLABLE
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As in torch, with S and x in the precision in which they were saved.

        Raises `ValueError` if the state was saved with a callable `alpha` and this optimizer was built without.
        """
        own = [group["alpha"] for group in self.param_groups]
        for alpha, saved in zip(own, state_dict["param_groups"], strict=False):
            if saved["alpha"] == _CALLABLE and not callable(alpha):
                raise ValueError(f"alpha must be the function that the state was saved with, got {alpha!r}")
        super().load_state_dict(dict(state_dict))
        for alpha, group, saved in zip(own, self.param_groups, state_dict["param_groups"], strict=True):
            if saved["alpha"] == _CALLABLE:
                group["alpha"] = alpha
        restore_state(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "process_group": self.process_group}


@dataclass
class _Batch:
    """Parameters of one group on one device, of one dtype, at the same step t; `alpha` is alpha_t.

    `squared_norms` holds |g_t|^2 of each tensor, shape (tensors,), or None in `diag` mode.
    """

    group: dict[str, Any]
    t: int
    alpha: float
    next_alpha: float
    params: list[Tensor] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    points: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    squared_norms: Tensor | None = None

    @property
    def weight(self) -> float:
        """What |g_t|^2 counts in S."""
        return 1 / self.alpha**2 if self.group["variant"] == "accelegrad" else 1.0


def _measure(batch: _Batch) -> None:
    """Fill in what enters the step: x_bar_t, g_t in the precision that is computed in, and its norms."""
    group, compute = batch.group, _compute_dtype(batch.params[0].dtype)
    batch.points = _as(compute, local(batch.params))
    batch.grads = _as(compute, local(batch.grads))
    if group["maximize"]:
        batch.grads = list(torch._foreach_neg(batch.grads))
    if group["weight_decay"] and not group["decoupled"]:
        batch.grads = list(torch._foreach_add(batch.grads, batch.points, alpha=group["weight_decay"]))
    if group["mode"] != "diag":
        batch.squared_norms = squared_norms(batch.grads)


def adagrad_bound(L: float, delta0: float, lr: float, b0: float, T: int) -> float:
    """An upper bound on the mean squared gradient of T exact steps of AdaGrad in `norm` mode.

    For an L-smooth f with infimum f*, delta0 = f(x_1) - f*, and S_0 = b0^2,

        sqrt(S_T) <= B = max(b0, L lr) + 2/lr (delta0 + L lr^2 max(0, log(L lr / b0)))
        1/T sum_t |grad f(x_t)|^2 = (S_T - b0^2) / T <= (B^2 - b0^2) / T

    Args:
        L: smoothness of f, > 0.
        delta0: f(x_1) - f*, >= 0.
        lr: learning rate of `AdaGradAGD`, > 0.
        b0: square root of `initial_accumulator`, > 0.
        T: number of steps, >= 1.

    Raises:
        ValueError: for a value outside its range.

    Source: derived from the descent lemma, in the manner of arXiv 2204.02833; not a formula of the paper.

    >>> adagrad_bound(L=1.0, delta0=2.0, lr=1.0, b0=1.0, T=24)
    1.0
    """
    positive = Range(low=0, low_open=True)
    ranges = {"L": positive, "delta0": Range(low=0), "lr": positive, "b0": positive, "T": Range(low=1, integer=True)}
    check_arguments(ranges, L=L, delta0=delta0, lr=lr, b0=b0, T=T)
    B = max(b0, L * lr) + 2 / lr * (delta0 + L * lr**2 * max(0.0, math.log(L * lr / b0)))
    return (B**2 - b0**2) / T


def _alpha(group: Mapping[str, Any], t: int) -> float:
    alpha = group["alpha"]
    if group["variant"] == "adagrad":
        return 1.0
    if alpha is None:
        return 2 / (t + 1)
    if not callable(alpha):
        return alpha
    value = alpha(t)
    if not 0 < value <= 1:
        raise ValueError(f"alpha({t}) must be in (0, 1], got {value!r}")
    return value


def _inverse_root(S: Tensor, eps: float) -> Tensor:
    """1 / (sqrt(S) + eps), and 0 where S is 0."""
    return torch.where(S == 0, 0.0, 1 / (S.sqrt() + eps))


def _scalar(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=_scalar_dtype(device), device=device)


def _scalar_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _as(dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


def _any_sharded(params: list[Any]) -> bool:
    return any(placement.is_shard() for p in params for placement in getattr(p, "placements", ()))
