"""One step of the Adam family over lists of tensors: the shared core of the element-wise rules.

For each parameter p with gradient g, moments m and v, and optionally the previous gradient h:

    g = scale (g - along p)             projections; this g and the next one are left in the gradients
    g = clamp(g, -bound, bound)         bounds
    g = -g                              if maximize
    g = g + l2 p                        coupled decay
    g = sign(g) min(|g|, sqrt(spike v)) where v > 0 and spike > 0     (the old v)
    c = clamp(g, -clip, clip)           what enters the first moment
    m = beta1 m + (1 - beta1) c
    v = beta2 v + (1 - beta2) g^2
    xi = sigmoid(|h - g|); h = g        friction; 1 without h
    p = decay_before p
    p = p - step_size xi m / (root_scale sqrt(v) + eps)
    p = decay_after p

`torch.optim.AdamW` is step_size = lr / (1 - beta1^t), root_scale = 1 / sqrt(1 - beta2^t) and
decay_before = 1 - lr weight_decay.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from headway.kernels import library
from headway.kernels.project import Projection

__all__ = ["adam_", "adam_reference_"]

# Elements: a step's seven arrays of them stay in a shared cache of 8 MB, and threads have enough to share.
_PIECE = 2**18


def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step_sizes: Sequence[float],
    root_scales: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    decay_before: float = 1.0,
    decay_after: float = 1.0,
    l2: float = 0.0,
    spike: float = 0.0,
    clip: float | None = None,
    previous_grads: Sequence[Tensor] | None = None,
    projections: Sequence[Projection] | None = None,
    bounds: Sequence[float] | None = None,
    maximize: bool = False,
    native: bool | None = None,
) -> None:
    """The step above, in place on `params`, `exp_avgs`, `exp_avg_sqs` and `previous_grads`.

    `grads` are only read, but for `projections` and `bounds`, one per tensor (`along` 0 and `scale` 1: none).
    All tensors of one position have the same shape; moments and previous gradients are float32 where the parameter is
    16-bit. `step_sizes` and `root_scales` hold a number per tensor. `native` None: the kernel for
    tensors that it takes, the reference for all others; True: the kernel, or `RuntimeError` with the reason;
    False: the reference.
    """
    position_lists = [params, grads, exp_avgs, exp_avg_sqs] + ([] if previous_grads is None else [previous_grads])
    positions = list(zip(*position_lists, strict=True))
    refused = list(range(len(positions)))
    changing = projections is not None or bounds is not None
    if native is not False:
        loaded = library.library()
        taken: dict[torch.dtype, list[int]] = {torch.float32: [], torch.bfloat16: []}
        refused = []
        for index, tensors in enumerate(positions):
            if loaded is not None and _takes(*tensors) and (not changing or tensors[0].dtype == torch.float32):
                taken[tensors[0].dtype].append(index)
            elif native:
                reason = library.why_not() or f"tensor {index} is not what it takes (dtype, device or strides)"
                raise RuntimeError(f"the native Adam kernel cannot run: {reason}")
            else:
                refused.append(index)
        for dtype, indices in taken.items():
            if loaded is not None and indices:
                _run(
                    loaded,
                    [positions[index] for index in indices],
                    dtype,
                    [step_sizes[index] for index in indices],
                    [root_scales[index] for index in indices],
                    (beta1, beta2, eps, decay_before, decay_after, l2, spike, -1.0 if clip is None else clip),
                    maximize,
                    None if projections is None else [projections[index] for index in indices],
                    None if bounds is None else [bounds[index] for index in indices],
                )
    if not refused:
        return
    chosen = [[tensors[index] for index in refused] for tensors in position_lists]
    adam_reference_(
        *chosen[:4],
        step_sizes=[step_sizes[index] for index in refused],
        root_scales=[root_scales[index] for index in refused],
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        decay_before=decay_before,
        decay_after=decay_after,
        l2=l2,
        spike=spike,
        clip=clip,
        previous_grads=None if previous_grads is None else chosen[4],
        projections=None if projections is None else [projections[index] for index in refused],
        bounds=None if bounds is None else [bounds[index] for index in refused],
        maximize=maximize,
    )


def _takes(param: Tensor, grad: Tensor, *states: Tensor) -> bool:
    return (
        library.takes(param, (torch.float32, torch.bfloat16))
        and library.takes(grad, (param.dtype,))
        and all(library.takes(state) for state in states)
        and library.dense_alike(param, grad, *states)
    )


def _run(
    loaded: ctypes.CDLL,
    positions: Sequence[tuple[Tensor, ...]],
    dtype: torch.dtype,
    step_sizes: Sequence[float],
    root_scales: Sequence[float],
    numbers: tuple[float, ...],
    maximize: bool,
    projections: Sequence[Projection] | None,
    bounds: Sequence[float] | None,
) -> None:
    count, lists = len(positions), list(zip(*positions, strict=True))
    floats = ctypes.c_float * count
    done = loaded.headway_adam(
        count,
        library.sizes(lists[0]),
        dtype == torch.bfloat16,
        *[library.pointers(tensors) for tensors in lists],
        *([None] if len(lists) == 4 else []),
        floats(*step_sizes),
        floats(*root_scales),
        None if projections is None else (Projection * count)(*projections),
        None if bounds is None else floats(*bounds),
        *numbers,
        maximize,
        torch.get_num_threads(),
    )
    if not done:
        raise MemoryError("the native Adam kernel could not allocate its list of chunks")
    # As torch's own in-place operations do, so that autograd sees a saved tensor change.
    read_only = 1 if projections is None and bounds is None else None
    changed = [t for index, tensors in enumerate(lists) if index != read_only for t in tensors]
    torch.autograd.graph.increment_version(changed)


def adam_reference_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step_sizes: Sequence[float],
    root_scales: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    decay_before: float = 1.0,
    decay_after: float = 1.0,
    l2: float = 0.0,
    spike: float = 0.0,
    clip: float | None = None,
    previous_grads: Sequence[Tensor] | None = None,
    projections: Sequence[Projection] | None = None,
    bounds: Sequence[float] | None = None,
    maximize: bool = False,
) -> None:
    """`adam_` in `torch._foreach_*` operations, in the order of torch.optim.AdamW's own.

    On the CPU they go over pieces that stay in its cache: each of a dozen operations would fetch whole tensors again.
    """
    if projections is not None:
        for g, p, own in zip(grads, params, projections, strict=True):
            wide = torch.float64 if own.close else torch.float32
            g.copy_((g.to(wide) - own.along * p.to(wide)) * own.scale)
    if bounds is not None:
        for g, bound in zip(grads, bounds, strict=True):
            g.clamp_(-bound, bound)
    position_lists = [params, grads, exp_avgs, exp_avg_sqs] + ([] if previous_grads is None else [previous_grads])
    for indices, positions in _pieces(list(zip(*position_lists, strict=True))):
        _advance(
            *map(list, zip(*positions, strict=True)),
            step_sizes=[step_sizes[index] for index in indices],
            root_scales=[root_scales[index] for index in indices],
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            decay_before=decay_before,
            decay_after=decay_after,
            l2=l2,
            spike=spike,
            clip=clip,
            maximize=maximize,
        )


def _pieces(positions: list[tuple[Tensor, ...]]) -> Iterator[tuple[list[int], list[tuple[Tensor, ...]]]]:
    """Lists of `_PIECE` elements at most, cut out of the tensors, and the positions that they are from."""
    indices: list[int] = []
    pieces: list[tuple[Tensor, ...]] = []
    elements = 0
    for index, tensors in enumerate(positions):
        count, cut = tensors[0].numel(), [tensors]
        if count > _PIECE and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors):
            cut = list(zip(*(t.view(-1).split(_PIECE) for t in tensors), strict=True))
        for piece in cut:
            count = piece[0].numel() if piece[0].device.type == "cpu" else 0
            if pieces and elements + count > _PIECE:
                yield indices, pieces
                indices, pieces, elements = [], [], 0
            indices.append(index)
            pieces.append(piece)
            elements += count
    if pieces:
        yield indices, pieces


def _advance(
    weights: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    previous: list[Tensor] | None = None,
    *,
    step_sizes: list[float],
    root_scales: list[float],
    beta1: float,
    beta2: float,
    eps: float,
    decay_before: float,
    decay_after: float,
    l2: float,
    spike: float,
    clip: float | None,
    maximize: bool,
) -> None:
    points = [p if p.dtype == state.dtype else p.to(state.dtype) for p, state in zip(weights, m, strict=True)]
    grads = [g if g.dtype == state.dtype else g.to(state.dtype) for g, state in zip(grads, m, strict=True)]
    if maximize:
        grads = list(torch._foreach_neg(grads))
    if l2:
        grads = list(torch._foreach_add(grads, points, alpha=l2))
    if spike:
        limits = torch._foreach_mul(v, spike)
        torch._foreach_sqrt_(limits)
        grads = [
            torch.where(state > 0, g.clamp(-limit, limit), g) for g, limit, state in zip(grads, limits, v, strict=True)
        ]
    clipped = grads
    if clip is not None:
        clipped = list(torch._foreach_clamp_min(grads, -clip))
        torch._foreach_clamp_max_(clipped, clip)
    torch._foreach_lerp_(m, clipped, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
    if decay_before != 1:
        torch._foreach_mul_(points, decay_before)
    denominators = torch._foreach_sqrt(v)
    torch._foreach_mul_(denominators, root_scales)
    torch._foreach_add_(denominators, eps)
    numerators = m
    if previous is not None:
        # In place of the previous gradients, until they are the present ones.
        torch._foreach_sub_(previous, grads)
        torch._foreach_abs_(previous)
        torch._foreach_sigmoid_(previous)
        torch._foreach_mul_(previous, m)
        numerators = previous
    torch._foreach_addcdiv_(points, numerators, denominators, [-size for size in step_sizes])
    if previous is not None:
        torch._foreach_copy_(previous, grads)
    if decay_after != 1:
        torch._foreach_mul_(points, decay_after)
    for weight, point in zip(weights, points, strict=True):
        if weight is not point:
            weight.copy_(point)
