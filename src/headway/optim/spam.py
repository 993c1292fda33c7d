"""SPAM: Adam that clips gradient spikes against its own second moment and forgets its moments at intervals.

    g = sign(g) min(|g|, sqrt(threshold v))        v, m = 0 every reset_interval steps

so that one bad batch cannot poison the second moment for thousands of steps. Source: Huang et al., "SPAM: Spike-Aware
Adam with Momentum Reset for Stable LLM Training", ICLR 2025, arXiv 2501.06842.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.kernels.adam import adam_
from headway.optim.checks import gradients, local, refuse_complex, refuse_sharded
from headway.optim.grouping import split_parameters
from headway.optim.quantized_state import SHARDED, STATE_BITS, batches, create, read, write
from headway.optim.spikes import GradientSpikeMonitor, GradientSpikes
from headway.optim.state import ExactStateOptimizer
from headway.optim.subspace import Coordinates, as_matrix, draw, seeded_generator

__all__ = ["SPAM", "GradientSpikeMonitor", "GradientSpikes", "spam_param_groups", "warmup_factor"]


class SPAM(ExactStateOptimizer):
    """Adam with spike-aware clipping, momentum reset and, with density < 1, moments for a random part of each matrix.

    From m = v = 0, step t = 1, 2, ... of the optimizer does, entry by entry, with j = t mod reset_interval::

        j == 0:            m, v = 0;  a new random mask
        k = k + 1                                          the parameter's own count: not reset
        j >= clip_delay:   g = sign(g) min(|g|, sqrt(threshold v))           where v > 0
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        p = p - lr phi(j) sqrt(1 - beta2^k) / (1 - beta1^k) m / (sqrt(v) + eps)         on the mask
        p = p - lr weight_decay p                                                       everywhere

    phi is 1 before the first reset and `warmup_factor(j, warmup_steps)` after it: 0.01, rising to 1.

    Use it for pre-training whose loss shows spikes. Its warm-up multiplies that of a scheduler; clipping by
    the global norm may be used too, before the step. Because k goes on, m / sqrt(v) is not bias-corrected after a
    reset: j steps after it a constant gradient moves parameters by lr phi (1 - beta1^j) / sqrt(1 - beta2^j), with the
    default betas 3.2 lr phi at j = 1, at most 6.6 lr phi at j = 13 and still 2 lr phi at j = 300. This is part of
    the official method's speed; `reset_step=True` restarts k, and the factor is 1.

    With density < 1 entries outside the mask do not move, except by `weight_decay`, which acts on all. The
    first mask of a parameter has int(density * numel) entries, later ones take each entry with probability density.
    They depend on the seed, the parameter's place and the number of resets alone, and so are the same on all ranks
    and after a resume. `spam_param_groups` picks the matrices of a model.

    Cost per step: Adam's. State: 2 numbers per entry, in fp32 for 16-bit parameters; with density < 1, 2 numbers and
    an int32 index per entry of the mask, which is less than Adam's for density < 2/3. `state_bits=8` makes the numbers
    1.016 bytes each. Works on the shards of FSDP2 with density 1 and 32-bit state. A step in which no parameter has a
    gradient does not count. A parameter without a gradient at a reset is reset at its next gradient.

    Args:
        params: parameters or parameter groups; every argument below except `generator` may differ by group.
        lr: learning rate, > 0. Default 1e-3 (official code).
        betas: decay of m and v, each in [0, 1). Default (0.9, 0.999) (official code).
        eps: added to the root before the bias correction, > 0. Default 1e-6 (official code).
        weight_decay: decoupled, after the step and without phi, >= 0. Default 0 (official code).
        reset_interval: steps between resets, >= 0; 0 never resets. Default 500 (paper).
        warmup_steps: steps of the warm-up after a reset, >= 0. Default 150 (paper).
        threshold: squared gradients above threshold * v are clipped, >= 0; 0 never clips. Default 5000 (paper).
        clip_delay: steps after the start or a reset without clipping, >= 0. Default 20 (official code).
        density: fraction of the entries of each matrix that have moments and move, in (0, 1]. Default 1.
        reset_step: restart k with the moments. Default False (official code).
        state_bits: 32 (default), or 8: m and v of 4096 and more entries are kept as block-wise 8-bit codes
            (`headway.optim.quantized_state`); clipping then sees v as it was kept.
        maximize: ascend instead of descend. Default False.
        fused: None (default): the native kernel for the tensors that it takes; True: the kernel or a `RuntimeError`
            with the reason; False: foreach operations.
        generator: source of the one seed that all masks follow, the same on all ranks. Default: seed 0.

    Raises:
        ValueError: an argument outside its range, also in a parameter group; density < 1 in a group with a tensor that
            is not 2-D, or that is sharded; complex parameters; sharded ones with `state_bits=8`.
        RuntimeError: from `step`, sparse gradients.
        FloatingPointError: from `step`, a gradient that is not finite; nothing was changed.

    Source: arXiv 2501.06842 and the authors' code (TianjinYellow/SPAM-Optimizer, galore_torch/SPAM.py at e8185fb).
    Departures: `p.grad` is only read, the code clips and scatters in place; gradients where v = 0 are not clipped, the
    code sets them to zero; with density < 1 the code loses the weight decay, and draws masks from the global generator
    of each rank; `reset_step`, `maximize` and reset_interval 0 are additions.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(8, 8))
    >>> optimizer = SPAM([weight], lr=0.1, density=0.25)
    >>> weight.grad = torch.ones(8, 8)
    >>> optimizer.step()
    >>> int(weight.count_nonzero()), optimizer.state_bytes()
    (16, 192)
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Range(low=0, low_open=True),
        "betas": Range(low=0, high=1, high_open=True, length=2),
        "eps": Range(low=0, low_open=True),
        "weight_decay": Range(low=0),
        "reset_interval": Range(low=0, integer=True),
        "warmup_steps": Range(low=0, integer=True),
        "threshold": Range(low=0),
        "clip_delay": Range(low=0, integer=True),
        "density": Range(low=0, low_open=True, high=1),
        "reset_step": OneOf(False, True),
        "state_bits": STATE_BITS,
        "maximize": OneOf(False, True),
        "fused": OneOf(None, False, True),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        reset_interval: int = 500,
        warmup_steps: int = 150,
        threshold: float = 5000.0,
        clip_delay: int = 20,
        density: float = 1.0,
        reset_step: bool = False,
        state_bits: int = 32,
        maximize: bool = False,
        fused: bool | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        arguments = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "reset_interval": reset_interval,
            "warmup_steps": warmup_steps,
            "threshold": threshold,
            "clip_delay": clip_delay,
            "density": density,
            "reset_step": reset_step,
            "state_bits": state_bits,
            "maximize": maximize,
            "fused": fused,
        }
        check_arguments(self.constraints, **arguments)
        seed = 0
        if generator is not None:
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        # In the group, the seed and t are saved, copied and loaded by everything that handles optimizers.
        super().__init__(params, {**arguments, "seed": seed, "t": 0})

    @classmethod
    def for_model(cls, model: nn.Module, *, density: float = 1.0, **hyperparameters: Any) -> SPAM:
        """An optimizer for `model`: `density` is that of its linear layers' weights, all others have full moments.

        Vectors and scalars get no weight decay.

        >>> optimizer = SPAM.for_model(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), density=0.25, weight_decay=0.1)
        >>> [(len(g["params"]), g["density"], g["weight_decay"]) for g in optimizer.param_groups]
        [(1, 0.25, 0.1), (3, 1.0, 0.0)]
        """
        check_arguments(cls.constraints, density=density)
        matrices, others = split_parameters(model)
        groups: list[dict[str, Any]] = [
            {"params": matrices, "density": density},
            {"params": [p for p in others if p.ndim >= 2]},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        return cls([group for group in groups if group["params"]], **hyperparameters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; hyper-parameters are checked like the constructor's. The group joins at the present t."""
        t = self.param_groups[0]["t"] if self.param_groups else 0
        group = {**self.defaults, **param_group, "t": t}
        check_arguments(self.constraints, **{name: group[name] for name in self.constraints})
        super().add_param_group(group)
        try:
            refuse_complex(self.param_groups[-1]["params"])
            if group["state_bits"] == 8:
                refuse_sharded("SPAM", self.param_groups[-1]["params"], SHARDED)
            if group["density"] < 1:
                _check_sparse(self.param_groups[-1]["params"], group["density"])
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
        ready = gradients("SPAM", self.param_groups)
        if not any(ready):
            return loss
        for number, (group, params) in enumerate(zip(self.param_groups, ready, strict=True)):
            group["t"] += 1
            self._reset(number, group)
            kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for p in params:
                kinds.setdefault((p.device, p.dtype), []).append(p)
            for kind in kinds.values():
                for batch in batches(kind, group["state_bits"]):
                    self._advance(group, batch)
        return loss

    def _reset(self, number: int, group: dict[str, Any]) -> None:
        """Bring the states of parameters with a gradient to the present number of resets, and create missing ones."""
        interval = group["reset_interval"]
        resets = group["t"] // interval if interval else 0
        for place, p in enumerate(group["params"]):
            state = self.state.get(p)
            if p.grad is None or (state and state["resets"] == resets):
                continue
            fresh: dict[str, Any] = {"resets": resets, "step": 0}
            if state and not group["reset_step"]:
                fresh["step"] = state["step"]
            like = p
            if group["density"] < 1:
                generator = seeded_generator(group["seed"], number, place, resets)
                fresh["indices"] = _draw_mask(p, group["density"], generator, first=not state)
                like = p.detach().new_empty(fresh["indices"].numel())
            create(fresh, "exp_avg", like, group["state_bits"])
            create(fresh, "exp_avg_sq", like, group["state_bits"], signed=False)
            self.state[p] = fresh

    def _advance(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """The step for parameters of one device and dtype."""
        beta1, beta2 = group["betas"]
        t, interval = group["t"], group["reset_interval"]
        since_reset = t % interval if interval else t
        phi = warmup_factor(since_reset, group["warmup_steps"]) if interval and t >= interval else 1.0
        decay = 1 - group["lr"] * group["weight_decay"]
        states = [self.state[p] for p in params]
        for state in states:
            state["step"] += 1
        whole, grads = local(params), local(p.grad for p in params)
        points = list(whole)
        masks = [Coordinates(None, state["indices"]) if "indices" in state else None for state in states]
        for i, mask in enumerate(masks):
            if mask is not None:
                points[i], grads[i] = mask.down(as_matrix(whole[i])), mask.down(as_matrix(grads[i]))
        means = [read(state, "exp_avg", like=point) for state, point in zip(states, points, strict=True)]
        squares = [read(state, "exp_avg_sq", signed=False, like=p) for state, p in zip(states, points, strict=True)]
        adam_(
            points,
            grads,
            local(means),
            local(squares),
            step_sizes=[
                group["lr"] * phi * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                for state in states
            ],
            root_scales=[1.0] * len(states),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            decay_after=decay,
            spike=group["threshold"] if since_reset >= group["clip_delay"] else 0.0,
            maximize=group["maximize"],
            native=group["fused"],
        )
        for state, mean, square in zip(states, means, squares, strict=True):
            write(state, "exp_avg", mean)
            write(state, "exp_avg_sq", square, signed=False)
        for i, mask in enumerate(masks):
            if mask is not None:
                if decay != 1:
                    whole[i].mul_(decay)
                matrix = mask.merge_(as_matrix(whole[i]), points[i])
                if not whole[i].is_contiguous():  # then the matrix is a copy
                    whole[i].copy_(matrix.view_as(whole[i]))


def warmup_factor(step: int, warmup_steps: int) -> float:
    """The factor of the learning rate `step` steps after a reset: from 0.01 to 1 along a cosine.

        phi = 1 - 0.99 (1 + cos(pi step / (warmup_steps + 1))) / 2      for step < warmup_steps, then 1

    >>> [round(warmup_factor(step, 5), 6) for step in range(6)]
    [0.01, 0.076317, 0.2575, 0.505, 0.7525, 1.0]
    """
    if step >= warmup_steps:
        return 1.0
    return 1 - 0.99 * (1 + math.cos(math.pi * step / (warmup_steps + 1))) / 2


def spam_param_groups(model: nn.Module, density: float) -> list[dict[str, Any]]:
    """Split a model's trainable parameters: sparse moments for its linear layers, full moments for all others.

    The linear layers are the `hidden_matrices` of `headway.optim.grouping`: in a transformer attention and MLP.
    Embeddings, norms, biases and the output head are in the second group.

    Args:
        model: any module; Hugging Face models included.
        density: that of the linear layers' weights, in (0, 1].

    >>> groups = spam_param_groups(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)), density=0.25)
    >>> [(len(group["params"]), group.get("density", 1.0)) for group in groups]
    [(1, 0.25), (3, 1.0)]
    """
    matrices, others = split_parameters(model)
    groups: list[dict[str, Any]] = [{"params": matrices, "density": density}, {"params": others}]
    return [group for group in groups if group["params"]]


def _check_sparse(params: list[Tensor], density: float) -> None:
    for p in params:
        if p.ndim != 2:
            raise ValueError(
                f"density must be 1 for tensors that are not 2-D, got {density} for shape {tuple(p.shape)}; "
                "put them into a group of their own (spam_param_groups does)"
            )
    refuse_sharded("SPAM with density < 1", params, "a mask is one draw over the whole matrix")


def _draw_mask(p: Tensor, density: float, generator: torch.Generator, first: bool) -> Tensor:
    """The indices of the entries with moments, ascending: a fixed number at first, each with its own draw later."""
    if first:
        return cast(Coordinates, draw("randk", as_matrix(p), density, generator)).tensor
    chosen = torch.rand(p.numel(), generator=generator, device=generator.device) < density
    indices = chosen.nonzero().view(-1)
    return indices.to(device=p.device, dtype=torch.int32 if p.numel() < 2**31 else torch.int64)
