"""FRUGAL: a state-full rule in a small subspace, a rule without state on the rest of every gradient.

    W <- W - lr * (up(Adam(down(G))) + sign(G - up(down(G))))

so that every step is full-rank at the optimizer memory of the subspace. Source: arXiv 2411.07837.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.optim.checks import gradients, refuse_sharded
from headway.optim.grouping import hidden_matrices
from headway.optim.quantized_state import SHARDED, STATE_BITS, batches, create, read, write
from headway.optim.state import ExactStateOptimizer
from headway.optim.subspace import (
    BLOCK_ORDERS,
    COORDINATE_PROJECTIONS,
    TENSOR_PROJECTIONS,
    Coordinates,
    Subspace,
    active_blocks,
    as_matrix,
    draw,
    reproject,
    reproject_units,
    restore,
    seeded_generator,
)

__all__ = ["Frugal", "frugal_param_groups"]


class Frugal(ExactStateOptimizer):
    """Adam (or SGD with momentum, or Lion) in a small subspace and sign descent on the rest.

    For each *projected* parameter W with gradient G, at every step of its group::

        every update_gap steps, starting with the first:
            draw a new subspace (down, up);  k, m, v = 0
        W *= 1 - lr * weight_decay
        k += 1;  g = down(G);  r = G - up(g)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        W -= lr * proj_lr_scale * up((m / (1 - beta1^k)) / (sqrt(v / (1 - beta2^k)) + eps))
        W -= lr * proj_lr_scale * free_lr_scale * f(r)          f = sign | identity | 0

    Parameters that are not projected get the inner rule with full state. A parameter group says which
    with the key `projected`: True (all of its parameters), False (none), or None, the default (those of
    two and more dimensions). So `Frugal(model.parameters())` keeps full state for biases and
    norms and projects everything else, **embeddings and output head included**; `for_model` or
    `frugal_param_groups` leave those out, which is the paper's setting.

    With `projection="blocks"` the unit is a whole tensor: `round(density * count)` of a group's projected tensors
    are active, the others hold no state at all. One tensor per group is therefore never split: use `columns`
    for few tensors (a warning says so when the count rounds to zero). The other projections take a
    part of each tensor; see `headway.optim.subspace.draw`. State: about `density * 2` numbers per projected weight,
    `state_bytes()` tells. Moments of 16-bit parameters are kept in fp32.

    Args:
        params: parameters or parameter groups; every argument below except `generator` may differ by group.
        lr: learning rate, > 0. Default 1e-3 (official code).
        betas: decay of m and v, each in [0, 1). Default (0.9, 0.999) (official code). `sgdm` uses the first as its
            momentum; Lion's own default is (0.9, 0.99).
        eps: added to the denominator, > 0. Default 1e-8 (official code).
        weight_decay: decoupled weight decay, >= 0. Default 0 (pre-training scripts).
        projection: `blocks`, `columns`, `rows`, `randk`, `randperm`, `random` or `svd`. Default `blocks`, what the
            authors run in pre-training; `columns` is what they run in fine-tuning.
        density: fraction of the projected weights that has state, in [0, 1]. Default 0.25 (paper's main experiments).
        update_gap: steps between changes of the subspace, >= 1. Default 200 (paper's main experiments).
        on_change: what becomes of k, m, v then. `reset` (default, official code): they restart. `keep`: they stay,
            in the new basis (as GaLore does); a block keeps them while it stays active. `reproject`, for coordinate
            projections: entries in the old and the new subspace keep theirs, new ones start at zero.
        state_free: rule for the residual: `sign` (default), `sgd` or `none`.
        free_lr_scale: its learning rate relative to the inner rule's, >= 0. Default 1 (pre-training). A sign step has
            the size of an Adam step, so fine-tuning uses 0.1.
        proj_lr_scale: learning rate of projected parameters relative to `lr`, >= 0. Default 1.
        block_order: `random` (default, official code), `ascending`, `descending` (the pre-training scripts) or
            `mirror` (equally many from both ends; needs an even number of active tensors).
        inner: `adamw` (default), `sgdm` (m = beta1 * m + g, step lr * m) or `lion`.
        state_bits: 32 (default), or 8: m and v of 4096 and more entries are kept as block-wise 8-bit codes
            (`headway.optim.quantized_state`). Indices, bases and, with `reproject`, counts stay as they are.
        maximize: ascend instead of descend.
        generator: source of the one seed that all draws follow. Default: seed 0. The seed must be the same
            on all data-parallel ranks; draws depend on it, on the parameter's place and on the number of
            changes, and so agree on all ranks and after a resume.

    Raises:
        ValueError: an argument outside its range, also in a parameter group; a tensor of fewer than two dimensions with
            `projected=True` and any projection other than `blocks` and `randk`; `mirror` with an odd number of
            active tensors; `reproject` with `svd` or `random`; complex parameters; sharded
            ones with `state_bits=8`.
        RuntimeError: sparse gradients.
        FloatingPointError: a gradient that is not finite; nothing is changed.

    Source: Zmushko et al., arXiv 2411.07837, and the authors' code (fzmushko/FRUGAL at c7ebe4c). Departures from the
    code: one counter per group, not the first parameter's own, drives `update_gap`; a full-rank subspace
    has no state-free step and residuals that are rounding noise count as zero (`Basis.residual`), both of
    which the code turns into full-size sign steps; `sgdm` starts from a zero buffer and decays decoupled;
    `reproject` follows a summary of the paper and counts k per entry, so that bias correction is
    exact for entries that stay and for new ones. As in the code, the sign is taken in the full space, so with `svd` and
    `random` the state-free step reaches back into the subspace.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(8, 8)
        >>> optimizer = Frugal(layer.parameters(), lr=1e-2, projection="columns", density=0.25)
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state_bytes()  # two moments of 8 x 2 weights, their 2 indices, two moments of 8 biases
        208
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Range(low=0, low_open=True),
        "betas": Range(low=0, high=1, high_open=True, length=2),
        "eps": Range(low=0, low_open=True),
        "weight_decay": Range(low=0),
        "projection": OneOf("blocks", *TENSOR_PROJECTIONS),
        "density": Range(low=0, high=1),
        "update_gap": Range(low=1, integer=True),
        "on_change": OneOf("reset", "keep", "reproject"),
        "state_free": OneOf("sign", "sgd", "none"),
        "free_lr_scale": Range(low=0),
        "proj_lr_scale": Range(low=0),
        "block_order": OneOf(*BLOCK_ORDERS),
        "inner": OneOf("adamw", "sgdm", "lion"),
        "state_bits": STATE_BITS,
        "maximize": OneOf(False, True),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        projection: str = "blocks",
        density: float = 0.25,
        update_gap: int = 200,
        on_change: str = "reset",
        state_free: str = "sign",
        free_lr_scale: float = 1.0,
        proj_lr_scale: float = 1.0,
        block_order: str = "random",
        inner: str = "adamw",
        state_bits: int = 32,
        maximize: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        arguments = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "projection": projection,
            "density": density,
            "update_gap": update_gap,
            "on_change": on_change,
            "state_free": state_free,
            "free_lr_scale": free_lr_scale,
            "proj_lr_scale": proj_lr_scale,
            "block_order": block_order,
            "inner": inner,
            "state_bits": state_bits,
            "maximize": maximize,
        }
        check_arguments(self.constraints, **arguments)
        seed = 0
        if generator is not None:
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
        # `step` and `change` count steps and subspace changes of a group. In the group, they and the seed are saved,
        # copied and loaded by everything that handles optimizers.
        super().__init__(params, {**arguments, "projected": None, "seed": seed, "step": 0, "change": 0})

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        target_modules: str | Sequence[str] | None = None,
        include_embeddings: bool = False,
        include_norms: bool = False,
        include_head: bool = False,
        **hyperparameters: Any,
    ) -> Frugal:
        """An optimizer for `model` with the grouping of `frugal_param_groups`.

        >>> import torch
        >>> optimizer = Frugal.for_model(torch.nn.TransformerEncoderLayer(16, 2, 32), lr=1e-3, density=0.5)
        >>> [group["projected"] for group in optimizer.param_groups]
        [True, False]
        """
        groups = frugal_param_groups(model, target_modules, include_embeddings, include_norms, include_head)
        return cls(groups, **hyperparameters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; hyper-parameters of the group are checked like the constructor's."""
        group = {**self.defaults, **param_group, "step": 0, "change": 0}
        check_arguments(self.constraints, **{name: group[name] for name in self.constraints})
        check_arguments({"projected": OneOf(None, False, True)}, projected=group["projected"])
        super().add_param_group(group)
        try:
            _check_tensors(self.param_groups[-1])
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
        for group_index, (group, ready) in enumerate(
            zip(self.param_groups, gradients("Frugal", self.param_groups), strict=True)
        ):
            if not ready:
                continue
            self._change_subspace(group_index, group)
            if group["weight_decay"] != 0:
                torch._foreach_mul_(ready, 1 - group["lr"] * group["weight_decay"])

            projected = [parameter for parameter in ready if _is_projected(group, parameter)]
            regular = [parameter for parameter in ready if not _is_projected(group, parameter)]
            lr = group["lr"] * group["proj_lr_scale"]
            self._full_steps(group, regular, group["lr"])
            if group["projection"] == "blocks":
                self._full_steps(group, [parameter for parameter in projected if parameter in self.state], lr)
                self._free_steps(group, [parameter for parameter in projected if parameter not in self.state], lr)
            else:
                self._subspace_steps(group_index, group, projected, lr)
        return loss

    def _change_subspace(self, group_index: int, group: dict[str, Any]) -> None:
        """Count the step; at a change, pick the active blocks. The other projections are drawn at the next gradient."""
        due = group["step"] % group["update_gap"] == 0
        group["step"] += 1
        if not due:
            return
        group["change"] += 1
        if group["projection"] != "blocks":
            return
        blocks = [parameter for parameter in group["params"] if _is_projected(group, parameter)]
        generator = seeded_generator(group["seed"], group_index, group["change"])
        active = set(active_blocks(len(blocks), group["density"], group["block_order"], group["change"] - 1, generator))
        for position, parameter in enumerate(blocks):
            if position not in active:
                self.state.pop(parameter, None)
            elif parameter not in self.state or group["on_change"] == "reset":
                self.state[parameter] = {"step": 0}

    def _full_steps(self, group: dict[str, Any], parameters: list[Tensor], lr: float) -> None:
        """The inner rule with state for every entry."""
        for batch in batches(parameters):
            states = [self.state[parameter] for parameter in batch]
            gradients = _gradients(batch, group["maximize"])
            numerators, denominators, factors = _inner_rule(group, gradients, states, lr)
            if denominators is None:
                torch._foreach_add_(batch, numerators, alpha=-lr)
            else:
                torch._foreach_addcdiv_(batch, numerators, denominators, factors)

    def _free_steps(self, group: dict[str, Any], parameters: list[Tensor], lr: float) -> None:
        """The rule without state on whole gradients."""
        if group["state_free"] == "none":
            return
        alpha = lr * group["free_lr_scale"] * (1 if group["maximize"] else -1)
        for batch in batches(parameters):
            gradients = [cast(Tensor, parameter.grad) for parameter in batch]
            directions = torch._foreach_sign(gradients) if group["state_free"] == "sign" else gradients
            torch._foreach_add_(batch, directions, alpha=alpha)

    def _subspace_steps(self, group_index: int, group: dict[str, Any], parameters: list[Tensor], lr: float) -> None:
        """The inner rule in each tensor's subspace and the state-free rule on the residual."""
        positions = {parameter: position for position, parameter in enumerate(group["params"])}
        for batch in batches(parameters):
            matrices = [as_matrix(gradient) for gradient in _gradients(batch, group["maximize"])]
            subspaces = []
            for parameter, matrix in zip(batch, matrices, strict=True):
                counters = (group_index, group["change"], positions[parameter])
                subspaces.append(self._subspace(group, self.state[parameter], matrix, counters))
            smalls = [subspace.down(matrix) for subspace, matrix in zip(subspaces, matrices, strict=True)]
            states = [self.state[parameter] for parameter in batch]
            numerators, denominators, factors = _inner_rule(group, smalls, states, lr)
            steps = torch._foreach_mul(numerators, factors)
            if denominators is not None:
                torch._foreach_div_(steps, denominators)
            updates = [
                _with_free_step(group, matrix, subspace, small, step, lr).view(parameter.shape)
                for parameter, matrix, subspace, small, step in zip(
                    batch, matrices, subspaces, smalls, steps, strict=True
                )
            ]
            torch._foreach_add_(batch, updates)

    def _subspace(
        self, group: dict[str, Any], state: dict[str, Any], matrix: Tensor, counters: tuple[int, ...]
    ) -> Subspace:
        """A parameter's subspace, drawn anew if the group has changed since it was drawn."""
        projection, shape = group["projection"], matrix.shape
        if state.get("change") == group["change"]:
            return restore(projection, state["projector"], shape)
        new = draw(projection, matrix, group["density"], seeded_generator(group["seed"], *counters))
        if not state or group["on_change"] == "reset" or new.tensor.shape != state["projector"].shape:
            state.clear()
            state["step"] = 0
        elif group["on_change"] == "reproject":
            old = cast(Coordinates, restore(projection, state["projector"], shape))
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False), ("momentum_buffer", True)):
                if name in state:
                    moment = reproject(read(state, name, signed=signed), old, new, shape)
                    write(state, name, moment, signed=signed)
            if "age" in state:
                state["age"] = reproject_units(state["age"], old, cast(Coordinates, new), shape)
        if group["on_change"] == "reproject" and group["inner"] == "adamw" and "age" not in state:
            state["age"] = cast(Coordinates, new).units(matrix, fill=state["step"])
        state.update(change=group["change"], projector=new.tensor)
        return new


