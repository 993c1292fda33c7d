r"""WSD-S against WSD and a cyclic cosine: counted steps, a river valley, its noise, and a real training run.

The river valley is loss = -c x + (g / 2) y^2: the river x moves by the rate at every step, the hill y
feels curvature g and gradient noise s. In expectation, with v = E y^2,

    v <- (1 - eta g)^2 v + eta^2 s^2,    x <- x + eta,

so a constant eta keeps the hill at eta s^2 / (2 (2 - eta g)), which a short decay takes away.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from headway.claims import Check, Outcome, Panel
from headway.schedules.profile import CosineLR
from headway.schedules.wsd_s import WSDSLR, DecayBranchPlanner

__all__ = ["claim"]

CHECKPOINTS = (250, 500, 1000)
PEAKS = (0.2, 0.5, 1.0)
SLOPES = (0.002, 0.005, 0.01)
WARMUP = 50
FLOOR = 0.1
HILL_PEAKS = (0.1, 0.5, 1.0)

DIGITS_CHECKPOINTS = (1000, 2000, 4000)
DIGITS_PEAK = 3.0
DIGITS_FLOOR = 0.02
BATCH = 16
NOISY_LABELS = 0.2
SEEDS = 64  # the loss of one iterate at the peak rate scatters widely; so many runs show its mean

Schedule: TypeAlias = Callable[[Optimizer], LRScheduler]


def claim(
    seed: int = 0,
    *,
    chains: int = 4000,
    digits_checkpoints: Sequence[int] = DIGITS_CHECKPOINTS,
    seeds: int = SEEDS,
) -> Outcome:
    """One run with short decays yields the models of several budgets, at the loss of separate branches.

    Args:
        seed: start of the sequence of seeds for noise, labels and batch order.
        chains: walkers of the sampled river valley.
        digits_checkpoints: checkpoints of the training run, in optimizer steps.
        seeds: training runs behind every mean.

    Raises:
        ImportError: scikit-learn is missing; the message says what brings it.
    """
    data = _noisy_digits(seed)
    checks, panels = _river_valley()
    hill_checks = _noise(seed, chains)
    training_checks, training_panel = _training(data, seed, digits_checkpoints, seeds)
    return Outcome(
        statement="WSD-S gives good models at several budgets from one run, without extra steps for decay branches.",
        paper="WSD-S beats WSD and Cyclic-Cosine in obtaining checkpoints at several budgets in one run, for language "
        "models of 0.1B to 1.2B parameters (abstract).",
        checks=[*_step_counts(), *checks, *hill_checks, *training_checks],
        panels=[*panels, training_panel],
    )


def _step_counts() -> list[Check]:
    plan = DecayBranchPlanner(CHECKPOINTS, decay_fraction=0.1)
    separate, branches, single = (plan.total_steps(mode) for mode in ("separate", "wsd", "wsd-s"))
    return [
        Check("steps for three models: WSD-S", single, "<=", 1000, separate),
        Check("steps for three models: WSD", branches, "<=", 1075, separate),
    ]


def _wsd_s(optimizer: Optimizer) -> LRScheduler:
    return WSDSLR(optimizer, CHECKPOINTS, warmup_steps=WARMUP, min_lr_ratio=FLOOR)


def _cyclic_cosine(optimizer: Optimizer) -> LRScheduler:
    cycles: list[LRScheduler] = [
        CosineLR(optimizer, end - start, warmup_steps=0 if start else WARMUP, lr_min_ratio=FLOOR)
        for start, end in pairwise((0, *CHECKPOINTS))
    ]
    return SequentialLR(optimizer, cycles, milestones=list(CHECKPOINTS[:-1]))


def _branch(budget: int) -> Schedule:
    """What a WSD decay branch has seen of the rate from the start to its end."""
    return lambda optimizer: WSDSLR(optimizer, [budget], warmup_steps=WARMUP, min_lr_ratio=FLOOR)


def _rates(schedule: Schedule, peaks: Sequence[float], steps: int) -> Tensor:
    """The rates that a run of `steps` steps sees, shape (steps, peaks)."""
    optimizer = torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": peak} for peak in peaks])
    scheduler = schedule(optimizer)
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rates, dtype=torch.float64)


def _valley(rates: Tensor, slope: float) -> Tensor:
    """The expected loss after each step for g = s = v_0 = 1, shape (steps, peaks)."""
    hill = torch.ones_like(rates[0])
    hills = []
    for eta in rates:
        hill = (1 - eta) ** 2 * hill + eta**2
        hills.append(hill)
    return torch.stack(hills) / 2 - slope * rates.cumsum(dim=0)


def _river_valley() -> tuple[list[Check], list[Panel]]:
    last = CHECKPOINTS[-1]
    at = torch.tensor(CHECKPOINTS) - 1
    rates = {"WSD-S": _rates(_wsd_s, PEAKS, last), "cyclic cosine": _rates(_cyclic_cosine, PEAKS, last)}
    branch_rates = [_rates(_branch(budget), PEAKS, budget) for budget in CHECKPOINTS]
    gaps_to_cosine, gaps_to_wsd = [], []
    for slope in SLOPES:
        single, cosine = (_valley(rates[name], slope)[at] for name in ("WSD-S", "cyclic cosine"))
        branches = torch.stack([_valley(branch, slope)[-1] for branch in branch_rates])
        gaps_to_cosine.append(single - cosine)
        gaps_to_wsd.append((single - branches) / branches.abs())
    checks = [
        Check(
            "river valley: largest loss of WSD-S - loss of cyclic cosine over 27 settings",
            float(torch.stack(gaps_to_cosine).max()),
            "<=",
            0.0,
        ),
        Check(
            "river valley: largest relative gap between WSD-S and WSD over 27 settings",
            float(torch.stack(gaps_to_wsd).abs().max()),
            "<=",
            0.05,
        ),
    ]
    middle, steps = PEAKS.index(0.5), list(range(1, last + 1))
    panels = [
        Panel(
            "Learning rate",
            "step",
            "rate",
            {name: (steps, values[:, middle].tolist()) for name, values in rates.items()},
        ),
        Panel(
            "River valley, peak rate 0.5, slope 0.005",
            "step",
            "expected loss",
            {name: (steps, _valley(values, 0.005)[:, middle].tolist()) for name, values in rates.items()},
        ),
    ]
    return checks, panels


def _noise(seed: int, chains: int) -> list[Check]:
    """SGD on the hill with sampled noise: its stationary height, and what the decay leaves of it."""
    stable_steps, decay_steps, window = 900, 100, 200
    rates = _rates(
        lambda optimizer: WSDSLR(optimizer, [stable_steps + decay_steps], min_lr_ratio=FLOOR),
        HILL_PEAKS,
        stable_steps + decay_steps,
    )
    generator = torch.Generator().manual_seed(seed)
    y = torch.ones(len(HILL_PEAKS), chains, dtype=torch.float64)
    hills = []
    for eta in rates:
        noise = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        y = y - eta[:, None] * (y + noise)
        hills.append((y**2).mean(dim=1) / 2)
    hill = torch.stack(hills)
    stationary = hill[stable_steps - window : stable_steps].mean(dim=0)
    checks = []
    for row, eta in enumerate(HILL_PEAKS):
        expected = eta / (2 * (2 - eta))
        error = abs(float(stationary[row]) / expected - 1)
        checks.append(
            Check(f"sampled hill at rate {eta}: relative error of eta s^2 / (2 (2 - eta g))", error, "<=", 0.05)
        )
    middle = HILL_PEAKS.index(0.5)
    drop = float(stationary[middle] / hill[-1, middle])
    checks.append(Check("sampled hill at rate 0.5: stable height / height after the decay", drop, ">=", 5.0, 1.0))
    return checks


def _noisy_digits(seed: int) -> tuple[Tensor, Tensor]:
    """All rows, x in [0, 1] of shape (rows, 64), and labels of which a fifth is drawn anew at random."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the claim of wsd-s needs scikit-learn: pip install "headway[estimators]"') from error
    bunch = load_digits()
    x = torch.tensor(bunch.data, dtype=torch.float32) / 16
    y = torch.tensor(bunch.target, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.rand(len(y), generator=generator) < NOISY_LABELS
    return x, torch.where(noisy, torch.randint(10, y.shape, generator=generator), y)


def _training(
    data: tuple[Tensor, Tensor], seed: int, checkpoints: Sequence[int], seeds: int
) -> tuple[list[Check], Panel]:
    """Softmax regression: the full-data loss falls in each decay, and hardly before it."""
    x, y = data
    rows = len(x)
    weight = torch.nn.Parameter(torch.zeros(seeds, x.shape[1], 10))
    bias = torch.nn.Parameter(torch.zeros(seeds, 1, 10))
    optimizer = torch.optim.SGD([weight, bias], lr=DIGITS_PEAK)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a shortened claim may have short decays
        scheduler = WSDSLR(optimizer, checkpoints, warmup_steps=WARMUP, min_lr_ratio=DIGITS_FLOOR)
    edges = _windows(scheduler, checkpoints)
    every = max(1, checkpoints[-1] // 200)
    generators = [torch.Generator().manual_seed(1000 * seed + run) for run in range(seeds)]

    def losses(rows_of_runs: Tensor) -> Tensor:
        """The mean loss of each run, shape (seeds,), on its rows (seeds, batch)."""
        logits = torch.baddbmm(bias, x[rows_of_runs], weight)
        each = functional.cross_entropy(logits.flatten(0, 1), y[rows_of_runs].flatten(), reduction="none")
        return each.view(rows_of_runs.shape).mean(dim=1)

    everything = torch.arange(rows).expand(seeds, -1)
    seen: dict[int, float] = {}
    needed = {step for window in edges for step in window}
    queue = torch.empty(seeds, 0, dtype=torch.long)
    for step in range(checkpoints[-1] + 1):
        if step in needed or step % every == 0:
            with torch.no_grad():
                seen[step] = float(losses(everything).mean())
        if step == checkpoints[-1]:
            break
        if queue.shape[1] < BATCH:
            queue = torch.stack([torch.randperm(rows, generator=generator) for generator in generators])
        batch, queue = queue[:, :BATCH], queue[:, BATCH:]
        optimizer.zero_grad(set_to_none=True)
        losses(batch).sum().backward()
        optimizer.step()
        scheduler.step()

    checks = []
    for before, start, end in edges:
        fall = 1 - seen[end] / seen[start]
        earlier_fall = 1 - seen[start] / seen[before]
        checks.append(Check(f"digits: fall of the loss in the decay before step {end}", fall, ">=", 0.25, earlier_fall))
        checks.append(
            Check(f"digits: change of the loss in the window before step {start}", abs(earlier_fall), "<=", 0.15)
        )
    steps = sorted(seen)
    panel = Panel(
        "Digits with 20 % random labels", "step", "loss on all rows", {"WSD-S": (steps, [seen[s] for s in steps])}
    )
    return checks, panel


def _windows(scheduler: WSDSLR, checkpoints: Sequence[int]) -> list[tuple[int, int, int]]:
    """For each decay: the start of the stable window of equal length before it, its start and its end."""
    windows = []
    for start, end in pairwise((0, *checkpoints)):
        first = next(step for step in range(start, end) if scheduler.phase(step) == "decay")
        windows.append((2 * first - end, first, end))
    return windows
