"""Composite stochastic mirror descent with step sizes that make the last iterate optimal.

    x_{t+1} = argmin_x h(x) + <g_t, x> + D(x, x_t) / eta_t,   t = 1 .. T

minimises f + h without averaging iterates: with eta_t = eta (T - t + 1) / T^(3/2) the last x has the rate that
otherwise only an average has.

Source: "Revisiting the Last-Iterate Convergence of Stochastic Gradient Methods", Liu, Zhou, ICLR 2024,
arXiv 2312.08531.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.optim.checks import gradients, local, refuse_complex, refuse_sharded
from headway.optim.mirror import (
    Entropy,
    Euclidean,
    MirrorMap,
    PowerMap,
    UnnormalisedEntropy,
    block_norm,
    project_ball_,
    project_simplex,
    soft_threshold_,
)
from headway.optim.state import restore_state

__all__ = ["CompositeMirrorDescent", "LastIterateLR", "StepSize", "last_iterate_lambda", "suggest_eta"]

_MAPS: dict[str, Callable[[], MirrorMap]] = {
    "euclidean": Euclidean,
    "entropy": Entropy,
    "unnormalised_entropy": UnnormalisedEntropy,
}
_SCHEDULES = ("constant", "convex", "strongly_convex_f", "strongly_convex_h", "heavy_tail")
_PROX = ("l1", "l2", "box", "ball", "simplex")
_CALLABLE = "callable"  # stands for a function or a map of the user's in a state_dict


@dataclass(frozen=True)
class StepSize:
    """The step sizes eta_t, t = 1, 2, ..., each min(1 / (2 L), eta shape(t)).

    With k = L / mu and tau = ceil(T / 2), the shapes without T and with T are

    | kind              | T unknown                | T known                                                      |
    |-------------------|--------------------------|--------------------------------------------------------------|
    | constant          | 1                        | 1                                                            |
    | convex            | 1 / sqrt(t)              | (T-t+1) / T^(3/2); 1 / sqrt(T) without `log_free`            |
    | strongly_convex_f | 2 / (mu (t+1+4k))        | t = 1: 1 / (mu (1+2k)); t <= tau: 1 / (mu (e+2k));           |
    |                   |                          | then 2 / (mu (t-tau+2+4k))                                   |
    | strongly_convex_h | 2 / (mu (t+4k))          | t <= tau: 1 / (mu (e+2k)); then 2 / (mu (t-tau+4k))          |
    | heavy_tail        | t^(-1/p)                 | (T-t+1) / T^(1+1/p); T^(-1/p) without `log_free`             |

    Linear decay is free of the factor log T that the others have. `strongly_convex_f` is for mu-strongly convex f, `_h`
    for mu-strongly convex h; `heavy_tail` for gradients with a p-th moment only, with the power map.
    The functions of the same names make one with the arguments that it uses.

    Args:
        kind: the row above.
        eta: the scale, > 0; `suggest_eta` has the best. Default 1.
        L: smoothness of f, >= 0. Default 0: no cap (f is Lipschitz).
        T: the number of steps, >= 1, or None: unknown.
        mu: modulus of strong convexity, > 0; needed by the two kinds named so.
        e: constant of the first half of these, >= 0; > 0 where L is 0. Default 0.
        p: moment of the noise, in (1, 2]. Default 2.
        log_free: linear decay where T is known. Default True.

    Raises:
        ValueError: an argument out of its range; in a call, t outside 1 .. T.

    >>> eta = StepSize.convex(eta=1.0, T=4)
    >>> [eta(t) for t in (1, 2, 3, 4)]
    [0.5, 0.375, 0.25, 0.125]
    """

    kind: str
    eta: float = 1.0
    L: float = 0.0
    T: int | None = None
    mu: float | None = None
    e: float = 0.0
    p: float = 2.0
    log_free: bool = True

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "kind": OneOf(*_SCHEDULES),
        "eta": Range(low=0, low_open=True),
        "L": Range(low=0),
        "T": Range(low=1, integer=True, optional=True),
        "mu": Range(low=0, low_open=True, optional=True),
        "e": Range(low=0),
        "p": Range(low=1, high=2, low_open=True),
        "log_free": OneOf(False, True),
    }

    def __post_init__(self) -> None:
        check_arguments(self.constraints, **asdict(self))
        if self.mu is not None and not self.kind.startswith("strongly_convex"):
            raise ValueError(f"mu is not used with {self.kind!r}, got {self.mu!r}")
        if self.kind.startswith("strongly_convex"):
            if self.mu is None:
                raise ValueError(f"mu must be > 0 with {self.kind!r}, got None")
            if self.T is not None and self.e == 0 and self.L == 0:
                raise ValueError(f"e must be > 0 with {self.kind!r} where L is 0 and T is known, got {self.e!r}")

    @classmethod
    def constant(cls, eta: float, L: float = 0.0) -> StepSize:
        """Steps of eta, for an outer learning-rate scheduler to shape."""
        return cls("constant", eta=eta, L=L)

    @classmethod
    def convex(cls, eta: float, L: float = 0.0, T: int | None = None, log_free: bool = True) -> StepSize:
        """For convex f."""
        return cls("convex", eta=eta, L=L, T=T, log_free=log_free)

    @classmethod
    def strongly_convex_f(cls, mu: float, L: float = 0.0, T: int | None = None, e: float = 0.0) -> StepSize:
        """For mu-strongly convex f."""
        return cls("strongly_convex_f", L=L, T=T, mu=mu, e=e)

    @classmethod
    def strongly_convex_h(cls, mu: float, L: float = 0.0, T: int | None = None, e: float = 0.0) -> StepSize:
        """For convex f and mu-strongly convex h, such as `prox="l2"` with `reg` = mu."""
        return cls("strongly_convex_h", L=L, T=T, mu=mu, e=e)

    @classmethod
    def heavy_tail(cls, eta: float, p: float, T: int | None = None, log_free: bool = True) -> StepSize:
        """For convex Lipschitz f and noise with a p-th moment."""
        return cls("heavy_tail", eta=eta, T=T, p=p, log_free=log_free)

    def __call__(self, t: int) -> float:
        """eta_t, t from 1."""
        return self.scaled(self.eta, t)

    def scaled(self, eta: float, t: int) -> float:
        """eta_t with another eta."""
        step = eta * self._shape(t)
        return min(step, 1 / (2 * self.L)) if self.L else step

    def _shape(self, t: int) -> float:
        T = self.T
        if t < 1 or (T is not None and t > T):
            raise ValueError(f"t must be a whole number in [1, {T or 'inf'}], the steps that were planned, got {t!r}")
        if self.kind == "constant":
            return 1.0
        if self.kind == "convex":
            if T is None:
                return 1 / math.sqrt(t)
            return _linear_decay(t - 1, T) if self.log_free else 1 / math.sqrt(T)
        if self.kind == "heavy_tail":
            if T is None:
                return float(t ** (-1 / self.p))
            return float((T - t + 1) / T ** (1 + 1 / self.p) if self.log_free else T ** (-1 / self.p))
        assert self.mu is not None
        k, of_f = self.L / self.mu, self.kind == "strongly_convex_f"
        if T is None:
            return 2 / (self.mu * (t + of_f + 4 * k))
        tau = math.ceil(T / 2)
        if t == 1 and of_f:
            return 1 / (self.mu * (1 + 2 * k))
        if t <= tau:
            return 1 / (self.mu * (self.e + 2 * k))
        return 2 / (self.mu * (t - tau + 2 * of_f + 4 * k))


def _linear_decay(step: int, total_steps: int) -> float:
    """Factor of step 0, 1, ..., total_steps - 1; 0 for the reading after the last step."""
    if not 0 <= step <= total_steps:
        raise ValueError(f"step must be in [0, {total_steps}], the steps that were planned, got {step!r}")
    return (total_steps - step) / total_steps / math.sqrt(total_steps)


def last_iterate_lambda(T: int) -> Callable[[int], float]:
    """The factor (T - t) / T^(3/2) of step t = 0, 1, ..., for `torch.optim.lr_scheduler.LambdaLR`.

    `StepSize.convex(T=T)` with steps counted from 0 as torch does: the last step has factor 1 / T^(3/2). After it,
    where schedulers are read once more, the factor is 0; beyond it raises `ValueError`.

    >>> [last_iterate_lambda(4)(t) for t in range(5)]
    [0.5, 0.375, 0.25, 0.125, 0.0]
    """
    check_arguments({"T": Range(low=1, integer=True)}, T=T)
    return partial(_linear_decay, total_steps=T)


class LastIterateLR(LambdaLR):
    """Linear decay that makes the last iterate of SGD optimal: lr_t = eta (T - t) / T^(3/2) for t = 0, 1, ..., T - 1.

    Args:
        optimizer: any; each group's current `lr` is its eta, the best of which `suggest_eta` gives. Plain SGD has the
            theory, momentum and Adam do not.
        total_steps: T >= 1, in optimizer steps. Stopping early, or going on, loses the guarantee.
        last_epoch: the last step seen by the scheduler that this one continues, -1 for a new run.

    Raises:
        ValueError: total_steps < 1; stepping past total_steps.

    Source: arXiv 2312.08531. `CompositeMirrorDescent(schedule="convex")` is the same for SGD, and takes constraints.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    >>> LastIterateLR(optimizer, total_steps=4).get_last_lr()
    [1.0]
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {"total_steps": Range(low=1, integer=True)}

    def __init__(self, optimizer: Optimizer, total_steps: int, last_epoch: int = -1) -> None:
        check_arguments(self.constraints, total_steps=total_steps)
        super().__init__(optimizer, last_iterate_lambda(total_steps), last_epoch)


