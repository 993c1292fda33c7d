"""Optimistic online mirror descent: the last gradient as a hint of the next one.

    x_t        = argmin_{x in X} <M_t, x> + D_t(x, xhat_t)          M_t = g_{t-1}, M_1 = 0
    xhat_{t+1} = argmin_{x in X} <g_t, x> + D_t(x, xhat_t)          g_t = grad f_t(x_t)

For streams of convex losses that are neither i.i.d. nor worst-case, the regret scales with their measured noise and
drift, not with their number. For a bounded set X and bounded gradients; deep networks have no guarantee.

Source: "Optimistic Online Mirror Descent for Bridging Stochastic and Adversarial Online Convex Optimization",
Chen, Tu, Zhao, Zhang, ICML 2023, JMLR 2024, arXiv 2302.04552.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.optim.checks import gradients, local, refuse_complex, refuse_sharded
from headway.optim.mirror import Ball, Box, Simplex, block_norm, project_ball_, project_ball_in_norm
from headway.optim.state import ExactStateOptimizer

__all__ = ["OptimisticEnsemble", "OptimisticOMD", "SEAOptimizer"]

_MODES = ("convex", "strongly_convex", "exp_concave")
_ROUNDING = 1e-6  # how far, relative to its norm, a start may lie outside X


class OptimisticOMD:
    r"""An online learner: `predict` plays x_t, `update` takes the gradient there.

    | mode            | parameters                                            | needs            |
    |-----------------|-------------------------------------------------------|------------------|
    | convex          | eta_t = D / sqrt(delta + 4 G^2 + V_{t-1})             | D, G, L or delta |
    | strongly_convex | eta_t = 2 / (lam t)                                   | lam              |
    | exp_concave     | H_t = (1 + beta G^2/2) I + beta/2 sum_{s<t} g_s g_s^T | D, G, alpha      |

    with V_{t-1} = sum_{s<t} |g_s - M_s|^2, delta = 10 D^2 L^2 and beta = min(1/(4 G D), alpha) / 2. In the first two
    modes D_t(x, y) = |x - y|^2 / (2 eta_t), so x_t = P(xhat_t - eta_t M_t) and xhat_{t+1} = P(xhat_t - eta_t g_t),
    both from xhat_t. In `exp_concave` D_t(x, y) = (x - y)^T H_t (x - y) / 2.

    With noise of total variance sigma^2 and mean losses whose gradients drift by Sigma^2 in total, the regret is
    O(sqrt(sigma^2) + sqrt(Sigma^2)) in the convex mode. The hint doubles the noise in V: against pure i.i.d. noise over
    a known horizon, plain gradient descent has the better constant.

    Args:
        x0: the start, a point of X: torch tensor or numpy array of floats, shape (d,). What comes back is of its kind.
        mode: see above. Default `convex`.
        D: diameter of X, > 0.
        G: bound on the gradients' norm, > 0. A larger gradient is used as it is, and warned of once.
        L: smoothness of the mean losses, > 0.
        lam: modulus of strong convexity, > 0.
        alpha: modulus of exp-concavity, > 0.
        delta: instead of 10 D^2 L^2, > 0.
        project: X, as `headway.optim.mirror`'s `Ball`, `Box` or `Simplex`, or a function v -> nearest point. Default
            None: the ball of diameter D around x0; the whole space if D is None. In `exp_concave` the projection
            is under H_t: a `Ball`, or a function (v, H) -> point.
        hint: `last` (default), or a function t -> M_t, t = 1, 2, ...

    Raises:
        ValueError: a constant out of its range or missing for the mode; x0 outside X; `exp_concave` with a box or
            simplex.
        RuntimeError: `update` without `predict`.
        FloatingPointError: a gradient or hint that is not finite, before anything changes.

    Cost per round: two projections; `exp_concave` keeps H and its inverse (Sherman-Morrison), O(d^2) a round and O(d^3)
    where the ball is left.

    Source: arXiv 2302.04552; no official code. delta and the constants of `strongly_convex` and `exp_concave` have not
    been compared with the paper's full text.

    >>> learner = OptimisticOMD(torch.zeros(2), D=2.0, G=1.0, L=1.0)
    >>> for _ in range(200):
    ...     x = learner.predict()
    ...     learner.update(x - torch.tensor([0.5, 0.0]))
    >>> round(float(learner.predict()[0]), 3)
    0.5
    """

    def __init__(
        self,
        x0: Tensor | np.ndarray,
        *,
        mode: str = "convex",
        D: float | None = None,
        G: float | None = None,
        L: float | None = None,
        lam: float | None = None,
        alpha: float | None = None,
        delta: float | None = None,
        project: Callable[..., Any] | None = None,
        hint: str | Callable[[int], Any] = "last",
    ) -> None:
        constants = {"D": D, "G": G, "L": L, "lam": lam, "alpha": alpha, "delta": delta}
        positive = Range(low=0, low_open=True, optional=True)
        check_arguments({"mode": OneOf(*_MODES), **dict.fromkeys(constants, positive)}, mode=mode, **constants)
        if not callable(hint):
            check_arguments({"hint": OneOf("last")}, hint=hint)
        needed = {"convex": ["D", "G"], "strongly_convex": ["lam"], "exp_concave": ["D", "G", "alpha"]}[mode]
        for name in [*needed, "L"] if mode == "convex" and delta is None else needed:
            if constants[name] is None:
                raise ValueError(f"{name} must be given in mode {mode!r}, got None")
        self._numpy = isinstance(x0, np.ndarray)
        start = torch.as_tensor(x0).detach().clone()
        if start.ndim != 1 or not start.is_floating_point():
            raise ValueError(f"x0 must be a vector of floats, got shape {tuple(start.shape)} of {start.dtype}")
        self._mode, self._constants = mode, constants
        self._hint = hint if callable(hint) else None
        self._project = Ball(D / 2, center=start) if project is None and D is not None else project
        self._t, self._V, self._warned = 1, 0.0, False
        self._xhat, self._last = start, torch.zeros_like(start)  # xhat_t and g_{t-1}
        self._played: list[Tensor] | None = None  # x_t and M_t
        self._H: Tensor | None = None
        self._H_inverse: Tensor | None = None
        if mode == "exp_concave":
            if isinstance(self._project, Box | Simplex):
                raise ValueError(f"project must be a Ball or a function (v, H) in mode {mode!r}, got {project!r}")
            self._H, self._H_inverse = _first_metric(start, constants)
        distance = torch.linalg.vector_norm(self._projected(start) - start)
        if not bool(distance <= _ROUNDING * (1 + torch.linalg.vector_norm(start))):
            raise ValueError(f"x0 must lie in the set of project, got {x0!r}")

    @property
    def t(self) -> int:
        """The round in progress, from 1."""
        return self._t

    @property
    def V(self) -> float:
        """V_{t-1}, the sum of |g_s - M_s|^2 over the rounds s < t."""
        return self._V

    @property
    def eta(self) -> Any:
        """eta_t of the round in progress; 1 in `exp_concave`, where H_t has the scale."""
        return _step_size(self._mode, self._t, self._V, self._constants)

    def predict(self) -> Any:
        """x_t; the same point until `update`."""
        if self._played is None:
            hint = self._last if self._hint is None else self._vector(self._hint(self._t), "hint")
            self._played = [self._play(hint), hint]
        return self._given(self._played[0])

    def update(self, g: Any) -> None:
        """Take the gradient at x_t, of x0's shape."""
        if self._played is None:
            raise RuntimeError("update() must follow predict(): the gradient belongs to the point that was played")
        gradient = self._vector(g, "gradient")
        change, norm = torch.linalg.vector_norm(torch.stack([gradient - self._played[1], gradient]), dim=1).tolist()
        _require_representable(change, norm)
        self._warned = _warn_if_larger(self._warned, norm, self._constants["G"])
        self._advance(gradient)
        self._V += change**2
        self._last, self._played = gradient, None
        self._t += 1

    def _play(self, hint: Tensor) -> Tensor:
        """x_t, from xhat_t."""
        return self._half_step(hint)

    def _advance(self, gradient: Tensor) -> None:
        """xhat_{t+1}, and H_{t+1} where there is one."""
        self._xhat = self._half_step(gradient)
        if self._H is not None and self._H_inverse is not None:
            _add_to_metric_(self._H, self._H_inverse, gradient, self._constants)

    def _half_step(self, vector: Tensor) -> Tensor:
        if self._H_inverse is not None:
            return self._projected(self._xhat - self._H_inverse @ vector)
        return self._projected(self._xhat - self.eta * vector)

    def _projected(self, v: Tensor) -> Tensor:
        """The nearest point of X to v, or to each of its rows."""
        if self._project is None:
            return v
        if self._H is not None and isinstance(self._project, Ball):
            return project_ball_in_norm(self._H, v, self._project.radius, self._project.center)
        if isinstance(self._project, Ball | Box | Simplex):
            return self._project(v)
        if v.ndim == 2:
            return torch.stack([self._projected(row) for row in v])
        arguments = [v] if self._H is None else [v, self._H]
        return self._vector(self._project(*(self._given(argument) for argument in arguments)), "projection")

    def _vector(self, values: Any, what: str) -> Tensor:
        """The user's values as a tensor like xhat, in memory of its own."""
        vector = torch.as_tensor(values).detach().to(self._last, copy=True)
        if vector.shape != self._last.shape:
            raise ValueError(f"the {what} must have shape {tuple(self._last.shape)}, got {tuple(vector.shape)}")
        if not bool(vector.isfinite().all()):
            raise FloatingPointError(f"the {what} of round {self._t} is not finite; nothing was changed")
        return vector

    def _given(self, x: Tensor) -> Any:
        """A tensor as what x0 was, in memory of its own."""
        return x.numpy(force=True).copy() if self._numpy else x.clone()

    @property
    def _changing(self) -> tuple[str, ...]:
        return ("t", "V", "warned", "xhat", "last", "played", "H", "H_inverse")

    def state_dict(self) -> dict[str, Any]:
        """All that changes from round to round, as tensors and numbers."""
        return {name: copy.deepcopy(getattr(self, "_" + name)) for name in self._changing}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state; the constructor's arguments have to be the same."""
        for name in self._changing:
            setattr(self, "_" + name, copy.deepcopy(state_dict[name]))


