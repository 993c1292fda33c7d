"""The point of optimistic mirror descent: the regret follows the noise and drift that there are, not the worst case.

Rounds on the unit ball of R^5 (D = 2) with gradients

    g_t = x_t - c_t + s xi_t,   |xi_t| = 1 in a random direction,   L = lambda = 1

and regret sum_t |x_t - c_t|^2 / 2, where c_t = (0.5, 0, 0, 0, 0), or, for the ensemble, c_t jumps every 200 rounds.
Plain online gradient descent has the step D / (G sqrt(T)) of the worst case, G = 1.5 + s.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from headway.claims import Check, Outcome, Panel
from headway.optim.mirror import Ball
from headway.optim.optimistic_mirror_descent import OptimisticEnsemble, OptimisticOMD

__all__ = ["claim", "descent_regret", "regret"]

DIMENSION, RADIUS = 5, 1.0
START = torch.zeros(DIMENSION, dtype=torch.float64)
X = Ball(RADIUS)


def directions(rounds: int, seed: int) -> Tensor:
    """Random unit vectors, shape (rounds, 5)."""
    draws = torch.from_numpy(np.random.default_rng(seed).standard_normal((rounds, DIMENSION)))
    return draws / torch.linalg.vector_norm(draws, dim=1, keepdim=True)


def still(rounds: int) -> Tensor:
    """The constant c_t."""
    return torch.tensor([0.5, 0, 0, 0, 0], dtype=torch.float64).expand(rounds, -1)


def jumping(rounds: int, seed: int) -> Tensor:
    """c_t, anew every 200 rounds: 0.8 times a random unit vector."""
    return 0.8 * directions(math.ceil(rounds / 200), seed).repeat_interleave(200, dim=0)[:rounds]


def regret(learner: OptimisticOMD, targets: Tensor, noise: Tensor) -> Tensor:
    """The regret after each round, shape (rounds,)."""
    losses = []
    for c, e in zip(targets, noise, strict=True):
        error = learner.predict() - c
        losses.append(error.square().sum() / 2)
        learner.update(error + e)
    return torch.stack(losses).cumsum(0)


def descent_regret(step: Callable[[int], float], targets: Tensor, noise: Tensor) -> Tensor:
    """The same of projected gradient descent with the step sizes step(1), step(2), ..."""
    x, losses = START, []
    for t, (c, e) in enumerate(zip(targets, noise, strict=True), 1):
        error = x - c
        losses.append(error.square().sum() / 2)
        x = X(x - step(t) * (error + e))
    return torch.stack(losses).cumsum(0)


def convex(s: float) -> OptimisticOMD:
    return OptimisticOMD(START, D=2.0, G=1.5 + s, L=1.0, project=X)


def strongly_convex(s: float) -> OptimisticOMD:
    return OptimisticOMD(START, mode="strongly_convex", lam=1.0, project=X)


def fixed(T: int) -> Callable[[int], float]:
    """The step size of the worst case without noise, D / (G sqrt(T))."""
    return lambda t: 2.0 / (1.5 * math.sqrt(T))


def bound(s: float, T: int) -> float:
    """The convex mode's bound, with D = 2, L = 1, sigma^2 = T s^2 and Sigma^2 = 1.5^2, the first gradient's."""
    D, G = 2.0, 1.5 + s
    return 5 * math.sqrt(10) * D**2 + 2.5 * math.sqrt(5) * D * G + 5 * D * (math.sqrt(2 * T) * s + 1.5)


def claim(
    seed: int = 0, rounds: int = 16000, moves: int = 4000, method: Callable[[float], OptimisticOMD] = convex
) -> Outcome:
    """Measure the claim over `rounds`, a quarter and a sixteenth of them, and over `moves` with a moving target.

    `method` makes the convex learner under test, from the size of the noise.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # vectors this small lose more to waiting threads than they win
    try:
        return _claim(seed, rounds, moves, method)
    finally:
        torch.set_num_threads(threads)