def suggest_eta(D1: float, M: float, sigma: float, delta: float | None = None, p: float = 2.0) -> float:
    """The eta that minimises the bound of `convex` and `heavy_tail` step sizes.

        eta = (D1 / (M^p + sigma^p))^(1/p);   p = 2, with probability 1 - delta: sqrt(D1 / (M^2 + sigma^2 log(1/delta)))

    Args:
        D1: D(x*, x_1), for the Euclidean map half the squared distance to the solution, > 0.
        M: f(x) <= f(y) + <grad f(y), x - y> + (L/2) |x - y|^2 + M |x - y|: 0 for L-smooth, 2 G for G-Lipschitz f.
        sigma: scale of the gradient noise: its p-th moment is sigma^p, >= 0; with `delta`, its sub-Gaussian scale.
        delta: probability of failure in (0, 1), or None, the default: in expectation.
        p: moment in (1, 2]. Default 2.

    Raises:
        ValueError: out of range; M and sigma both 0 (eta is then free below 1 / (2 L)); delta with p < 2.

    >>> suggest_eta(D1=8.0, M=1.0, sigma=1.0)
    2.0
    """
    check_arguments(
        {
            "D1": Range(low=0, low_open=True),
            "M": Range(low=0),
            "sigma": Range(low=0),
            "delta": Range(low=0, high=1, low_open=True, high_open=True, optional=True),
            "p": Range(low=1, high=2, low_open=True),
        },
        D1=D1,
        M=M,
        sigma=sigma,
        delta=delta,
        p=p,
    )
    if delta is not None and p < 2:
        raise ValueError(f"delta must be None with p < 2, got {delta!r}")
    factor = 1.0 if delta is None else math.log(1 / delta)
    scale = M**p + sigma**p * factor
    if scale == 0:
        raise ValueError(f"sigma must be > 0 where M is 0, got {sigma!r}")
    return float((D1 / scale) ** (1 / p))


