"""Products of the Hessian, or the Gauss-Newton matrix, of a mean loss over batches and ranks with flat vectors.

v -> H v,   H = mean over batches and ranks of d^2 loss / d params^2
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headway.numerics.curvature import gradients_with_graph, hvp

__all__ = ["Matvec", "hessian_matvec", "mean_over_ranks", "world_size"]

Matvec = Callable[[Tensor], Tensor]


def hessian_matvec(
    loss_fn: Callable[[Any], Any],
    params: Iterable[Tensor],
    batches: Iterable[Any],
    *,
    ggn: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Matvec:
    r"""The function v -> H v for the Hessian H of the mean of `loss_fn` over batches, here and now.

        H v = d<g, v> / dp,  g = dL/dp;     with `ggn`:  G v = J^T (d^2 L / dz^2) J v,  z the outputs, J = dz/dp

    The batches are evaluated once and their graphs kept, so every product is of the same operator, dropout masks
    included; memory is that of the graph of all the batches, and a product costs about two gradient steps. Change no
    parameter before the last product: autograd raises if that is done. Attention is evaluated by its mathematical
    definition meanwhile, since fused kernels have no second derivative.

    Batches count alike, whatever their size, and so do ranks: with torch.distributed the products are averaged over
    the ranks, in one buffer, and all ranks get the same bits. Call the module inside of DistributedDataParallel, or
    its `no_sync()`.

    Args:
        loss_fn: batch -> mean loss, a scalar; with `ggn`, batch -> (outputs, loss), one tensor and the loss of it.
        params: the parameters.
        batches: one batch or more; all are held.
        ggn: the generalised Gauss-Newton matrix, positive semi-definite where the loss is convex in the outputs.
            Default False.
        process_group: ranks to average over. Default None: all, if torch.distributed is initialised.

    Returns:
        A function of a vector with an entry per parameter entry, in the order of `params`; the result is in the
        parameters' dtype, float32 at least.

    Raises:
        ValueError: no batch, no parameter, or a parameter that is sharded or needs no gradient.
        RuntimeError: the loss is no scalar or does not depend on the parameters.

    >>> x = torch.tensor([1.0, 3.0], requires_grad=True)
    >>> matvec = hessian_matvec(lambda scale: scale * x[0] ** 2 * x[1], [x], [1.0, 3.0])
    >>> matvec(torch.tensor([1.0, 0.0]))
    tensor([12.,  4.])
    """
    params, batches = list(params), list(batches)
    if not batches:
        raise ValueError("batches must hold one batch at least, got none")
    if not params or not all(p.requires_grad for p in params):
        raise ValueError("params must hold one parameter at least, all with requires_grad")
    if any(hasattr(p, "placements") for p in params):
        raise ValueError("params must not be sharded (FSDP2, DTensor): the products are taken of whole parameters")
    sizes = [p.numel() for p in params]
    dtype = params[0].dtype
    for p in params:
        dtype = torch.promote_types(dtype, p.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    with _differentiable_twice():
        product = (_ggn_product if ggn else _hessian_product)(loss_fn, params, batches)

    def matvec(v: Tensor) -> Tensor:
        vector = [part.view(p.shape) for part, p in zip(v.to(dtype).split(sizes), params, strict=True)]
        return mean_over_ranks(torch.cat([part.reshape(-1).to(dtype) for part in product(vector)]), process_group)

    return matvec


def _hessian_product(
    loss_fn: Callable[[Any], Any], params: list[Tensor], batches: list[Any]
) -> Callable[[list[Tensor]], list[Tensor]]:
    def mean_loss() -> Any:
        losses = [loss_fn(batch) for batch in batches]
        return losses[0] if len(losses) == 1 else sum(losses[1:], losses[0]) / len(losses)

    _, grads = gradients_with_graph(mean_loss, params)
    return lambda vector: hvp(grads, params, vector)


def _ggn_product(
    loss_fn: Callable[[Any], Any], params: list[Tensor], batches: list[Any]
) -> Callable[[list[Tensor]], list[Tensor]]:
    parts = []
    with torch.enable_grad():
        for batch in batches:
            outputs, loss = loss_fn(batch)
            (slope,) = torch.autograd.grad(loss, outputs, create_graph=True)
            # J^T u is linear in u: differentiating <J^T u, v> by u gives the forward product J v.
            u = torch.zeros_like(outputs, requires_grad=True)
            pulled = torch.autograd.grad(
                outputs, params, u, create_graph=True, allow_unused=True, materialize_grads=True
            )
            parts.append((outputs, slope, u, pulled))

    def product(vector: list[Tensor]) -> list[Tensor]:
        total: list[Tensor] = []
        for outputs, slope, u, pulled in parts:
            (forward,) = hvp(pulled, [u], vector)
            (curved,) = hvp([slope], [outputs], [forward]) if slope.requires_grad else (torch.zeros_like(forward),)
            back = torch.autograd.grad(
                outputs, params, curved, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            total = list(torch._foreach_add(total, list(back))) if total else list(back)
        return list(torch._foreach_div(total, len(parts)))

    return product


@contextmanager
def _differentiable_twice() -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def mean_over_ranks(values: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    if world_size(process_group) > 1:
        dist.all_reduce(values, group=process_group)
        values /= dist.get_world_size(process_group)
    return values


def world_size(process_group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1
