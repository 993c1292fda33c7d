"""SplitSGD: SGD where the momentum is small, a step of fixed size where it is large.

    p = p - lr m_hat          where |m_hat| <= r
    p = p - sign_lr sign(m_hat)    elsewhere

Source: Rosenfeld and Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network
Optimization", ICLR 2024, arXiv 2311.04163. `headway.optim.opposing_pairs` finds the outlier groups themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributed as dist

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.kernels.select import kth_largest_magnitude_reference
from headway.optim.checks import gradients, local, refuse_complex, refuse_sharded
from headway.optim.opposing_pairs import OpposingSignals, Pair
from headway.optim.quantile import magnitude_quantile
from headway.optim.quantized_state import SHARDED, STATE_BITS, batches, create, read, write
from headway.optim.state import ExactStateOptimizer

__all__ = ["OpposingSignals", "Pair", "SplitSGD"]


class SplitSGD(ExactStateOptimizer):
    """SGD with momentum for ordinary coordinates and sign steps for the few whose momentum is large.

    Small groups of outliers with opposing signals give a few coordinates large gradients that cancel most of the time.
    SGD has to be slow enough for those; here they move by a fixed size, and lr can suit the rest. From m = 0,
    step t = 1, 2, ... of a parameter p with gradient g does, entry by entry::

        g     = g + weight_decay p
        m     = momentum m + (1 - dampening) g
        m_hat = m / (1 - dampening^t)
        r     = threshold, or the largest number with at most int(quantile n) of all n |m_hat| above it
        p     = p - lr m_hat                          where |m_hat| <= r
        p     = p - sign_lr (lr / lr_0) sign(m_hat)   elsewhere

    lr_0 is the `lr` that the group was made with, so that a scheduler, which acts on `lr`, scales both steps. With
    `quantile`, r is recomputed at every step over the entries of all groups that have the same quantile. With
    `threshold`, gradients that shrink in training leave ever fewer entries above it: `sign_fraction()` tells how many.
    The division is exact only for dampening = momentum, where m_hat is a weighted mean of the gradients;
    other values are allowed, as in torch.optim.SGD.

    Cost per step: about twelve passes over the parameters, and with `quantile` an exact selection, which reads one
    number from the device. State: one number per entry, in fp32 for 16-bit parameters. With `state_bits=8` it takes
    1.016 bytes, the step is that of the m that is kept, and m_hat is never held as a whole but made up to three times.
    The same on all DDP ranks. On the shards of FSDP2 `threshold` works as it is, `quantile` with the `process_group` of
    the shards, and `state_bits=8` does not.

    Args:
        params: parameters or parameter groups; all arguments below but `process_group` may differ by group.
        lr: step on the entries whose momentum is small, > 0. Default 1.0, of the order of SGD's largest stable one.
        sign_lr: step on all others, >= 0. Default 1e-3, a usual lr for Adam, whose steps have the same size.
        momentum: in [0, 1). Default 0.9 (the paper's, from memory).
        dampening: in [0, 1). Default 0.9, so that m_hat has the scale of a gradient.
        threshold: r, >= 0, the paper's form. Default None.
        quantile: fraction of entries that take the sign step, in (0, 1). Default 0.1. One of `threshold` and
            `quantile` must be None.
        weight_decay: L2 penalty, coupled as in torch.optim.SGD, >= 0. Default 0.
        state_bits: 32 (default), or 8: m of 4096 and more entries is kept as block-wise 8-bit codes
            (`headway.optim.quantized_state`).
        maximize: ascend instead of descend. Default False.
        process_group: where parameters are sharded, the ranks that hold the shards; all of them must call `step`.
            Default None.

    Raises:
        ValueError: an argument outside its range, also in a group; `threshold` and `quantile` both given or both None;
            sharded parameters with `quantile` and no `process_group`, or with `state_bits=8`; complex parameters.
        RuntimeError: from `step`, sparse gradients.
        FloatingPointError: from `step`, a gradient that is not finite; nothing was changed.

    Source: arXiv 2311.04163, appendix. There is no official code, and the pseudocode is rendered from memory.
    `quantile`, the scaling of `sign_lr` by schedulers and weight decay are additions.

    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> optimizer = SplitSGD([weight], lr=1.0, sign_lr=0.01, threshold=0.5, quantile=None)
    >>> weight.grad = torch.tensor([0.1, -0.5, 8.0])
    >>> optimizer.step()
    >>> weight
    Parameter containing:
    tensor([-0.1000,  0.5000, -0.0100], requires_grad=True)
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Range(low=0, low_open=True),
        "sign_lr": Range(low=0),
        "momentum": Range(low=0, high=1, high_open=True),
        "dampening": Range(low=0, high=1, high_open=True),
        "threshold": Range(low=0, optional=True),
        "quantile": Range(low=0, high=1, low_open=True, high_open=True, optional=True),
        "weight_decay": Range(low=0),
        "state_bits": STATE_BITS,
        "maximize": OneOf(False, True),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        sign_lr: float = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.9,
        threshold: float | None = None,
        quantile: float | None = 0.1,
        weight_decay: float = 0.0,
        *,
        state_bits: int = 32,
        maximize: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        arguments = {
            "lr": lr,
            "sign_lr": sign_lr,
            "momentum": momentum,
            "dampening": dampening,
            "threshold": threshold,
            "quantile": quantile,
            "weight_decay": weight_decay,
            "state_bits": state_bits,
            "maximize": maximize,
        }
        check_arguments(self.constraints, **arguments)
        self.process_group = process_group
        super().__init__(params, arguments)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group is checked like the constructor's arguments."""
        group = {**self.defaults, **param_group}
        check_arguments(self.constraints, **{name: group[name] for name in self.constraints})
        if (group["threshold"] is None) == (group["quantile"] is None):
            raise ValueError(
                "one of threshold and quantile must be None, "
                f"got threshold={group['threshold']!r} and quantile={group['quantile']!r}"
            )
        super().add_param_group({**group, "lr_0": group["lr"]})
        added = self.param_groups[-1]
        try:
            refuse_complex(added["params"])
            if added["state_bits"] == 8:
                refuse_sharded("SplitSGD", added["params"], SHARDED)
            if added["quantile"] is not None and self.process_group is None:
                reason = "the quantile is over all entries of all ranks; give process_group, or a threshold instead"
                refuse_sharded("SplitSGD", added["params"], reason)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. `closure` re-evaluates the model; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = gradients("SplitSGD", self.param_groups)
        for group, params in zip(self.param_groups, ready, strict=True):
            for batch in batches(params, group["state_bits"]):
                self._advance(group, batch)
        momenta = self._momenta(ready)
        bounds = self._bounds(ready, momenta)
        for group, params, m_hats in zip(self.param_groups, ready, momenta, strict=True):
            if isinstance(m_hats, list):
                if params:
                    _split_step(group, local(params), local(m_hats), bounds[_rule(group)])
            else:
                for batch in batches(params):
                    _split_step(group, batch, self._debiased(group, batch), bounds[_rule(group)])
        return loss

    def sign_fraction(self) -> float:
        """The fraction of entries (this rank's, if sharded) whose |m_hat| is above r; NaN before the first step."""
        with_state = [[p for p in group["params"] if p in self.state] for group in self.param_groups]
        momenta = self._momenta(with_state)
        bounds = self._bounds(with_state, momenta)
        count = above = 0
        for group, m_hats in zip(self.param_groups, momenta, strict=True):
            for m_hat in m_hats:
                (part,) = local([m_hat])
                count += part.numel()
                above += int((part.abs() > bounds[_rule(group)]).sum())
        return above / count if count else float("nan")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "process_group": self.process_group}

    def _advance(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Advance m."""
        if not params:
            return
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state["step"] = 0
                create(state, "momentum_buffer", p, group["state_bits"])
            state["step"] += 1
        buffers = [read(state, "momentum_buffer", like=p) for p, state in zip(params, states, strict=True)]
        grads = [p.grad.to(m.dtype) for p, m in zip(params, buffers, strict=True)]  # type: ignore[union-attr]
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        if group["weight_decay"]:
            points = [p.to(m.dtype) for p, m in zip(params, buffers, strict=True)]
            grads = list(torch._foreach_add(grads, points, alpha=group["weight_decay"]))
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads, alpha=1 - group["dampening"])
        for state, m in zip(states, buffers, strict=True):
            write(state, "momentum_buffer", m)

    def _debiased(self, group: dict[str, Any], params: list[Tensor]) -> list[Tensor]:
        """m_hat in new memory."""
        if not params:
            return []
        states = [self.state[p] for p in params]
        buffers = [read(state, "momentum_buffer", like=p) for p, state in zip(params, states, strict=True)]
        return list(torch._foreach_div(buffers, [1 - group["dampening"] ** state["step"] for state in states]))

    def _momenta(self, params: list[list[Tensor]]) -> list[list[Tensor] | _Anew]:
        """m_hat of each group's parameters: a list, or with 8 bits made one by one as they are asked for."""
        momenta: list[list[Tensor] | _Anew] = []
        for group, members in zip(self.param_groups, params, strict=True):
            if group["state_bits"] == 32:
                momenta.append(self._debiased(group, members))
            else:
                momenta.append(_Anew(partial(self._one_by_one, group, members)))
        return momenta

    def _one_by_one(self, group: dict[str, Any], params: list[Tensor]) -> Iterator[Tensor]:
        for p in params:
            yield from self._debiased(group, [p])

    def _bounds(
        self, params: list[list[Tensor]], momenta: list[list[Tensor] | _Anew]
    ) -> dict[tuple[float | None, float | None], float]:
        """What r is for every pair (threshold, quantile) among the groups."""
        bounds: dict[tuple[float | None, float | None], float] = {}
        for rule in dict.fromkeys(_rule(group) for group in self.param_groups):
            threshold, quantile = rule
            members = [number for number, group in enumerate(self.param_groups) if _rule(group) == rule]
            count = sum(p.numel() for number in members for p in params[number])
            pools = [momenta[number] for number in members]
            if threshold is not None:
                bounds[rule] = threshold
            elif quantile is None or count == 0:
                bounds[rule] = 0.0  # nothing to split
            elif all(isinstance(pool, list) for pool in pools):
                whole = [m_hat for pool in pools for m_hat in pool]
                bounds[rule] = magnitude_quantile(whole, quantile, self.process_group)
            else:
                parts = _Anew(partial(_in_float32, pools))
                bounds[rule] = kth_largest_magnitude_reference(parts, int(count * quantile) + 1, self._add_over_ranks)
        return bounds

    def _add_over_ranks(self, counts: Tensor) -> None:
        if self.process_group is not None:
            dist.all_reduce(counts, group=self.process_group)


class _Anew:
    """Tensors that are made each time they are iterated over, so that one is held at a time."""

    def __init__(self, make: Callable[[], Iterator[Tensor]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Tensor]:
        return self.make()


def _in_float32(pools: Iterable[Iterable[Tensor]]) -> Iterator[Tensor]:
    """As `magnitude_quantile` compares shards: each rank its parts."""
    for pool in pools:
        for tensor in pool:
            yield local([tensor])[0].float()


def _rule(group: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return group["threshold"], group["quantile"]


def _split_step(group: Mapping[str, Any], params: list[Tensor], m_hat: list[Tensor], bound: float) -> None:
    """The last two lines of the rule; overwrites `m_hat`."""
    # 1.0 where |m_hat| > bound and 0.0 elsewhere: there are no foreach comparisons.
    large = torch._foreach_abs(m_hat)
    torch._foreach_sub_(large, bound)
    torch._foreach_clamp_min_(large, 0)
    torch._foreach_sign_(large)
    signs = torch._foreach_sign(m_hat)
    torch._foreach_mul_(signs, large)
    torch._foreach_sub_(large, 1)
    torch._foreach_mul_(m_hat, large)  # -m_hat where it is small, 0 elsewhere
    points = [p.to(m.dtype) for p, m in zip(params, m_hat, strict=True)]
    torch._foreach_add_(points, m_hat, alpha=group["lr"])
    torch._foreach_add_(points, signs, alpha=-group["sign_lr"] * (group["lr"] / group["lr_0"]))
    if any(point is not p for point, p in zip(points, params, strict=True)):
        torch._foreach_copy_(params, points)
