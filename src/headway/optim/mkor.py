"""MKOR: Kronecker-factored preconditioning at the cost of vectors, around any optimizer.

    U = G_inv [dW, db] A_inv

where the inverse factors of a layer are kept up to date by rank-1 updates with the batch means of its inputs and of
its output gradients. Source: Mozaffari et al., NeurIPS 2023, arXiv 2306.01685.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from headway.catalogue import get
from headway.config.methods import build_optimizer
from headway.config.schema import MethodSection
from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.kernels.finite import first_nonfinite
from headway.optim.checks import gradients, refuse_sharded
from headway.optim.wrapper import OptimizerWrapper

__all__ = ["MKOR", "HybridSwitch", "update_inverse"]


class MKOR(OptimizerWrapper):
    """Preconditions the gradients of a model's linear and convolutional layers, then lets another optimizer step.

    A layer with weight W (out x in; a kernel is flattened) and a bias, which counts as the weight of an input that is
    1, has the gradient Gm = [dW, db] and two symmetric matrices that are the identity at first. Every `inv_freq`
    steps, and at each of the first `warmup_steps`::

        a = mean over rows of clamp(input, -clip, clip)                 rows: batch and sequence positions
        g = mean over rows of clamp(n dL/d(output), -clip, clip)        n: number of rows
        A_inv = update_inverse(A_inv, a);  G_inv = update_inverse(G_inv, g)

    and at every step::

        U = G_inv Gm A_inv
        [dW, db] = U (|dW| + |db|) / (|U_W| + |U_b|)

    A convolution's a and g are averaged over positions first. `variant` says how a factor P takes a vector v, and
    `reset` what happens when an entry of P exceeds `reset_threshold`:

    - `official`: P = inverse of (Q^-1 + v v^T), Q = decay P + (1 - decay) I. The first refresh leaves P = I, whatever
      v is. All eigenvalues stay in (0, 1]. Where a factor trips, both of its layer are reset, in place of the next
      update.
    - `exact`: P = inverse of decay P^-1 + (1 - decay) v v^T, the running second moment of v. It grows like
      decay^-t in directions that no v has, so that resets, before the update, are routine.

    It helps where inputs or output gradients have a large common mean; on centred data it does what the inner
    optimizer does. Means of gradients vanish near convergence, and G_inv tends to I.

    Tracked are modules that are exactly `nn.Linear` or `nn.Conv2d` (without groups), whose weight the inner optimizer
    has and no other module shares. Statistics come from forwards in training mode with gradients enabled, and enter
    when their backward reaches the layer; a layer may be called once per forward. The loss is a mean over rows; with
    gradient accumulation over k backward passes, each loss is divided by k as usual, and every pass counts equally.
    Statistics are in fp32 or the parameters' float64. Hooks stop a compiled model's graph at each tracked layer.

    Groups, state and learning rates are those of the inner optimizer. `state_dict` adds the key `mkor`; without
    it, `load_state_dict` begins with new factors.

    Args:
        model: the model, or its DDP wrapper. Its hooks hold no reference to the optimizer.
        inner: an optimizer of the model's parameters, or of some of them.
        decay: in (0, 1). Default 0.95 (official code).
        inv_freq: steps between refreshes, >= 1. Default 10 (official code).
        variant: `official` (default) or `exact`.
        reset: `identity` (default, what the official code does): P = I; or `blend`: P = (1 - blend) P + blend I.
        reset_threshold: of the largest entry, > 0. Default 2 (official code).
        blend: in [0, 1]. Default 0.1 (official code, without effect there).
        clip: bound of the statistics, > 0. Default 100 (official code).
        warmup_steps: first steps, each of which refreshes, >= 0. Default 0.
        skip_modules: modules, or their names, to leave alone, with all that they contain. Default: none.
        factor_dtype: in which factors are stored, floating. Default fp32; updates are in fp32 at least.
        rescale: keep the norm of each layer's gradient. Default True (official code).
        grad_scale: what the loss is multiplied with before backward, > 0. Default 1. With a GradScaler set the
            attribute `grad_scale` to `scaler.get_scale()` before each backward.
        process_group: ranks that average the vectors, in one buffer of (in + 1) + out numbers per layer. Default None:
            all of them, if torch.distributed is initialised. Gradients are DDP's to average.
        hybrid: None (default), or a `HybridSwitch`, fed by `observe(loss)`: MKOR-H.

    Raises:
        TypeError: `inner` is not an optimizer, or has no parameter of the model.
        ValueError: an argument outside its range; an unknown name in `skip_modules`; sharded weights.
        RuntimeError: at a refresh, a layer has a gradient and saw no backward, or was called twice in a forward;
            sparse gradients.
        FloatingPointError: a gradient or a statistic that is not finite; nothing was changed.

    Source: arXiv 2306.01685 and the authors' code (Mohammad-Mozaffari/mkor at 3a0e3bb), with which `official` agrees;
    there vectors are averaged over ranks twice, and the decay and the blend are fixed. As the paper's equation is
    remembered, it adds where the code subtracts, and so is not an inverse: not offered. MKOR-H is not in the
    code.

    Cost of a refresh: two products of a matrix and a vector and a rank-1 update per layer; of a step: two products of
    matrices per layer. State: in^2 + out^2 numbers per layer, from the first refresh that uses data.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1), inv_freq=1)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(4, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> sorted(optimizer.state_dict()["mkor"]["layers"])
        ['0', '2']
    """

    needs_model: ClassVar[bool] = True
    constraints: ClassVar[Mapping[str, Constraint]] = {
        "decay": Range(low=0, high=1, low_open=True, high_open=True),
        "inv_freq": Range(low=1, integer=True),
        "variant": OneOf("official", "exact"),
        "reset": OneOf("identity", "blend"),
        "reset_threshold": Range(low=0, low_open=True),
        "blend": Range(low=0, high=1),
        "clip": Range(low=0, low_open=True),
        "warmup_steps": Range(low=0, integer=True),
        "rescale": OneOf(False, True),
        "grad_scale": Range(low=0, low_open=True),
    }

    def __init__(
        self,
        model: nn.Module,
        inner: Optimizer,
        *,
        decay: float = 0.95,
        inv_freq: int = 10,
        variant: str = "official",
        reset: str = "identity",
        reset_threshold: float = 2.0,
        blend: float = 0.1,
        clip: float = 100.0,
        warmup_steps: int = 0,
        skip_modules: Sequence[str | nn.Module] = (),
        factor_dtype: torch.dtype = torch.float32,
        rescale: bool = True,
        grad_scale: float = 1.0,
        process_group: dist.ProcessGroup | None = None,
        hybrid: HybridSwitch | None = None,
    ) -> None:
        check_arguments(
            self.constraints,
            decay=decay,
            inv_freq=inv_freq,
            variant=variant,
            reset=reset,
            reset_threshold=reset_threshold,
            blend=blend,
            clip=clip,
            warmup_steps=warmup_steps,
            rescale=rescale,
            grad_scale=grad_scale,
        )
        if not factor_dtype.is_floating_point:
            raise ValueError(f"factor_dtype must be a floating type, got {factor_dtype}")
        super().__init__(inner)
        owned = {p for group in inner.param_groups for p in group["params"]}
        if owned.isdisjoint(model.parameters()):
            raise TypeError("inner must be an optimizer of the model's parameters, got one that has none of them")
        self.decay = decay
        self.inv_freq = inv_freq
        self.variant = variant
        self.reset = reset
        self.reset_threshold = reset_threshold
        self.blend = blend
        self.clip = clip
        self.warmup_steps = warmup_steps
        self.factor_dtype = factor_dtype
        self.rescale = rescale
        self.grad_scale = grad_scale
        self.process_group = process_group
        self.hybrid = copy.deepcopy(hybrid)
        self.model = model
        self.steps = 0
        self.active = True
        self._skipped = _names(model, skip_modules)
        self._layers: list[_Layer] = []
        self._handles: list[RemovableHandle] = []
        self._attach()

    @classmethod
    def from_parameters(
        cls,
        params: Iterable[Any],
        *,
        module: nn.Module | None = None,
        inner: str | type[Optimizer] = "sgd",
        lr: float = 1e-3,
        **options: Any,
    ) -> MKOR:
        """For parameters, or groups, of `module`; `inner` is a slug of the catalogue or a class, options go to both."""
        if module is None:
            raise TypeError("MKOR.from_parameters needs module, the model that the parameters belong to")
        inner_class: Any = get(inner, "optimizer").load() if isinstance(inner, str) else inner
        own = _take_own(options)
        return cls(module, inner_class(params, lr=lr, **options), **own)

    @classmethod
    def for_model(
        cls, model: nn.Module, *, inner: str = "adamw", lr: float = 1e-3, max_width: int = 8192, **options: Any
    ) -> MKOR:
        """For all of a model's parameters, grouped as the inner optimizer wants them; what `headway train` builds.

        Args:
            model: any module.
            inner: slug of the optimizer to wrap (`headway methods --role optimizer`). Default `adamw`.
            lr: its learning rate. Default 1e-3.
            max_width: linear layers with more inputs or outputs, such as the head of a large vocabulary, are left
                alone. Default 8192, where a factor takes 256 MiB.
            **options: arguments of MKOR and of the inner optimizer.

        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 30000))
        >>> list(MKOR.for_model(model, lr=1e-3).state_dict()["mkor"]["layers"])
        ['0']
        """
        own = _take_own(options)
        wide = [
            module
            for module in model.modules()
            if isinstance(module, nn.Linear) and max(module.in_features, module.out_features) > max_width
        ]
        own["skip_modules"] = [*own.get("skip_modules", ()), *wide]
        section = MethodSection.model_validate({"name": inner, "lr": lr, **options})
        return cls(model, build_optimizer(section, model), **own)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in the inner optimizer; layers whose weight is new to it are tracked from here on."""
        super().add_param_group(param_group)
        if self.active:
            self._attach()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; what backward passes have left for a refresh goes with the gradients."""
        super().zero_grad(set_to_none)
        for layer in self._layers:
            layer.clear()

    def observe(self, loss: Any) -> None:
        """Show the loss of a step to the hybrid switch, on every rank; rank 0 decides for all.

        Raises:
            RuntimeError: there is no hybrid switch.
        """
        if self.hybrid is None:
            raise RuntimeError("MKOR.observe needs hybrid=HybridSwitch()")
        if not self.active:
            return
        decision = self.hybrid.observe(loss)
        if decision is None:
            return
        if _world_size(self.process_group) > 1:
            message = torch.tensor(float(decision), device=next(self.model.parameters()).device)
            dist.broadcast(message, group_src=0, group=self.process_group)
            decision = bool(message)
        if decision:
            self.remove_hooks()

    def statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer, a and g of the backward passes since the last step, as a refresh uses them on this rank."""
        return {layer.name: (layer.a / layer.passes, layer.g) for layer in self._layers if layer.passes}

    def remove_hooks(self) -> None:
        """Leave the model; from here on each step is the inner optimizer's alone, and the factors are freed."""
        self.active = False
        self._detach()
        self._layers = []

    def before_step(self) -> None:
        """Refresh the factors if it is time, and precondition the gradients."""
        if not any(gradients("MKOR", self.param_groups)) or not self.active:
            return
        layers = [layer for layer in self._layers if layer.module.weight.grad is not None]
        if self._due():
            self._refresh(layers)
        for layer in layers:
            layer.precondition(self.rescale)
        for layer in self._layers:
            layer.clear()
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, and under `mkor` the factors by layer, their flags and the counters."""
        own = {
            "steps": self.steps,
            "active": self.active,
            "layers": {layer.name: layer.state_dict() for layer in self._layers},
            "hybrid": None if self.hybrid is None else self.hybrid.state_dict(),
        }
        return {**self.optimizer.state_dict(), "mkor": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch. Raises `ValueError` if the state is of other layers; nothing is changed then."""
        own = state_dict.get("mkor", {"steps": 0, "active": True, "layers": None, "hybrid": None})
        layers = self._tracked() if own["active"] else []
        names = [layer.name for layer in layers]
        if own["layers"] is not None and own["layers"].keys() != set(names):
            raise ValueError(f"the state must be of the layers {names}, got one of {list(own['layers'])}")
        self.optimizer.load_state_dict({name: value for name, value in state_dict.items() if name != "mkor"})
        self._layers = layers
        for layer in layers:
            layer.load_state_dict((own["layers"] or {}).get(layer.name))
        if self.hybrid is not None and own["hybrid"] is not None:
            self.hybrid.load_state_dict(own["hybrid"])
        self.steps, self.active = own["steps"], own["active"]
        self._detach()
        if self.active:
            self._attach()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_layers" in state:  # a copy: its model's hooks came along without an owner
            self._handles = []
            if self.active:
                self._attach()

    def _due(self) -> bool:
        return self.steps % self.inv_freq == 0 or self.steps < self.warmup_steps

    def _tracked(self) -> list[_Layer]:
        """The layers to precondition, in the model's order; those of `_layers` as they are."""
        known = {layer.name: layer for layer in self._layers}
        owned = {p for group in self.param_groups for p in group["params"]}
        users = Counter(p for module in self.model.modules() for p in module.parameters(recurse=False))
        layers: list[_Layer] = []
        for name, module in self.model.named_modules():
            # Subclasses may be used without being called, as the projection of nn.MultiheadAttention.
            if type(module) not in (nn.Linear, nn.Conv2d) or getattr(module, "groups", 1) != 1:
                continue
            if name not in self._skipped and module.weight in owned and users[module.weight] == 1:
                refuse_sharded("MKOR", [module.weight], "it preconditions whole gradient matrices")
                layers.append(known.get(name) or _Layer(name, module))
        return layers

    def _attach(self) -> None:
        self._detach()
        self._layers = self._tracked()
        for layer in self._layers:
            _Tap.clean(layer.module)
            self._handles.append(layer.module.register_forward_hook(_Tap(self, layer), with_kwargs=True))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _refresh(self, layers: Sequence[_Layer]) -> None:
        for layer in layers:
            if layer.passes == 0:
                raise RuntimeError(
                    f"MKOR: the layer '{layer.name}' has a gradient, but no backward went through a call of it in "
                    "training mode since the last step; if it is used without being called, or in evaluation mode, put "
                    "it into skip_modules"
                )
        vectors = [layer.a / layer.passes for layer in layers] + [layer.g for layer in layers]
        _average(vectors, self.process_group)
        bad = first_nonfinite(vectors)
        if bad is not None:
            name = layers[bad % len(layers)].name
            raise FloatingPointError(f"MKOR: the statistics of the layer '{name}' are not finite; nothing was changed")
        count = len(layers)
        update = partial(update_inverse, decay=self.decay, variant=self.variant)
        if self.variant == "exact":
            for layer, trips in zip(layers, self._trips(layers), strict=True):
                layer.factors = [self._stable(P) if trip else P for P, trip in zip(layer.factors, trips, strict=True)]
        for layer, a, g in zip(layers, vectors[:count], vectors[count:], strict=True):
            if self.variant == "official" and layer.reset:
                layer.factors = [self._stable(P) for P in layer.factors]
                layer.reset = False
                continue
            layer.factors = [
                update(_wide_factor(P, v, self.factor_dtype), v).to(self.factor_dtype)
                for P, v in zip(layer.factors, (a, g), strict=True)
            ]
        if self.variant == "official":
            for layer, trips in zip(layers, self._trips(layers), strict=True):
                layer.reset = layer.reset or any(trips)

    def _trips(self, layers: Sequence[_Layer]) -> list[list[bool]]:
        """For both factors of each layer, whether an entry exceeds the threshold; one number list read for all."""
        factors = [P for layer in layers for P in layer.factors if P is not None]
        sizes = iter(torch.stack([P.abs().amax().float() for P in factors]).tolist() if factors else [])
        return [[False if P is None else next(sizes) > self.reset_threshold for P in layer.factors] for layer in layers]

    def _stable(self, P: Tensor | None) -> Tensor | None:
        if P is None or self.reset == "identity":
            return None
        P = (1 - self.blend) * P
        P.diagonal().add_(self.blend)
        return P