class OptimisticEnsemble(OptimisticOMD):
    r"""Experts with step sizes on a grid and a learner of their weights: for comparators that move.

        N = ceil(log2(G^2 T / (8 L^2 D^2)) / 2) + 1 experts, at least 1
        eta_i        = min(1/(8 L), D 2^(i-1) / (G sqrt(8 T))),   i = 1 ... N
        x_{t,i}      = P(xhat_{t,i} - eta_i g_{t-1})
        m_{t,i}      = <g_{t-1}, x_{t,i}> + 2 L |x_{t,i} - x_{t-1,i}|^2
        x_t          = sum_i p_{t,i} x_{t,i},   p_t ~ exp(-eps_t (sum_{s<t} l_{s,i} + m_{t,i}))
        l_{t,i}      = <g_t, x_{t,i}> + 2 L |x_{t,i} - x_{t-1,i}|^2
        xhat_{t+1,i} = P(xhat_{t,i} - eta_i g_t)

    with eps_t = min(1/(8 D^2 L), sqrt(ln N / (D^2 V_{t-1}))). All experts take the one gradient at x_t. Against
    comparators with a path of length P the regret is O(P + sqrt(1 + P) (sqrt(sigma^2) + sqrt(Sigma^2))).

    Args:
        x0, D, G, L, project: as in `OptimisticOMD`; a function `project` gets one expert's point at a time.
        T: number of rounds, >= 1, from which the grid follows.

    Raises:
        ValueError, RuntimeError, FloatingPointError: as `OptimisticOMD`.

    Cost per round: 2 N projections; state 3 N + 2 vectors.

    Source: arXiv 2302.04552; the constants have not been compared with the paper's full text.

    >>> ensemble = OptimisticEnsemble(torch.zeros(2), D=2.0, G=2.0, L=1.0, T=4000)
    >>> [round(float(eta), 4) for eta in ensemble.eta]
    [0.0056, 0.0112, 0.0224, 0.0447, 0.0894, 0.125]
    """

    def __init__(
        self,
        x0: Tensor | np.ndarray,
        D: float,
        G: float,
        L: float,
        T: int,
        project: Callable[..., Any] | None = None,
    ) -> None:
        check_arguments({"T": Range(low=1, integer=True)}, T=T)
        super().__init__(x0, D=D, G=G, L=L, project=project)
        N = max(1, math.ceil(math.log2(G**2 * T / (8 * L**2 * D**2)) / 2) + 1)
        etas = [min(1 / (8 * L), D * 2**i / (G * math.sqrt(8 * T))) for i in range(N)]
        self._etas = torch.tensor(etas).to(self._last)
        self._D, self._L = D, L
        self._xhat = self._xhat.repeat(N, 1)  # [experts, d]
        self._points, self._before = self._xhat.clone(), self._xhat.clone()  # x_{t,i} and x_{t-1,i}
        self._losses = torch.zeros_like(self._etas)  # sum_{s<t} l_{s,i}
        self._weights = torch.full_like(self._etas, 1 / N)

    @property
    def eta(self) -> Any:
        """The experts' step sizes."""
        return self._given(self._etas)

    @property
    def weights(self) -> Any:
        """The experts' weights in the point last played."""
        return self._given(self._weights)

    def _play(self, hint: Tensor) -> Tensor:
        self._points = self._half_step(hint)
        eps = 1 / (8 * self._D**2 * self._L)
        if self._V > 0:
            eps = min(eps, math.sqrt(math.log(len(self._etas)) / (self._D**2 * self._V)))
        self._weights = torch.softmax(-eps * (self._losses + self._expert_losses(hint)), 0)
        return self._weights @ self._points

    def _advance(self, gradient: Tensor) -> None:
        self._losses = self._losses + self._expert_losses(gradient)
        self._before, self._xhat = self._points, self._half_step(gradient)

    def _half_step(self, vector: Tensor) -> Tensor:
        return self._projected(self._xhat - self._etas[:, None] * vector)

    def _expert_losses(self, vector: Tensor) -> Tensor:
        return self._points @ vector + 2 * self._L * (self._points - self._before).square().sum(1)

    @property
    def _changing(self) -> tuple[str, ...]:
        return (*super()._changing, "points", "before", "losses", "weights")


