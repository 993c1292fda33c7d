"""Consensus-based optimization as an optimizer of parameters: the loss is evaluated, never differentiated.

Source: Riedl, Klock, Geldhauser, Fornasier, "Gradient is All You Need?", arXiv 2306.09778. The rule and the solver
for functions are in `headway.optim.consensus`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.func import functional_call, vmap

from headway.constraints import Constraint, Range, check_arguments
from headway.optim.checks import refuse_complex, refuse_sharded
from headway.optim.consensus import (
    CBO,
    SETTINGS,
    cbo_minimize,
    cbo_step,
    check_drift,
    consensus_weights,
    require_some_finite,
)
from headway.optim.state import ExactStateOptimizer
from headway.optim.subspace import seeded_generator

__all__ = ["CBO", "ConsensusBasedOptimizer", "ModuleCBO", "cbo_minimize"]


class ConsensusBasedOptimizer(ExactStateOptimizer):
    """Trains parameters by N particles that each hold values for all of them; the parameters hold their consensus.

    At the first step of a parameter p, particle 0 is p itself and the others are p + init_std xi. Each step evaluates
    all particles, by writing them into the parameters and calling the closure, and then does, over all
    parameters together::

        w = exp(-alpha (E - min E)) / sum;  v = sum_i w_i x_i
        x_i = clamp(x_i - lam lr (x_i - v) + sigma sqrt(lr) n_i, -clip, clip)
        p   = v

    with n_i = (x_i - v) * xi_i (anisotropic) or |x_i - v| xi_i (isotropic). `lr` is the time step dt, so that
    schedulers cool the particles down. Particles whose loss is not finite have weight 0.

    For losses that are not differentiable or whose gradients lead nowhere, and up to some hundred parameters; for
    small networks `ModuleCBO` evaluates all particles at once. The closure must be deterministic, or alpha of the order
    of 1 / noise. A parameter that the loss does not depend on wanders within its particles, as no evaluation shows
    that it is idle: freeze it with `requires_grad_(False)`, then it is not touched.

    Cost per step: N evaluations of the closure, under `no_grad`. State: N numbers per entry, fp32 for 16-bit
    parameters. On DDP ranks that see different data give `process_group`: the losses are averaged over it; all draws
    are the same on all ranks.

    Args:
        params: parameters or parameter groups; groups may set lr, lam, sigma, init_std and clip.
        lr: time step dt, > 0. Default 0.01 (CBXpy). lam lr <= 1.
        n_particles: N, >= 2. Default 100 (the authors' MATLAB code).
        init_std: spread of the first particles around the parameters, >= 0: the scale on which the loss is explored.
            Default 0.1, at which some particle soon improves on a network's initial weights; for few variables, take
            the size of the region to search.
        lam: drift, >= 0. Default 1.
        sigma: exploration, >= 0. Default 5.
        alpha: inverse temperature of the weights, >= 0. Default 1e5.
        noise: `anisotropic` (default) or `isotropic`, which explodes in many dimensions unless sigma^2 < 2 lam / d.
        clip: bound on every coordinate, > 0. Default 1e8.
        process_group: ranks to average the losses over. Default None.
        generator: source of the one seed of all draws; the same on all ranks. Default: seed 0.

    Raises:
        ValueError: an argument outside its range, also in a group, or lam lr > 1; n_particles, alpha or noise that
            differ between groups; complex or sharded parameters.
        RuntimeError: from `step`, no closure.
        FloatingPointError: from `step`, no loss is finite; nothing was changed.

    Source: arXiv 2306.09778; see `headway.optim.consensus.CBO` for the departures. The optimizer form is an addition.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = ConsensusBasedOptimizer([weight], n_particles=50, lr=0.02, init_std=1.0)
    >>> for _ in range(200):
    ...     loss = optimizer.step(lambda: (weight - 1).abs().sum())
    >>> bool((weight - 1).abs().max() < 0.01)
    True
    """

    step_protocol: ClassVar[str] = "loss"
    constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Range(low=0, low_open=True),
        "n_particles": Range(low=2, integer=True),
        "init_std": Range(low=0),
        **{name: SETTINGS[name] for name in ("lam", "sigma", "alpha", "noise", "clip")},
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        *,
        n_particles: int = 100,
        init_std: float = 0.1,
        lam: float = 1.0,
        sigma: float = 5.0,
        alpha: float = 1e5,
        noise: str = "anisotropic",
        clip: float = 1e8,
        process_group: dist.ProcessGroup | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        arguments = {
            "lr": lr,
            "n_particles": n_particles,
            "init_std": init_std,
            "lam": lam,
            "sigma": sigma,
            "alpha": alpha,
            "noise": noise,
            "clip": clip,
        }
        check_arguments(self.constraints, **arguments)
        check_drift(lam, lr, "lr")
        self.process_group = process_group
        seed = 0
        if generator is not None:
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        # Of `seed` and `step`, those of the first group count; in the groups they are saved, copied and loaded.
        super().__init__(params, {**arguments, "seed": seed, "step": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; the group is checked like the constructor's arguments."""
        group = {**self.defaults, **param_group}
        check_arguments(self.constraints, **{name: group[name] for name in self.constraints})
        check_drift(group["lam"], group["lr"], "lr")
        for name in ("n_particles", "alpha", "noise"):
            if self.param_groups and group[name] != self.param_groups[0][name]:
                raise ValueError(
                    f"{name} must be the same in all groups, got {group[name]!r} after {self.param_groups[0][name]!r}"
                )
        super().add_param_group(group)
        try:
            refuse_complex(self.param_groups[-1]["params"])
            reason = "a particle holds values for whole parameters"
            refuse_sharded("ConsensusBasedOptimizer", self.param_groups[-1]["params"], reason)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` returns the loss at the parameters' present values. Returns the lowest loss seen."""
        if closure is None:
            raise RuntimeError("ConsensusBasedOptimizer.step needs a closure that returns the loss")
        for group in self.param_groups:
            check_drift(group["lam"], group["lr"], "lr")
        first = self.param_groups[0]
        movable = [(g, i, p) for g, group in enumerate(self.param_groups) for i, p in enumerate(group["params"])]
        movable = [(g, i, p) for g, i, p in movable if p.requires_grad]
        params = [p for _, _, p in movable]
        particles = [
            self.state[p]["particles"] if p in self.state else self._first_particles(p, g, i) for g, i, p in movable
        ]
        energies = self._evaluate(closure, params, particles)

        weights = consensus_weights(energies, first["alpha"])
        consensus = [_mean(weights, x) for x in particles]
        radius = None
        if first["noise"] == "isotropic" and particles:
            squares = [(x - v).reshape(len(x), -1).square().sum(1) for x, v in zip(particles, consensus, strict=True)]
            radius = torch.stack([s.to(squares[0]) for s in squares]).sum(0).sqrt().unsqueeze(1)  # (N, 1)
        generator = seeded_generator(first["seed"], first["step"])
        for (g, _, p), x, v in zip(movable, particles, consensus, strict=True):
            group = self.param_groups[g]
            flat = x.reshape(len(x), -1)
            xi = torch.randn(flat.shape, generator=generator, dtype=flat.dtype).to(flat.device)
            around = None if radius is None else radius.to(flat)
            moved = cbo_step(flat, v.flatten(), xi, group["lam"], group["lr"], group["sigma"], around)
            self.state[p]["particles"] = moved.clamp_(-group["clip"], group["clip"]).view_as(x)
            p.copy_(v)
        first["step"] += 1
        return torch.where(energies.isfinite(), energies, float("inf")).min()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "process_group": self.process_group}

    def _first_particles(self, p: Tensor, group: int, index: int) -> Tensor:
        first = self.param_groups[0]
        generator = seeded_generator(first["seed"], -1, group, index)
        dtype = torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype
        offsets = torch.randn(first["n_particles"], *p.shape, generator=generator, dtype=dtype)
        offsets[0] = 0
        return p.detach().to(dtype) + self.param_groups[group]["init_std"] * offsets.to(p.device)

    def _evaluate(self, closure: Callable[[], Any], params: list[Tensor], particles: list[Tensor]) -> Tensor:
        """The losses of all particles, (N,). Whatever happens, the parameters hold their values again afterwards."""
        saved = [p.clone() for p in params]
        losses = []
        try:
            for i in range(self.param_groups[0]["n_particles"]):
                for p, x in zip(params, particles, strict=True):
                    p.copy_(x[i])
                losses.append(torch.as_tensor(closure()).detach().reshape(()).clone())
        finally:
            for p, value in zip(params, saved, strict=True):
                p.copy_(value)
        energies = torch.stack(losses)
        if self.process_group is not None:
            dist.all_reduce(energies, group=self.process_group)
            energies /= dist.get_world_size(self.process_group)
        require_some_finite("ConsensusBasedOptimizer", energies)
        return energies


class ModuleCBO:
    """Consensus-based optimization of a small module, with all particles evaluated in one vectorised call.

    The parameters that require a gradient are the variables of a `headway.optim.consensus.CBO`, whose first particles
    are the module's own values and normal ones around them. After each step the module holds the consensus.

    Cost per step: one batched evaluation of N copies. Buffers are shared and must not be written in the forward pass
    (batch norm in training mode does); dropout is refused by `vmap`.

    Args:
        module: the module; changed in place.
        loss_fn: maps (model, *batch) to a scalar loss, `model` being called like the module.
        n_particles: N, >= 2. Default 200.
        init_std: spread of the first particles, >= 0. Default 0.1 (see `ConsensusBasedOptimizer`).
        chunk_size: particles evaluated at a time, >= 1. Default None: all.
        generator: source of the one seed of all draws. Default: seed 0.
        **options: of `CBO`.

    Raises:
        ValueError: an argument outside its range; no parameter that requires a gradient.
        FloatingPointError: from `step`, no loss is finite; nothing was changed.

    Source: arXiv 2306.09778.

    >>> inputs = torch.linspace(-1, 1, 16).unsqueeze(1)
    >>> module = torch.nn.Linear(1, 1)
    >>> trainer = ModuleCBO(module, lambda model, x, y: (model(x) - y).abs().mean(), init_std=1.0, dt=0.02)
    >>> for _ in range(200):
    ...     loss = trainer.step(inputs, 2 * inputs - 0.5)
    >>> loss < 0.01
    True
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: Callable[..., Tensor],
        n_particles: int = 200,
        *,
        init_std: float = 0.1,
        chunk_size: int | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        ranges = {
            "n_particles": Range(low=2, integer=True),
            "init_std": Range(low=0),
            "chunk_size": Range(low=1, integer=True, optional=True),
        }
        check_arguments(ranges, n_particles=n_particles, init_std=init_std, chunk_size=chunk_size)
        self.module, self.loss_fn, self.chunk_size = module, loss_fn, chunk_size
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("module must have a parameter that requires a gradient, got none")
        start = torch.cat([p.detach().reshape(-1) for p in self.parameters.values()])
        start = start.float() if start.dtype in (torch.bfloat16, torch.float16) else start
        self.cbo = CBO(start.expand(n_particles, -1), generator=generator, **options)
        offsets = torch.randn(n_particles, len(start), generator=seeded_generator(self.cbo.seed, -1), dtype=start.dtype)
        offsets[0] = 0
        self.cbo.x += init_std * offsets.to(start.device)

    def losses(self, *batch: Any) -> Tensor:
        """The loss of each particle, (N,)."""

        def one(values: dict[str, Tensor]) -> Tensor:
            def model(*args: Any, **kwargs: Any) -> Any:
                return functional_call(self.module, values, args, kwargs)

            return self.loss_fn(model, *batch)

        with torch.no_grad():
            return vmap(one, chunk_size=self.chunk_size)(self._unflatten(self.cbo.x))

    def step(self, *batch: Any) -> float:
        """One step on a batch; returns the lowest loss among the particles."""
        losses = self.losses(*batch)
        self.cbo.tell(losses)
        assert self.cbo.consensus is not None
        with torch.no_grad():
            for name, value in self._unflatten(self.cbo.consensus.unsqueeze(0)).items():
                self.parameters[name].copy_(value[0])
        return float(torch.where(losses.isfinite(), losses, float("inf")).min())

    def _unflatten(self, x: Tensor) -> dict[str, Tensor]:
        """The rows of x (M, d) as parameters with M in front."""
        parts = x.split([p.numel() for p in self.parameters.values()], dim=1)
        named = zip(self.parameters.items(), parts, strict=True)
        return {name: part.reshape(len(x), *p.shape).to(p.dtype) for (name, p), part in named}


def _mean(weights: Tensor, x: Tensor) -> Tensor:
    """The weighted mean of x (N, ...) over its first dimension, exact where all agree."""
    origin = x[int(weights.argmax())]
    return origin + torch.tensordot(weights.to(x), x - origin, dims=1)