class HybridSwitch:
    """When MKOR-H goes over to its inner optimizer: once preconditioning no longer brings the loss down quickly.

    After every `window` steps, with L the mean loss of the window::

        r = (L_before - L) / (|L_before| window)
        best = max(best, r)

    and after `patience` windows in a row with r < tau best the switch is thrown, for good.

    Args:
        window: steps, >= 1. Default 50.
        tau: fraction of the best rate, in [0, 1]. Default 0.1.
        patience: windows, >= 1. Default 3.

    Raises:
        ValueError: an argument outside its range.

    Source: the abstract of arXiv 2306.01685 has the switch, but not its rule; rule and defaults are this project's.

    >>> switch = HybridSwitch(window=1, tau=0.5, patience=2)
    >>> [switch.observe(loss) for loss in (8.0, 4.0, 3.9, 3.8)]
    [False, False, False, True]
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        "window": Range(low=1, integer=True),
        "tau": Range(low=0, high=1),
        "patience": Range(low=1, integer=True),
    }

    def __init__(self, window: int = 50, tau: float = 0.1, patience: int = 3) -> None:
        check_arguments(self.constraints, window=window, tau=tau, patience=patience)
        self.window = window
        self.tau = tau
        self.patience = patience
        self._total: Any = 0.0
        self._count = 0
        self._before: float | None = None
        self._best = 0.0
        self._low = 0

    def observe(self, loss: Any) -> bool | None:
        """Count one loss; at the end of a window whether to switch, otherwise None. Reads the device there alone.

        A window whose mean is not finite counts for nothing.
        """
        self._total = self._total + (loss.detach() if isinstance(loss, Tensor) else loss)
        self._count += 1
        if self._count < self.window:
            return None
        mean = float(self._total) / self._count
        self._total, self._count = 0.0, 0
        if not math.isfinite(mean):
            return False
        if self._before is not None and self._before != 0:
            rate = (self._before - mean) / (abs(self._before) * self.window)
            self._best = max(self._best, rate)
            self._low = self._low + 1 if rate < self.tau * self._best else 0
        self._before = mean
        return self._low >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "total": float(self._total),
            "count": self._count,
            "before": self._before,
            "best": self._best,
            "low": self._low,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` returned."""
        self._total, self._count = state["total"], state["count"]
        self._before, self._best, self._low = state["before"], state["best"], state["low"]