class SEAOptimizer(ExactStateOptimizer):
    r"""`OptimisticOMD` on the parameters of each group as one vector, in the ball of diameter D around the start.

    The parameters are x_t, where the gradient g_t was taken. With P the projection on the ball, a step does

        xhat = P(xhat - eta_t g_t);   V += |g_t - g_{t-1}|^2;   t += 1
        x    = P(xhat - eta_t g_{t-1})                                 the gradient just seen is the hint

    | mode            | eta_t                                           | uses        |
    |-----------------|-------------------------------------------------|-------------|
    | convex          | lr D / sqrt(delta + 4 G^2 + V)                  | D, G, L     |
    | strongly_convex | 2 lr / (lam t)                                  | D, lam      |
    | exp_concave     | the matrix lr H_t^-1, and P in the norm of H_t  | D, G, alpha |

    Both half-steps of a round have the same eta_t, so that a new `lr` counts from the next round on. The parameters
    that have a gradient in a step are the vector; the others stay, and what they have used of the radius is missing.
    D, G and L are those of a group's whole vector.

    For projected streaming problems with convex losses. With i.i.d. noise and a known horizon plain SGD has the better
    constant; for deep networks there is no guarantee.

    Args:
        params: parameters or groups; groups may set all that follows.
        lr: multiplies the mode's eta_t, > 0. Default 1, the theory.
        mode: `convex` (default), `strongly_convex` or `exp_concave`.
        D: diameter of the ball, > 0. Default 2, radius 1 around the start. To be set: what is farther is not reached.
        G: bound on the gradient's norm, > 0. Default 10. A larger gradient is used as it is, and warned of
            once per group, except in `strongly_convex`, which does not use G.
        L: smoothness of the mean losses, > 0. Default 1.
        lam: modulus of strong convexity, > 0. Default 1.
        alpha: modulus of exp-concavity, > 0. Default 1.
        delta: > 0. Default None: 10 D^2 L^2.
        maximize: ascend. Default False.

    Raises:
        ValueError: an argument out of its range; sharded parameters with `exp_concave`, whose matrix couples all.
        RuntimeError, FloatingPointError: unusable gradients, before anything changes.

    Cost: three copies of the parameters as state (xhat, the last gradient, the start), in float32 for 16-bit ones;
    two numbers read from the device per group and step. Sharded parameters take collective norms: every rank has
    to step. `exp_concave` has two d x d matrices in float64 and takes O(d^2) a step for a group of d entries, O(d^3)
    where the ball is left or a gradient is missing.

    Source: arXiv 2302.04552; no official code. The defaults of D, G, L, lam and alpha are scales of this package.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = SEAOptimizer([weight], mode="strongly_convex", lam=1.0)
    >>> for _ in range(100):
    ...     weight.grad = weight.detach() - torch.tensor([0.5, 0.0])
    ...     optimizer.step()
    >>> round(float(weight.detach()[0]), 2)
    0.5
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Range(low=0, low_open=True),
        "mode": OneOf(*_MODES),
        "D": Range(low=0, low_open=True),
        "G": Range(low=0, low_open=True),
        "L": Range(low=0, low_open=True),
        "lam": Range(low=0, low_open=True),
        "alpha": Range(low=0, low_open=True),
        "delta": Range(low=0, low_open=True, optional=True),
        "maximize": OneOf(False, True),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        mode: str = "convex",
        *,
        D: float = 2.0,
        G: float = 10.0,
        L: float = 1.0,
        lam: float = 1.0,
        alpha: float = 1.0,
        delta: float | None = None,
        maximize: bool = False,
    ) -> None:
        settings = {"lr": lr, "mode": mode, "D": D, "G": G, "L": L, "lam": lam, "alpha": alpha, "delta": delta}
        settings["maximize"] = maximize
        check_arguments(self.constraints, **settings)
        super().__init__(params, settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; hyper-parameters of the group are checked like the constructor's."""
        # The round in progress, V_{t-1}, and eta_t (None: to be fixed by the first step).
        group = {**self.defaults, **param_group, "t": 1, "V": 0.0, "eta": None, "warned": False}
        check_arguments(self.constraints, **{name: group[name] for name in self.constraints})
        super().add_param_group(group)
        try:
            refuse_complex(self.param_groups[-1]["params"])
            if group["mode"] == "exp_concave":
                refuse_sharded("SEAOptimizer", self.param_groups[-1]["params"], "exp_concave couples all entries")
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One round. `closure` re-evaluates the model; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = gradients("SEAOptimizer", self.param_groups)
        for group, params in zip(self.param_groups, ready, strict=True):
            if params:
                self._round(group, params)
        return loss

    def _round(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            state = self.state[p]
            if "xhat" not in state:
                state["start"] = p.detach().to(_compute_dtype(p), copy=True)
                state["xhat"] = state["start"].clone()
                state["last_grad"] = torch.zeros_like(state["start"])
        xhats, lasts, starts = (local(self.state[p][name] for p in params) for name in ("xhat", "last_grad", "start"))
        grads = [g.to(xhat.dtype) for g, xhat in zip(local([p.grad for p in params]), xhats, strict=True)]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        change, norm = _read_norms(torch._foreach_sub(grads, lasts), grads, params)
        _require_representable(change, norm)
        if group["mode"] != "strongly_convex":
            group["warned"] = _warn_if_larger(group["warned"], norm, group["G"])
        if group["eta"] is None:
            group["eta"] = self._eta(group)
        radius = self._radius(group, params)

        def half_step() -> list[Tensor]:
            if group["mode"] == "exp_concave":
                return self._half_step_in_metric(group, params, xhats, grads, starts, radius)
            new = list(torch._foreach_add(xhats, grads, alpha=-group["eta"]))
            project_ball_(new, starts, radius, block_norm(torch._foreach_sub(new, starts), params))
            return new

        torch._foreach_copy_(xhats, half_step())
        torch._foreach_copy_(lasts, grads)
        group["t"] += 1
        group["V"] += change**2
        group["eta"] = self._eta(group)
        if group["mode"] == "exp_concave":
            padded = [
                self.state[p]["last_grad"] if p.grad is not None else torch.zeros_like(p) for p in group["params"]
            ]
            _add_to_metric_(*self._metric(group), _flat(padded), group)
        torch._foreach_copy_(local(params), half_step())

    def _eta(self, group: Mapping[str, Any]) -> float:
        return group["lr"] * _step_size(group["mode"], group["t"], group["V"], group)

    def _radius(self, group: dict[str, Any], params: list[Tensor]) -> float | Tensor:
        """What the group's other parameters leave of the ball's radius."""
        moving = set(params)
        rest = [p for p in group["params"] if p not in moving and "start" in self.state.get(p, {})]
        if not rest:
            return group["D"] / 2
        starts = local(self.state[p]["start"] for p in rest)
        used = [p.to(start.dtype) - start for p, start in zip(local(rest), starts, strict=True)]
        return ((group["D"] / 2) ** 2 - block_norm(used, rest) ** 2).clamp_min(0).sqrt()

    def _metric(self, group: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """H_t and its inverse, over all parameters of the group; they are kept with the first."""
        state = self.state[group["params"][0]]
        if "H" not in state:
            state["H"], state["H_inverse"] = _first_metric(_flat(group["params"]), group)
        return state["H"], state["H_inverse"]

    def _half_step_in_metric(
        self,
        group: Mapping[str, Any],
        params: list[Tensor],
        xhats: list[Tensor],
        grads: list[Tensor],
        starts: list[Tensor],
        radius: float | Tensor,
    ) -> list[Tensor]:
        H, H_inverse = self._metric(group)
        if len(params) < len(group["params"]):
            active = _flat([torch.full_like(p, p.grad is not None) for p in group["params"]]).bool()
            H = H[active][:, active]
            H_inverse = torch.linalg.inv(H)
        new = _flat(xhats) - group["eta"] * (H_inverse @ _flat(grads))
        new = project_ball_in_norm(H, new, radius, _flat(starts))
        pieces = new.split([xhat.numel() for xhat in xhats])
        return [piece.view(xhat.shape).to(xhat) for piece, xhat in zip(pieces, xhats, strict=True)]


def _step_size(mode: str, t: int, V: float, constants: Mapping[str, Any]) -> float:
    if mode == "exp_concave":
        return 1.0
    if mode == "strongly_convex":
        return 2 / (constants["lam"] * t)
    D, G, L, delta = (constants[name] for name in ("D", "G", "L", "delta"))
    return D / math.sqrt((10 * D**2 * L**2 if delta is None else delta) + 4 * G**2 + V)


def _beta(constants: Mapping[str, Any]) -> float:
    return min(1 / (4 * constants["G"] * constants["D"]), constants["alpha"]) / 2


def _first_metric(like: Tensor, constants: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """H_1 and its inverse."""
    identity = torch.eye(like.numel(), dtype=like.dtype, device=like.device)
    scale = 1 + _beta(constants) * constants["G"] ** 2 / 2
    return scale * identity, identity / scale


def _add_to_metric_(H: Tensor, H_inverse: Tensor, g: Tensor, constants: Mapping[str, Any]) -> None:
    """H + (beta / 2) g g^T and, by Sherman and Morrison, its inverse."""
    half_beta = _beta(constants) / 2
    direction = H_inverse @ g
    H.add_(torch.outer(g, g), alpha=half_beta)
    H_inverse.sub_(torch.outer(direction, direction) * (half_beta / (1 + half_beta * (g @ direction))))


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """One vector in float64."""
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in tensors])


def _read_norms(
    differences: Sequence[Tensor], grads: Sequence[Tensor], params: Sequence[Tensor] | None = None
) -> tuple[float, float]:
    """|g - M| and |g|, in one read from the device."""
    change, norm = torch.stack([block_norm(differences, params), block_norm(grads, params)]).tolist()
    return change, norm


def _require_representable(change: float, norm: float) -> None:
    """Refuse a gradient whose square overflows: with V infinite no later step would move."""
    if not math.isfinite(change * change):
        raise FloatingPointError(f"a gradient of norm {norm:.3g} is too large for V; nothing was changed")


def _warn_if_larger(warned: bool, norm: float, G: float | None) -> bool:
    """Whether there has been a gradient of more than norm G, and so a warning."""
    if warned or G is None or norm <= G:
        return warned
    warnings.warn(
        f"a gradient has norm {norm:.3g} > G = {G:g}: it is used as it is, the guarantee is void", stacklevel=4
    )
    return True


def _compute_dtype(p: Tensor) -> torch.dtype:
    return torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype
