r"""AdAdaGrad: the test proposes the batch that theory says, and a grown batch trains like a large one on fewer samples.

Per-sample gradients mu + sigma_j z with z ~ N(0, 1): with tr = sum_j sigma_j^2, the norm test's proposal is near

    tr / (eta^2 (||mu||^2 + tr / b)),

for mu = 0 the growth per test near 1 / eta^2. Then AdaGradNorm on L(x) = x^T H x / 2, H diagonal from 0.2 to 2 in 20
dimensions, per-sample gradients H x + z, from x = (2, ..., 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from headway.claims import Check, Outcome, Panel
from headway.optim.adagrad_norm import AdaGradNorm
from headway.schedules.adadagrad import AdaptiveBatchController, noise_stats, propose_batch

__all__ = ["claim"]

BATCHES = (16, 64, 256, 1024, 4096)
DIMENSIONS, MEAN, ETA = 50, 0.05, 0.5
GROWTH_ETAS = (0.5, 0.9)

SMALL, LARGE = 2, 4096
STEPS, EXTRA_STEPS = 200, 60
TRAINING_ETA = 0.1
START = 2.0


def claim(
    seed: int = 0, *, batches: Sequence[int] = BATCHES, draws: int = 200, seeds: int = 5, large: int = LARGE
) -> Outcome:
    """The statistics against theory, and training with a growing batch against the smallest and the largest.

    All the figures of training are means over `seeds` runs. Loss is compared at equal samples, and samples at equal
    loss. At equal steps the growing batch is behind by a factor that depends on the seed (1.01 to 1.23 for seeds 0 to
    9), because the noise of the first, tiny batches stays in the accumulator of AdaGradNorm. In samples alone the
    smallest batch is cheapest, as far as it gets: what it lacks is steps.

    Args:
        seed: start of the sequence of seeds.
        batches: b at which the proposals are compared with theory.
        draws: batches behind every median.
        seeds: training runs behind every mean.
        large: the largest batch in training.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        checks, panel = _proposals(seed, batches, draws)
        training_checks, training_panels = _training(seed, seeds, large)
        growth_checks = _growth(seed, draws)
    finally:
        torch.set_num_threads(threads)
    return Outcome(
        statement="The norm test asks for the batch that theory predicts; grown by it, a batch of 2 reaches the loss "
        "of a large one on fewer samples.",
        paper="No headline number: convergence at rate O(1/K) with the test in force, and image classification.",
        checks=[*checks, *growth_checks, *training_checks],
        panels=[panel, *training_panels],
    )


def _median_proposal(mean: float, batch: int, eta: float, draws: int, generator: torch.Generator) -> float:
    sigma = torch.linspace(0.5, 1.5, DIMENSIONS, dtype=torch.float64)
    proposals = []
    for _ in range(draws):
        noise = torch.randn(batch, DIMENSIONS, generator=generator, dtype=torch.float64)
        proposals.append(float(propose_batch(noise_stats(mean + sigma * noise), eta=eta)))
    return float(torch.tensor(proposals).median())


def _proposals(seed: int, batches: Sequence[int], draws: int) -> tuple[list[Check], Panel]:
    trace = float(torch.linspace(0.5, 1.5, DIMENSIONS, dtype=torch.float64).square().sum())
    generator = torch.Generator().manual_seed(seed)
    measured = {batch: _median_proposal(MEAN, batch, ETA, draws, generator) for batch in batches}
    theory = {batch: trace / (ETA**2 * (DIMENSIONS * MEAN**2 + trace / batch)) for batch in batches}
    checks = [
        Check(
            f"b = {batch}: median proposal {measured[batch]:.0f}, relative distance from theory",
            abs(measured[batch] / theory[batch] - 1),
            "<=",
            0.08,
            baseline=theory[batch],
        )
        for batch in batches
    ]
    x = [float(batch) for batch in batches]
    panel = Panel(
        "What the norm test asks for, eta = 0.5",
        "batch b",
        "proposed batch",
        {"theory": (x, list(theory.values())), "median proposal": (x, list(measured.values())), "b": (x, x)},
        log_x=True,
        log_y=True,
        styles={"median proposal": "points"},
    )
    return checks, panel


def _growth(seed: int, draws: int) -> list[Check]:
    """Pure noise: each test multiplies the batch by about 1 / eta^2."""
    generator = torch.Generator().manual_seed(seed + 1)
    batch = 64
    checks = []
    for eta in GROWTH_ETAS:
        factor = _median_proposal(0.0, batch, eta, draws, generator) / batch
        checks.append(
            Check(
                f"no gradient at all, eta = {eta}: growth per test {factor:.2f}, relative distance from 1 / eta^2",
                abs(factor * eta**2 - 1),
                "<=",
                0.15,
                baseline=1 / eta**2,
            )
        )
    return checks


@dataclass(frozen=True)
class Run:
    """Loss before each step and at the end, samples drawn by then, and the batch of each step."""

    losses: list[float]
    samples: list[float]
    batches: list[float]


def _train(seed: int, steps: int, initial: int, largest: int) -> Run:
    curvature = torch.linspace(0.2, 2, 20, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    x = nn.Parameter(torch.full((20,), START, dtype=torch.float64))
    optimizer = AdaGradNorm([x])
    schedule = AdaptiveBatchController(initial, largest, eta=TRAINING_ETA)
    losses, samples, batches = [], [0.0], []
    for step in range(steps):
        losses.append(float((curvature * x.detach().square()).sum()) / 2)
        noise = torch.randn(schedule.size, 20, generator=generator, dtype=torch.float64)
        gradients = curvature * x.detach() + noise
        x.grad = gradients.mean(0)
        optimizer.step()
        batches.append(float(schedule.size))
        samples.append(samples[-1] + schedule.size)
        if schedule.due(step):
            schedule.update(noise_stats(gradients))
    losses.append(float((curvature * x.detach().square()).sum()) / 2)
    return Run(losses, samples, batches)


def _mean(runs: Sequence[Run]) -> Run:
    def mean(curves: list[list[float]]) -> list[float]:
        return torch.tensor(curves, dtype=torch.float64).mean(0).tolist()

    return Run(mean([r.losses for r in runs]), mean([r.samples for r in runs]), mean([r.batches for r in runs]))


def _at_samples(run: Run, samples: float) -> float:
    """The loss when that many samples were drawn, at the last step that is within them."""
    return [loss for loss, drawn in zip(run.losses, run.samples, strict=True) if drawn <= samples][-1]


def _training(seed: int, seeds: int, large: int) -> tuple[list[Check], list[Panel]]:
    each = [seed + number for number in range(seeds)]
    growing = _mean([_train(s, STEPS + EXTRA_STEPS, SMALL, large) for s in each])
    fixed_large = _mean([_train(s, STEPS, large, large) for s in each])
    fixed_small = _mean([_train(s, STEPS, SMALL, SMALL) for s in each])

    goal = fixed_large.losses[-1]
    reached = [drawn for loss, drawn in zip(growing.losses, growing.samples, strict=True) if loss <= goal]
    needed = reached[0] if reached else float("inf")
    spent = growing.samples[STEPS]
    checks = [
        Check(
            f"samples to the final loss of the fixed batch of {large}, relative to its own",
            needed / fixed_large.samples[-1],
            "<=",
            0.85,
            baseline=fixed_large.samples[-1],
        ),
        Check(
            f"loss after {STEPS} steps, relative to the fixed batch of {large} after as many samples",
            growing.losses[STEPS] / _at_samples(fixed_large, spent),
            "<=",
            0.85,
            baseline=_at_samples(fixed_large, spent),
        ),
        Check(
            f"final loss of the fixed batch of {SMALL}, relative to the fixed batch of {large}",
            fixed_small.losses[-1] / goal,
            ">=",
            2.0,
            baseline=goal,
        ),
    ]
    named = {"growing": growing, f"fixed {large}": fixed_large, f"fixed {SMALL}": fixed_small}
    by_samples = {name: (run.samples[1:], run.losses[1:]) for name, run in named.items()}
    steps = {name: ([float(i) for i in range(len(run.batches))], run.batches) for name, run in named.items()}
    panels = [
        Panel("AdaGradNorm on a noisy quadratic", "samples", "loss", by_samples, log_x=True, log_y=True),
        Panel("The batch", "step", "samples per step", steps, log_y=True),
    ]
    return checks, panels
