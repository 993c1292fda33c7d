"""Block-wise 8-bit quantisation with the dynamic tree map, and the step of the Adam family on 8-bit moments.

A tensor is cut into blocks of B consecutive elements (the last one short). A block stores its largest
magnitude, absmax, in float32, and for each element the code of the map's value nearest to x / absmax.

Source: Dettmers, Lewis, Shleifer, Zettlemoyer, arXiv 2110.02861.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from headway.kernels import library
from headway.kernels.adam import adam_reference_

__all__ = [
    "adam8_",
    "adam8_reference_",
    "create_dynamic_map",
    "dequantize_blockwise",
    "dequantize_blockwise_reference",
    "quantize_blockwise",
    "quantize_blockwise_reference",
]

# Elements of whole blocks that are in float32 at a time.
_CHUNK = 2**20
# Longest block of the native step, BLOCK_LIMIT in native/headway.h: moments stay in the first-level cache.
_NATIVE_BLOCK = 2**12


@functools.cache
def create_dynamic_map(signed: bool = True) -> Tensor:
    """The 256 values of the dynamic tree map, ascending, float32.

    For i = 0 ... 6 with n = 2^i values (signed) or 2^(i+1) (unsigned): 10^(i-6) times the means of neighbours in
    linspace(0.1, 1, n + 1), and their negatives when signed; and 0 and 1. Seven decades within one block; the signed
    map has no -1. The tensor is shared: do not change it.

    >>> signed, unsigned = create_dynamic_map(), create_dynamic_map(signed=False)
    >>> len(signed), signed[127].item(), signed[0].item(), signed[255].item()
    (256, 0.0, -0.992968738079071, 1.0)
    >>> unsigned[0].item(), round(unsigned[1].item(), 9)
    (0.0, 3.25e-07)
    """
    values = [0.0, 1.0]
    for i in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float64, device="cpu")
        means = (10.0 ** (i - 6) * (bounds[:-1] + bounds[1:]) / 2).tolist()
        values += means + ([-mean for mean in means] if signed else [])
    # The first call may come under a default device; the cached map is for all later ones.
    return torch.tensor(sorted(values), dtype=torch.float64, device="cpu").float()


@functools.cache
def _midpoints(signed: bool) -> Tensor:
    """Between neighbours of the map: at or below a midpoint the lower code is nearest."""
    values = create_dynamic_map(signed)
    return (values[1:] + values[:-1]) / 2


def blocks(count: int, block_size: int) -> int:
    """The number of blocks of `count` elements."""
    return -(-count // block_size)


def quantize_blockwise(x: Tensor, signed: bool = True, block_size: int = 256) -> tuple[Tensor, Tensor]:
    """Codes and scales of a tensor.

        absmax_k = max |x| over block k;  code = nearest map value to x / absmax_k, a tie to the lower code

    An element that is 0 gets the code of 0, also in a block of zeros (absmax 0). With the unsigned map no other element
    does: what is nearer to 0 than to the smallest value gets that value. A second moment that became 0 beside a first
    one that did not would make steps of m / eps.

    Args:
        x: floating-point, any shape; elements are counted in the order of `x.reshape(-1)`.
        signed: the signed map; the unsigned one is for values >= 0 and twice as fine.
        block_size: elements of a block, >= 1. Default 256 (bitsandbytes; the paper has 2048).

    Returns:
        codes, uint8 in the shape of x, and absmax, float32 (ceil(n / block_size),).

    Raises:
        ValueError: `x` is not floating-point; block_size < 1.

    >>> codes, absmax = quantize_blockwise(torch.tensor([0.0, 2.0, -1.0]))
    >>> absmax.tolist(), dequantize_blockwise(codes, absmax).tolist()
    ([2.0], [0.0, 2.0, -1.001562476158142])
    """
    _check(x, block_size)
    flat = x.detach().reshape(-1).float()
    loaded = _library()
    if loaded is None or not library.takes(flat):
        return quantize_blockwise_reference(x, signed, block_size)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(blocks(flat.numel(), block_size), dtype=torch.float32, device=x.device)
    _code(loaded, False, signed, block_size, flat, codes, absmax)
    return codes, absmax


@functools.cache
def _set_maps(loaded: ctypes.CDLL) -> bool:
    """Give the library both maps; False if it cannot work with them."""
    unsigned_midpoints = _midpoints(False).clone()
    unsigned_midpoints[0] = 0  # so that 0 alone gets the code of 0
    midpoints = {False: unsigned_midpoints, True: _midpoints(True)}
    return all(
        loaded.headway_set_map(signed, create_dynamic_map(signed).data_ptr(), midpoints[signed].data_ptr())
        for signed in (False, True)
    )


def _library() -> ctypes.CDLL | None:
    loaded = library.library()
    return loaded if loaded is not None and _set_maps(loaded) else None


def _code(
    loaded: ctypes.CDLL, backward: bool, signed: bool, block_size: int, flat: Tensor, codes: Tensor, absmax: Tensor
) -> None:
    addresses = [flat.data_ptr(), codes.data_ptr(), absmax.data_ptr()]
    if not loaded.headway_code(backward, signed, flat.numel(), block_size, *addresses, torch.get_num_threads()):
        raise MemoryError("the native quantisation could not allocate its list of chunks")


def _check(x: Tensor, block_size: int) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be floating-point, got {x.dtype}")
    if block_size < 1:
        raise ValueError(f"block_size must be a whole number >= 1, got {block_size!r}")


def _check_scales(codes: Tensor, absmax: Tensor, block_size: int) -> None:
    if absmax.numel() != blocks(codes.numel(), block_size):
        raise ValueError(f"absmax must have {blocks(codes.numel(), block_size)} scales, got {absmax.numel()}")


def quantize_blockwise_reference(x: Tensor, signed: bool = True, block_size: int = 256) -> tuple[Tensor, Tensor]:
    """The same in torch operations."""
    flat = x.detach().reshape(-1).float()
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(blocks(flat.numel(), block_size), dtype=torch.float32, device=x.device)
    midpoints = _midpoints(signed).to(x.device)
    stride = max(1, _CHUNK // block_size) * block_size
    for start in range(0, flat.numel(), stride):
        part = flat[start : start + stride]
        count = blocks(part.numel(), block_size)
        padded = torch.nn.functional.pad(part, (0, count * block_size - part.numel())).view(count, block_size)
        largest = padded.abs().amax(1)
        absmax[start // block_size : start // block_size + count] = largest
        z = padded / largest.masked_fill(largest == 0, 1).unsqueeze(1)
        nearest = torch.bucketize(z, midpoints).to(torch.uint8)
        if not signed:
            nearest.masked_fill_((nearest == 0) & (z > 0), 1)
        codes[start : start + stride] = nearest.view(-1)[: part.numel()]
    return codes.view(x.shape), absmax


def dequantize_blockwise(
    codes: Tensor,
    absmax: Tensor,
    signed: bool = True,
    block_size: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The tensor map[code] * absmax of its block, in the shape of `codes`.

    Raises:
        TypeError: codes are not uint8.
        ValueError: block_size < 1, or absmax of another length than there are blocks.

    >>> dequantize_blockwise(torch.tensor([127, 255], dtype=torch.uint8), torch.tensor([3.0])).tolist()
    [0.0, 3.0]
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be uint8, got {codes.dtype}")
    if block_size < 1:
        raise ValueError(f"block_size must be a whole number >= 1, got {block_size!r}")
    _check_scales(codes, absmax, block_size)
    loaded = _library()
    if (
        loaded is None
        or not (codes.is_contiguous() and library.takes(codes, (torch.uint8,)))
        or not (absmax.is_contiguous() and library.takes(absmax))
    ):
        return dequantize_blockwise_reference(codes, absmax, signed, block_size, dtype)
    values = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    _code(loaded, True, signed, block_size, values, codes, absmax)
    return values.to(dtype)


def dequantize_blockwise_reference(
    codes: Tensor,
    absmax: Tensor,
    signed: bool = True,
    block_size: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The same in torch operations."""
    values = create_dynamic_map(signed).to(codes.device)[codes.reshape(-1).int()]
    scales = absmax.repeat_interleave(block_size)[: values.numel()]
    return values.mul_(scales).to(dtype).view(codes.shape)


