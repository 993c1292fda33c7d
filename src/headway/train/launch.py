"""Several workers on this machine, through torchrun's elastic launcher."""

from __future__ import annotations

import logging
import os
import sys

from headway.train import TrainError
from headway.train.run import RunFolder

__all__ = ["launch"]


def launch(run: RunFolder, workers: int, max_restarts: int) -> None:
    """Run `headway train --resume` of an existing run folder as `workers` processes, and wait for them.

    A worker that fails ends them all, or restarts them all from the newest checkpoint up to
    `max_restarts` times. SIGINT and SIGTERM reach the workers as SIGTERM: they save and end.

    Raises:
        TrainError: a worker failed; the message is that of the first one to fail.
        KeyboardInterrupt: the workers were told to stop, and have.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The first failure is told below, in one line; the agent would print tables of tracebacks.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=f"headway-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=max_restarts,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "headway", "train", "--resume", str(run.path))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        raise TrainError(f"worker {rank} failed first: {' '.join(str(message).split())}") from error
    except SignalException as error:
        raise KeyboardInterrupt from error
