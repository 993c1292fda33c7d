"""The top eigenvalue of a batch Hessian by batch size, and SGD whose lr and momentum come from Lanczos alone.

1. Matrices of 1 200 rows with eigenvalues 10, 4 and -3, and 0 else, plus symmetric Gaussian noise of c = 60 at batch
   sizes 1 ... 1 024 out of 50 000: the top eigenvalue against `batch_hessian_edge`.
2. A 64-16-10 tanh network on scikit-learn's digits after 60 steps of gradient descent at rate 0.5: mean top eigenvalue
   of batch Hessians; the noise is calibrated at batch 8 and predicts batches 4 and 16.
3. A quadratic of 500 dimensions, eigenvalues spaced logarithmically in 10^-2.5 ... 1: heavy-ball with the pair that
   `SpectralLRController` sets from 80 products, against gradient descent at its best rate 2 / (L + l).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from headway.claims import Check, Outcome, Panel
from headway.numerics.lanczos import slq
from headway.schedules.batch_size_scaling import (
    SpectralLRController,
    batch_hessian_edge,
    calibrate_noise,
    hessian_matvec,
)

__all__ = ["claim"]

ROWS, SPIKES, NOISE, EXAMPLES = 1200, (10.0, 4.0, -3.0), 60.0, 50_000
MATRIX_BATCHES = (1, 4, 16, 64, 256, 1024)
DIGIT_BATCHES = (2, 4, 8, 16, 32)
CALIBRATED, PREDICTED = 8, (4, 16)
DIMENSIONS, SMALLEST = 500, -2.5

Lower = str | float | Callable[..., float]


def claim(seed: int = 0, *, rows: int = ROWS, draws: int = 20, products: int = 80, lower: Lower = "ritz") -> Outcome:
    """Measure the claim.

    Args:
        seed: of the noise, the network and the batches.
        rows: size of the random matrices; the error of the formula falls with it.
        draws: batches behind every mean top eigenvalue of the network.
        products: Hessian-vector products of the learner.
        lower: how the learner finds the smallest eigenvalue, as `SpectralLRController` takes it.

    Raises:
        ImportError: scikit-learn is missing; the message says what brings it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # problems this small lose more to waiting threads than they win
    try:
        tops = _matrix_tops(seed, rows)
        whole, means = _network_tops(seed, draws)
        spectral, descent, best = _quadratic(seed, products, lower)
    finally:
        torch.set_num_threads(threads)
    edges = {B: batch_hessian_edge(SPIKES[0], NOISE, B, EXAMPLES) for B in MATRIX_BATCHES}
    c = calibrate_noise(whole[0], max(means[CALIBRATED], whole[0]), CALIBRATED, whole[1])
    predicted = {B: batch_hessian_edge(whole[0], c, B, whole[1]) for B in DIGIT_BATCHES}

    worst = max(MATRIX_BATCHES, key=lambda B: abs(tops[B] / edges[B] - 1))
    falls = min(means[a] - means[b] for a, b in pairwise(DIGIT_BATCHES))
    rate = (spectral[-1] / spectral[0]) ** (1 / (len(spectral) - 1))
    checks = [
        Check(
            "matrices: largest relative error of the top eigenvalue", abs(tops[worst] / edges[worst] - 1), "<=", 0.03
        ),
        Check("digits: smallest fall of the mean top eigenvalue from a batch size to the next", falls, ">=", 0.0),
        Check("digits: mean top eigenvalue at batch 32 less the full one", means[32] - whole[0], ">=", 0.0, whole[0]),
    ]
    checks += [
        Check(f"digits: relative error predicted at batch {B}", abs(predicted[B] / means[B] - 1), "<=", 0.25)
        for B in PREDICTED
    ]
    checks += [
        Check("quadratic: factor of |x| per step, learnt lr and momentum", rate, "<=", 0.915, best),
        Check("quadratic: steps of gradient descent / steps, to |x| / 10^6", len(descent) / len(spectral), ">=", 5, 1),
    ]
    batches = [float(B) for B in MATRIX_BATCHES]
    sizes = [float(B) for B in DIGIT_BATCHES]
    panels = [
        Panel(
            "Spikes plus noise",
            "batch size",
            "largest eigenvalue",
            {
                "formula": (batches, list(edges.values())),
                f"matrix of {rows} rows": (batches, list(tops.values())),
                "without noise": (batches, [SPIKES[0]] * len(batches)),
            },
            log_x=True,
            styles={f"matrix of {rows} rows": "points"},
        ),
        Panel(
            "Network on digits",
            "batch size",
            "largest Hessian eigenvalue",
            {
                f"predicted from batch {CALIBRATED}": (sizes, list(predicted.values())),
                "mean of batches": (sizes, list(means.values())),
                "all data": (sizes, [whole[0]] * len(sizes)),
            },
            log_x=True,
            from_zero=True,
            styles={"mean of batches": "points"},
        ),
        Panel(
            "Quadratic, 500 dimensions",
            "step",
            "|x| / |x at the start|",
            {
                f"lr and momentum from {products} products": (list(range(len(spectral))), spectral),
                "gradient descent, best lr": (list(range(len(descent))), descent),
            },
            log_y=True,
        ),
    ]
    return Outcome(
        statement="The top eigenvalue of batch Hessians falls with the batch size as one measured number predicts, and "
        "a few Hessian-vector products replace a grid over lr and momentum.",
        paper="Extremal eigenvalues of batch Hessians exceed those of the empirical Hessian, and with them the largest "
        "stable lr depends on the batch size; the learner shows good preliminary results on CIFAR-100 (abstract, no "
        "figure).",
        checks=checks,
        panels=panels,
    )


