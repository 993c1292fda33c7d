"""Newton's method damped by the gradient-normalised smoothness: one searched radius, any approximate Hessian.

    x <- x - (H + (||g||_* / gamma) B)^-1 g

with gamma doubled after every step that is accepted and halved in every trial that is not. Source: arXiv 2506.13710.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.numerics.curvature import hessian, hvp
from headway.optim.checks import refuse_complex, refuse_sharded
from headway.optim.damped_solve import SOLVERS, Curvature, DampedSystem, LinearOperator, LowRank, Metric

__all__ = [
    "GNSNewton",
    "Iteration",
    "OptimizeResult",
    "exact_hessian",
    "fisher",
    "gns_minimize",
    "power_norm",
    "weighted_gauss_newton",
]

_SEARCH: dict[str, Constraint] = {
    "gamma0": Range(low=0, low_open=True),
    "max_trials": Range(low=1, integer=True),
    "gamma_min": Range(low=0, low_open=True),
    "solver": OneOf(None, *SOLVERS),
    "cg_tol": Range(low=0, low_open=True, high=1, high_open=True, optional=True),
}

# gamma doubles with every success; beyond this the damping is lost in the rounding of a singular H.
_GAMMA_MAX = 1e12
_CALLABLE = "callable"  # stands for a callable curvature in the groups and so in a state_dict


@dataclass(frozen=True)
class Iteration:
    """One accepted step: f and ||g||_* before it, the gamma and damping of its last trial, trials, ||x+ - x||_B."""

    fun: float
    grad_norm: float
    gamma: float
    damping: float
    trials: int
    step_norm: float


@dataclass(frozen=True)
class OptimizeResult:
    """What `gns_minimize` reached: point, value, gradient, and the counts of what it took.

    `status` says why it stopped: `gtol`, `ftol`, `callback`, `max_iter`, or `stalled`, where no trial of a search was
    acceptable and x is the last accepted point. `success` is True for the first three. `nsolve` counts linear solves
    and `gamma` is the radius with which another iteration would begin.
    """

    x: Tensor
    fun: float
    jac: Tensor
    nit: int
    nfev: int
    njev: int
    nsolve: int
    gamma: float
    status: str
    success: bool
    history: list[Iteration] = field(repr=False)


def gns_minimize(
    fun_and_grad: Callable[[Tensor], tuple[Any, Tensor]],
    x0: Tensor,
    curvature: Callable[[Tensor], Curvature] | None = None,
    *,
    B: Tensor | None = None,
    gamma0: float = 1.0,
    gtol: float = 1e-8,
    ftol: float = 0.0,
    max_iter: int = 1000,
    max_trials: int = 41,
    gamma_min: float = 1e-9,
    solver: str | None = None,
    cg_tol: float | None = None,
    callback: Callable[[Tensor, float], Any] | None = None,
) -> OptimizeResult:
    """Minimise a deterministic smooth function with an approximate Hessian and no constants to tune.

    From gamma = gamma0, at a point x with gradient g and H = curvature(x)::

        repeat at most max_trials times:
            lam = ||g||_* / gamma
            d = -(H + lam B)^-1 g
            if f(x) - f(x + d) >= ||grad f(x + d)||_*^2 / (8 lam):      accept
                x += d;  gamma = max(2 gamma, gamma_min), at most 1e12
            else:
                gamma = gamma / 2

    where ||h|| = sqrt(h^T B h) and ||g||_* = sqrt(g^T B^-1 g). For H >= 0 the step is at most gamma long. With H = 0
    this is gradient descent with step gamma / ||g||_*, with the exact Hessian Newton's method with local quadratic
    convergence. Near the optimum f cannot resolve the decrease: a trial with |f(x) - f(x + d)| <= 10 eps |f(x)|, eps of
    the dtype of f, is accepted as well if it makes ||g||_* smaller. A trial with a failed solve, a NaN or an infinity
    is one that is not accepted, so an indefinite H is damped until it is positive definite.

    Args:
        fun_and_grad: x (d,) -> (f, g): a number or 0-D tensor and a (d,) tensor, the same at every call with the same
            x. Under mini-batch noise the test fails.
        x0: start, (d,). float64 is recommended: the test compares function values.
        curvature: x -> symmetric positive semi-definite H: a (d, d) tensor, `LowRank`, `LinearOperator` or None.
            Default None: H = 0. `exact_hessian`, `weighted_gauss_newton`, `fisher` and `power_norm` make some.
        B: metric, symmetric positive definite (d, d). Default: the identity.
        gamma0: first radius, in the units of x, > 0. Default 1 (official code).
        gtol: stop at ||g||_* <= gtol, >= 0. Default 1e-8.
        ftol: stop at a decrease of f of at most ftol * max(|f|, 1), >= 0. Default 0: never.
        max_iter: accepted steps, >= 0. Default 1000 (official code).
        max_trials: trials per step, >= 1. Default 41 (official code).
        gamma_min: smallest radius after an accepted step, > 0. Default 1e-9 (official code).
        solver: `cholesky`, `woodbury`, `cg` or, the default, None: what suits the form of H
            (`headway.optim.damped_solve`).
        cg_tol: relative residual at which CG stops, in (0, 1). Default None: min(0.1, lam).
        callback: called as callback(x, f) at the start and after every step; a true result stops.

    Raises:
        ValueError: an argument outside its range; B not positive definite; H of a wrong shape or, at x0, not symmetric.
        FloatingPointError: f or g is not finite at x0.

    About two trials per step: their sum is 2 nit + log2(gamma0 / gamma) while gamma stays within its bounds. Each is
    a solve and an evaluation of f and g. Memory: H, its factor and a handful of vectors.

    Source: Semenov, Jaggi, Doikov, arXiv 2506.13710, and the authors' code (epfml/grad-norm-smooth at 9f4ca00).
    Departures from the code: a failed Cholesky is a rejected trial, where the code takes the direction before; after
    the last trial the point stays, where the code takes it; lam has no 1e-8 added to gamma, which would keep
    gradient descent from the small radii that it needs near an optimum; the test at the limit of rounding and the upper
    bound of gamma are additions.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([1.0, 100.0], dtype=torch.float64))
        >>> result = gns_minimize(lambda x: (x @ A @ x / 2, A @ x), torch.ones(2, dtype=A.dtype), lambda x: A)
        >>> result.success, result.nit, bool(result.x.norm() < 1e-8)
        (True, 6, True)
    """
    check_arguments(
        {**_SEARCH, "gtol": Range(low=0), "ftol": Range(low=0), "max_iter": Range(low=0, integer=True)},
        gamma0=gamma0,
        gtol=gtol,
        ftol=ftol,
        max_iter=max_iter,
        max_trials=max_trials,
        gamma_min=gamma_min,
        solver=solver,
        cg_tol=cg_tol,
    )
    if x0.ndim != 1 or not x0.is_floating_point():
        raise ValueError(f"x0 must be a vector of real floating-point numbers, got {x0.dtype} of {tuple(x0.shape)}")
    x = x0.detach().clone()
    metric = Metric(None if B is None else B.to(x))
    if metric.B is not None and metric.B.shape[0] != x.numel():
        raise ValueError(f"B must be of shape ({x.numel()}, {x.numel()}), got {tuple(metric.B.shape)}")

    def evaluate(x: Tensor) -> _Point:
        f, g = fun_and_grad(x)
        if g.shape != x.shape:
            raise ValueError(f"the gradient must be of shape {tuple(x.shape)}, got {tuple(g.shape)}")
        g = g.detach().to(x)
        return _Point(f.item() if isinstance(f, Tensor) else float(f), g, float(metric.dual_norm(g)), _eps(f, x.dtype))

    point = evaluate(x)
    if not point.finite:
        raise FloatingPointError(f"f and its gradient must be finite at x0, got f = {point.value}")
    gamma, evaluations, solves = gamma0, 1, 0
    history: list[Iteration] = []
    status = ""
    while True:
        if point.grad_norm <= gtol:
            status = "gtol"
        elif callback is not None and callback(x, point.value):
            status = "callback"
        elif len(history) == max_iter:
            status = status or "max_iter"
        if status:
            break
        system = DampedSystem(
            _cast(curvature(x) if curvature else None, x),
            metric,
            x.numel(),
            solver,
            cg_tol,
            symmetric_to=None if history else point.grad_norm / gamma,
        )
        found = _search(point, lambda d, x=x: evaluate(x + d), system, gamma, max_trials)  # type: ignore[misc]  # x=x binds now
        evaluations += found.evaluations
        solves += found.trials
        if found.point is None or found.direction is None:
            status = "stalled"
            break
        gamma = min(max(2 * found.gamma, gamma_min), _GAMMA_MAX)
        step_norm = float(metric.norm(found.direction))
        history.append(Iteration(point.value, point.grad_norm, found.gamma, found.damping, found.trials, step_norm))
        if ftol > 0 and point.value - found.point.value <= ftol * max(abs(point.value), 1.0):
            status = "ftol"
        x, point = x + found.direction, found.point
    return OptimizeResult(
        x=x,
        fun=point.value,
        jac=point.gradient,
        nit=len(history),
        nfev=evaluations,
        njev=evaluations,
        nsolve=solves,
        gamma=gamma,
        status=status,
        success=status in ("gtol", "ftol", "callback"),
        history=history,
    )


class GNSNewton(Optimizer):
    """`gns_minimize` as an optimizer: each step is one accepted step of the damped Newton method on a fixed batch.

    With x the vector of all parameters that require a gradient and take part in the loss, in the order of the groups::

        lam = ||g||_* / gamma
        d = -(H + lam B)^-1 g
        accept x + d and double gamma if f(x) - f(x + d) >= ||grad f(x + d)||_*^2 / (8 lam), else halve gamma and retry

    `step(closure)` takes a closure that returns the scalar loss **without** backward. It is evaluated at the present
    parameters and once per trial, and must give the same loss for the same parameters within a step: hold the batch
    fixed, and put dropout and batch normalisation in evaluation mode. `.grad` is neither read nor written. A step
    whose trials all fail leaves the parameters and gamma as they were and sets `stalled`.

    The arithmetic is in float64 (float32 on devices without it), whatever the parameters' dtype; the loss and its
    derivatives have the precision of the closure, and a trial is evaluated at the rounded parameters. Where the loss
    is float32 the test loses its digits near the optimum; there, as in `gns_minimize`, a trial with
    |f(x) - f(x + d)| <= 10 eps |f(x)|, eps of the dtype of the loss, is accepted if it makes ||g||_* smaller. A float64
    loss of float64 parameters is recommended.

    For one process: under data parallelism the closure sees a rank's own batch, and ranks would take different steps.
    The method has no learning rate. Its settings hold for all groups.

    Args:
        params: parameters or groups of them.
        curvature: `exact` (default): the Hessian of the closure's loss; a function x -> H, where x is the vector above
            in float64 and H a symmetric positive semi-definite (d, d) tensor, `LowRank`, `LinearOperator` or None;
            or None: H = 0. An exact Hessian that is indefinite is damped until it is positive definite.
        gamma0: first radius, in the units of the parameters, > 0. Default 1 (official code).
        B: metric, symmetric positive definite (d, d). Default: the identity.
        max_trials: trials per step, >= 1. Default 41 (official code).
        gamma_min: smallest radius after an accepted step, > 0. Default 1e-9 (official code).
        solver: `cholesky`, `woodbury`, `cg` or, the default, None: what suits the form of H. With an `exact` Hessian,
            `cg` needs Hessian-vector products alone and no d x d matrix.
        cg_tol: relative residual at which CG stops, in (0, 1). Default None: min(0.1, lam).

    Raises:
        ValueError: an argument outside its range, also in a group, or unequal over groups; B not positive definite;
            H of a wrong shape or, at the first step, not symmetric; complex or sharded parameters.
        RuntimeError: from `step`: no closure; a loss that is no scalar or has no graph; sparse gradients.
        FloatingPointError: from `step`: a loss or gradient that is not finite at the start; nothing was changed.

    A `state_dict` holds gamma, the counters and the settings, except B and a callable `curvature`: the optimizer that
    loads the state has to be built with them.

    Source: arXiv 2506.13710; departures from the authors' code as in `gns_minimize`. Cost of a step: H (d gradient
    passes if exact), about two factorisations of d^3 / 3 operations, two evaluations and gradients and one more at the
    start. State: four numbers.

    Example:
        >>> import torch
        >>> X, y = torch.tensor([[1.0], [-2.0], [0.5]]), torch.tensor([[1.0], [0.0], [0.0]])
        >>> layer = torch.nn.Linear(1, 1)
        >>> optimizer = GNSNewton(layer.parameters())
        >>> def closure():
        ...     return torch.nn.functional.binary_cross_entropy_with_logits(layer(X), y)
        >>> for _ in range(20):
        ...     loss = optimizer.step(closure)
        >>> bool(torch.autograd.grad(closure(), layer.weight)[0].abs() < 1e-6)
        True
    """

    step_protocol: ClassVar[str] = "loss"
    constraints: ClassVar[Mapping[str, Constraint]] = _SEARCH

    def __init__(
        self,
        params: Iterable[Any],
        curvature: str | Callable[[Tensor], Curvature] | None = "exact",
        gamma0: float = 1.0,
        B: Tensor | None = None,
        *,
        max_trials: int = 41,
        gamma_min: float = 1e-9,
        solver: str | None = None,
        cg_tol: float | None = None,
    ) -> None:
        if not callable(curvature) and curvature not in ("exact", None):
            raise ValueError(f"curvature must be 'exact', a function or None, got {curvature!r}")
        if curvature == "exact" and solver == "woodbury":
            raise ValueError("solver must be 'cholesky' or 'cg' with curvature 'exact', got 'woodbury'")
        settings = {
            "gamma0": gamma0,
            "max_trials": max_trials,
            "gamma_min": gamma_min,
            "solver": solver,
            "cg_tol": cg_tol,
        }
        check_arguments(self.constraints, **settings)
        self._curvature = curvature if callable(curvature) else None
        super().__init__(params, {**settings, "curvature": _CALLABLE if callable(curvature) else curvature})
        first = self.param_groups[0]["params"][0]
        self._metric = Metric(None if B is None else B.detach().to(first.device, _compute_dtype(first.device)))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Raises `ValueError` as the constructor does."""
        first = self.param_groups[0] if self.param_groups else {**self.defaults, **param_group}
        group = {**{name: first[name] for name in self.defaults}, **param_group}
        check_arguments(self.constraints, **{name: group[name] for name in self.constraints})
        for name in self.defaults:
            shared = self.defaults[name] if name == "curvature" else first[name]
            if group[name] != shared:
                raise ValueError(f"{name} must be the same in all groups, got {group[name]!r} beside {shared!r}")
        super().add_param_group(group)
        try:
            refuse_complex(self.param_groups[-1]["params"])
            refuse_sharded("GNSNewton", self.param_groups[-1]["params"], "it solves for all parameters at once")
        except ValueError:
            self.param_groups.pop()
            raise

    @property
    def gamma(self) -> float:
        """The radius with which the next step begins."""
        return self.param_groups[0].get("gamma", self.param_groups[0]["gamma0"])

    @property
    def stalled(self) -> bool:
        """Whether no trial of the last step was acceptable."""
        return self.param_groups[0].get("stalled", False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One accepted step, or none if the search stalls; returns the loss before it."""
        if closure is None:
            raise RuntimeError("GNSNewton.step needs a closure that returns the loss without backward")
        group = self.param_groups[0]
        trainable = [p for each in self.param_groups for p in each["params"] if p.requires_grad]
        if not trainable:
            raise RuntimeError("GNSNewton needs a parameter that requires a gradient")
        products = group["curvature"] == "exact" and group["solver"] == "cg"
        loss, params, grads = _differentiate(closure, trainable, graph=products)
        device = params[0].device if params else trainable[0].device
        dtype = _compute_dtype(device)
        g = _flatten(grads, device, dtype)
        point = _Point(loss.item(), g, float(self._metric.dual_norm(self._checked(g))), _eps(loss, dtype))
        if not point.finite:
            raise FloatingPointError(
                f"GNSNewton: the loss {point.value} or its gradient is not finite; nothing was changed"
            )
        if point.grad_norm == 0:
            return loss.detach()
        x = _flatten(params, device, dtype)
        H = _cast(self._curvature_at(closure, x, params, grads, group), x)
        first = None if "iterations" in group else point.grad_norm / self.gamma
        system = DampedSystem(H, self._metric, x.numel(), group["solver"], group["cg_tol"], symmetric_to=first)

        def evaluate(d: Tensor) -> _Point:
            _write(params, x + d)
            with torch.enable_grad():
                value = _scalar(closure())
            gradient = _flatten(
                torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True), device, dtype
            )
            return _Point(value.item(), gradient, float(self._metric.dual_norm(gradient)), _eps(value, dtype))

        before = [p.detach().clone() for p in params]
        try:
            found = _search(point, evaluate, system, self.gamma, group["max_trials"])
        except BaseException:
            torch._foreach_copy_(params, before)
            raise
        group["trials"] = group.get("trials", 0) + found.trials
        group["stalled"] = found.point is None
        if found.point is None:
            torch._foreach_copy_(params, before)
        else:
            group["gamma"] = min(max(2 * found.gamma, group["gamma_min"]), _GAMMA_MAX)
            group["iterations"] = group.get("iterations", 0) + 1
        return loss.detach()

    def _checked(self, g: Tensor) -> Tensor:
        B = self._metric.B
        if B is not None and B.shape[0] != g.numel():
            raise ValueError(f"B must be of shape ({g.numel()}, {g.numel()}), got {tuple(B.shape)}")
        return g

    def _curvature_at(
        self,
        closure: Callable[[], Any],
        x: Tensor,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        group: Mapping[str, Any],
    ) -> Curvature:
        if group["curvature"] is None:
            return None
        if group["curvature"] == _CALLABLE:
            assert self._curvature is not None
            with torch.enable_grad():
                return self._curvature(x.clone())
        if group["solver"] == "cg":
            if not any(g.requires_grad for g in grads):  # the loss is linear
                return None

            def matvec(v: Tensor) -> Tensor:
                return _flatten(hvp(grads, params, _like(params, v)), x.device, x.dtype)

            return LinearOperator(matvec)
        with torch.enable_grad():
            return hessian(closure, params)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As in torch. Raises `ValueError` if the state belongs to a callable curvature and this optimizer has none."""
        if any(saved["curvature"] == _CALLABLE for saved in state_dict["param_groups"]) and self._curvature is None:
            raise ValueError("curvature must be the function that the state was saved with, got none")
        super().load_state_dict(dict(state_dict))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_curvature": self._curvature, "_metric": self._metric}


def exact_hessian(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The full Hessian of f: x (d,) -> 0-D, by automatic differentiation; for convex f.

    >>> exact_hessian(lambda x: x[0] ** 2 * x[1])(torch.tensor([1.0, 3.0]))
    tensor([[6., 2.],
            [2., 0.]])
    """

    def curvature(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            return hessian(lambda: f(x), [x])

    return curvature


def weighted_gauss_newton(A: Tensor, b: Tensor, mu: float = 1.0) -> Callable[[Tensor], LowRank]:
    """A^T diag(softmax((A x - b) / mu)) A / mu, an upper bound of the Hessian of f(x) = mu logsumexp((A x - b) / mu).

    >>> A = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> weighted_gauss_newton(A, torch.zeros(2))(torch.zeros(2)).dense()
    tensor([[0.5000, 0.0000],
            [0.0000, 2.0000]])
    """

    def curvature(x: Tensor) -> LowRank:
        return LowRank(A.mT, torch.softmax((A @ x - b) / mu, dim=0) / mu)

    return curvature


def fisher(losses: Callable[[Tensor], Tensor]) -> Callable[[Tensor], LowRank]:
    """mean_i grad_i grad_i^T for f = mean_i loss_i; `losses`: x (d,) -> (n,).

    For logistic and softmax losses it is close to the Hessian, and so fast, only where f is close to 0.

    >>> fisher(lambda x: x**2)(torch.tensor([1.0, 3.0])).dense()
    tensor([[ 2.,  0.],
            [ 0., 18.]])
    """

    def curvature(x: Tensor) -> LowRank:
        gradients = torch.func.jacrev(losses)(x)  # (n, d)
        return LowRank(gradients.mT, gradients.new_full((gradients.shape[0],), 1 / gradients.shape[0]))

    return curvature


def power_norm(
    u: Callable[[Tensor], Tensor], p: float = 2.0, kind: str = "gauss_newton_full"
) -> Callable[[Tensor], LowRank]:
    """Curvature of f(x) = ||u(x)||^p / p, p >= 2, without second derivatives of `u`: x (d,) -> (m,).

    With J = du/dx and q = J^T u::

        fisher_term         (p - 2) ||u||^(p-4) q q^T
        gauss_newton_full   ||u||^(p-2) J^T J + (p - 2) ||u||^(p-4) q q^T

    At u = 0: J^T J for `gauss_newton_full` with p = 2, zero otherwise.

    >>> A = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> power_norm(lambda x: A @ x)(torch.zeros(2)).dense()
    tensor([[2., 2.],
            [2., 4.]])
    """
    check_arguments(
        {"p": Range(low=2), "kind": OneOf("fisher_term", "gauss_newton_full")},
        p=p,
        kind=kind,
    )

    def curvature(x: Tensor) -> LowRank:
        residual = u(x)
        J = torch.func.jacrev(u)(x)  # (m, d)
        norm = float(torch.linalg.vector_norm(residual))
        q = J.mT @ residual
        rank_one = (p - 2) * norm ** (p - 4) if norm > 0 and p > 2 else 0.0
        if kind == "fisher_term":
            return LowRank(q.unsqueeze(1), q.new_tensor([rank_one]))
        weights = q.new_full((J.shape[0] + 1,), norm ** (p - 2))
        weights[-1] = rank_one
        return LowRank(torch.cat([J.mT, q.unsqueeze(1)], dim=1), weights)

    return curvature


@dataclass(frozen=True)
class _Point:
    """f, g and ||g||_* at a point, and the spacing of f's floating-point numbers relative to f."""

    value: float
    gradient: Tensor
    grad_norm: float
    eps: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.value) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class _Found:
    """The trials of one search, and its accepted point unless all were rejected."""

    trials: int
    evaluations: int
    gamma: float
    damping: float
    point: _Point | None = None
    direction: Tensor | None = None


def _search(
    start: _Point, evaluate: Callable[[Tensor], _Point], system: DampedSystem, gamma: float, max_trials: int
) -> _Found:
    """Halve gamma until a step passes the test; `evaluate(d)` gives the point at x + d, and was last called there."""
    evaluations = 0
    for trial in range(1, max_trials + 1):
        damping = start.grad_norm / gamma
        direction = system.solve(-start.gradient, damping)
        if direction is not None:
            evaluations += 1
            point = evaluate(direction)
            if _accepts(start, point, damping):
                return _Found(trial, evaluations, gamma, damping, point, direction)
        gamma /= 2
    return _Found(max_trials, evaluations, gamma, damping)


def _accepts(start: _Point, point: _Point, damping: float) -> bool:
    if not point.finite:
        return False
    decrease = start.value - point.value
    if decrease >= point.grad_norm * point.grad_norm / (8 * damping):
        return True
    return abs(decrease) <= 10 * start.eps * abs(start.value) and point.grad_norm < start.grad_norm


def _differentiate(
    closure: Callable[[], Any], trainable: Sequence[Tensor], graph: bool
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The loss, the parameters that take part in it and their gradients."""
    with torch.enable_grad():
        loss = _scalar(closure())
        if not loss.requires_grad:
            raise RuntimeError("the closure must return a loss that depends on the parameters, without backward")
        gradients = torch.autograd.grad(loss, trainable, create_graph=graph, allow_unused=True)
    taking_part = [(p, g) for p, g in zip(trainable, gradients, strict=True) if g is not None]
    if any(g.layout != torch.strided for _, g in taking_part):
        raise RuntimeError("GNSNewton does not support sparse gradients")
    return loss, [p for p, _ in taking_part], [g for _, g in taking_part]


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise RuntimeError("the closure must return the loss as a scalar tensor")
    return loss


def _eps(value: Any, otherwise: torch.dtype) -> float:
    """Of the dtype in which f was computed."""
    dtype = value.dtype if isinstance(value, Tensor) and value.is_floating_point() else otherwise
    return torch.finfo(dtype).eps


def _compute_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _flatten(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    if not tensors:
        return torch.zeros(0, device=device, dtype=dtype)
    return torch.cat([t.detach().reshape(-1).to(device, dtype) for t in tensors])


def _like(params: Sequence[Tensor], vector: Tensor) -> list[Tensor]:
    """The vector cut into tensors of the parameters' shapes, dtypes and devices."""
    pieces = vector.split([p.numel() for p in params])
    return [piece.view(p.shape).to(p) for p, piece in zip(params, pieces, strict=True)]


def _write(params: Sequence[Tensor], vector: Tensor) -> None:
    for p, piece in zip(params, vector.split([p.numel() for p in params]), strict=True):
        p.copy_(piece.view(p.shape))


def _cast(H: Curvature, x: Tensor) -> Curvature:
    """H in the dtype and on the device of x."""
    if H is None:
        return None
    if isinstance(H, LowRank):
        return replace(H, U=H.U.detach().to(x), C=None if H.C is None else H.C.detach().to(x))
    if isinstance(H, LinearOperator):
        matvec = H.matvec
        return LinearOperator(lambda v: matvec(v).detach().to(x))
    if isinstance(H, Tensor):
        return H.detach().to(x)
    raise ValueError(f"curvature must return a tensor, LowRank, LinearOperator or None, got {type(H).__name__}")
