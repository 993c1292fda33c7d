"""Exact selection by magnitude over a list of tensors, and clamping to a magnitude."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from headway.kernels import library

__all__ = [
    "clamp_magnitude_",
    "clamp_magnitude_reference_",
    "kth_largest_magnitude",
    "kth_largest_magnitude_reference",
    "largest_magnitudes",
    "largest_magnitudes_reference",
]


def kth_largest_magnitude(tensors: Sequence[Tensor], k: int) -> float:
    """The k-th largest |x| over all elements of the tensors, k from 1; exact, ties counted one by one.

    The tensors are float32 or all float64. NaN counts as larger than infinity.

    Raises `ValueError` unless 1 <= k <= number of elements.

    >>> kth_largest_magnitude([torch.tensor([3.0, -1.0]), torch.tensor([-2.0])], 2)
    2.0
    """
    return largest_magnitudes(tensors, k)[0]


def largest_magnitudes(tensors: Sequence[Tensor], k: int) -> tuple[float, float]:
    """`kth_largest_magnitude`, and the largest magnitude: not finite if one of the elements is not.

    >>> largest_magnitudes([torch.tensor([3.0, -1.0]), torch.tensor([-2.0])], 2)
    (2.0, 3.0)
    """
    count = sum(t.numel() for t in tensors)
    if not 1 <= k <= count:
        raise ValueError(f"k must be in [1, {count}], got {k!r}")
    loaded = library.library()
    if loaded is None or not all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors):
        return largest_magnitudes_reference(tensors, k)
    dense = [t if library.takes(t) else t.detach().contiguous() for t in tensors]
    if not all(library.takes(t) for t in dense):
        return largest_magnitudes_reference(tensors, k)
    magnitudes = (ctypes.c_float * 2)()
    if not loaded.headway_kth_largest(
        len(dense),
        library.sizes(dense),
        library.pointers(dense),
        k,
        magnitudes,
        torch.get_num_threads(),
    ):
        raise MemoryError("the native selection could not allocate its sample")
    return magnitudes[0], magnitudes[1]


def largest_magnitudes_reference(tensors: Sequence[Tensor], k: int) -> tuple[float, float]:
    """The same by `kth_largest_magnitude_reference` and a maximum."""
    largest = torch.stack([t.detach().abs().amax() for t in tensors if t.numel()]).amax()
    return kth_largest_magnitude_reference(tensors, k), largest.item()


def kth_largest_magnitude_reference(
    tensors: Iterable[Tensor], k: int, reduce: Callable[[Tensor], object] | None = None
) -> float:
    """The same by radix selection on the bits of |x|, which sort like the numbers: 16 bits, then the other 15.

    `reduce` adds up a histogram over ranks, in place, where each rank has a part of the elements (float32 only).
    With it the tensors are iterated over twice, one in use at a time: they may be made as they are asked for.
    """
    if reduce is None and next(iter(tensors)).dtype == torch.float64:
        magnitudes = torch.cat([t.detach().abs().reshape(-1) for t in tensors])
        return magnitudes.kthvalue(magnitudes.numel() + 1 - k).values.item()

    def histogram(part: Callable[[Tensor], Tensor], bins: int) -> Tensor:
        counts: Tensor | None = None
        for t in tensors:
            more = torch.bincount(part(t.detach().abs().reshape(-1).view(torch.int32)), minlength=bins)
            counts = more if counts is None else counts.add_(more)
        assert counts is not None
        if reduce is not None:
            reduce(counts)
        return counts

    top, above = _bin_of(histogram(lambda bits: bits >> 15, 2**16), k)
    bottom, _ = _bin_of(histogram(lambda bits: (bits & 0x7FFF)[bits >> 15 == top], 2**15), k - above)
    return torch.tensor((top << 15) | bottom, dtype=torch.int32).view(torch.float32).item()


def _bin_of(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin of the k-th largest element, and the number of elements in the bins above it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    return counts.numel() - 1 - position, int(from_top[position - 1]) if position else 0


def clamp_magnitude_(tensors: Sequence[Tensor], bound: float) -> None:
    """Each x <- sign(x) min(|x|, bound), in place; NaN stays NaN.

    >>> x = torch.tensor([3.0, -2.0, 0.5])
    >>> clamp_magnitude_([x], 1.0); x
    tensor([ 1.0000, -1.0000,  0.5000])
    """
    loaded = library.library()
    taken = [t for t in tensors if loaded is not None and library.takes(t)]
    if loaded is not None and taken:
        count = len(taken)
        if not loaded.headway_clamp(
            count, library.sizes(taken), library.pointers(taken), bound, torch.get_num_threads()
        ):
            raise MemoryError("the native clamp could not allocate its list of chunks")
        torch.autograd.graph.increment_version(taken)
    clamp_magnitude_reference_([t for t in tensors if loaded is None or not library.takes(t)], bound)


def clamp_magnitude_reference_(tensors: Sequence[Tensor], bound: float) -> None:
    """The same in `torch._foreach_*` operations."""
    if tensors:
        torch._foreach_clamp_min_(list(tensors), -bound)
        torch._foreach_clamp_max_(list(tensors), bound)
