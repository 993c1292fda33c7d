"""What this machine has: cores, memory, and the rate of its matrix products."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Machine", "measure_machine"]


@dataclass(frozen=True)
class Machine:
    """A machine as a plan needs to know it.

    `memory_bytes` is what a new process can still take; `matmul_flops` the floating-point operations per
    second of large float32 matrix products on `threads` threads (or the GPU).
    """

    processor: str
    device: str
    cores: int
    threads: int
    memory_bytes: int
    matmul_flops: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure_machine(seconds: float = 1.0) -> Machine:
    """Measure for about `seconds`.

    >>> machine = measure_machine(0.05)
    >>> machine.cores >= 1, machine.matmul_flops > 0, machine.memory_bytes > 0
    (True, True, True)
    """
    import torch

    from headway.train.machine import cores, processor

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 1024 if device.type == "cpu" else 8192
    matrix = torch.ones(size, size, device=device)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    memory = torch.cuda.mem_get_info()[0] if device.type == "cuda" else _free_memory()
    # The median: the first products warm up, and a busy machine lengthens some.
    rate = 2 * size**3 / sorted(times)[len(times) // 2]
    return Machine(name, device.type, cores(), torch.get_num_threads(), memory, rate)


def _free_memory() -> int:
    """Bytes that the system, and the control group that this process is in, still have."""
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    except (OSError, StopIteration):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        if limit.strip() != "max":
            limits.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return max(0, min(limits))