def adam8_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    codes1: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    codes2: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    *,
    step_sizes: Sequence[float],
    root_scales: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    decay_before: float = 1.0,
    decay_after: float = 1.0,
    l2: float = 0.0,
    maximize: bool = False,
    block_size: int = 256,
    native: bool | None = None,
) -> None:
    """`headway.kernels.adam.adam_` on 8-bit moments, in place on `params`, codes and scales.

    The parameters move by the fresh float32 moments; what is stored of them is quantised: m with the signed map, v with
    the unsigned one. `codes1` and `codes2` are uint8 (n,), in the order of `p.reshape(-1)`; `absmax1` and `absmax2`
    float32 (ceil(n / block_size),). `native` as in `adam_`. Scales of another number raise `ValueError`.
    """
    lists = (params, grads, codes1, absmax1, codes2, absmax2)
    positions = list(zip(*lists, step_sizes, root_scales, strict=True))
    for _, _, q1, a1, q2, a2, _, _ in positions:
        _check_scales(q1, a1, block_size)
        _check_scales(q2, a2, block_size)
    refused = list(range(len(positions)))
    if native is not False:
        loaded = _library()
        taken: dict[torch.dtype, list[int]] = {torch.float32: [], torch.bfloat16: []}
        refused = []
        for index, position in enumerate(positions):
            if loaded is not None and block_size <= _NATIVE_BLOCK and _takes(*position[:6]):
                taken[position[0].dtype].append(index)
            elif native:
                reason = library.why_not() or f"tensor {index} is not what it takes (dtype, device, strides or blocks)"
                raise RuntimeError(f"the native 8-bit Adam kernel cannot run: {reason}")
            else:
                refused.append(index)
        for dtype, indices in taken.items():
            if loaded is not None and indices:
                chosen = [positions[index] for index in indices]
                numbers = (beta1, beta2, eps, decay_before, decay_after, l2)
                _run_adam8(loaded, chosen, dtype, block_size, numbers, maximize)
    if refused:
        left = list(zip(*[positions[index] for index in refused], strict=True))
        adam8_reference_(
            *left[:6],
            step_sizes=left[6],
            root_scales=left[7],
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            decay_before=decay_before,
            decay_after=decay_after,
            l2=l2,
            maximize=maximize,
            block_size=block_size,
        )