def update_inverse(P: Tensor, v: Tensor, *, decay: float, variant: str = "official") -> Tensor:
    """The inverse factor P (d, d) after a vector v (d,), by the Sherman-Morrison formula; symmetric if P is.

    `official`: the inverse of Q^-1 + v v^T, where Q = decay P + (1 - decay) I. `exact`: the inverse of
    decay P^-1 + (1 - decay) v v^T. One product with v and one rank-1 update: 4 d^2 operations.

    >>> P = torch.eye(2, dtype=torch.float64)
    >>> v = torch.tensor([3.0, 0.0], dtype=torch.float64)
    >>> update_inverse(P, v, decay=0.5, variant="exact")  # of diag(0.5 + 0.5 * 9, 0.5)
    tensor([[0.2000, 0.0000],
            [0.0000, 2.0000]], dtype=torch.float64)
    """
    column = v.to(P.dtype).unsqueeze(1)  # [d, 1]
    if variant == "exact":
        u = P @ column
        w = u * ((1 - decay) / (decay + (1 - decay) * (column.T @ u))).sqrt()
        return torch.addmm(P, w, w.T, alpha=-1).div_(decay)
    u = torch.addmm(column, P, column, beta=1 - decay, alpha=decay)  # Q v
    w = u / (1 + column.T @ u).sqrt()
    updated = torch.addmm(P, w, w.T, beta=decay, alpha=-1)
    updated.diagonal().add_(1 - decay)
    return updated