class CompositeMirrorDescent(Optimizer):
    """Stochastic mirror descent on f + h whose last iterate is optimal; projected and proximal SGD as special cases.

    Step t of a group does, with `eta_t = min(1 / (2 L), lr shape(t))` of `StepSize`,

        z   = grad psi(x) - eta_t g
        v   = inverse(z)                               the mirror step; v = x - eta_t g for the Euclidean map
        x   = argmin_y h(y) + D(y, v) / eta_t          the proximal step

    | `mirror`             | x lives on                              | step                                         |
    |----------------------|-----------------------------------------|----------------------------------------------|
    | euclidean            | the whole space                         | x - eta g, then `prox`                       |
    | entropy              | a simplex per row of the last dimension | x exp(-eta g), normalised; log x is kept     |
    | unnormalised_entropy | positive tensors                        | x exp(-eta g); log x is kept                 |
    | power                | the whole space                         | `PowerMap(p, center)`: heavy-tailed noise    |
    | a `MirrorMap`        | tensor by tensor                        | as above                                     |

    | `prox` | h, for the Euclidean map                                                                         |
    |--------|--------------------------------------------------------------------------------------------------|
    | l1     | reg sum_i abs(x_i): exact zeros                                                                  |
    | l2     | (reg / 2) sum_i x_i^2, implicitly: x / (1 + eta reg)                                             |
    | box    | all entries in `bounds`                                                                          |
    | ball   | the group as one vector at most `radius` from `center`                                           |
    | simplex| each row of the last dimension in the simplex                                                    |
    | a function (v, eta) -> x | the proximal step itself, tensor by tensor; for all maps but power             |

    The parameters of a group that have a gradient in a step form one block: `power` and `ball` take one norm over them.
    t counts a group's steps with a gradient. With `power` the first step from the centre has length
    (eta |g| / 2^(q-2))^(1/(q-1)), much more than eta |g| for small eta.

    With total_steps, steps after the last raise, and stopping early loses the guarantee. A learning-rate scheduler
    multiplies `lr` and so the schedule: use `schedule="constant"` with one. Momentum, Adam-like preconditioning and
    averaging are not part of it. The entropies write x from their saved logarithm: values
    put into the parameters after the first step do not stay.

    Args:
        params: parameters or groups; groups may set all that follows.
        lr: eta, > 0. Default None: a `StepSize`'s own; otherwise 1 for the strongly convex schedules, whose scale
            is 1/mu, and 0.01 for the rest, where only `suggest_eta` knows.
        schedule: `constant`, `convex` (default), `strongly_convex_f`, `strongly_convex_h`, `heavy_tail`; or, not in
            groups, a `StepSize`, which then holds total_steps, L, mu, e and log_free too.
        total_steps: T >= 1, or None, the default: unknown. With it, `convex` is the linear decay.
        L, mu, e, log_free: as in `StepSize`.
        mirror: see above. Default `euclidean`.
        prox: see above. Default None, h = 0.
        reg: weight of l1 and l2, >= 0. Default 0.
        bounds: (low, high) of the box.
        radius: of the ball, > 0.
        p: moment of the noise, in (1, 2], for `power` and `heavy_tail`. Default 2, plain SGD.
        center: of `power` and `ball`: a number for all entries; None, the default: the start.
        maximize: ascend on f. Default False.

    Raises:
        ValueError: an argument out of its range, or one that the schedule, map or prox does not use; `entropy` from a
            start that is not positive or whose rows do not sum to 1; a step after total_steps; sharded parameters with
            `entropy`, `simplex`, a user's map or prox, which need whole tensors.
        RuntimeError, FloatingPointError: unusable gradients, before anything changes.

    Cost: one pass over parameters and gradients; state 0, one copy for the entropies (log x) and for `power` and `ball`
    around the start. In float32 for 16-bit parameters. Sharded parameters work otherwise; `power` and `ball` then take
    collective norms, so every rank has to step. Under data parallelism average gradients, never the points.

    A `state_dict` holds all but a user's map or prox: the optimizer that loads it has to be built with them.

    Source: arXiv 2312.08531; no official code. The heavy-tailed schedules were derived here from the mirror-descent
    inequality (they are the convex ones at p = 2), and the additive constants of the strongly convex ones have not been
    compared with the paper's text.

    >>> weight = torch.nn.Parameter(torch.tensor([0.5, 0.5]))
    >>> optimizer = CompositeMirrorDescent([weight], lr=1.0, schedule="constant", mirror="entropy")
    >>> (weight * torch.tensor([0.0, 1.0])).sum().backward()
    >>> optimizer.step()
    >>> weight.data
    tensor([0.7311, 0.2689])
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Range(low=0, low_open=True, optional=True),
        "schedule": OneOf(*_SCHEDULES),
        "total_steps": Range(low=1, integer=True, optional=True),
        "L": Range(low=0),
        "mu": Range(low=0, low_open=True, optional=True),
        "e": Range(low=0),
        "log_free": OneOf(False, True),
        "mirror": OneOf(*_MAPS, "power"),
        "prox": OneOf(None, *_PROX),
        "reg": Range(low=0),
        "bounds": Range(length=2, optional=True),
        "radius": Range(low=0, low_open=True, optional=True),
        "p": Range(low=1, high=2, low_open=True),
        "center": Range(optional=True),
        "maximize": OneOf(False, True),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        schedule: str | StepSize = "convex",
        *,
        total_steps: int | None = None,
        L: float = 0.0,
        mu: float | None = None,
        e: float = 0.0,
        log_free: bool = True,
        mirror: str | MirrorMap = "euclidean",
        prox: str | Callable[[Tensor, float], Tensor] | None = None,
        reg: float = 0.0,
        bounds: tuple[float, float] | None = None,
        radius: float | None = None,
        p: float = 2.0,
        center: float | None = None,
        maximize: bool = False,
    ) -> None:
        if isinstance(schedule, StepSize):
            own = {"lr": lr, "total_steps": total_steps, "L": L, "mu": mu, "e": e, "log_free": log_free}
            defaults = {"lr": None, "total_steps": None, "L": 0.0, "mu": None, "e": 0.0, "log_free": True}
            check_arguments(self.constraints, **own)
            for name, value in own.items():
                if value != defaults[name]:
                    raise ValueError(f"{name} must be left to the StepSize that schedule is, got {value!r}")
            if schedule.kind == "heavy_tail":
                if p not in (2.0, schedule.p):
                    raise ValueError(f"p must be that of the StepSize, {schedule.p!r}, got {p!r}")
                p = schedule.p
            lr, total_steps, L, mu = schedule.eta, schedule.T, schedule.L, schedule.mu
            e, log_free, schedule = schedule.e, schedule.log_free, schedule.kind
        settings = {
            "lr": lr,
            "schedule": schedule,
            "total_steps": total_steps,
            "L": L,
            "mu": mu,
            "e": e,
            "log_free": log_free,
            "mirror": mirror,
            "prox": prox,
            "reg": reg,
            "bounds": bounds,
            "radius": radius,
            "p": p,
            "center": center,
            "maximize": maximize,
        }
        self._check(settings)
        super().__init__(params, settings)

    def _check(self, settings: Mapping[str, Any]) -> None:
        custom_map, custom_prox = isinstance(settings["mirror"], MirrorMap), callable(settings["prox"])
        skipped = {"mirror"} if custom_map else set()
        skipped |= {"prox"} if custom_prox else set()
        check_arguments(self.constraints, **{k: settings[k] for k in self.constraints if k not in skipped})
        _step_size(settings)
        mirror, prox = settings["mirror"], settings["prox"]
        if prox is not None and mirror != "euclidean" and (mirror == "power" or not custom_prox):
            raise ValueError(
                f"prox must be {'None' if mirror == 'power' else 'None or a function'} with mirror={mirror!r}, "
                f"which has no closed form for it, got {prox!r}"
            )
        uses = {
            "reg": prox in ("l1", "l2"),
            "bounds": prox == "box",
            "radius": prox == "ball",
            "center": prox == "ball" or mirror == "power",
        }
        for name, used in uses.items():
            if settings[name] and not used:
                raise ValueError(f"{name} is not used with mirror={mirror!r} and prox={prox!r}, got {settings[name]!r}")
        for name, needing in (("bounds", "box"), ("radius", "ball")):
            if prox == needing and settings[name] is None:
                raise ValueError(f"{name} must be given with prox={prox!r}, got None")
        if settings["bounds"] is not None and settings["bounds"][0] > settings["bounds"][1]:
            raise ValueError(f"bounds must be (low, high), got {settings['bounds']!r}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Raises `ValueError` as the constructor does."""
        group = {**self.defaults, **param_group, "step": 0}
        self._check(group)
        if group["lr"] is None:
            group["lr"] = 1.0 if group["schedule"].startswith("strongly_convex") else 0.01
        super().add_param_group(group)
        try:
            _check_tensors(self.param_groups[-1])
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
        ready = gradients("CompositeMirrorDescent", self.param_groups)
        due = [(group, params) for group, params in zip(self.param_groups, ready, strict=True) if params]
        etas = [_step_size(group).scaled(group["lr"], group["step"] + 1) for group, _ in due]
        for (group, params), eta in zip(due, etas, strict=True):
            group["step"] += 1
            self._move(group, params, eta)
        return loss

    def _move(self, group: dict[str, Any], params: list[Tensor], eta: float) -> None:
        mirror, prox = group["mirror"], group["prox"]
        points, grads = _compute(local(params)), _compute(local([p.grad for p in params]))
        centers = self._centers(group, params, points)
        alpha = eta if group["maximize"] else -eta
        if mirror == "power" and group["p"] < 2:
            new = _power_step(PowerMap(group["p"]), points, centers, grads, alpha, params)
            torch._foreach_copy_(points, new)
        elif mirror in ("euclidean", "power"):
            torch._foreach_add_(points, grads, alpha=alpha)
        else:
            self._mirror_steps(_MAPS[mirror]() if isinstance(mirror, str) else mirror, params, points, grads, alpha)

        if prox == "l1":
            soft_threshold_(points, eta * group["reg"])
        elif prox == "l2":
            torch._foreach_div_(points, 1 + eta * group["reg"])
        elif prox == "box":
            torch._foreach_clamp_min_(points, group["bounds"][0])
            torch._foreach_clamp_max_(points, group["bounds"][1])
        elif prox == "ball":
            distance = block_norm(torch._foreach_sub(points, centers), params)
            project_ball_(points, centers, group["radius"], distance)
        elif prox is not None:
            for p, point in zip(params, points, strict=True):
                point.copy_(project_simplex(point) if prox == "simplex" else prox(point, eta))
                if "dual" in self.state[p]:
                    self.state[p]["dual"] = UnnormalisedEntropy().grad(point)
        stored = local(params)
        if any(point.dtype != target.dtype for point, target in zip(points, stored, strict=True)):
            torch._foreach_copy_(stored, points)

    def _centers(self, group: dict[str, Any], params: list[Tensor], points: list[Tensor]) -> list[Tensor]:
        if group["prox"] != "ball" and (group["mirror"] != "power" or group["p"] == 2):
            return []
        if group["center"] is not None:
            return [torch.full_like(point, group["center"]) for point in points]
        for p in params:
            if "center" not in self.state[p]:
                self.state[p]["center"] = p.detach().to(_compute_dtype(p), copy=True)
        return local(self.state[p]["center"] for p in params)

    def _mirror_steps(
        self, mirror: MirrorMap, params: list[Tensor], points: list[Tensor], grads: list[Tensor], alpha: float
    ) -> None:
        """The steps of a map that is not linear, tensor by tensor."""
        canonical = getattr(mirror, "canonical", None)
        for p, point, grad in zip(params, points, grads, strict=True):
            if canonical is None:
                point.copy_(mirror.inverse(mirror.grad(point) + alpha * grad))
                continue
            # The entropies step on log x, which still moves where x has underflowed.
            state = self.state[p]
            if "dual" not in state:
                state["dual"] = mirror.grad(p.detach().to(_compute_dtype(p)))
            [dual] = local([state["dual"]])
            dual.copy_(canonical(dual.add_(grad, alpha=alpha)))
            point.copy_(mirror.inverse(dual))

    def state_dict(self) -> dict[str, Any]:
        """As in torch; a user's map and prox are left out."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            for name in ("mirror", "prox"):
                if not isinstance(group[name], str | None):
                    group[name] = _CALLABLE
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As in torch, with the state in the precision in which it was saved.

        Raises `ValueError` if the state was saved with a user's map or prox and this optimizer was built without.
        """
        own = [{name: group[name] for name in ("mirror", "prox")} for group in self.param_groups]
        for mine, saved in zip(own, state_dict["param_groups"], strict=False):
            for name, value in mine.items():
                if saved[name] == _CALLABLE and isinstance(value, str | None):
                    raise ValueError(f"{name} must be the object that the state was saved with, got {value!r}")
        super().load_state_dict(dict(state_dict))
        for mine, group, saved in zip(own, self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in mine.items() if saved[name] == _CALLABLE})
        restore_state(self, state_dict)