def _matrix_tops(seed: int, rows: int) -> dict[int, float]:
    """The largest eigenvalue of spikes plus noise, for each batch size."""
    generator = torch.Generator().manual_seed(seed)
    tops = {}
    for B in MATRIX_BATCHES:
        scale = math.sqrt(NOISE / rows / (B / (1 - B / EXAMPLES)))
        matrix = torch.randn(rows, rows, generator=generator)
        matrix = (matrix + matrix.T) * (scale / math.sqrt(2))
        matrix.diagonal()[: len(SPIKES)] += torch.tensor(SPIKES)
        tops[B] = slq(matrix.mv, rows, 100, generator=generator).lam_max
    return tops


def _network_tops(seed: int, draws: int) -> tuple[tuple[float, int], dict[int, float]]:
    """(Top eigenvalue on all data, number of examples), and the mean of batches for each size."""
    x, y = _digits()
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.utils.skip_init(nn.Linear, 64, 16), nn.Tanh(), nn.utils.skip_init(nn.Linear, 16, 10))
    params: list[Tensor] = list(model.parameters())
    with torch.no_grad():
        for p in params:
            bound = 1 / math.sqrt(64 if p.shape[0] == 16 else 16)
            p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) * bound)

    def loss(rows: Tensor) -> Tensor:
        return functional.cross_entropy(model(x[rows]), y[rows])

    everything = torch.arange(len(x))
    for _ in range(60):
        grads = torch.autograd.grad(loss(everything), params)
        with torch.no_grad():
            torch._foreach_add_(params, grads, alpha=-0.5)

    def top(rows: Tensor) -> float:
        matvec = hessian_matvec(loss, params, [rows])
        return slq(matvec, sum(p.numel() for p in params), 20, generator=generator).lam_max

    def mean(B: int) -> float:
        return sum(top(torch.randperm(len(x), generator=generator)[:B]) for _ in range(draws)) / draws

    return (top(everything), len(x)), {B: mean(B) for B in DIGIT_BATCHES}


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'the claim of batch-size-scaling needs scikit-learn: pip install "headway[estimators]"'
        ) from error
    bunch = load_digits()
    return torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target, dtype=torch.long)


def _quadratic(seed: int, products: int, lower: Lower) -> tuple[Sequence[float], Sequence[float], float]:
    """|x| / |x_0| by step until 10^-6, of the learner and of gradient descent, and the latter's best factor."""
    eigenvalues = torch.logspace(SMALLEST, 0, DIMENSIONS, dtype=torch.float64)
    L, l = float(eigenvalues[-1]), float(eigenvalues[0])

    def run(lr: float, learnt: bool) -> list[float]:
        x = nn.Parameter(torch.ones(DIMENSIONS, dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=lr, momentum=0.0)
        if learnt:
            SpectralLRController(
                optimizer,
                lambda batch: (batch * x.square()).sum() / 2,
                batches=[eigenvalues],
                lanczos_steps=products,
                lower=lower,
                bounds=(1e-5, 10.0),
                seed=seed,
            ).probe()
        lengths = [1.0]
        while 1e-6 < lengths[-1] < 1e3 and len(lengths) < 20_000:
            x.grad = eigenvalues * x.detach()
            optimizer.step()
            lengths.append(float(x.detach().norm()) / math.sqrt(DIMENSIONS))
        return lengths

    return run(1.0, learnt=True), run(2 / (L + l), learnt=False), (L - l) / (L + l)