@dataclass(eq=False)
class _Layer:
    """A tracked layer: its factors A_inv and G_inv (None: the identity), and the sums of the passes since a step."""

    name: str
    module: Any

    def __post_init__(self) -> None:
        self.load_state_dict(None)

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        state = state or {"A_inv": None, "G_inv": None, "reset": True}
        device = self.module.weight.device
        self.factors: list[Tensor | None] = [
            None if P is None else P.to(device=device, copy=True) for P in (state["A_inv"], state["G_inv"])
        ]
        self.reset: bool = state["reset"]
        self.clear()

    def state_dict(self) -> dict[str, Any]:
        A_inv, G_inv = self.factors
        return {"A_inv": A_inv, "G_inv": G_inv, "reset": self.reset}

    def clear(self) -> None:
        self.a: Any = 0.0
        self.g: Any = 0.0
        self.passes = 0
        self.task = -1

    def record(self, a: Tensor, clip: float, scale: float, gradient: Tensor) -> None:
        """Add the statistics of one backward pass, when it has reached the output."""
        task = torch._C._current_graph_task_id()
        if self.passes and task == self.task:
            raise RuntimeError(
                f"MKOR: the layer '{self.name}' was called more than once in a forward, so that its gradient is not of "
                "one input; put it into skip_modules"
            )
        if self.module.weight.grad is None:  # what an abandoned step left behind
            self.clear()
        self.a, self.g = self.a + a, self.g + _output_statistic(self.module, gradient, clip, scale)
        self.passes += 1
        self.task = task

    @torch.no_grad()
    def precondition(self, rescale: bool) -> None:
        A_inv, G_inv = self.factors
        if A_inv is None and G_inv is None:
            return
        dW, bias = self.module.weight.grad, self.module.bias
        db = None if bias is None else bias.grad
        dtype = torch.promote_types(dW.dtype, torch.float32)
        Gm = dW.reshape(dW.shape[0], -1).to(dtype)  # [out, in]
        if bias is not None:
            column = Gm.new_zeros(len(Gm)) if db is None else db.to(dtype)
            Gm = torch.cat([Gm, column.unsqueeze(1)], dim=1)
        U = Gm if G_inv is None else G_inv.to(dtype) @ Gm
        U = U if A_inv is None else U @ A_inv.to(dtype)
        inputs = dW[0].numel()
        if rescale:
            ratio = _norm(Gm, inputs, db is not None) / _norm(U, inputs, db is not None)
            U = torch.where(torch.isfinite(ratio), U * ratio, Gm)
        dW.copy_(U[:, :inputs].reshape(dW.shape))
        if db is not None:
            db.copy_(U[:, inputs])


