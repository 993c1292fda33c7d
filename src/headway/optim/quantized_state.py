"""State of any optimizer in 8 bits: block-wise codes with a scale per block in place of a float32 tensor.

An optimizer with the keyword `state_bits` creates its state by `create`, takes it out by `read` and puts it back
by `write`; with 32 bits these are the tensor itself, and nothing changes. A quantised `name` is kept as
`state[name]` (uint8 codes in the tensor's shape) and `state[name + "_absmax"]` (float32, one per 256 elements).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from headway.constraints import OneOf
from headway.kernels.blockwise import blocks, dequantize_blockwise, quantize_blockwise

__all__ = ["BLOCK_SIZE", "MIN_SIZE", "SHARDED", "STATE_BITS", "batches", "create", "is_quantized", "read", "write"]

STATE_BITS = OneOf(32, 8)
BLOCK_SIZE = 256
MIN_SIZE = 4096  # smaller tensors stay in 32 bits, as in bitsandbytes: they hardly take memory
BATCH_ELEMENTS = 2**20
SHARDED = "blocks of 8-bit state belong to whole tensors; use state_bits=32"


def create(
    state: dict[str, Any],
    name: str,
    like: Tensor,
    bits: int = 32,
    *,
    signed: bool = True,
    block_size: int = BLOCK_SIZE,
    min_size: int = MIN_SIZE,
) -> None:
    """Zeros in the shape of `like`: codes if `bits` is 8 and there are `min_size` elements or more, else a tensor.

    >>> state = {}
    >>> create(state, "exp_avg", torch.zeros(64, 64), bits=8)
    >>> {name: (value.dtype, value.numel()) for name, value in state.items()}
    {'exp_avg': (torch.uint8, 4096), 'exp_avg_absmax': (torch.float32, 16)}
    """
    if bits == 8 and like.numel() >= min_size:
        zero = 127 if signed else 0
        state[name] = torch.full(like.shape, zero, dtype=torch.uint8, device=like.device)
        state[f"{name}_absmax"] = torch.zeros(blocks(like.numel(), block_size), dtype=torch.float32, device=like.device)
    else:
        wide = torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
        state[name] = torch.zeros_like(like, dtype=wide, memory_format=torch.preserve_format, requires_grad=False)


def is_quantized(state: dict[str, Any], name: str) -> bool:
    """Whether `name` is held in 8 bits."""
    return f"{name}_absmax" in state


def read(
    state: dict[str, Any],
    name: str,
    *,
    signed: bool = True,
    block_size: int = BLOCK_SIZE,
    like: Tensor | None = None,
) -> Tensor:
    """The state as numbers: the tensor itself, or the dequantised values in new memory.

    New memory is contiguous float32; with `like`, in its layout, and float64 where it is.
    """
    if not is_quantized(state, name):
        return state[name]
    dtype = torch.float64 if like is not None and like.dtype == torch.float64 else torch.float32
    value = dequantize_blockwise(state[name], state[f"{name}_absmax"], signed, block_size, dtype)
    if like is None or like.stride() == value.stride():
        return value
    return torch.empty_like(like, dtype=dtype, requires_grad=False).copy_(value)


def write(
    state: dict[str, Any], name: str, value: Tensor, *, signed: bool = True, block_size: int = BLOCK_SIZE
) -> None:
    """Put numbers back that `read` gave out and the step has changed in place.

    Zero stays zero, and of an unsigned state nothing else becomes zero (`quantize_blockwise`).

    >>> state = {}
    >>> create(state, "exp_avg", torch.zeros(4096), bits=8)
    >>> write(state, "exp_avg", read(state, "exp_avg").add_(0.5))
    >>> read(state, "exp_avg")[:2].tolist()
    [0.5, 0.5]
    """
    if is_quantized(state, name):
        state[name], state[f"{name}_absmax"] = quantize_blockwise(value, signed, block_size)
    else:
        state[name] = value


def batches(tensors: Iterable[Tensor], bits: int = 8) -> Iterator[list[Tensor]]:
    """The tensors in lists of at most 2^20 elements, or of one tensor: what is in float32 at a time. One if 32 bits.

    >>> [len(batch) for batch in batches([torch.zeros(2**19)] * 3)]
    [2, 1]
    """
    batch: list[Tensor] = []
    elements = 0
    for tensor in tensors:
        if batch and bits != 32 and elements + tensor.numel() > BATCH_ELEMENTS:
            yield batch
            batch, elements = [], 0
        batch.append(tensor)
        elements += tensor.numel()
    if batch:
        yield batch
