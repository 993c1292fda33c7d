"""One step of the AdaGrad family over lists of tensors.

For each point p with gradient g, and optionally a second sequence x and a sum of squares S per entry:

    u = inverse g                               without S
    S = S + weight g^2                          with S
    u = g / (max(sqrt(S), floor) + eps)
    u = u + decay p
    p = p - point_step u
    x = x - x_step u                            with x
    p = (1 - mix) p + mix x
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headway.kernels import library

__all__ = ["adagrad_", "adagrad_reference_"]


def adagrad_(
    points: Sequence[Tensor],
    grads: Sequence[Tensor],
    xs: Sequence[Tensor] | None = None,
    sums: Sequence[Tensor] | None = None,
    inverses: Tensor | None = None,
    *,
    weight: float = 1.0,
    floor: float = 0.0,
    eps: float = 0.0,
    decay: float = 0.0,
    point_step: float = 0.0,
    x_step: float = 0.0,
    mix: float = 0.0,
) -> None:
    """The step above, in place on `points`, `xs` and `sums`; `grads` are only read.

    All tensors of one position have the same shape, device and dtype. Without `sums`, `inverses` holds a number per
    tensor, float64 (float32 on MPS), on their device: it may come from other tensors without the host waiting for it.

    >>> p = torch.ones(2)
    >>> adagrad_([p], [torch.tensor([3.0, -0.5])], sums=[torch.zeros(2)], point_step=0.5); p
    tensor([0.5000, 1.5000])
    """
    if sums is None and (inverses is None or inverses.shape != (len(points),)):
        raise ValueError(f"inverses must have shape ({len(points)},) without sums, got {inverses}")
    lists = [points, grads] + [own for own in (xs, sums) if own is not None]
    loaded = library.library()
    if loaded is None or not all(
        all(map(library.takes, tensors)) and library.dense_alike(*tensors) for tensors in zip(*lists, strict=True)
    ):
        adagrad_reference_(
            points,
            grads,
            xs,
            sums,
            inverses,
            weight=weight,
            floor=floor,
            eps=eps,
            decay=decay,
            point_step=point_step,
            x_step=x_step,
            mix=mix,
        )
        return
    own_inverses = None if inverses is None else inverses.contiguous()
    if not loaded.headway_adagrad(
        len(points),
        library.sizes(points),
        library.pointers(points),
        library.pointers(grads),
        None if xs is None else library.pointers(xs),
        None if sums is None else library.pointers(sums),
        None if own_inverses is None else own_inverses.data_ptr(),
        weight,
        floor,
        eps,
        decay,
        point_step,
        x_step,
        mix,
        torch.get_num_threads(),
    ):
        raise MemoryError("the native AdaGrad kernel could not allocate its list of chunks")
    torch.autograd.graph.increment_version([t for own in (points, xs, sums) if own is not None for t in own])


def adagrad_reference_(
    points: Sequence[Tensor],
    grads: Sequence[Tensor],
    xs: Sequence[Tensor] | None = None,
    sums: Sequence[Tensor] | None = None,
    inverses: Tensor | None = None,
    *,
    weight: float = 1.0,
    floor: float = 0.0,
    eps: float = 0.0,
    decay: float = 0.0,
    point_step: float = 0.0,
    x_step: float = 0.0,
    mix: float = 0.0,
) -> None:
    """`adagrad_` in `torch._foreach_*` operations."""
    points, grads = list(points), list(grads)
    if not points:
        return
    if sums is None:
        assert inverses is not None
        directions = torch._foreach_mul(grads, inverses.to(grads[0].dtype).unbind())
    else:
        torch._foreach_addcmul_(list(sums), grads, grads, value=weight)
        roots = torch._foreach_sqrt(list(sums))
        if floor:
            torch._foreach_clamp_min_(roots, floor)
        if eps:
            torch._foreach_add_(roots, eps)
        directions = torch._foreach_div(grads, roots)
    if decay:
        torch._foreach_add_(directions, points, alpha=decay)
    if point_step:
        torch._foreach_add_(points, directions, alpha=-point_step)
    if xs is not None:
        torch._foreach_add_(list(xs), directions, alpha=-x_step)
        torch._foreach_lerp_(points, list(xs), mix)
