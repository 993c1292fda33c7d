"""What the benchmarks share: the machine in words, its matrix-product rate, and a line per result."""

from __future__ import annotations

import os
import platform
import statistics
import time

import torch

from headway.train.machine import processor


def describe() -> str:
    return (
        f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def matmul_rate(dtype: torch.dtype, size: int = 1024, seconds: float = 1.0) -> float:
    """Measured FLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    a @ b
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ b
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - start)


def median_and_spread(values: list[float]) -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered):.3f} ({ordered[0]:.3f} to {ordered[-1]:.3f})"
