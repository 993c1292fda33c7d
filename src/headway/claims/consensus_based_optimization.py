"""Particles that only evaluate an objective descend like gradient descent and cross barriers where it stays.

The link, exact for many samples: a hop of width s from x lands at x - alpha s^2 grad F(x), with

    F(x) = -1/alpha log mean exp(-alpha E(x + s xi));   E = 1/2 x.Qx:  (I + alpha s^2 Q)^-1 x

The search: Rastrigin's function E = sum x_j^2 + 2.5 (1 - cos 2 pi x_j), particles uniform in [-2, 4]^d, 2000 steps;
a run succeeds if the consensus is within 1/4 of the minimum at 0 in every coordinate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headway.claims import Check, Outcome, Panel
from headway.optim.consensus import CBO

__all__ = ["claim", "rastrigin", "success_rate"]

BOX = (-2.0, 4.0)


def rastrigin(x: Tensor) -> Tensor:
    """E of points (..., d), shape (...); zero at the minimum."""
    return (x.square() + 2.5 * (1 - torch.cos(2 * math.pi * x))).sum(-1)


def _solved(x: Tensor) -> Tensor:
    return (x.abs() < 0.25).all(-1)


def search(dim: int, particles: int, steps: int, seed: int, **options: float | str) -> tuple[Tensor, list[float]]:
    """The last consensus of one run, and E at the consensus of every 20th step."""
    generator = torch.Generator().manual_seed(seed)
    swarm = CBO((particles, dim, BOX), generator=generator, **options)  # type: ignore[arg-type]
    curve = []
    for step in range(steps):
        swarm.tell(rastrigin(swarm.ask()))
        assert swarm.consensus is not None
        if step % 20 == 0 or step == steps - 1:
            curve.append(float(rastrigin(swarm.consensus)))
    assert swarm.consensus is not None
    return swarm.consensus, curve


def success_rate(dim: int, particles: int, steps: int, runs: range, **options: float | str) -> float:
    """The fraction of runs that end at the global minimum."""
    found = [bool(_solved(search(dim, particles, steps, seed, **options)[0])) for seed in runs]
    return sum(found) / len(found)


def _descent(dim: int, particles: int, steps: int, runs: range) -> tuple[float, list[float]]:
    """Gradient descent, step 0.005, from the first particles of the same runs: success rate, and the first run's E."""
    starts = [CBO((particles, dim, BOX), generator=torch.Generator().manual_seed(seed)).x for seed in runs]
    x = torch.stack(starts)  # (runs, particles, d)
    curve = []
    for step in range(steps):
        x = x - 0.005 * (2 * x + 5 * math.pi * torch.sin(2 * math.pi * x))
        if step % 20 == 0 or step == steps - 1:
            curve.append(float(rastrigin(x[0, 0])))
    return float(_solved(x).double().mean()), curve


def _quadratic_error(hops: int, seed: int) -> float:
    """Of the mean of hops of 2 million samples from (1, -2) on E = (x_0^2 + 4 x_1^2) / 2, against the formula.

    One in a thousand of the samples carries the weight, so that a single hop is off by up to 0.02.
    """
    start, q, alpha, width = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 4.0]), 3.0, 0.3
    ends = []
    for hop in range(hops):
        swarm = _hopper(start, 2_000_000, alpha, width, hops * seed + hop)
        for _ in range(2):  # the first particles are all at the start
            swarm.tell((q * swarm.ask().square()).sum(1) / 2)
        assert swarm.consensus is not None
        ends.append(swarm.consensus)
    return float((torch.stack(ends).mean(0) - start / (1 + alpha * width**2 * q)).abs().max())


def _hopper(start: Tensor, samples: int, alpha: float, width: float, seed: int) -> CBO:
    return CBO(
        start.expand(samples, -1),
        variant="hopping",
        alpha=alpha,
        hop_width=width,
        generator=torch.Generator().manual_seed(seed),
    )