def _takes(p: Tensor, g: Tensor, codes1: Tensor, absmax1: Tensor, codes2: Tensor, absmax2: Tensor) -> bool:
    return (
        library.takes(p, (torch.float32, torch.bfloat16))
        and library.takes(g, (p.dtype,))
        and all(library.takes(codes, (torch.uint8,)) for codes in (codes1, codes2))
        and all(library.takes(absmax) for absmax in (absmax1, absmax2))
        and all(t.is_contiguous() for t in (p, g, codes1, absmax1, codes2, absmax2))
        and p.numel() == g.numel() == codes1.numel() == codes2.numel()
    )


def _run_adam8(
    loaded: ctypes.CDLL,
    positions: Sequence[tuple],
    dtype: torch.dtype,
    block_size: int,
    numbers: tuple[float, ...],
    maximize: bool,
) -> None:
    lists = list(zip(*positions, strict=True))
    floats = ctypes.c_float * len(positions)
    done = loaded.headway_adam8(
        len(positions),
        library.sizes(lists[0]),
        dtype == torch.bfloat16,
        block_size,
        *[library.pointers(tensors) for tensors in lists[:6]],
        floats(*lists[6]),
        floats(*lists[7]),
        *numbers,
        maximize,
        torch.get_num_threads(),
    )
    if not done:
        raise MemoryError("the native 8-bit Adam kernel could not allocate its list of chunks")
    torch.autograd.graph.increment_version([t for index in (0, 2, 3, 4, 5) for t in lists[index]])


def adam8_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    codes1: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    codes2: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    *,
    step_sizes: Sequence[float],
    root_scales: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    decay_before: float = 1.0,
    decay_after: float = 1.0,
    l2: float = 0.0,
    maximize: bool = False,
    block_size: int = 256,
) -> None:
    """The same by `adam_reference_` on chunks of whole blocks, so that no float32 copy of a whole state exists."""
    stride = max(1, _CHUNK // block_size) * block_size
    lists = zip(params, grads, codes1, absmax1, codes2, absmax2, step_sizes, root_scales, strict=True)
    for p, g, q1, a1, q2, a2, step_size, root_scale in lists:
        flat, flat_grad = p.reshape(-1), g.reshape(-1)
        for start in range(0, flat.numel(), stride):
            part = slice(start, start + stride)
            scales = slice(start // block_size, start // block_size + stride // block_size)
            m = dequantize_blockwise_reference(q1[part], a1[scales], True, block_size)
            v = dequantize_blockwise_reference(q2[part], a2[scales], False, block_size)
            adam_reference_(
                [flat[part]],
                [flat_grad[part]],
                [m],
                [v],
                step_sizes=[step_size],
                root_scales=[root_scale],
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                decay_before=decay_before,
                decay_after=decay_after,
                l2=l2,
                maximize=maximize,
            )
            q1[part], a1[scales] = quantize_blockwise_reference(m, True, block_size)
            q2[part], a2[scales] = quantize_blockwise_reference(v, False, block_size)
        if flat.data_ptr() != p.data_ptr():  # not contiguous: reshape has made a copy
            p.copy_(flat.view(p.shape))