def _step_size(settings: Mapping[str, Any]) -> StepSize:
    """The group's schedule at eta = 1: `lr` is applied at every step, for schedulers may change it, also to 0."""
    return StepSize(
        settings["schedule"],
        L=settings["L"],
        T=settings["total_steps"],
        mu=settings["mu"],
        e=settings["e"],
        p=settings["p"],
        log_free=settings["log_free"],
    )


def _check_tensors(group: dict[str, Any]) -> None:
    params, mirror, prox = group["params"], group["mirror"], group["prox"]
    refuse_complex(params)
    if mirror == "entropy" or prox == "simplex":
        refuse_sharded("CompositeMirrorDescent", params, "a row of the simplex may be spread over ranks")
    if not isinstance(mirror, str) or callable(prox):
        refuse_sharded("CompositeMirrorDescent", params, "a map or prox of yours gets whole tensors")
    if mirror not in ("entropy", "unnormalised_entropy"):
        return
    for p, part in zip(params, local(p.detach() for p in params), strict=True):
        if not bool((part > 0).all()):
            raise ValueError(
                f"params must be positive with mirror={mirror!r}, got a tensor of shape {tuple(p.shape)} that is not"
            )
        sums = part.double().sum(-1) if mirror == "entropy" else torch.ones(())
        if bool(((sums - 1).abs() > 16 * torch.finfo(p.dtype).eps).any()):
            raise ValueError(
                "params must have rows (last dimension) that sum to 1 with mirror='entropy', "
                f"got sums up to {1 + float((sums - 1).abs().max()):g} in shape {tuple(p.shape)}"
            )


def _power_step(
    mirror: PowerMap,
    points: list[Tensor],
    centers: list[Tensor],
    grads: list[Tensor],
    alpha: float,
    params: Sequence[Tensor],
) -> list[Tensor]:
    """The dual step with one norm over the whole block."""
    dual = torch._foreach_sub(points, centers)
    _scale_(dual, mirror.grad_factor(block_norm(dual, params)))
    torch._foreach_add_(dual, grads, alpha=alpha)
    _scale_(dual, mirror.inverse_factor(block_norm(dual, params)))
    torch._foreach_add_(dual, centers)
    return list(dual)


def _scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    for tensor in tensors:
        tensor.mul_(factor.to(tensor.device))


def _compute_dtype(p: Tensor) -> torch.dtype:
    return torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype


def _compute(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The tensors; copies in fp32 of those that are 16-bit."""
    return [tensor.to(_compute_dtype(tensor)) for tensor in tensors]
