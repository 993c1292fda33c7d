"""Consensus-based optimization: particles that evaluate an objective, drift to their weighted mean and explore.

    v   = sum_i w_i x_i,   w_i in proportion to exp(-alpha (E(x_i) - min E))
    x_i = x_i - lam dt (x_i - v) + sigma sqrt(dt) n_i

No gradient is used. Source: Riedl, Klock, Geldhauser, Fornasier, "Gradient is All You Need?", arXiv 2306.09778.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.optim.subspace import seeded_generator

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

__all__ = ["CBO", "SETTINGS", "cbo_minimize", "cbo_step", "check_drift", "consensus_point", "consensus_weights"]

SETTINGS: Mapping[str, Constraint] = {
    "lam": Range(low=0),
    "sigma": Range(low=0),
    "alpha": Range(low=0),
    "dt": Range(low=0, low_open=True),
    "noise": OneOf("anisotropic", "isotropic"),
    "variant": OneOf("cbo", "hopping"),
    "hop_width": Range(low=0),
    "batch_size": Range(low=2, integer=True, optional=True),
    "alpha_schedule": OneOf(None, "ess"),
    "clip": Range(low=0, low_open=True),
}


class CBO:
    """Consensus-based optimization of an objective that only needs to be evaluated, with `ask` and `tell`.

    Per step, for N particles x_i with energies E_i::

        w_i = exp(-alpha (E_i - min_j E_j));  v = sum_i w_i x_i / sum_i w_i
        d_i = x_i - v
        x_i = x_i - lam dt d_i + sigma sqrt(dt) n_i,  n_i = d_i * xi_i or |d_i| xi_i,  xi_i ~ N(0, I)   "cbo"
        x_i = v + hop_width xi_i                                                                   "hopping"
        x_i = clamp(x_i, -clip, clip)

    `consensus` is v of the last energies told. A particle whose energy is not finite, for instance because its worker
    was lost, has weight 0. For many samples a hop is a gradient step of length alpha hop_width^2 on a smoothed
    objective, which is why the consensus descends, and can cross barriers. Use it where gradients are missing or
    useless, for up to some hundred variables, with 10 to 1000 cheap parallel evaluations per step.

    Isotropic noise needs 2 lam > d sigma^2 to contract on average, anisotropic noise 2 lam > sigma^2; the default
    breaks this on purpose and still contracts, as lam + sigma^2 / 2 > 0, and `clip` bounds what the rare large steps
    do. With anisotropic noise, a coordinate in which all particles agree never changes again. On a noisy objective,
    alpha should be of the order of 1 / noise.

    Cost per step: N evaluations and a few passes over N d numbers. State: N d numbers.

    Args:
        x0: the first particles, shape (N, d), N >= 2; or (N, d, (low, high)) to draw them uniformly. Hops from one
            point: `point.expand(N, d)`.
        lam: drift, >= 0, default 1, in units of 1 / dt; lam dt <= 1 in "cbo".
        sigma: exploration, >= 0. Default 5 (CBXpy: 5.1).
        alpha: inverse temperature of the weights, >= 0. Default 1e5, in units of 1 / energy: nearly the best particle.
        dt: time step, > 0. Default 0.01 (CBXpy).
        noise: `anisotropic` (default) or `isotropic`.
        variant: `cbo` (default) or `hopping`.
        hop_width: width of the hops, >= 0. Default 0.5 (the authors' figures: 0.4 to 0.7).
        batch_size: particles per consensus, >= 2 and a divisor of N: the particles are split at random in every step.
            Default None: all in one.
        alpha_schedule: None (default), or "ess": at every step, the alpha up to `alpha` at which half of the particles
            count, (sum w)^2 / sum w^2 = N / 2.
        clip: bound on every coordinate, > 0. Default 1e8 (CBXpy).
        generator: source of the one seed of all draws. Default: seed 0.

    Raises:
        ValueError: an argument outside its range; lam dt > 1 in "cbo", which overshoots the consensus; energies that
            are not N numbers.
        FloatingPointError: from `tell`, no energy is finite; nothing was changed.

    Source: arXiv 2306.09778, the authors' MATLAB code (KonstantinRiedl/CBOGlobalConvergenceAnalysis at b6cc87e) and
    CBXpy (PdIPS/CBXpy at 1ff2b4a). Departures: lost particles; anisotropic noise as the default (the authors: isotropic
    with alpha 1e15, sigma 0.1, dt 0.02); no gradient drift.

    >>> swarm = CBO((50, 2, (-3.0, 3.0)))
    >>> for _ in range(300):
    ...     x = swarm.ask()
    ...     swarm.tell((x - 1).square().sum(1))
    >>> bool((swarm.consensus - 1).abs().max() < 0.01)
    True
    """

    def __init__(
        self,
        x0: Tensor | tuple[int, int, tuple[float, float]],
        *,
        lam: float = 1.0,
        sigma: float = 5.0,
        alpha: float = 1e5,
        dt: float = 0.01,
        noise: str = "anisotropic",
        variant: str = "cbo",
        hop_width: float = 0.5,
        batch_size: int | None = None,
        alpha_schedule: str | None = None,
        clip: float = 1e8,
        generator: torch.Generator | None = None,
    ) -> None:
        settings: dict[str, Any] = {
            "lam": lam,
            "sigma": sigma,
            "alpha": alpha,
            "dt": dt,
            "noise": noise,
            "variant": variant,
            "hop_width": hop_width,
            "batch_size": batch_size,
            "alpha_schedule": alpha_schedule,
            "clip": clip,
        }
        check_arguments(SETTINGS, **settings)
        if variant == "cbo":
            check_drift(lam, dt, "dt")
        self.settings = settings
        self.seed = 0
        if generator is not None:
            self.seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        self.x = self._start(x0)
        count = len(self.x)
        if batch_size is not None and count % batch_size:
            raise ValueError(f"batch_size must divide the number of particles, {count}, got {batch_size!r}")
        self.steps = 0
        self.n_evals = 0
        self.consensus: Tensor | None = None
        self.best_x: Tensor | None = None
        self.best_f = float("inf")
        self.spread = float("inf")

    def ask(self) -> Tensor:
        """The particles to evaluate, (N, d)."""
        return self.x.clone()

    @torch.no_grad()
    def tell(self, energies: Tensor) -> None:
        """Move the particles by their energies, shape (N,)."""
        count, dim = self.x.shape
        E = torch.as_tensor(energies).detach().to(self.x)
        if E.shape != (count,):
            raise ValueError(f"energies must have shape ({count},), got {tuple(E.shape)}")
        require_some_finite("CBO", E)
        settings = self.settings
        generator = seeded_generator(self.seed, self.steps)
        size = settings["batch_size"] or count
        order: slice | Tensor = slice(None)
        if size != count:
            order = torch.randperm(count, generator=generator).to(self.x.device)
        x, batches = self.x[order].view(-1, size, dim), E[order].view(-1, size)
        whole = consensus_point(self.x, E, self._alpha(E))
        v = whole.expand(1, dim)
        if size != count:
            v = consensus_point(x, batches, self._alpha(batches))
            v = torch.where(batches.isfinite().any(-1, keepdim=True), v, whole)  # a batch may be lost
        xi = torch.randn(count, dim, generator=generator, dtype=x.dtype).to(x.device).view_as(x)
        if settings["variant"] == "hopping":
            moved = v.unsqueeze(-2) + settings["hop_width"] * xi
        else:
            radius = None if settings["noise"] == "anisotropic" else (x - v.unsqueeze(-2)).norm(dim=-1, keepdim=True)
            moved = cbo_step(x, v, xi, settings["lam"], settings["dt"], settings["sigma"], radius)

        best = int(torch.where(E.isfinite(), E, float("inf")).argmin())
        if float(E[best]) < self.best_f:
            self.best_f, self.best_x = float(E[best]), self.x[best].clone()
        self.consensus = whole
        self.spread = float((self.x - whole).abs().max())
        self.x = torch.empty_like(self.x)
        self.x[order] = moved.view(count, dim).clamp(-settings["clip"], settings["clip"])
        self.steps += 1
        self.n_evals += count

    def state_dict(self) -> dict[str, Any]:
        """All that changes, and the seed: with the same settings, the run continues the same."""
        names = ("x", "seed", "steps", "n_evals", "consensus", "best_x", "best_f", "spread")
        state = {name: getattr(self, name) for name in names}
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set back to a state of the same number of particles and variables."""
        shape = tuple(state_dict["x"].shape)
        if shape != tuple(self.x.shape):
            raise ValueError(f"state_dict must hold particles of shape {tuple(self.x.shape)}, got {shape}")
        for name, value in state_dict.items():
            setattr(self, name, value.to(self.x.device, copy=True) if isinstance(value, Tensor) else value)

    def _start(self, x0: Tensor | tuple[int, int, tuple[float, float]]) -> Tensor:
        if isinstance(x0, tuple):
            count, dim, (low, high) = x0
            ranges = {"n_particles": Range(low=2, integer=True), "dim": Range(low=1, integer=True)}
            check_arguments(ranges, n_particles=count, dim=dim)
            generator = seeded_generator(self.seed, -1)
            return low + (high - low) * torch.rand(count, dim, generator=generator, dtype=torch.float64)
        x = torch.as_tensor(x0).detach().clone()
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"x0 must hold two or more particles, shape (N, d), got shape {tuple(x.shape)}")
        if not x.is_floating_point() or not bool(x.isfinite().all()):
            raise ValueError(f"x0 must be finite floating-point numbers, got {x.dtype}")
        return x

    def _alpha(self, energies: Tensor) -> float | Tensor:
        if self.settings["alpha_schedule"] is None:
            return self.settings["alpha"]
        return _alpha_for_half(energies, self.settings["alpha"])


