"""ADAHESSIAN: Adam that divides by the root mean square of the Hessian's diagonal, not of the gradient.

    D = z * (H z),   z = +-1        m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) D^2
    p = p - lr (m' / (sqrt(v')^k + eps) + weight_decay p)

so that the step has the units of p, as Newton's has. Source: Yao et al., AAAI 2021, arXiv 2006.00719.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.numerics.curvature import hessian_diagonal, rademacher
from headway.optim.checks import refuse_complex, refuse_sharded, require_finite
from headway.optim.state import ExactStateOptimizer
from headway.optim.subspace import seeded_generator

__all__ = ["AdaHessian", "block_average"]

Block = int | tuple[int, ...]


@dataclass(frozen=True)
class _Blocks:
    """Accepted values of `block`; a list, one entry per parameter, is what a function becomes in a group."""

    def accepts(self, value: Any) -> bool:
        if isinstance(value, str):
            return value in ("none", "auto", "row")
        return callable(value) or isinstance(value, list) or _is_size(value)

    def describe(self) -> str:
        return "'none', 'auto', 'row', a whole number >= 1 or a function of a shape"

    def outside(self) -> list[Any]:
        return ["no-such-value", 0, -1, 1.5]


# One probe and one count of the steps serve all groups.
_COMMON = ("n_samples", "update_each", "seed")


class AdaHessian(ExactStateOptimizer):
    """Adam on the diagonal of the Hessian, estimated with one more backward pass.

    At step t = 1, 2, ... of a parameter p with gradient g, from m = v = 0::

        D = mean over n_samples of z * (H z)        z = +-1 with probability 1/2, one vector for all parameters
        D = mean of |D| over each block             block_reduce="signed": |mean of D|
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) D^2
        h = (v / (1 - beta2^t))^(hessian_power / 2)
        p = p - lr (m / (1 - beta1^t) / (h + eps) + weight_decay p)

    For eps = 0 and hessian_power = 1 scaling the loss changes nothing, and scaling a parameter scales its steps. Use it
    where parameters have very different curvature. It is driven in one of two ways:

    - `loss.backward(create_graph=True)`, then `step()`. The graph hangs on `p.grad` until `step` detaches it; keep
      `zero_grad(set_to_none=True)`, the default. A gradient that was clipped in place keeps the curvature of the loss.
    - `step(closure)`, where the closure returns the loss **without** backward. `.grad` is neither read nor
      written. Preferred: no graph outlives the step.

    H z differentiates through the backward pass: fused attention kernels, reentrant checkpointing and compiled graphs
    do not allow it. With a GradScaler D would grow with the scale. Piecewise linear networks have no curvature but that
    of the loss; where D is 0, the step is lr m / eps. Batch normalisation in training mode is differentiated too.

    Data parallel: where torch.distributed is initialised, g and D are averaged over the ranks, in one buffer, before
    blocks are formed. The probe is the same on all ranks, so this is exactly the D of the whole batch. Make
    local gradients: `step(closure)` or backward under DDP's `no_sync()`. The same parameters must have gradients on
    every rank.

    Args:
        params: parameters or parameter groups. All arguments but `n_samples`, `update_each`, `generator` and
            `process_group` may differ by group.
        lr: factor on the Newton-like step, >= 0; 1 is a full diagonal Newton step. Default 0.15 (official code).
        betas: decay of m and v, each in [0, 1). Default (0.9, 0.999) (official code).
        eps: added to h, >= 0; bounds the step where curvature vanishes. Default 1e-4 (official code; 1e-8 for fairseq).
        weight_decay: decoupled, >= 0, in units of lr. Default 0. The authors' script divides its L2 factor by lr.
        hessian_power: k in [0, 1]. Default 1; 0 is momentum descent, the authors suggest 0.5 for some tasks.
        block: over what |D| is averaged. `auto` (default): over the positions of a convolution's kernel. `none`: over
            nothing. `row`: as `auto`, and over the rows of matrices. A number b: over b consecutive entries of the
            flattened tensor; b must divide each of the group's tensors. A function of a tensor's shape that returns
            such a number or a tuple of dimensions.
        block_reduce: `abs` (default, official code) or `signed` (the paper), which can vanish where curvature changes
            its sign within a block.
        n_samples: probes per estimate, >= 1. Default 1. They are averaged with their sign.
        update_each: a new D every so many steps, >= 1; the last one is used in between. Default 1.
        generator: source of the one seed that all probes follow. Default: seed 0.
        maximize: ascend instead of descend.
        process_group: ranks to average over. Default None: all of them, if torch.distributed is initialised. An
            optimizer with a group of its own can be neither copied nor pickled.

    Raises:
        ValueError: an argument outside its range, also in a group; complex or sharded parameters.
        RuntimeError: from `step`: a gradient without graph where D is due; sparse gradients.
        FloatingPointError: from `step`: a gradient or D that is not finite; nothing was changed.

    A parameter without gradient is left alone; so is, until the next D, one that has its first gradient in between.

    Source: arXiv 2006.00719 and the authors' code (amirgholami/adahessian at 85ebc00), with which it agrees but for: a
    second group gets its own gradients in `row` and number blocks, not the first group's; D is averaged over
    ranks, which the code means to do and does not; the graph is freed. `n_samples` and `update_each` are
    those of davda54/ada-hessian at 5e1bebc.

    Cost of a step: two backward passes (1 + n_samples / update_each), and the memory of a graph of the first. State:
    two numbers per entry (three with update_each > 1), in fp32 for 16-bit parameters.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = AdaHessian([x], lr=1.0, betas=(0.0, 0.0), eps=0.0)
        >>> loss = optimizer.step(lambda: (torch.tensor([3.0, 1000.0]) * x.square()).sum())
        >>> x.tolist()  # curvatures 6 and 2000: one Newton step
        [0.0, 0.0]
    """

    step_protocol: ClassVar[str] = "graph"
    constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Range(low=0),
        "betas": Range(low=0, high=1, high_open=True, length=2),
        "eps": Range(low=0),
        "weight_decay": Range(low=0),
        "hessian_power": Range(low=0, high=1),
        "block": _Blocks(),
        "block_reduce": OneOf("abs", "signed"),
        "n_samples": Range(low=1, integer=True),
        "update_each": Range(low=1, integer=True),
        "maximize": OneOf(False, True),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        *,
        block: str | int | Callable[[torch.Size], Block] = "auto",
        block_reduce: str = "abs",
        n_samples: int = 1,
        update_each: int = 1,
        generator: torch.Generator | None = None,
        maximize: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        arguments = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "block": block,
            "block_reduce": block_reduce,
            "n_samples": n_samples,
            "update_each": update_each,
            "maximize": maximize,
        }
        check_arguments(self.constraints, **arguments)
        seed = 0
        if generator is not None:
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        self.process_group = process_group
        super().__init__(params, {**arguments, "seed": seed, "step": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; hyper-parameters of the group are checked like the constructor's."""
        common = self.param_groups[0] if self.param_groups else self.defaults
        group = {**self.defaults, **{name: common[name] for name in (*_COMMON, "step")}, **param_group}
        check_arguments(self.constraints, **{name: group[name] for name in self.constraints})
        for name in _COMMON:
            if group[name] != common[name]:
                raise ValueError(f"{name} must be the same in all groups, {common[name]!r}, got {group[name]!r}")
        super().add_param_group(group)
        group = self.param_groups[-1]
        try:
            refuse_complex(group["params"])
            refuse_sharded("AdaHessian", group["params"], "the second backward does not pass their gathering")
            if callable(group["block"]):
                group["block"] = [group["block"](p.shape) for p in group["params"]]
            for index, p in enumerate(group["params"]):
                _check_block(_block(group, index), p)
        except ValueError:
            self.param_groups.pop()
            raise

    def sample_probe(self, p: Tensor, generator: torch.Generator) -> Tensor:
        """The part of z for one parameter, +-1 like `p`; a subclass may draw it in another way."""
        return rademacher(p, generator)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. `closure`, if given, returns the loss without backward; it is returned."""
        first = self.param_groups[0]
        refresh = first["step"] % first["update_each"] == 0
        loss, found = self._gradients(closure, refresh)
        if not found:
            return loss
        # Between two refreshes a parameter that has no D yet cannot be stepped.
        ready = [
            [p for p in group["params"] if p in found and (refresh or "hessian_diag" in self.state.get(p, {}))]
            for group in self.param_groups
        ]
        flat = [p for params in ready for p in params]
        diagonals = self._diagonals(flat, [found[p] for p in flat]) if refresh else []
        if closure is None:
            for p, g in found.items():  # breaks the cycle from p over its gradient's graph to p
                p.grad = g.detach()
        values = [found[p].detach().to(_wide(p.dtype)) for p in flat]
        _average(values + diagonals, self.process_group)
        # Only now: a rank that refused its own part would leave the others waiting for it.
        by_group = _split(values, ready)
        require_finite("AdaHessian", self.param_groups, ready, by_group)
        if refresh:
            require_finite("AdaHessian", self.param_groups, ready, _split(diagonals, ready), "Hessian diagonal")
            self._keep_diagonals(dict(zip(flat, diagonals, strict=True)))
        for group in self.param_groups:
            group["step"] += 1
        for group, params, grads in zip(self.param_groups, ready, by_group, strict=True):
            _update(group, params, grads, [self.state[p] for p in params])
        if first["update_each"] == 1:
            for p in flat:
                del self.state[p]["hessian_diag"]
        return loss

    def _gradients(self, closure: Callable[[], Any] | None, refresh: bool) -> tuple[Any, dict[Tensor, Tensor]]:
        """The loss, and the gradient of each parameter that has one; with graph on a refresh."""
        loss = None
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if closure is None:
            grads = [p.grad for p in params]
        else:
            with torch.enable_grad():
                loss = closure()
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                    raise RuntimeError("AdaHessian: the closure must return a scalar loss with graph, without backward")
                grads = list(torch.autograd.grad(loss, params, create_graph=refresh, allow_unused=True))
            loss = loss.detach()
        found = {p: g for p, g in zip(params, grads, strict=True) if g is not None}
        if any(g.layout != torch.strided for g in found.values()):
            raise RuntimeError("AdaHessian does not support sparse gradients")
        if closure is None and refresh:
            for number, group in enumerate(self.param_groups):
                for index, p in enumerate(group["params"]):
                    if p in found and found[p].grad_fn is None:
                        raise RuntimeError(
                            f"AdaHessian: the gradient of parameter {index} of group {number} has no graph: call "
                            "loss.backward(create_graph=True), or step(closure) with the loss, which also takes "
                            "a loss that is linear in a parameter"
                        )
        return loss, found

    def _diagonals(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """D, signed, of this rank's loss."""
        if not any(g.requires_grad for g in grads):  # linear in all parameters
            return [torch.zeros_like(p, dtype=_wide(p.dtype)) for p in params]
        first = self.param_groups[0]
        generator = seeded_generator(first["seed"], first["step"])
        probes = ([self.sample_probe(p, generator) for p in params] for _ in range(first["n_samples"]))
        return hessian_diagonal(grads, params, probes)

    def _keep_diagonals(self, diagonals: Mapping[Tensor, Tensor]) -> None:
        """Averaged over blocks, with the rest of the state where it is missing."""
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p not in diagonals:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    for name in ("exp_avg", "exp_hessian_diag_sq"):
                        state[name] = torch.zeros_like(p, dtype=_wide(p.dtype))
                D, block = diagonals[p], _block(group, index)
                signed = group["block_reduce"] == "signed"
                state["hessian_diag"] = block_average(D, block).abs() if signed else block_average(D.abs(), block)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "process_group": self.process_group}


