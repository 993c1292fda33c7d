"""Curvature of a loss without a Hessian in memory: Hessian-vector products, Hutchinson's estimate of the diagonal.

    H v     = d<g, v> / dp,       g = dL/dp with its graph
    diag(H) = E[z * (H z)],       z = +-1 with probability 1/2

and, for small problems, the Hessian itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["gradients_with_graph", "hessian", "hessian_diagonal", "hvp", "rademacher"]


def gradients_with_graph(closure: Callable[[], Any], params: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss that `closure` returns, and its gradients, which can be differentiated again.

    A parameter that the loss does not depend on has the gradient zero. Works under `no_grad` as well.

    Raises:
        RuntimeError: the loss is no scalar, or has no graph.

    >>> x = torch.tensor([1.0, 3.0], requires_grad=True)
    >>> loss, grads = gradients_with_graph(lambda: x.pow(3).sum(), [x])
    >>> hvp(grads, [x], [torch.tensor([1.0, 0.0])])
    [tensor([6., 0.])]
    """
    params = list(params)
    with torch.enable_grad():
        loss = closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise RuntimeError("the closure must return a scalar loss that depends on the parameters, without backward")
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
    return loss, list(grads)


def hvp(
    grads: Sequence[Tensor], params: Sequence[Tensor], vector: Sequence[Tensor], *, retain_graph: bool = True
) -> list[Tensor]:
    """The Hessian-vector product H v as a list of tensors like `params`, by differentiating <g, v>.

    Gradients that are constants, because the loss is linear in their parameter, contribute nothing.

    Args:
        grads: the gradients of one loss with respect to `params`, made with `create_graph=True`.
        params: parameters.
        vector: v, a tensor per parameter, of its shape; cast to the gradients' dtype.
        retain_graph: keep the graph for another product. Default True; False frees it.

    Raises:
        RuntimeError: no gradient has a graph.

    >>> x = torch.tensor([2.0], requires_grad=True)
    >>> hvp([torch.tensor([4.0])], [x], [torch.ones(1)])
    Traceback (most recent call last):
    ...
    RuntimeError: the gradients have no graph to differentiate: make them with create_graph=True
    """
    with_graph = [index for index, g in enumerate(grads) if g.requires_grad]
    if not with_graph:
        raise RuntimeError("the gradients have no graph to differentiate: make them with create_graph=True")
    products = torch.autograd.grad(
        [grads[index] for index in with_graph],
        list(params),
        grad_outputs=[vector[index].to(grads[index].dtype) for index in with_graph],
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return list(products)


def hessian(closure: Callable[[], Any], params: Iterable[Tensor]) -> Tensor:
    """The Hessian (d, d) of the loss that `closure` returns, d the entries of `params`, flattened in their order.

    Symmetric to the bit, in the dtype and on the device of the first parameter. Cost: one evaluation and d + 1 gradient
    passes.

    >>> x = torch.tensor([1.0, 3.0], requires_grad=True)
    >>> hessian(lambda: x[0] ** 2 * x[1], [x])
    tensor([[6., 2.],
            [2., 0.]])
    """
    params = list(params)
    _, grads = gradients_with_graph(closure, params)
    like, size = params[0], sum(p.numel() for p in params)
    H = torch.zeros((size, size), dtype=like.dtype, device=like.device)
    row = 0
    for g in grads:
        unit = torch.zeros_like(g, memory_format=torch.contiguous_format).detach()
        for entry in range(g.numel() if g.requires_grad else 0):
            unit.view(-1)[entry] = 1
            products = torch.autograd.grad(
                g, params, unit, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            H[row + entry] = torch.cat([product.detach().reshape(-1).to(H) for product in products])
            unit.view(-1)[entry] = 0
        row += g.numel()
    return (H + H.T) / 2


def hessian_diagonal(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    probes: Iterable[Sequence[Tensor]],
) -> list[Tensor]:
    """Hutchinson's estimate of diag(H): the mean of z * (H z) over `probes`, as a list of tensors like `params`.

    With one probe, E = diag(H) and the variance of entry i is the sum over j != i of H_ij^2. The estimate is float32
    for 16-bit parameters; the products themselves have the precision of the graph. The graph is freed.

    Args:
        grads: the gradients of one loss with respect to `params`, made with `create_graph=True`.
        params: parameters.
        probes: for each sample, a z with a tensor of +-1 per parameter (`rademacher`).

    Raises:
        RuntimeError: no gradient has a graph.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> _, grads = gradients_with_graph(lambda: x.pow(3).sum(), [x])
    >>> hessian_diagonal(grads, [x], [[rademacher(x, torch.Generator().manual_seed(0))]])
    [tensor([ 6., 12.])]
    """
    samples = list(probes)
    total: list[Tensor] = []
    for number, z in enumerate(samples, start=1):
        products = hvp(grads, params, z, retain_graph=number < len(samples))
        wide = [product.to(torch.promote_types(product.dtype, torch.float32)) for product in products]
        estimate = torch._foreach_mul(wide, [sign.to(product) for sign, product in zip(z, wide, strict=True)])
        total = list(torch._foreach_add(total, estimate)) if total else list(estimate)
    return list(torch._foreach_div(total, len(samples)))


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of +-1 with probability 1/2 each, in the shape and dtype and on the device of `like`.

    Drawn on the generator's device, 64 signs a number: with a CPU generator the signs are the same on every device.

    >>> rademacher(torch.zeros(2, 3), torch.Generator().manual_seed(0)).abs().sum()
    tensor(6.)
    """
    words = torch.empty(-(-like.numel() // 64), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    octets = words.view(torch.uint8).to(like.device)
    bits = octets.unsqueeze(1).bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=like.device)) & 1  # [., 8]
    return (bits.reshape(-1)[: like.numel()].to(like.dtype) * 2 - 1).view(like.shape)
