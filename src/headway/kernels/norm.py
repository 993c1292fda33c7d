"""The squared norms of a list of tensors, in one pass that also says whether they are finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headway.kernels import library

__all__ = ["squared_norms", "squared_norms_reference"]


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """|x|^2 of each tensor, shape (tensors,), in float64 (float32 on MPS): not finite where a tensor is not.

    From the kernel, for float32 tensors on the CPU, that holds the other way too. The reference sums in the tensors'
    dtype, whose squares may overflow.

    >>> squared_norms([torch.tensor([3.0, 4.0]), torch.tensor([1.0])]).tolist()
    [25.0, 1.0]
    """
    loaded = library.library()
    if loaded is None or not all(library.takes(t) for t in tensors):
        return squared_norms_reference(tensors)
    norms = torch.empty(len(tensors), dtype=torch.float64)
    if not loaded.headway_squared_norms(
        len(tensors), library.sizes(tensors), library.pointers(tensors), norms.data_ptr(), torch.get_num_threads()
    ):
        raise MemoryError("the native norm could not allocate its sums")
    return norms


def squared_norms_reference(tensors: Sequence[Tensor]) -> Tensor:
    """The same with one `torch._foreach_norm`."""
    norms = torch.stack(torch._foreach_norm(list(tensors)))
    return norms.to(torch.float32 if norms.device.type == "mps" else torch.float64).square()