def consensus_weights(energies: Tensor, alpha: float | Tensor) -> Tensor:
    """The weights w_i, (..., N), with sum 1; 0 where the energy is not finite, NaN if that is so for all.

    The energies' minimum is subtracted first, so that any finite alpha is safe.

    >>> consensus_weights(torch.tensor([1.0, 1.0, float("nan"), 5.0]), alpha=1e15)
    tensor([0.5000, 0.5000, 0.0000, 0.0000])
    """
    finite = energies.isfinite()
    lowest = torch.where(finite, energies, float("inf")).amin(-1, keepdim=True)
    weights = torch.where(finite, (-alpha * (energies - lowest)).exp(), 0.0)
    return weights / weights.sum(-1, keepdim=True)


def consensus_point(x: Tensor, energies: Tensor, alpha: float | Tensor) -> Tensor:
    """The weighted mean, (..., d), of particles x (..., N, d) with energies (..., N); one run per leading index.

    >>> consensus_point(torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([7.0, 7.0, 7.0]), alpha=1.0)
    tensor([2.])
    """
    weights = consensus_weights(energies, alpha)
    # Relative to the particle of the largest weight: exact where particles agree.
    origin = torch.take_along_dim(x, weights.argmax(-1, keepdim=True).unsqueeze(-1), dim=-2)
    return (origin + weights.unsqueeze(-2) @ (x - origin)).squeeze(-2)


