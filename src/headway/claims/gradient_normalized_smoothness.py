"""The point of gradient-normalised smoothness: one method, no constants, as fast as its Hessian approximation allows.

    f(x) = mu logsumexp((A x - b) / mu),   200 x 60,   entries of A and b ~ U(-1, 1),   x_0 = ones

with A shifted by the gradient at 0, so that the minimum is at 0. Iterations until f - f* < 1e-8 with the exact Hessian,
with the weighted Gauss-Newton matrix A^T diag(softmax) A / mu, and of gradient descent with a doubling and halving line
search; for mu = 1 and the hard mu = 0.1; each number is the worst of three problems. The error of the Gauss-Newton
matrix, g g^T / mu, vanishes with the gradient, so the linear rate turns superlinear at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.claims import Check, Outcome, Panel
from headway.optim.damped_solve import Curvature
from headway.optim.gradient_normalized_smoothness import gns_minimize, weighted_gauss_newton

__all__ = ["Problem", "claim", "gradient_descent", "minimise"]

TARGET = 1e-8
PROBLEMS = 3


@dataclass(frozen=True)
class Problem:
    """The function on one draw of the data, in float64."""

    A: Tensor
    b: Tensor
    mu: float

    @staticmethod
    def draw(seed: int, mu: float, rows: int = 200, columns: int = 60) -> Problem:
        """The data of a seed, shifted."""
        generator = torch.Generator().manual_seed(seed)
        A = 2 * torch.rand(rows, columns, generator=generator, dtype=torch.float64) - 1
        b = 2 * torch.rand(rows, generator=generator, dtype=torch.float64) - 1
        at_zero = A.mT @ torch.softmax(-b / mu, dim=0)
        return Problem(A - at_zero, b, mu)

    def __call__(self, x: Tensor) -> tuple[float, Tensor]:
        a = (self.A @ x - self.b) / self.mu
        return float(self.mu * torch.logsumexp(a, dim=0)), self.A.mT @ torch.softmax(a, dim=0)

    def exact(self, x: Tensor) -> Tensor:
        """The Hessian."""
        _, g = self(x)
        return weighted_gauss_newton(self.A, self.b, self.mu)(x).dense() - torch.outer(g, g) / self.mu

    def gauss_newton(self, x: Tensor) -> Tensor:
        """Its upper bound, as a matrix: it has full rank, so that Woodbury would gain nothing."""
        return weighted_gauss_newton(self.A, self.b, self.mu)(x).dense()


def minimise(
    problem: Problem, curvature: Callable[[Tensor], Curvature] | None, max_iter: int = 1000
) -> tuple[list[float], bool]:
    """F - f* before each iteration and at the end, and whether that is below the target."""
    start = torch.ones(problem.A.shape[1], dtype=torch.float64)
    best, _ = problem(torch.zeros_like(start))
    errors: list[float] = []

    def reached(x: Tensor, f: float) -> bool:
        errors.append(f - best)
        return f - best < TARGET

    result = gns_minimize(problem, start, curvature, gtol=0.0, max_iter=max_iter, callback=reached)
    return errors, result.status == "callback"


def gradient_descent(problem: Problem, max_iter: int = 3000) -> tuple[list[float], bool]:
    """The same for x - g / L, where L = 1 at first, doubles until it bounds f along the step and halves after it."""
    x = torch.ones(problem.A.shape[1], dtype=torch.float64)
    best, _ = problem(torch.zeros_like(x))
    f, g = problem(x)
    L, errors = 1.0, [f - best]
    while errors[-1] >= TARGET and len(errors) <= max_iter:
        while True:
            candidate = x - g / L
            f_new, g_new = problem(candidate)
            if f_new <= f - float(g @ g) / (2 * L):
                break
            L *= 2
        x, f, g, L = candidate, f_new, g_new, max(L / 2, 1e-5)
        errors.append(f - best)
    return errors, errors[-1] < TARGET


def claim(seed: int = 0, problems: int = PROBLEMS, use_curvature: bool = True) -> Outcome:
    """Measure the claim on that many problems. Without `use_curvature` H is zero, and there is nothing to claim."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results: dict[float, dict[str, list[tuple[list[float], bool]]]] = {}
        for mu in (1.0, 0.1):
            drawn = [Problem.draw(PROBLEMS * seed + index, mu) for index in range(problems)]
            results[mu] = {
                "exact Hessian": [minimise(p, p.exact if use_curvature else None) for p in drawn],
                "weighted Gauss-Newton": [minimise(p, p.gauss_newton if use_curvature else None) for p in drawn],
                "gradient descent": [gradient_descent(p) for p in drawn],
            }
    finally:
        torch.set_num_threads(threads)

    checks = []
    for mu, name, limit in (
        (1.0, "exact Hessian", 12),
        (1.0, "weighted Gauss-Newton", 25),
        (0.1, "exact Hessian", 60),
        (0.1, "weighted Gauss-Newton", 250),
    ):
        checks.append(
            Check(
                f"mu = {mu:g}, {name}: iterations to f - f* < 1e-8, the most of {problems} problems",
                max(_iterations(run) for run in results[mu][name]),
                "<=",
                limit,
                baseline=min(len(errors) - 1 for errors, _ in results[mu]["gradient descent"]),
            )
        )
    checks += [
        Check(
            f"mu = 1, gradient descent: the fewest iterations of {problems} problems",
            min(_iterations(run) for run in results[1.0]["gradient descent"]),
            ">=",
            35,
        ),
        Check(
            f"mu = 0.1, gradient descent: problems of {problems} that it solves in 3000 iterations",
            sum(done for _, done in results[0.1]["gradient descent"]),
            "<=",
            0,
        ),
    ]
    for mu in (1.0, 0.1):
        checks.append(
            Check(
                f"mu = {mu:g}, weighted Gauss-Newton, linear or faster: decades of f - f* per iteration in the last "
                "half of a run over those in its first half, the least",
                min(_acceleration(errors) for errors, _ in results[mu]["weighted Gauss-Newton"]),
                ">=",
                1.0,
                baseline=min(_acceleration(errors) for errors, _ in results[mu]["gradient descent"]),
            )
        )
    panels = [
        Panel(
            f"LogSumExp, mu = {mu:g}",
            "iteration",
            "f - f*",
            {
                name: ([float(i) for i in range(len(runs[0][0][:301]))], runs[0][0][:301])
                for name, runs in results[mu].items()
            },
            log_y=True,
        )
        for mu in results
    ]
    return Outcome(
        statement="One damped Newton method without constants is as fast with an exact Hessian as Newton's method and "
        "linear with a Gauss-Newton matrix, where gradient descent stalls.",
        paper="No figure in the abstract: universal global rates, linear for logistic regression and softmax problems.",
        checks=checks,
        panels=panels,
    )


def _iterations(run: tuple[list[float], bool]) -> float:
    errors, done = run
    return len(errors) - 1 if done else float("inf")


def _acceleration(errors: list[float]) -> float:
    """By how much log10 of the error falls per iteration in the last half of a run, over the same in the first half."""
    logs = [math.log10(error) for error in errors if error > 0]  # the last may be 0 to rounding
    middle = len(logs) // 2
    return (logs[middle] - logs[-1]) / (len(logs) - 1 - middle) / ((logs[0] - logs[middle]) / middle)
