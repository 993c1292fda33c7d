"""Which examples of a training set are outliers with opposing signals: their losses swing against each other.

    d_t[i] = l_{t+1}[i] - l_t[i];   U_t, D_t = the k largest and the k smallest d_t
    strength_t = sqrt(mean d_t over U_t * mean -d_t over D_t)

Source: Rosenfeld and Risteski, ICLR 2024, arXiv 2311.04163; score and confirmations are this file's.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from headway.constraints import Constraint, Range, check_arguments

__all__ = ["OpposingSignals", "Pair", "shared_feature"]


@dataclass(frozen=True)
class Pair:
    """Two groups of examples whose losses moved against each other in one step.

    `step` is the number of the call of `on_step_end` that saw it, from 1. `up_indices` and `down_indices` are rows
    of the probe, the strongest first; `strength` is the geometric mean of the groups' mean changes of loss.

    The rest confirms that the groups oppose each other: `loss_correlation`, over the recorded steps, of their mean
    changes (near -1), and `alternation`, the lag-1 autocorrelation of the up group's (negative at the edge of
    stability), both NaN when fewer than three steps are on record; `gradient_cosine` of their mean gradients
    (negative); `gradient_norms` of both, relative to the whole probe's mean gradient (large).
    """

    step: int
    up_indices: list[int]
    down_indices: list[int]
    strength: float
    loss_correlation: float
    alternation: float
    gradient_cosine: float
    gradient_norms: tuple[float, float]


@dataclass
class _Candidate:
    step: int
    up: Tensor
    down: Tensor
    strength: float
    gradient_cosine: float
    gradient_norms: tuple[float, float]


class OpposingSignals:
    """Finds pairs of outlier groups while a model is trained, by watching the losses of a fixed set of examples.

    At every `interval`-th call, l[i] is the loss of example i of the probe, in evaluation mode. The difference d to the
    previous record, or across one virtual step, gives two groups and a strength:

        up, down = the k examples with the largest and with the smallest d
        strength = sqrt(mean d over up * mean -d over down)       0 unless both are positive

    and the strongest steps are kept. Both tails are needed: a group alone may just be hard. Inspect, relabel, reweight
    or remove what `report` names; examples in both groups of one pair share a feature, which `shared_feature` finds.

    Training is not changed: parameters, gradients, random state, modes and buffers are what they would be without.

    With mini-batches, use an `interval` and a `virtual_lr`: d is then the change across one gradient step on the
    mean loss of the whole probe, taken and undone. Otherwise d covers the steps since the previous record.

    Cost per record: one evaluation of the probe (with `virtual_lr` two, and one gradient); where a step enters the
    strongest so far, three more gradients. Memory: `history` times N floats on the CPU.

    Args:
        probe: a batch: a tensor, or tuples, lists and dicts of tensors, with N examples in front, without augmentation.
        loss_fn: maps (model, batch) to the N losses, shape (N,). For DDP, pass the bare module to `on_step_end`.
        k: group size, >= 1. Default None: max(10, N // 500).
        interval: calls between records, >= 1. Default 1.
        warmup: first calls that are not recorded, >= 0, default 10: then everyone's loss changes.
        virtual_lr: learning rate of the virtual step, > 0. Default None: no virtual step.
        keep: how many strongest steps are kept, >= 1. Default 20.
        history: records over which correlations are taken, >= 3. Default 1000.

    Raises:
        ValueError: an argument outside its range; a probe of fewer than 2 k examples; losses that are not N numbers.
        FloatingPointError: a loss that is not finite.

    Source: arXiv 2311.04163, whose definition is the largest change of loss in both directions over a step; the score,
    k and the confirmations are this class's. `virtual_lr` takes a number, as a step needs one.

    >>> inputs, targets = torch.tensor([[1.0], [-1.0], [2.0], [3.0]]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    >>> model = torch.nn.Linear(1, 1)
    >>> signals = OpposingSignals(
    ...     (inputs, targets), lambda model, batch: (model(batch[0])[:, 0] - batch[1]).square(), k=1, warmup=0
    ... )
    >>> signals.on_step_end(model)
    >>> with torch.no_grad():
    ...     _ = model.weight.add_(1.0)
    >>> signals.on_step_end(model)
    >>> [pair.step for pair in signals.report() if pair.strength > 0] in ([2], [])
    True
    """

    def __init__(
        self,
        probe: Any,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        k: int | None = None,
        interval: int = 1,
        warmup: int = 10,
        virtual_lr: float | None = None,
        *,
        keep: int = 20,
        history: int = 1000,
    ) -> None:
        whole = Range(low=1, integer=True)
        ranges: dict[str, Constraint] = {
            "k": Range(low=1, integer=True, optional=True),
            "interval": whole,
            "warmup": Range(low=0, integer=True),
            "virtual_lr": Range(low=0, low_open=True, optional=True),
            "keep": whole,
            "history": Range(low=3, integer=True),
        }
        check_arguments(
            ranges, k=k, interval=interval, warmup=warmup, virtual_lr=virtual_lr, keep=keep, history=history
        )
        sizes = {leaf.shape[0] for leaf in pytree.tree_leaves(probe) if isinstance(leaf, Tensor)}
        if len(sizes) != 1:
            raise ValueError(f"probe must hold tensors of one number of examples, got {sorted(sizes)}")
        self.examples = sizes.pop()
        self.k = max(10, self.examples // 500) if k is None else k
        if self.examples < 2 * self.k:
            raise ValueError(f"probe must hold at least 2 k = {2 * self.k} examples, got {self.examples}")
        self.probe, self.loss_fn = probe, loss_fn
        self.interval, self.warmup, self.virtual_lr, self.keep = interval, warmup, virtual_lr, keep
        self.step = 0
        self._previous: Tensor | None = None
        self._changes: deque[Tensor] = deque(maxlen=history)
        self._strongest: list[_Candidate] = []

    def on_step_end(self, model: nn.Module) -> None:
        """Call after every optimizer step."""
        self.step += 1
        if self.step <= self.warmup or self.step % self.interval:
            return
        with _undisturbed(model):
            losses = self._losses(model)
            if self.virtual_lr is not None:
                self._record(model, self._losses_after_virtual_step(model) - losses)
            elif self._previous is not None:
                self._record(model, losses - self._previous)
            self._previous = losses

    def report(self, top: int = 5) -> list[Pair]:
        """The `top` strongest pairs, the strongest first; steps of strength 0 are no pairs."""
        changes = torch.stack(list(self._changes)) if self._changes else torch.empty(0, self.examples)
        pairs = []
        for found in self._strongest[:top]:
            up, down = changes[:, found.up].mean(1), changes[:, found.down].mean(1)
            pairs.append(
                Pair(
                    step=found.step,
                    up_indices=found.up.tolist(),
                    down_indices=found.down.tolist(),
                    strength=found.strength,
                    loss_correlation=_correlation(up, down),
                    alternation=_correlation(up[1:], up[:-1]),
                    gradient_cosine=found.gradient_cosine,
                    gradient_norms=found.gradient_norms,
                )
            )
        return pairs

    def _record(self, model: nn.Module, change: Tensor) -> None:
        self._changes.append(change)
        up, down = change.topk(self.k), (-change).topk(self.k)
        rise, fall = float(up.values.mean()), float(down.values.mean())
        strength = math.sqrt(rise * fall) if rise > 0 and fall > 0 else 0.0
        weakest = self._strongest[-1].strength if len(self._strongest) == self.keep else 0.0
        if strength <= weakest:
            return
        cosine, norms = self._confirm(model, up.indices, down.indices)
        self._strongest.append(_Candidate(self.step, up.indices, down.indices, strength, cosine, norms))
        self._strongest.sort(key=lambda found: -found.strength)
        del self._strongest[self.keep :]

    def _losses(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            return self._checked(self.loss_fn(model, self.probe)).float().cpu()

    def _checked(self, losses: Tensor) -> Tensor:
        if losses.shape != (self.examples,):
            raise ValueError(f"loss_fn must return {self.examples} losses, got shape {tuple(losses.shape)}")
        bad = int((~losses.isfinite()).sum())
        if bad:
            raise FloatingPointError(f"OpposingSignals: {bad} of {self.examples} losses are not finite")
        return losses

    def _gradient(self, model: nn.Module, rows: Tensor | None = None) -> list[Tensor]:
        """Of the mean loss over `rows`, or all; zeros for parameters without part in it."""
        parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        with torch.enable_grad():
            if rows is None:
                losses = self._checked(self.loss_fn(model, self.probe))
            else:
                losses = self.loss_fn(
                    model, pytree.tree_map_only(Tensor, lambda leaf: leaf[rows.to(leaf.device)], self.probe)
                )
            return list(torch.autograd.grad(losses.mean(), parameters, allow_unused=True, materialize_grads=True))

    def _losses_after_virtual_step(self, model: nn.Module) -> Tensor:
        gradient = self._gradient(model)
        parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            saved: list[Tensor] = [p.clone() for p in parameters]
            try:
                torch._foreach_add_(parameters, gradient, alpha=-float(self.virtual_lr or 0))
                return self._losses(model)
            finally:
                torch._foreach_copy_(parameters, saved)

    def _confirm(self, model: nn.Module, up: Tensor, down: Tensor) -> tuple[float, tuple[float, float]]:
        one, other, whole = (_flat(self._gradient(model, rows)) for rows in (up, down, None))
        norms = float(one.norm()), float(other.norm())
        reference = float(whole.norm())
        cosine = float(one @ other) / (norms[0] * norms[1]) if all(norms) else math.nan
        return cosine, (norms[0] / reference, norms[1] / reference) if reference else (math.nan, math.nan)


def shared_feature(features: Tensor, pair: Pair) -> Tensor:
    """The direction that the examples of both groups have in common, shape (d,), of length 1.

    The top right singular vector of the groups' rows, with the sign that makes their mean projection >= 0.

    Args:
        features: one row per example of the probe, (N, d): inputs, or activations before the last layer.
        pair: groups from `OpposingSignals.report`.

    >>> pair = Pair(1, [0], [1], 1.0, -1.0, -1.0, -1.0, (1.0, 1.0))
    >>> shared_feature(torch.tensor([[3.0, 0.0], [5.0, 0.0], [0.0, 9.0]]), pair)
    tensor([1., 0.])
    """
    rows = features[pair.up_indices + pair.down_indices].float()
    direction = torch.linalg.svd(rows, full_matrices=False).Vh[0]
    # adding 0 turns -0 into 0
    return direction * (-1 if float((rows @ direction).mean()) < 0 else 1) + 0.0


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes and random states are as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().float().reshape(-1) for t in tensors])


def _correlation(one: Tensor, other: Tensor) -> float:
    if len(one) < 3:
        return math.nan
    one, other = one.double() - one.double().mean(), other.double() - other.double().mean()
    scale = float(one.norm() * other.norm())
    return float(one @ other) / scale if scale else math.nan