def _free_energy_deviation(hops: int, seed: int) -> float:
    """Of the mean of hops of 10,000 samples from the formula: the largest coordinate, in standard errors."""
    start, alpha, width = torch.tensor([1.3, -0.6], dtype=torch.float64), 2.0, 0.3
    ends = []
    for hop in range(hops):
        swarm = _hopper(start, 10_000, alpha, width, hops * seed + hop)
        for _ in range(2):
            swarm.tell(rastrigin(swarm.ask()))
        assert swarm.consensus is not None
        ends.append(swarm.consensus)
    steps = (torch.stack(ends) - start) / (alpha * width**2)
    # E is a sum over coordinates, and so is F: integrals over one variable, on a grid of 12 standard deviations.
    xi = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    density = (-xi.square() / 2).exp()

    def smoothed(x: Tensor) -> Tensor:
        energies = rastrigin((x.unsqueeze(1) + width * xi).unsqueeze(-1))
        return -((-alpha * energies).exp() * density / density.sum()).sum(1).log() / alpha

    gradient = (smoothed(start + 1e-4) - smoothed(start - 1e-4)) / 2e-4
    error = steps.std(0) / hops**0.5
    return float(((steps.mean(0) + gradient) / error).abs().max())


def claim(seed: int = 0, steps: int = 2000, runs: int = 20, quadratic_hops: int = 8, sigma: float = 5.0) -> Outcome:
    """Measure the claim. `sigma` is the exploration under test: without it, particles just shrink to a local mean."""
    seeds = range(runs * seed, runs * seed + runs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # particles this few lose more to waiting threads than they win
    try:
        quadratic = _quadratic_error(quadratic_hops, seed)
        deviation = _free_energy_deviation(40, seed)
        small = success_rate(5, 100, steps, seeds, sigma=sigma)
        large = success_rate(10, 200, steps, seeds, sigma=sigma)
        isotropic = success_rate(10, 200, steps, seeds, sigma=0.3, dt=0.1, noise="isotropic")
        descent, descent_curve = _descent(5, 100, steps, seeds)
        hopper = _hopper(torch.tensor([2.0, -3.0]), 200, 20.0, 0.4, seed)
        distances = []
        for _ in range(200):
            hopper.tell(rastrigin(hopper.ask()))
            assert hopper.consensus is not None
            distances.append(float(hopper.consensus.norm()))
        curves = {
            "CBO, d = 5, 100 particles": search(5, 100, steps, seeds[0], sigma=sigma)[1],
            "CBO, d = 10, 200 particles": search(10, 200, steps, seeds[0], sigma=sigma)[1],
            "gradient descent, d = 5, one of the particles": descent_curve,
        }
    finally:
        torch.set_num_threads(threads)

    checks = [
        Check("deviation of a hop on a quadratic from the implicit gradient step", quadratic, "<=", 0.02),
        Check("deviation of the mean hop from -grad F, in standard errors", deviation, "<=", 3),
        Check("success rate, d = 5, 100 particles", small, ">=", 0.8, baseline=descent),
        Check("success rate, d = 10, 200 particles", large, ">=", 0.75),
        Check("success rate of isotropic noise, d = 10", isotropic, "<=", 0.3, baseline=large),
        Check("success rate of gradient descent from all the particles, d = 5", descent, "<=", 0.05, baseline=small),
        Check("distance from the minimum after 200 hops from (2, -3)", distances[-1], "<=", 0.15),
    ]
    at = [float(step) for step in range(0, steps, 20)] + ([float(steps - 1)] if (steps - 1) % 20 else [])
    panels = [
        Panel(
            "Rastrigin's function",
            "step",
            "E at the consensus",
            {name: (at, [max(value, 1e-12) for value in values]) for name, values in curves.items()},
            log_y=True,
        ),
        Panel(
            "Consensus hopping from (2, -3)",
            "hop",
            "distance from the minimum",
            {"200 samples, alpha 20, width 0.4": ([float(i) for i in range(200)], distances)},
        ),
    ]
    return Outcome(
        statement="The consensus of particles that only evaluate the objective takes gradient-like steps and finds the "
        "global minimum where gradient descent stays in the nearest of many.",
        paper="No figure in the abstract: an interpretation theorem, and global convergence on wide classes of "
        "non-smooth, non-convex functions.",
        checks=checks,
        panels=panels,
    )
