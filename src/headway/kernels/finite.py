"""Whether tensors hold NaN or infinities: one pass over them and one number read."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from headway.kernels import library

__all__ = ["first_nonfinite", "first_nonfinite_reference"]


def first_nonfinite(tensors: Sequence[Tensor]) -> int | None:
    """The index of the first tensor that holds a NaN or an infinity, or None.

    >>> first_nonfinite([torch.ones(2), torch.tensor([1.0, float("nan")])])
    1
    """
    loaded = library.library()
    if loaded is None:
        return first_nonfinite_reference(tensors)
    taken, refused = [], []
    for index, tensor in enumerate(tensors):
        if library.takes(tensor, (torch.float32, torch.bfloat16)):
            taken.append(index)
        else:
            refused.append(index)
    found = []
    if taken:
        chosen = [tensors[index] for index in taken]
        first = ctypes.c_size_t()
        half = (ctypes.c_int * len(chosen))(*[tensor.dtype == torch.bfloat16 for tensor in chosen])
        if not loaded.headway_first_nonfinite(
            len(chosen),
            library.sizes(chosen),
            half,
            library.pointers(chosen),
            ctypes.byref(first),
            torch.get_num_threads(),
        ):
            raise MemoryError("the native check for finite numbers could not allocate its list of chunks")
        if first.value < len(taken):
            found.append(taken[first.value])
    if refused:
        position = first_nonfinite_reference([tensors[index] for index in refused])
        if position is not None:
            found.append(refused[position])
    return min(found, default=None)


def first_nonfinite_reference(tensors: Sequence[Tensor]) -> int | None:
    """The same with one `torch._foreach_norm` per device."""
    by_device: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel():
            by_device.setdefault(tensor.device, []).append(index)
    first: int | None = None
    for indices in by_device.values():
        largest = torch._foreach_norm([tensors[index] for index in indices], float("inf"))
        finite = torch.stack([norm.isfinite() for norm in largest])
        if not bool(finite.all()):
            index = indices[int(finite.to(torch.uint8).argmin())]
            first = index if first is None else min(first, index)
    return first