def cbo_step(
    x: Tensor,
    consensus: Tensor,
    xi: Tensor,
    lam: float,
    dt: float,
    sigma: float,
    radius: Tensor | None = None,
) -> Tensor:
    """One Euler-Maruyama step of particles x (..., N, d) to a consensus (..., d), with xi ~ N(0, I) of the shape of x.

    Anisotropic noise, or isotropic noise with `radius` = |x_i - consensus|, shape (..., N, 1).

    >>> cbo_step(torch.tensor([[1.0], [3.0]]), torch.tensor([3.0]), torch.ones(2, 1), lam=1.0, dt=0.25, sigma=0.0)
    tensor([[1.5000],
            [3.0000]])
    """
    drift = x - consensus.unsqueeze(-2)
    return x - lam * dt * drift + sigma * dt**0.5 * (drift if radius is None else radius) * xi


def cbo_minimize(
    f: Callable[[Tensor], Any],
    x0: Any,
    *,
    steps: int,
    vectorized: bool = True,
    tol_spread: float = 1e-8,
    **options: Any,
) -> OptimizeResult:
    """Minimise f with `CBO`.

    Args:
        f: maps particles (N, d) to energies (N,); with `vectorized=False`, one particle (d,) to a number.
        x0: as for `CBO`; arrays are taken too.
        steps: largest number of steps, >= 1.
        vectorized: whether f takes all particles at once. Default True.
        tol_spread: stop when no coordinate of a particle is further from the consensus, >= 0. Default 1e-8.
        **options: of `CBO`.

    Returns:
        `x`, the last consensus, and `fun`, f there; `best_x` and `best_f` of the best particle ever evaluated; `nfev`,
        N per step and one for `fun`; `nit`; `spread`; `success`, whether the particles agree to `tol_spread`.
        Arrays are numpy's.

    Raises:
        ValueError, FloatingPointError: as `CBO`.

    >>> result = cbo_minimize(lambda x: (x - 1).abs().sum(1), (50, 2, (-3.0, 3.0)), steps=300)
    >>> result.nit, result.nfev, bool(result.fun < 1e-2)
    (300, 15001, True)
    """
    ranges = {"steps": Range(low=1, integer=True), "tol_spread": Range(low=0)}
    check_arguments(ranges, steps=steps, tol_spread=tol_spread)
    swarm = CBO(x0 if isinstance(x0, tuple) else torch.as_tensor(x0), **options)

    def evaluate(x: Tensor) -> Tensor:
        return torch.as_tensor(f(x)) if vectorized else torch.stack([torch.as_tensor(f(one)) for one in x])

    for _ in range(steps):
        swarm.tell(evaluate(swarm.ask()))
        if swarm.spread <= tol_spread:
            break
    assert swarm.consensus is not None
    assert swarm.best_x is not None
    agreed = swarm.spread <= tol_spread
    from scipy.optimize import OptimizeResult  # half a second that no other optimizer should wait for

    return OptimizeResult(
        x=swarm.consensus.cpu().numpy(),
        fun=float(evaluate(swarm.consensus.unsqueeze(0))[0]),
        best_x=swarm.best_x.cpu().numpy(),
        best_f=swarm.best_f,
        nfev=swarm.n_evals + 1,
        nit=swarm.steps,
        spread=swarm.spread,
        success=agreed,
        message="the particles agree" if agreed else "the particles still differ after the last step",
    )


def check_drift(lam: float, dt: float, name: str) -> None:
    """Raise `ValueError` if lam dt > 1; `name` is what dt is called."""
    if lam * dt > 1:
        raise ValueError(f"lam * {name} must be <= 1, above which particles overshoot the consensus, got {lam * dt!r}")


def require_some_finite(method: str, energies: Tensor) -> None:
    """Raise `FloatingPointError` if no energy is finite."""
    if not bool(energies.isfinite().any()):
        raise FloatingPointError(f"{method}: none of {energies.numel()} energies is finite; nothing was changed")


def _alpha_for_half(energies: Tensor, largest: float) -> Tensor:
    """The alpha <= largest, shape (..., 1), at which (sum w)^2 / sum w^2 is half the number of finite energies."""
    target = energies.isfinite().sum(-1, keepdim=True) / 2
    low = torch.full_like(energies[..., :1], 1e-12 * largest)
    high = torch.full_like(low, largest)
    for _ in range(60):  # the sample size falls in alpha: bisection, on the logarithm
        middle = (low * high).sqrt()
        enough = 1 / consensus_weights(energies, middle).square().sum(-1, keepdim=True) > target
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return high
