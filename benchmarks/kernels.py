"""Time of the native kernels against torch.optim.AdamW, fused and foreach, and against their own references.

    python benchmarks/kernels.py [--threads 2] [--rounds 11] [--most AVX2] [--references]

The tensors are the parameters of a Llama of 46 million; gradients are random and stay. Each round runs everything
once, in an order drawn anew, and a ratio is the median over the rounds of time / AdamW fused in the same round, so that
other load on the machine meets all of them.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from headway.kernels import library
from headway.kernels.adagrad import adagrad_, adagrad_reference_
from headway.kernels.adam import adam_, adam_reference_
from headway.kernels.blockwise import adam8_, adam8_reference_, blocks
from headway.kernels.finite import first_nonfinite, first_nonfinite_reference
from headway.kernels.norm import squared_norms, squared_norms_reference
from headway.kernels.project import (
    Projection,
    orthogonal_projections,
    orthogonal_projections_reference,
    project_orthogonal_,
    project_orthogonal_reference_,
)
from headway.kernels.select import (
    clamp_magnitude_,
    clamp_magnitude_reference_,
    kth_largest_magnitude,
    kth_largest_magnitude_reference,
)
from machine import describe

HIDDEN, MLP, LAYERS, VOCABULARY = 512, 1376, 12, 16384


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(VOCABULARY, HIDDEN)]
    for _ in range(LAYERS):
        shapes += [(HIDDEN, HIDDEN)] * 4 + [(MLP, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP)]
    made = []
    for shape in shapes:
        parameter = nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
        parameter.grad = torch.randn(shape, generator=generator)
        made.append(parameter)
    return made


def zeros_like(tensors: list[nn.Parameter]) -> list[Tensor]:
    return [torch.zeros_like(t, requires_grad=False) for t in tensors]


def subjects() -> dict[str, Callable[[], object]]:
    """What is timed; gradients and moments are shared where that changes nothing."""
    fused, foreach, own = parameters(), parameters(), parameters()
    moments = zeros_like(own), zeros_like(own)
    previous = [torch.randn_like(p) for p in own]
    grads = [p.grad for p in own]
    weights = [p.detach() for p in own]
    scales = {"step_sizes": [1e-3] * len(own), "root_scales": [1.0] * len(own)}
    rule = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "decay_before": 1 - 1e-5, **scales}
    count = sum(g.numel() for g in grads)

    codes = [[torch.full((p.numel(),), zero, dtype=torch.uint8) for p in own] for zero in (127, 0)]
    absmax = [[torch.zeros(blocks(p.numel(), 256)) for p in own] for _ in range(2)]

    def adam(function: Callable, **options: object) -> Callable[[], object]:
        return torch.no_grad()(lambda: function(own, grads, *moments, **rule, **options))

    def adagrad(function: Callable, **options: object) -> Callable[[], object]:
        return torch.no_grad()(lambda: function(own, grads, moments[0], x_step=1e-3, mix=0.1, **options))

    norm, diagonal = {"inverses": torch.ones(len(own), dtype=torch.float64)}, {"sums": moments[1]}
    projections = [Projection(1e-3, 1.0, 0)] * len(own)

    def adam8(function: Callable) -> Callable[[], object]:
        return torch.no_grad()(lambda: function(own, grads, codes[0], absmax[0], codes[1], absmax[1], **rule))

    return {
        "AdamW fused": AdamW(fused, fused=True).step,
        "AdamW foreach": AdamW(foreach, foreach=True).step,
        "adam_": adam(adam_),
        "adam_ reference": adam(adam_reference_),
        "adam_, friction": adam(adam_, previous_grads=previous),
        "adam_, friction reference": adam(adam_reference_, previous_grads=previous),
        "adam_, spike and clip": adam(adam_, spike=50.0, clip=1.0),
        "adam_, spike and clip reference": adam(adam_reference_, spike=50.0, clip=1.0),
        "adam_, projections": adam(adam_, projections=projections),
        "adam_, projections reference": adam(adam_reference_, projections=projections),
        "adam_, bounds": adam(adam_, bounds=[4.0] * len(own)),
        "adam_, bounds reference": adam(adam_reference_, bounds=[4.0] * len(own)),
        "adagrad_, norm": adagrad(adagrad_, **norm),
        "adagrad_, norm reference": adagrad(adagrad_reference_, **norm),
        "adagrad_, diagonal": adagrad(adagrad_, **diagonal),
        "adagrad_, diagonal reference": adagrad(adagrad_reference_, **diagonal),
        "adam8_": adam8(adam8_),
        "adam8_ reference": adam8(adam8_reference_),
        "first_nonfinite": lambda: first_nonfinite(grads),
        "first_nonfinite reference": lambda: first_nonfinite_reference(grads),
        "kth_largest_magnitude, 1 %": lambda: kth_largest_magnitude(grads, count // 100),
        "kth_largest_magnitude, 50 %": lambda: kth_largest_magnitude(grads, count // 2),
        "kth_largest_magnitude, 1 % reference": lambda: kth_largest_magnitude_reference(grads, count // 100),
        "clamp_magnitude_": lambda: clamp_magnitude_(grads, 4.0),
        "clamp_magnitude_ reference": lambda: clamp_magnitude_reference_(grads, 4.0),
        "squared_norms": lambda: squared_norms(grads),
        "squared_norms reference": lambda: squared_norms_reference(grads),
        "orthogonal_projections": lambda: orthogonal_projections(grads, weights, renormalize=True),
        "orthogonal_projections reference": lambda: orthogonal_projections_reference(grads, weights, renormalize=True),
        "project_orthogonal_": lambda: project_orthogonal_(grads, weights, renormalize=True),
        "project_orthogonal_ reference": lambda: project_orthogonal_reference_(grads, weights, renormalize=True),
    }


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--rounds", type=int, default=11)
    options.add_argument("--most", choices=("plain C", "AVX2", "AVX-512"), default="AVX-512", help="instruction set")
    options.add_argument("--references", action="store_true", help="time the references too, which takes minutes")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    kernels = library.instruction_set(arguments.most) if library.available() else f"no kernels: {library.why_not()}"
    print(f"{describe()}; {kernels}; {arguments.rounds} rounds")
    timed = {name: run for name, run in subjects().items() if arguments.references or "reference" not in name}
    for run in timed.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(arguments.rounds):
        for name in random.Random(turn).sample(list(timed), len(timed)):
            times[name].append(seconds(timed[name]))
    base = times["AdamW fused"]
    print(f"{'':38}{'ms':>8}{'ratio':>8}")
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
        print(f"{name:38}{1e3 * statistics.median(own):8.1f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