def _claim(seed: int, rounds: int, moves: int, method: Callable[[float], OptimisticOMD]) -> Outcome:
    horizons = (rounds // 16, rounds // 4, rounds)
    targets, xi = still(rounds), directions(rounds, seed)
    curves = {s: regret(method(s), targets, s * xi) for s in (0.0, 0.3, 1.0)}
    curved = regret(strongly_convex(0.1), targets, 0.1 * xi)
    exact = [float(descent_regret(fixed(T), targets[:T], 0 * xi[:T])[-1]) for T in horizons]

    moving, quiet = jumping(moves, seed), torch.zeros(moves, DIMENSION, dtype=torch.float64)
    ensemble = regret(OptimisticEnsemble(START, D=2.0, G=2.0, L=1.0, T=moves, project=X), moving, quiet)
    descent = descent_regret(lambda t: 2.0 / (2.0 * math.sqrt(t)), moving, quiet)

    at = {s: [float(curve[T - 1]) for T in horizons] for s, curve in curves.items()}
    strong = [float(curved[T - 1]) for T in horizons]
    checks = [
        Check(
            f"no noise: regret at T = {rounds} over that at T = {horizons[0]}, less 1",
            max(at[0.0]) / min(at[0.0]) - 1,
            "<=",
            0.01,
            baseline=exact[2] / exact[0] - 1,
        ),
        Check(
            "no noise: what gradient descent with the worst-case step gains per factor 4 of T, at least",
            min(exact[1] / exact[0], exact[2] / exact[1]),
            ">=",
            1.8,
        ),
        *(
            check
            for s in (0.3, 1.0)
            for check in (
                Check(f"noise {s:g}: regret gains per factor 4 of T", at[s][2] / at[s][1], "<=", 2.3),
                Check(f"noise {s:g}: the same, from below", at[s][2] / at[s][1], ">=", 1.8),
                Check(f"noise {s:g}: regret at T = {rounds}, against the bound", at[s][2], "<=", bound(s, rounds)),
            )
        ),
        Check(
            f"strongly convex, noise 0.1: regret at T = {rounds} over that at T = {horizons[0]}",
            strong[2] / strong[0],
            "<=",
            1.2,
        ),
        Check(
            "moving target: regret of the ensemble, against 0.35 of that of gradient descent",
            float(ensemble[-1]),
            "<=",
            0.35 * float(descent[-1]),
            baseline=float(descent[-1]),
        ),
    ]
    every = max(1, rounds // 400)
    steps = [float(t + 1) for t in range(0, rounds, every)]
    panels = [
        Panel(
            "Fixed target",
            "round",
            "regret",
            {
                **{f"optimistic, noise {s:g}": (steps, curve[::every].tolist()) for s, curve in curves.items()},
                "strongly convex mode, noise 0.1": (steps, curved[::every].tolist()),
            },
            log_x=True,
            log_y=True,
        ),
        Panel(
            "No noise",
            "T",
            "regret",
            {
                "optimistic": ([float(T) for T in horizons], at[0.0]),
                "gradient descent, D / (G sqrt(T))": ([float(T) for T in horizons], exact),
            },
            log_x=True,
            from_zero=True,
        ),
        Panel(
            "Target jumps every 200 rounds",
            "round",
            "regret",
            {
                name: ([float(t + 1) for t in range(0, moves, 10)], curve[::10].tolist())
                for name, curve in (("ensemble", ensemble), ("gradient descent, D / (G sqrt(t))", descent))
            },
        ),
    ]
    return Outcome(
        statement="With the last gradient as a hint, regret stays constant without noise, grows like sqrt(T) at most "
        "with it, stays logarithmic under strong convexity, and follows a target that jumps.",
        paper="Theory only: regret O(sqrt(sigma^2) + sqrt(Sigma^2)) for convex, logarithmic for strongly convex and "
        "exp-concave losses, and dynamic regret; no figures in the abstract.",
        checks=checks,
        panels=panels,
    )