def block_average(D: Tensor, block: str | int | tuple[int, ...]) -> Tensor:
    """Each entry's mean over its block, in the shape of D.

    Args:
        D: any tensor.
        block: `none`; `auto` (dimensions 2 and up: a convolution's kernel); `row` (as `auto`, and dimension 1 of a
            matrix); the number of consecutive entries of the flattened D; or a tuple of dimensions.

    >>> block_average(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), "row")
    tensor([[2., 2.],
            [5., 5.]])
    >>> block_average(torch.tensor([1.0, 3.0, 5.0, 5.0]), 2)
    tensor([2., 2., 5., 5.])
    """
    if isinstance(block, int):
        return D.reshape(-1, block).mean(1, keepdim=True).expand(-1, block).reshape(D.shape)
    if isinstance(block, str):
        first = 1 if block == "row" and D.ndim == 2 else 2
        block = () if block == "none" else tuple(range(first, D.ndim))
    return D.mean(block, keepdim=True).expand_as(D) if block else D


def _update(group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: Sequence[dict[str, Any]]) -> None:
    """Steps 6 to 8 for the parameters of a group."""
    if not params:  # the others wait, or have no gradient
        return
    beta1, beta2 = group["betas"]
    for state in states:
        state["step"] += 1
    m = [state["exp_avg"] for state in states]
    v = [state["exp_hessian_diag_sq"] for state in states]
    D = [state["hessian_diag"] for state in states]
    torch._foreach_mul_(m, beta1)
    torch._foreach_add_(m, grads, alpha=(beta1 - 1) if group["maximize"] else (1 - beta1))
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, D, D, 1 - beta2)
    h = torch._foreach_sqrt(v)
    torch._foreach_div_(h, [math.sqrt(1 - beta2 ** state["step"]) for state in states])
    if group["hessian_power"] != 1:
        torch._foreach_pow_(h, group["hessian_power"])
    torch._foreach_add_(h, group["eps"])
    factors = [-group["lr"] / (1 - beta1 ** state["step"]) for state in states]
    wide = [p.to(values.dtype) for p, values in zip(params, m, strict=True)]  # the parameters themselves if not 16-bit
    if group["weight_decay"] != 0:
        torch._foreach_mul_(wide, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_addcdiv_(wide, m, h, factors)
    for p, values in zip(params, wide, strict=True):
        if values is not p:
            p.copy_(values)


def _average(tensors: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> None:
    """The mean over the ranks, in place, through one buffer."""
    if not tensors or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(process_group) == 1:
        return
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    buffer = torch.cat([t.reshape(-1).to(dtype) for t in tensors])
    dist.all_reduce(buffer, group=process_group)
    buffer /= dist.get_world_size(process_group)
    for t, values in zip(tensors, buffer.split([t.numel() for t in tensors]), strict=True):
        t.copy_(values.view(t.shape))


def _split(values: Sequence[Tensor], ready: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    rest = iter(values)
    return [[next(rest) for _ in group] for group in ready]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _block(group: dict[str, Any], index: int) -> Any:
    return group["block"][index] if isinstance(group["block"], list) else group["block"]


def _check_block(block: Any, p: Tensor) -> None:
    if isinstance(block, list | tuple):
        if not all(isinstance(dim, int) and -p.ndim <= dim < p.ndim for dim in block):
            raise ValueError(f"block must name dimensions of a tensor of shape {tuple(p.shape)}, got {block!r}")
    elif not isinstance(block, str) and not _is_size(block):
        raise ValueError(f"block must give a whole number >= 1 or a tuple of dimensions, got {block!r}")
    elif isinstance(block, int) and p.numel() % block:
        raise ValueError(f"block must divide the {p.numel()} entries of a tensor of the group, got {block!r}")
