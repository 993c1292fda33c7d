"""Time and state of one optimizer step: Frugal against torch.optim.AdamW, foreach and fused.

    python benchmarks/frugal_step.py [--threads 1] [--rounds 15]

The parameters are those of a small Llama; gradients are random and stay. Each round runs every optimizer once, in
an order drawn anew, and ratios are medians over the rounds of time / AdamW foreach in the same round, so that other
load on the machine meets all of them. No step of a round is a change of subspace; that is timed by itself.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from headway.optim import Frugal

SIZES = {  # hidden, MLP, layers, vocabulary
    "4 M": (256, 688, 4, 4096),
    "25 M": (512, 1376, 6, 12288),
}


def parameter_groups(hidden: int, mlp: int, layers: int, vocabulary: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> nn.Parameter:
        value = nn.Parameter(torch.randn(shape, generator=generator))
        value.grad = torch.randn(shape, generator=generator)
        return value

    projected, regular = [], [parameter(vocabulary, hidden), parameter(hidden)]
    for _ in range(layers):
        projected += [parameter(hidden, hidden) for _ in range(4)]
        projected += [parameter(mlp, hidden), parameter(mlp, hidden), parameter(hidden, mlp)]
        regular += [parameter(hidden), parameter(hidden)]
    return [{"params": projected, "projected": True}, {"params": regular, "projected": False}]


def optimizers(sizes: tuple[int, int, int, int]) -> dict[str, Optimizer]:
    def groups() -> list[dict]:
        return parameter_groups(*sizes)

    made: dict[str, Optimizer] = {
        "AdamW foreach": AdamW(groups(), foreach=True),
        "AdamW fused": AdamW(groups(), fused=True),
    }
    for projection in ("blocks", "columns"):
        made[f"Frugal {projection}"] = Frugal(groups(), projection=projection, density=0.25, update_gap=10**9)
    return made


def state_bytes(optimizer: Optimizer) -> int:
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))


def seconds(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--rounds", type=int, default=15)
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} threads, load {os.getloadavg()[0]:.1f}; "
        f"torch {torch.__version__} on the CPU, float32, density 0.25, {arguments.rounds} rounds"
    )
    for size, sizes in SIZES.items():
        made = optimizers(sizes)
        first = {name: seconds(optimizer.step) for name, optimizer in made.items()}
        for optimizer in made.values():
            optimizer.step()
        times: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(arguments.rounds):
            for name in random.Random(turn).sample(list(made), len(made)):
                times[name].append(seconds(made[name].step))
        count = sum(p.numel() for group in next(iter(made.values())).param_groups for p in group["params"])
        base = times["AdamW foreach"]
        base_bytes = state_bytes(made["AdamW foreach"])
        print(f"\n{size}: {count:,} parameters")
        print(f"{'':16}{'ms/step':>9}{'ratio':>8}{'first step ms':>15}{'state MiB':>11}{'ratio':>8}")
        for name, optimizer in made.items():
            ratio = statistics.median(own / other for own, other in zip(times[name], base, strict=True))
            size_mib = state_bytes(optimizer) / 2**20
            print(
                f"{name:16}{1e3 * statistics.median(times[name]):9.1f}{ratio:8.2f}{1e3 * first[name]:15.1f}"
                f"{size_mib:11.1f}{state_bytes(optimizer) / base_bytes:8.2f}"
            )


if __name__ == "__main__":
    main()
