"""One threshold for the gradients of all parameters: the k-th largest magnitude among them.

The same number on one process, on DDP ranks (which hold equal gradients) and, with a process group, on
ranks that hold shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from headway.kernels.select import kth_largest_magnitude, kth_largest_magnitude_reference, largest_magnitudes
from headway.optim.checks import local

__all__ = ["magnitude_quantile", "quantile_and_largest"]


def magnitude_quantile(
    tensors: Sequence[Any], fraction: float, process_group: dist.ProcessGroup | None = None
) -> float:
    """The (int(n fraction) + 1)-th largest |x| over all n elements: at most int(n fraction) elements lie above it.

    Exact. Shards of distributed tensors are counted together over `process_group`, by two all-reduces of
    histograms over the bits of |x| (65,536 and 32,768 counts): no rank sees another's elements. Every rank
    of the group must call.

    Args:
        tensors: real tensors, one or more, without NaN; 16-bit ones, and shards, are compared in float32.
        fraction: in [0, 1).
        process_group: the group over which the tensors are sharded. Default None: the tensors are whole.

    >>> magnitude_quantile([torch.tensor([[3.0, -1.0], [0.5, -7.0]]), torch.tensor([2.0, -4.0, 0.1])], 0.3)
    3.0
    """
    if process_group is None:
        return kth_largest_magnitude(_comparable(tensors), _rank(tensors, fraction))
    parts = [part.float() for part in local(tensors)]
    return kth_largest_magnitude_reference(
        parts, _rank(tensors, fraction), lambda counts: dist.all_reduce(counts, group=process_group)
    )


def quantile_and_largest(tensors: Sequence[Any], fraction: float) -> tuple[float, float]:
    """`magnitude_quantile` of whole tensors, and the largest magnitude from the same pass: NaN or infinite if one is.

    >>> quantile_and_largest([torch.tensor([3.0, -1.0, 0.5, -7.0])], 0.3)
    (3.0, 7.0)
    """
    return largest_magnitudes(_comparable(tensors), _rank(tensors, fraction))


def _comparable(tensors: Sequence[Any]) -> list[Tensor]:
    return [part if part.dtype == torch.float64 else part.float() for part in local(tensors)]


def _rank(tensors: Sequence[Any], fraction: float) -> int:
    return int(sum(t.numel() for t in tensors) * fraction) + 1
