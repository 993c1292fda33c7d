"""Real gloo processes for tests, bounded in time."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2


def run_ranks(function: Callable[..., None], folder: Any, *arguments: Any, seconds: float = 60) -> None:
    """Call `function(rank, folder, *arguments)` in two processes of one group; it leaves its results in the folder.

    Raises what a process raised, and `AssertionError` if they do not end in time.
    """
    context = mp.spawn(_rank, args=(function, str(folder), *arguments), nprocs=RANKS, join=False)
    try:
        # True only when both have ended; raises what a process raised.
        assert any(context.join(timeout=seconds) for _ in range(RANKS + 1)), "the processes did not end in time"
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _rank(rank: int, function: Callable[..., None], folder: str, *arguments: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "rendezvous"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    function(rank, folder, *arguments)
    store.set(f"done-{rank}", "")
    store.wait([f"done-{other}" for other in range(RANKS)], timedelta(seconds=60))
    # No orderly exit: device meshes and DistributedDataParallel keep the group alive, and in torch 2.13 its thread
    # aborts or blocks a process whose interpreter is taken down meanwhile. headway's own workers free them first.
    os._exit(0)
