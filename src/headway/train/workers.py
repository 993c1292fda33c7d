"""The processes that train together, as torchrun's environment describes them."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Workers"]


@dataclass(frozen=True)
class Workers:
    """The place of one process among the workers. One worker needs no process group.

    `local_count` is the number of workers on this machine, which share its cores; `restarts` counts how
    often the elastic agent has started them again.
    """

    rank: int
    count: int
    local_rank: int
    local_count: int
    restarts: int = 0

    @classmethod
    def from_environment(cls) -> Workers:
        """Read the variables that torchrun sets; without them, one worker."""
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            count=int(os.environ.get("WORLD_SIZE", 1)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            local_count=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
        )

    def device(self, wanted: str) -> torch.device:
        """The device of `[train] device` for this worker."""
        if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()):
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")

    def connect(self, device: torch.device) -> None:
        """Join the process group: gloo on CPUs, nccl on GPUs."""
        if self.count > 1 and not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
            timeout = datetime.timedelta(minutes=10)
            store, _, _ = next(dist.rendezvous("env://", self.rank, self.count, timeout=timeout))
            if self.local_count == self.count:
                # torch 2.13's agent keeps one store over restarts: without a prefix, a worker can read the address
                # that its peer had before. (On several machines the agents' counts differ, and only they can tell.)
                store = dist.PrefixStore(f"attempt-{self.restarts}", store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.count, timeout=timeout)

    def disconnect(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.count > 1:
            dist.barrier()

    def sum(self, *values: float) -> list[float]:
        """The sums of a few numbers over the workers, in one collective."""
        if self.count == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers)
        return numbers.tolist()

    def average(self, tensors: list[torch.Tensor]) -> None:
        """Replace each of the tensors by its mean over the workers, in one collective."""
        if self.count == 1:
            return
        flat = torch._utils._flatten_dense_tensors(tensors)
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, mean in zip(tensors, torch._utils._unflatten_dense_tensors(flat, tensors), strict=True):
            tensor.copy_(mean)

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on all workers."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]
