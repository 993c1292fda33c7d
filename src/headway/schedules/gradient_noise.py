"""How much per-sample gradients scatter: from the gradients themselves, their Gram matrix, or chunks' means.

With per-sample gradients g_i, i = 1 ... b, their mean g and unbiased variances over i, the quantities are

    sum_j Var(g_ij),   ||g||^2,   Var(<g_i, g>),   sum_j Var(r_ij),   max_j Var(g_ij) / g_j^2

where r_i = g_i - (<g_i, g> / ||g||^2) g, and the first is Var(<g_i, g>) / ||g||^2 + sum_j Var(r_ij).

Source: the statistics of the batch-size tests in arXiv 2402.11215; the decomposition and the pooling are our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch import distributed as dist

from headway.constraints import OneOf, Range, check_arguments

__all__ = ["TESTS", "NoiseStats", "chunk_stats", "gram_stats", "noise_stats", "per_sample_grads", "pool_noise_stats"]

Gradients: TypeAlias = "Tensor | Mapping[str, Tensor]"

# The batch-size tests that these numbers serve, see `headway.schedules.adadagrad`.
TESTS = OneOf("norm", "ip", "ip+orth", "coordinate")
# ||mean||^2 <= mean ||.||^2 holds exactly; norms measured in 16 bits may miss it by this factor, sums taken for
# means miss it by far more.
_JENSEN_SLACK = 1.1


class NoiseStats(NamedTuple):
    """How much the per-sample gradients g_i, i = 1 ... batch, scatter about their mean g.

    Variances are unbiased (divided by batch - 1); what was not measured is None.

    Args:
        batch: number of samples.
        var_l1: sum over the coordinates j of Var_i(g_ij).
        grad_sq: ||g||^2.
        var_ip: Var_i(<g_i, g>).
        var_orth: sum over j of Var_i(r_ij), where r_i is g_i without its part along g.
        var_coord_ratio: the largest Var_i(g_ij) / g_j^2 of all coordinates; infinite where only g_j is 0.
    """

    batch: int
    var_l1: float
    grad_sq: float
    var_ip: float | None = None
    var_orth: float | None = None
    var_coord_ratio: float | None = None


def noise_stats(
    per_sample_grads: Gradients,
    granularity: str = "global",
    *,
    coordinate_quantile: float = 1.0,
    coordinate_eps: float = 0.0,
) -> NoiseStats:
    """All statistics of one batch of per-sample gradients.

    16-bit gradients are computed with in float32.

    Args:
        per_sample_grads: a tensor (b, ...) or a mapping of parameter names to such, b >= 2.
        granularity: "global" (default): inner products over all parameters. "tensor": one projection per tensor,
            variances added, covariances between tensors lost, as in the authors' code.
        coordinate_quantile: in (0, 1]; which of the sorted Var(g_ij) / g_j^2 is `var_coord_ratio`. Default 1, the
            largest, as the test is stated. Less leaves out coordinates whose mean happens to be near 0.
        coordinate_eps: >= 0, added to g_j^2 in that ratio; makes it depend on the scale of the loss. Default 0.

    Raises:
        ValueError: one sample, tensors of different b, no tensor at all, or an option out of its range.

    Source: arXiv 2402.11215; the global inner products follow the paper, not the code.

    >>> noise_stats(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    NoiseStats(batch=2, var_l1=2.0, grad_sq=4.0, var_ip=8.0, var_orth=0.0, var_coord_ratio=0.5)
    """
    check_arguments({"granularity": OneOf("global", "tensor")}, granularity=granularity)
    _check_coordinate_options(coordinate_quantile, coordinate_eps)
    matrices = _matrices(per_sample_grads)
    batch = _require_two(len(matrices[0]))
    means, squares, products = [], [], []
    for matrix in matrices:
        mean, deviations = _centred(matrix)
        means.append(mean)
        squares.append(deviations.square().sum(0))
        products.append(_precise(deviations @ mean))  # <g_i, g> - ||g||^2, shape (b,)
    variances = torch.cat(squares) / (batch - 1)
    grad_sqs = torch.stack([_precise(mean.square().sum()) for mean in means])
    if granularity == "global":
        var_ips = torch.stack(products).sum(0).square().sum().unsqueeze(0) / (batch - 1)
        grad_sqs, var_l1s = grad_sqs.sum(0, keepdim=True), _precise(variances.sum()).unsqueeze(0)
    else:
        var_ips = torch.stack([product.square().sum() for product in products]) / (batch - 1)
        var_l1s = torch.stack([_precise(square.sum()) for square in squares]) / (batch - 1)
    var_orths = _orthogonal(var_l1s, var_ips, grad_sqs)
    ratio = _coordinate_ratio(variances, torch.cat(means), coordinate_quantile, coordinate_eps)
    totals = torch.stack([var_l1s.sum(), grad_sqs.sum(), var_ips.sum(), var_orths.sum(), ratio]).tolist()
    return NoiseStats(batch, *totals)


def gram_stats(gram: Tensor) -> NoiseStats:
    """The statistics from the Gram matrix of per-sample gradients, all but `var_coord_ratio`.

    Args:
        gram: <g_i, g_k>, shape (b, b), b >= 2.

    Raises:
        ValueError: a matrix that is not square, or one sample.

    >>> G = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    >>> gram_stats(G @ G.T)
    NoiseStats(batch=2, var_l1=2.0, grad_sq=4.0, var_ip=8.0, var_orth=0.0, var_coord_ratio=None)
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must be a square matrix, got shape {tuple(gram.shape)}")
    batch = _require_two(len(gram))
    gram = _precise(gram)
    products = gram.mean(1)  # <g_i, g>
    grad_sq = products.mean().clamp_min(0)
    var_l1 = ((gram.diagonal() - 2 * products + grad_sq).sum() / (batch - 1)).clamp_min(0)
    var_ip = products.var()
    numbers = torch.stack([var_l1, grad_sq, var_ip, _orthogonal(var_l1, var_ip, grad_sq)]).tolist()
    return NoiseStats(batch, *numbers)


def chunk_stats(chunk_sq_norms: Sequence[float], mean_sq_norm: float, chunk_size: int) -> NoiseStats:
    """Statistics for the norm test without per-sample gradients: from the mean gradients g_j of k equal chunks.

        var_l1 = m k / (k - 1) (mean_j ||g_j||^2 - ||mean_j g_j||^2),   unbiased for sum_j Var(g_ij)

    The chunks are the micro-batches that are accumulated anyway, or what the ranks hold before they average. The
    estimate scatters like a variance of k numbers: with few chunks a wide `test_interval` is no loss.

    Args:
        chunk_sq_norms: ||g_j||^2 of each chunk's mean gradient, k >= 2 numbers.
        mean_sq_norm: ||mean_j g_j||^2, of the step's gradient before clipping.
        chunk_size: m >= 1, samples per chunk.

    Raises:
        ValueError: fewer than two chunks, or norms that do not belong together (as of a sum, not a mean).

    >>> chunk_stats([1.0, 3.0], mean_sq_norm=1.5, chunk_size=4)
    NoiseStats(batch=8, var_l1=4.0, grad_sq=1.5, var_ip=None, var_orth=None, var_coord_ratio=None)
    """
    check_arguments({"chunk_size": Range(low=1, integer=True)}, chunk_size=chunk_size)
    chunks = len(chunk_sq_norms)
    if chunks < 2:
        raise ValueError(f"chunk_sq_norms must hold the norms of at least two chunks, got {chunks}")
    mean = math.fsum(chunk_sq_norms) / chunks
    if mean_sq_norm > _JENSEN_SLACK * mean:
        raise ValueError(
            f"mean_sq_norm must be the squared norm of the chunks' mean gradient, at most the mean of "
            f"chunk_sq_norms = {mean:g}, got {mean_sq_norm:g}"
        )
    # max() would drop a NaN, which is for the controller to see.
    between = mean - mean_sq_norm
    variance = 0.0 if between < 0 else chunk_size * chunks / (chunks - 1) * between
    return NoiseStats(chunks * chunk_size, variance, float(mean_sq_norm))


@torch.no_grad()
def pool_noise_stats(
    chunks: Sequence[Gradients],
    test: str = "norm",
    *,
    process_group: dist.ProcessGroup | None = None,
    coordinate_quantile: float = 1.0,
    coordinate_eps: float = 0.0,
) -> NoiseStats:
    """What `noise_stats` gives for the whole batch, from its chunks over micro-batches and ranks, exactly.

    Chunks of a rank are merged by their counts, means and sums of squared deviations; one all-reduce adds up

        n,  n_r m_r,  M_r,  n_r m_r^2,      M = sum_r M_r + sum_r n_r m_r^2 - n g^2,  g = sum_r n_r m_r / n

    (squares summed over coordinates unless the test is "coordinate"). <g_i, g> can only be formed when g is known,
    so the inner-product tests go through the chunks a second time and add one number over the ranks.

    Args:
        chunks: per-sample gradients of this rank's micro-batches, each as for `noise_stats` but of any b >= 1; at
            least one chunk on every rank.
        test: the test to be served; what it does not read is None. Default "norm".
        process_group: ranks to pool over, all of which must call this. Default None: all of them, if
            torch.distributed is initialised.
        coordinate_quantile: as for `noise_stats`.
        coordinate_eps: as for `noise_stats`.

    Raises:
        ValueError: no chunk, fewer than two samples in all, or an option out of its range.

    Source: the authors' code takes the mean of the chunks' variances plus the variance of their means, which
    over-estimates (1.50 for 1.03 on six samples in three chunks); this does not.

    >>> G = torch.tensor([[1.0], [3.0], [5.0]])
    >>> pool_noise_stats([G[:1], G[1:]]).var_l1 == noise_stats(G).var_l1 == 4.0
    True
    """
    check_arguments({"test": TESTS}, test=test)
    _check_coordinate_options(coordinate_quantile, coordinate_eps)
    if not chunks:
        raise ValueError("chunks must hold at least one chunk of gradients, got none")
    count, mean, deviations = _moments(_matrices(chunks[0]))
    for chunk in chunks[1:]:
        size, chunk_mean, chunk_deviations = _moments(_matrices(chunk))
        step = chunk_mean - mean
        deviations = deviations + chunk_deviations + step.square() * (count * size / (count + size))
        mean = mean + step * (size / (count + size))
        count += size
    within, between = deviations, count * mean.square()
    if test != "coordinate":
        within, between = within.sum().reshape(1), between.sum().reshape(1)
    buffer = torch.cat([mean.new_tensor([count]), count * mean, within, between])
    pooled = _all_reduce(buffer, process_group)
    batch = _require_two(round(float(pooled[0])))
    if batch > count:
        mean = pooled[1 : 1 + len(mean)] / batch
        within, between = pooled[1 + len(mean) :].chunk(2)
        centre = mean.square() if test == "coordinate" else mean.square().sum()
        within = (within + between - batch * centre).clamp_min(0)
    variances, grad_sq = within / (batch - 1), _precise(mean.square().sum())
    var_l1 = _precise(variances.sum())
    if test == "coordinate":
        ratio = _coordinate_ratio(variances, mean, coordinate_quantile, coordinate_eps)
        return NoiseStats(batch, float(var_l1), float(grad_sq), var_coord_ratio=float(ratio))
    if test == "norm":
        return NoiseStats(batch, float(var_l1), float(grad_sq))
    squares = torch.stack([_squared_products(_matrices(chunk), mean) for chunk in chunks]).sum()
    var_ip = _all_reduce(squares.reshape(1), process_group)[0] / (batch - 1)
    var_orth = _orthogonal(var_l1, var_ip, grad_sq)
    return NoiseStats(batch, float(var_l1), float(grad_sq), float(var_ip), float(var_orth))


def per_sample_grads(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batch: tuple[Tensor, Tensor],
    *,
    randomness: Literal["error", "different", "same"] = "error",
    chunk_size: int | None = None,
) -> dict[str, Tensor]:
    """The gradient of each sample's loss, by `torch.func`: name -> (b, *shape), for parameters that require one.

    Args:
        model: maps inputs (b, ...) to outputs; left as it is.
        loss_fn: `loss_fn(outputs, targets)`, the mean loss, called on batches of one.
        batch: inputs (b, ...) and targets (b, ...).
        randomness: what dropout does in training mode: "error" (default) refuses, "different" draws a mask per
            sample as training does, "same" one for all. Masks count as gradient noise.
        chunk_size: samples at once, to bound memory. Default None: all.

    Raises:
        ValueError: batch normalisation in training mode, which ties the samples together.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> inputs, targets = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    >>> per_sample_grads(model, lambda outputs, targets: outputs.sum(), (inputs, targets))["weight"].flatten().tolist()
    [1.0, 2.0]
    """
    from torch.func import functional_call, grad, vmap

    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(f"model must not normalise over the batch in training mode, got {name}: {module}")
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(functional_call(model, values, (x.unsqueeze(0),)), y.unsqueeze(0))

    each = vmap(grad(loss), in_dims=(None, 0, 0), randomness=randomness, chunk_size=chunk_size)
    return each(parameters, *batch)


def _matrices(gradients: Gradients) -> list[Tensor]:
    """One (b, coordinates) matrix per tensor, in float32 at least."""
    tensors = [gradients] if isinstance(gradients, Tensor) else list(gradients.values())
    if not tensors:
        raise ValueError("per_sample_grads must hold at least one tensor, got none")
    sizes = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"per_sample_grads must all have the samples in front, got {sorted(sizes)} samples")
    return [_wide(tensor.detach()).reshape(len(tensor), -1) for tensor in tensors]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _precise(tensor: Tensor) -> Tensor:
    """In float64, where the device has it: products of small gradients underflow in float32."""
    return tensor if tensor.device.type == "mps" else tensor.double()