def frugal_param_groups(
    model: nn.Module,
    target_modules: str | Sequence[str] | None = None,
    include_embeddings: bool = False,
    include_norms: bool = False,
    include_head: bool = False,
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into a projected and a regular group for `Frugal`.

    Projected by default: the weight of every linear layer (`nn.Linear`, GPT-2's `Conv1D`) except the output head,
    which in a transformer is attention and MLP. The head is what `model.get_output_embeddings()` returns, and
    modules below a name such as `lm_head`, `classifier` or `head`. A head that is tied to the embedding is one
    parameter, projected if either `include_embeddings` or `include_head` says so. Both groups keep the model's order.

    Args:
        model: any module; Hugging Face models included.
        target_modules: name or names; linear layers whose qualified name contains one of them are projected,
            and no others.
        include_embeddings: project the weights of `nn.Embedding` too.
        include_norms: project the parameters of normalisation layers too (`blocks` or `randk` only: they are 1-D).
        include_head: project the weight of the output head too.

    Returns:
        The groups that are not empty, `{"params": [...], "projected": True}` first.

    Raises:
        ValueError: no linear layer's name contains any of `target_modules`.

    Source: the authors' code (fzmushko/FRUGAL at c7ebe4c), which goes by a fixed list of names for attention and MLP
    and appends embeddings, norms and head to the end of the group.

    >>> model = torch.nn.Sequential()
    >>> model.add_module("embed", torch.nn.Embedding(10, 4))
    >>> model.add_module("mlp", torch.nn.Linear(4, 4))
    >>> model.add_module("head", torch.nn.Linear(4, 10))
    >>> [[tuple(p.shape) for p in group["params"]] for group in frugal_param_groups(model)]
    [[(4, 4)], [(10, 4), (4,), (10, 4), (10,)]]
    """
    chosen = hidden_matrices(model, target_modules, include_head)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            if include_embeddings:
                chosen.add(id(module.weight))
        elif include_norms and "norm" in type(module).__name__.lower():
            chosen.update(id(parameter) for parameter in module.parameters(recurse=False))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trainable if id(parameter) in chosen], "projected": True},
        {"params": [parameter for parameter in trainable if id(parameter) not in chosen], "projected": False},
    ]
    return [group for group in groups if group["params"]]


def _is_projected(group: dict[str, Any], parameter: Tensor) -> bool:
    return parameter.ndim >= 2 if group["projected"] is None else group["projected"]


def _check_tensors(group: dict[str, Any]) -> None:
    """Refuse what a group's projection cannot handle."""
    projection, projected = group["projection"], [p for p in group["params"] if _is_projected(group, p)]
    if any(parameter.is_complex() for parameter in group["params"]):
        raise ValueError("params must be real, got a complex tensor")
    if group["state_bits"] == 8:
        refuse_sharded("Frugal", group["params"], SHARDED)
    if group["on_change"] == "reproject" and projection not in ("blocks", *COORDINATE_PROJECTIONS):
        raise ValueError(f"on_change must be 'reset' or 'keep' with projection={projection!r}, got 'reproject'")
    if projection == "blocks":
        active = len(active_blocks(len(projected), group["density"], group["block_order"], 0, torch.Generator()))
        if projected and group["density"] > 0 and active == 0:
            warnings.warn(
                f"density {group['density']} of {len(projected)} projected tensors rounds to no active block: "
                "none of them gets a state; projection='columns' splits each tensor instead",
                stacklevel=5,
            )
    elif projection != "randk" and any(parameter.ndim < 2 for parameter in projected):
        shape = next(tuple(parameter.shape) for parameter in projected if parameter.ndim < 2)
        raise ValueError(f"params must have two or more dimensions with projection={projection!r}, got shape {shape}")


def _gradients(parameters: list[Tensor], maximize: bool) -> list[Tensor]:
    """Gradients to descend along, in fp32 for 16-bit parameters."""
    gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
    if any(gradient.dtype in (torch.bfloat16, torch.float16) for gradient in gradients):
        gradients = [g.float() if g.dtype in (torch.bfloat16, torch.float16) else g for g in gradients]
    return list(torch._foreach_neg(gradients)) if maximize else gradients


def _inner_rule(
    group: dict[str, Any], gradients: list[Tensor], states: list[dict[str, Any]], lr: float
) -> tuple[list[Tensor], list[Tensor] | None, list[float]]:
    """Advance the states; the step is factor * numerator / denominator, and without denominators `-lr` * numerator."""
    beta1, beta2 = group["betas"]
    bits = group["state_bits"]
    for state in states:
        state["step"] = state.get("step", 0) + 1
    factors = [-lr] * len(states)
    if group["inner"] == "sgdm":
        buffers = _read(states, "momentum_buffer", gradients, bits)
        torch._foreach_mul_(buffers, beta1)
        torch._foreach_add_(buffers, gradients)
        _write(states, "momentum_buffer", buffers)
        return buffers, None, factors
    means = _read(states, "exp_avg", gradients, bits)
    if group["inner"] == "lion":
        directions = torch._foreach_lerp(means, gradients, 1 - beta1)
        torch._foreach_sign_(directions)
        torch._foreach_lerp_(means, gradients, 1 - beta2)
        _write(states, "exp_avg", means)
        return list(directions), None, factors
    squares = _read(states, "exp_avg_sq", gradients, bits, signed=False)
    # The operations of torch.optim.AdamW in their order, so that full density is AdamW to the bit.
    torch._foreach_lerp_(means, gradients, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
    _write(states, "exp_avg", means)
    _write(states, "exp_avg_sq", squares, signed=False)
    denominators = list(torch._foreach_sqrt(squares))
    if "age" in states[0]:
        ages = [state["age"].add_(1) for state in states]
        corrections = [_bias_correction(beta2, age).sqrt_() for age in ages]
        for denominator, correction in zip(denominators, corrections, strict=True):
            denominator.div_(correction)
        means = [mean / _bias_correction(beta1, age) for mean, age in zip(means, ages, strict=True)]
    else:
        torch._foreach_div_(denominators, [(1 - beta2 ** state["step"]) ** 0.5 for state in states])
        factors = [-(lr / (1 - beta1 ** state["step"])) for state in states]
    torch._foreach_add_(denominators, group["eps"])
    return means, denominators, factors


def _read(
    states: list[dict[str, Any]], name: str, gradients: list[Tensor], bits: int, signed: bool = True
) -> list[Tensor]:
    for state, gradient in zip(states, gradients, strict=True):
        if name not in state:
            create(state, name, gradient, bits, signed=signed)
    return [read(state, name, signed=signed, like=like) for state, like in zip(states, gradients, strict=True)]


def _write(states: list[dict[str, Any]], name: str, moments: list[Tensor], signed: bool = True) -> None:
    for state, moment in zip(states, moments, strict=True):
        write(state, name, moment, signed=signed)


def _bias_correction(beta: float, age: Tensor) -> Tensor:
    """1 - beta^age, without the cancellation of fp32 for beta near 1."""
    return torch.expm1(age * math.log(beta)).neg_() if beta > 0 else torch.ones_like(age)


def _with_free_step(
    group: dict[str, Any], matrix: Tensor, subspace: Subspace, small: Tensor, step: Tensor, lr: float
) -> Tensor:
    """The whole change of a matrix: `up(step)` and the state-free step on the residual."""
    if group["state_free"] == "none" or subspace.is_full(matrix.shape):
        return subspace.up(step, matrix.shape)
    # Coordinates overwrite their own entries in the end, so the gradient itself serves as the residual.
    residual = matrix if isinstance(subspace, Coordinates) else subspace.residual(matrix, small)
    free_lr = lr * group["free_lr_scale"]
    free = torch.sign(residual).mul_(-free_lr) if group["state_free"] == "sign" else residual * -free_lr
    return subspace.merge_(free, step)
