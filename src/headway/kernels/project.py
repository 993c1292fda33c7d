"""Gradients made orthogonal to their weights, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headway.kernels import library

__all__ = ["project_orthogonal_", "project_orthogonal_reference_"]

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
        norm = torch.linalg.vector_norm(wide)
        rest = wide - (weight * wide).sum() / (weight.square().sum() + 1e-30) * weight
        length = torch.linalg.vector_norm(rest)
        scale = norm / (length + 1e-30) if renormalize else torch.ones_like(length)
        g.copy_(rest * torch.where(length < _PARALLEL * norm, 0.0, scale))
