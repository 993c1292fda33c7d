"""Gradients made orthogonal to their weights, tensor by tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from headway.kernels import library

__all__ = [
    "Projection",
    "orthogonal_projections",
    "orthogonal_projections_reference",
    "project_orthogonal_",
    "project_orthogonal_reference_",
]

_PARALLEL = 1e-6  # |g_perp| below this fraction of |g| is rounding noise


def project_orthogonal_(grads: Sequence[Tensor], weights: Sequence[Tensor], *, renormalize: bool) -> None:
    """Each g <- g - (w.g) / (w.w + 1e-30) w, in place, and back to the norm of g with `renormalize`.

    Where |g_perp| < 1e-6 |g| the result is zero: it would be rounding noise, blown up to full size.

    >>> g, w = torch.tensor([3.0, 4.0]), torch.tensor([2.0, 0.0])
    >>> project_orthogonal_([g], [w], renormalize=True); g
    tensor([0., 5.])
    """
    loaded = library.library()
    taken: list[tuple[Tensor, Tensor]] = []
    refused: list[tuple[Tensor, Tensor]] = []
    for pair in zip(grads, weights, strict=True):
        native = loaded is not None and all(library.takes(t) for t in pair) and library.dense_alike(*pair)
        (taken if native else refused).append(pair)
    if loaded is not None and taken:
        own_grads, own_weights = zip(*taken, strict=True)
        if not loaded.headway_project(
            len(taken),
            library.sizes(own_grads),
            library.pointers(own_grads),
            library.pointers(own_weights),
            renormalize,
            torch.get_num_threads(),
        ):
            raise MemoryError("the native projection could not allocate its sums")
        torch.autograd.graph.increment_version(own_grads)
    project_orthogonal_reference_([g for g, _ in refused], [w for _, w in refused], renormalize=renormalize)


def project_orthogonal_reference_(grads: Sequence[Tensor], weights: Sequence[Tensor], *, renormalize: bool) -> None:
    """The same in torch operations, in float64 (float32 on devices without it)."""
    for g, w in zip(grads, weights, strict=True):
        dtype = torch.float32 if g.device.type == "mps" else torch.float64
        wide, weight = g.to(dtype), w.to(dtype)
        along, scale = _projection(wide, weight, renormalize)
        g.copy_((wide - along * weight) * scale)


class Projection(ctypes.Structure):
    """How a gradient becomes orthogonal to its weight: g <- scale (g - along w), in float64 where `close`."""

    _fields_ = (("along", ctypes.c_double), ("scale", ctypes.c_double), ("close", ctypes.c_int))
    along: float
    scale: float
    close: int


def orthogonal_projections(
    grads: Sequence[Tensor], weights: Sequence[Tensor], *, renormalize: bool
) -> list[Projection]:
    """What `project_orthogonal_` would do to each gradient, for `adam_` to do: one pass that changes nothing.

    `along` is not finite where the gradient is not. The tensors are on the CPU.

    >>> (own,) = orthogonal_projections([torch.tensor([3.0, 4.0])], [torch.tensor([2.0, 0.0])], renormalize=False)
    >>> own.along, own.scale
    (1.5, 1.0)
    """
    loaded = library.library()
    pairs = zip(grads, weights, strict=True)
    if loaded is None or not all(library.takes(g) and library.takes(w) and library.dense_alike(g, w) for g, w in pairs):
        return orthogonal_projections_reference(grads, weights, renormalize=renormalize)
    projections = (Projection * len(grads))()
    if not loaded.headway_projections(
        len(grads),
        library.sizes(grads),
        library.pointers(grads),
        library.pointers(weights),
        projections,
        renormalize,
        torch.get_num_threads(),
    ):
        raise MemoryError("the native projection could not allocate its sums")
    return list(projections)


def orthogonal_projections_reference(
    grads: Sequence[Tensor], weights: Sequence[Tensor], *, renormalize: bool
) -> list[Projection]:
    """The same in torch operations, in float64."""
    numbers = [_projection(g.double(), w.double(), renormalize) for g, w in zip(grads, weights, strict=True)]
    return [Projection(float(along), float(scale), 1) for along, scale in numbers]


def _projection(g: Tensor, w: Tensor, renormalize: bool) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(g)
    along = (w * g).sum() / (w.square().sum() + 1e-30)
    length = torch.linalg.vector_norm(g - along * w)
    scale = norm / (length + 1e-30) if renormalize else torch.ones_like(length)
    return along, torch.where(length < _PARALLEL * norm, 0.0, scale)