class _Tap:
    """The forward hook of a layer. Copies of a model, and pickles, get one that has no owner and does nothing."""

    def __init__(self, owner: MKOR | None = None, layer: _Layer | None = None) -> None:
        self.owner: Callable[[], MKOR | None] = (lambda: None) if owner is None else weakref.ref(owner)
        self.layer = layer

    @torch._disable_dynamo  # as torch.compiler.disable, which would load the compiler at import
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        owner, layer = self.owner(), self.layer
        if owner is None or layer is None or not module.training or not output.requires_grad or not owner._due():
            return
        a = _input_statistic(module, (args[0] if args else kwargs["input"]).detach(), owner.clip)
        output.register_hook(partial(layer.record, a, owner.clip, owner.grad_scale))

    def __deepcopy__(self, memo: Any) -> _Tap:
        return _Tap()

    def __reduce__(self) -> Any:
        return _Tap, ()

    @staticmethod
    def clean(module: nn.Module) -> None:
        """Take away the hooks of optimizers that are gone."""
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, _Tap) and hook.owner() is None:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)


def _input_statistic(module: Any, x: Tensor, clip: float) -> Tensor:
    """a: the mean of the clamped inputs, (in,) or, with the bias's, (in + 1,)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(module, nn.Conv2d):
        rows = _patch_means(module, x if x.ndim == 4 else x.unsqueeze(0), dtype)  # [batch, in]
    else:
        rows = x.reshape(-1, x.shape[-1])
    a = rows.clamp(-clip, clip).mean(0, dtype=dtype)
    return a if module.bias is None else torch.cat([a, a.new_tensor([min(1.0, clip)])])


def _patch_means(module: nn.Conv2d, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean over positions of the patches that a convolution sees, (batch, channels * kernel): no patch is built."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    spans = []
    for size, kernel, stride, dilation in zip(
        x.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True
    ):
        reach = size - dilation * (kernel - 1)  # places where the first entry of a kernel can be
        spans.append([slice(dilation * k, dilation * k + reach, stride) for k in range(kernel)])
    means = [x[:, :, rows, columns].mean((2, 3), dtype=dtype) for rows in spans[0] for columns in spans[1]]
    return torch.stack(means, dim=2).flatten(1)


def _output_statistic(module: Any, gradient: Tensor, clip: float, scale: float) -> Tensor:
    """g: the mean of the clamped gradients of single rows, (out,)."""
    gradient = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
    if isinstance(module, nn.Conv2d):
        rows = (gradient if gradient.ndim == 4 else gradient.unsqueeze(0)).mean((2, 3))
    else:
        rows = gradient.reshape(-1, gradient.shape[-1])
    return (rows * (len(rows) / scale)).clamp_(-clip, clip).mean(0)


def _wide_factor(P: Tensor | None, v: Tensor, dtype: torch.dtype) -> Tensor:
    """P in at least fp32 for an update; the identity if there is none yet."""
    wide = torch.promote_types(dtype, torch.float32)
    return torch.eye(len(v), dtype=wide, device=v.device) if P is None else P.to(wide)


def _norm(matrix: Tensor, inputs: int, bias: bool) -> Tensor:
    norm = torch.linalg.vector_norm(matrix[:, :inputs])
    return norm + torch.linalg.vector_norm(matrix[:, inputs:]) if bias else norm


def _world_size(process_group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1


def _average(vectors: Sequence[Tensor], process_group: dist.ProcessGroup | None) -> None:
    """The mean over the ranks, in place, through one buffer."""
    if not vectors or _world_size(process_group) == 1:
        return
    buffer = torch.cat(list(vectors))
    dist.all_reduce(buffer, group=process_group)
    buffer /= _world_size(process_group)
    for v, mean in zip(vectors, buffer.split([len(v) for v in vectors]), strict=True):
        v.copy_(mean)


def _names(model: nn.Module, modules: Sequence[str | nn.Module]) -> set[str]:
    """The names of all modules within those given."""
    by_module = {module: name for name, module in model.named_modules()}
    known = set(by_module.values())
    found: set[str] = set()
    for module in modules:
        name = by_module.get(module) if isinstance(module, nn.Module) else module
        if name is None or name not in known:
            raise ValueError(f"skip_modules must name modules of the model, got {module!r}")
        found |= {other for other in known if name == "" or other == name or other.startswith(name + ".")}
    return found


def _take_own(options: dict[str, Any]) -> dict[str, Any]:
    """MKOR's own arguments, taken out of `options`."""
    own = [*MKOR.constraints, "skip_modules", "factor_dtype", "process_group", "hybrid"]
    return {name: options.pop(name) for name in own if name in options}