def _centred(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over samples (d,) and the deviations from it (b, d); exactly 0 where all samples are equal."""
    deviations = matrix - matrix[:1]
    shift = deviations.mean(0)
    return matrix[0] + shift, deviations.sub_(shift)


def _moments(matrices: Sequence[Tensor]) -> tuple[int, Tensor, Tensor]:
    """Count, mean and sums of squared deviations of all coordinates (d,)."""
    means, squares = [], []
    for matrix in matrices:
        mean, deviations = _centred(matrix)
        means.append(mean)
        squares.append(deviations.square().sum(0))
    return len(matrices[0]), torch.cat(means), torch.cat(squares)


def _squared_products(matrices: Sequence[Tensor], mean: Tensor) -> Tensor:
    """sum_i <g_i - g, g>^2 of a chunk."""
    parts = mean.split([matrix.shape[1] for matrix in matrices])
    products = [_precise((matrix - part) @ part) for matrix, part in zip(matrices, parts, strict=True)]
    return torch.stack(products).sum(0).square().sum()


def _orthogonal(var_l1: Tensor, var_ip: Tensor, grad_sq: Tensor) -> Tensor:
    """var_orth by the decomposition; where g is 0, there is nothing to project on."""
    along = torch.where(grad_sq > 0, var_ip / grad_sq, 0.0)
    return (var_l1 - along).clamp_min(0)


def _coordinate_ratio(variances: Tensor, means: Tensor, quantile: float, eps: float) -> Tensor:
    ratios = torch.where(variances == 0, 0.0, variances / (means.square() + eps))
    rank = max(1, math.ceil(quantile * len(ratios)))
    return _precise(ratios.kthvalue(rank).values)


def _check_coordinate_options(quantile: float, eps: float) -> None:
    check_arguments(
        {"coordinate_quantile": Range(low=0, high=1, low_open=True), "coordinate_eps": Range(low=0)},
        coordinate_quantile=quantile,
        coordinate_eps=eps,
    )


def _require_two(batch: int) -> int:
    if batch < 2:
        raise ValueError(f"a variance needs at least two samples, got {batch}")
    return batch


def _all_reduce(buffer: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    if process_group is not None or (dist.is_available() and dist.is_initialized()):
        dist.all_reduce(buffer, group=process_group)
    return buffer
