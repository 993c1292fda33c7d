"""Optimizers with 8-bit state: block-wise dynamic quantisation of the moments, everything else as ever.

    m = deq(q1, absmax1);  v = deq(q2, absmax2);  the rule's step in float32;  q1, q2 = quant(m), quant(v)

Only what is stored between steps is quantised: the parameters move by the fresh float32 moments.
Source: arXiv 2110.02861.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.kernels.adam import adam_
from headway.kernels.blockwise import adam8_
from headway.optim.checks import gradients, local, refuse_complex, refuse_sharded
from headway.optim.quantized_state import BLOCK_SIZE, MIN_SIZE, SHARDED, STATE_BITS, create, is_quantized, read, write
from headway.optim.state import ExactStateOptimizer

__all__ = [
    "Adagrad8bit",
    "Adam8bit",
    "AdamW8bit",
    "Lion8bit",
    "RMSprop8bit",
    "SGD8bit",
    "StableEmbedding",
]

_RANGES: dict[str, Constraint] = {
    "lr": Range(low=0, low_open=True),
    "weight_decay": Range(low=0),
    "block_size": Range(low=1, integer=True),
    "min_8bit_size": Range(low=0, integer=True),
    "state_bits": STATE_BITS,
    "maximize": OneOf(False, True),
}
_BETAS = Range(low=0, high=1, high_open=True, length=2)
_POSITIVE = Range(low=0, low_open=True)


class _Optimizer8bit(ExactStateOptimizer):
    """What the family shares: a subclass names its states (with their sign) and does the step of one group."""

    constraints: ClassVar[Mapping[str, Constraint]] = _RANGES
    states: ClassVar[Mapping[str, bool]]  # name -> whether it can be negative

    def __init__(self, params: Iterable[Any], **arguments: Any) -> None:
        check_arguments(self.constraints, **arguments)
        super().__init__(params, {**arguments, "full_precision": []})

    @classmethod
    def for_model(cls, model: nn.Module, **hyperparameters: Any) -> Any:
        """An optimizer for `model`: embeddings keep 32-bit state, vectors and scalars get no weight decay.

        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
        >>> [(len(group["params"]), group["state_bits"]) for group in AdamW8bit.for_model(model).param_groups]
        [(1, 8), (1, 32), (1, 8)]
        """
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]},
            {"params": [p for p in trainable if id(p) in embeddings], "state_bits": 32},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        return cls([group for group in groups if group["params"]], **hyperparameters)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; hyper-parameters of the group are checked like the constructor's."""
        group = {**self.defaults, **param_group}
        check_arguments(self.constraints, **{name: group[name] for name in self.constraints})
        super().add_param_group({"full_precision": [], **param_group})
        group = self.param_groups[-1]
        try:
            refuse_complex(group["params"])
            if group["state_bits"] == 8:
                refuse_sharded(type(self).__name__, group["params"], SHARDED)
        except ValueError:
            self.param_groups.pop()
            raise

    def override(self, parameter: Tensor | str, bits: int = 32) -> None:
        """Keep one parameter's state in 32 bits (or in 8 again); before its first step.

        Args:
            parameter: the parameter, or its name if the optimizer was built with named parameters.
            bits: 32 (default) or 8.

        Raises:
            ValueError: not a parameter of this optimizer, or one that has state already.
        """
        check_arguments({"bits": STATE_BITS}, bits=bits)
        for group in self.param_groups:
            names = group.get("param_names", [None] * len(group["params"]))
            for index, (name, p) in enumerate(zip(names, group["params"], strict=True)):
                if p is not parameter and not (isinstance(parameter, str) and name == parameter):
                    continue
                if self.state.get(p):
                    raise ValueError("parameter must have no state yet, got one that has taken a step")
                chosen = set(group["full_precision"]) - {index} | ({index} if bits == 32 else set())
                group["full_precision"] = sorted(chosen)
                return
        described = repr(parameter) if isinstance(parameter, str) else f"a tensor of shape {tuple(parameter.shape)}"
        raise ValueError(f"parameter must be one of this optimizer's, got {described}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. `closure` re-evaluates the model; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = gradients(type(self).__name__, self.param_groups)
        for group, params in zip(self.param_groups, ready, strict=True):
            places = {id(p): index for index, p in enumerate(group["params"])}
            for p in params:
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    bits = 32 if places[id(p)] in group["full_precision"] else group["state_bits"]
                    for name, signed in self.states.items():
                        sizes = {"block_size": group["block_size"], "min_size": group["min_8bit_size"]}
                        create(state, name, p, bits, signed=signed, **sizes)
                state["step"] += 1
            if params:
                self._steps(group, params)
        return loss

    def _steps(self, group: dict[str, Any], params: list[Any]) -> None:
        """One parameter at a time: a float32 copy of more than one tensor's state never exists."""
        for p in params:
            state = self.state[p]
            values = {
                name: read(state, name, signed=signed, block_size=group["block_size"])
                for name, signed in self.states.items()
            }
            wide = next(iter(values.values())).dtype
            g, w = p.grad.to(wide), p if p.dtype == wide else p.to(wide)
            g = -g if group["maximize"] else g
            self._rule(group, state["step"], w, g, values)
            if w is not p:
                p.copy_(w)
            for name, signed in self.states.items():
                write(state, name, values[name], signed=signed, block_size=group["block_size"])

    def _rule(self, group: dict[str, Any], t: int, w: Tensor, g: Tensor, values: dict[str, Tensor]) -> None:
        """The step t of a weight w with gradient g, in place on w and on the states' values."""
        raise NotImplementedError


class Adam8bit(_Optimizer8bit):
    """Adam with both moments in 8 bits: 2.03 bytes of state per parameter in place of 8.

    With g the gradient, at step t::

        m = beta1 deq(q1) + (1 - beta1) g;  v = beta2 deq(q2) + (1 - beta2) g^2
        p = (1 - lr weight_decay) p
        p = p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)          m and v before quantisation
        q1 = quant(m), signed map;  q2 = quant(v), unsigned map

    Hyper-parameters are those of the 32-bit optimizer. Each block of `block_size` elements has its own scale, so that
    an outlier costs precision in its block alone; zero stays zero. A tensor with fewer than `min_8bit_size` elements
    keeps 32-bit state, and so does what `override` or a group's `state_bits` says; embeddings should (`for_model`).

    Cost: one pass in a native kernel over weight, gradient and codes. State of n elements: 2 n + 8 ceil(n / block_size)
    bytes.

    Args:
        params: parameters or parameter groups; every argument below may differ by group.
        lr: > 0. Default 1e-3 (bitsandbytes).
        betas: each in [0, 1). Default (0.9, 0.999).
        eps: > 0. Default 1e-8.
        weight_decay: decoupled, >= 0. Default 0; in bitsandbytes it is decoupled in both classes, too.
        block_size: elements per scale, >= 1. Default 256 (bitsandbytes; 2048 in the paper).
        min_8bit_size: smaller tensors keep 32-bit state. Default 4096 (bitsandbytes).
        state_bits: 8 (default) or 32.
        maximize: ascend instead of descend.

    Raises:
        ValueError: an argument outside its range, also in a group; complex parameters; sharded ones with 8 bits.
        RuntimeError: sparse gradients.
        FloatingPointError: a gradient that is not finite; nothing is changed.

    Source: Dettmers, Lewis, Shleifer, Zettlemoyer, arXiv 2110.02861, and bitsandbytes (at 95f9af3). Departures: codes
    are exact nearest values, where bitsandbytes' CPU library rounds by a table that turns 0 into 2e-5 of the scale, so
    no sign ever flips; a v that is not 0 never becomes 0, which the nearest value would be 6.8 decades below the
    block's largest: entries whose gradients are a thousandth of their neighbours' would then jump by m over almost
    nothing; a gradient that is not finite raises, where its CUDA kernel skips the entry.

    >>> layer = nn.Linear(128, 128)
    >>> optimizer = Adam8bit(layer.parameters())
    >>> layer(torch.ones(1, 128)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state_bytes()  # 2 x (16384 codes + 64 scales of 4 bytes), and two float32 moments of 128 biases
    34304
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {**_RANGES, "betas": _BETAS, "eps": _POSITIVE}
    states: ClassVar[Mapping[str, bool]] = {"exp_avg": True, "exp_avg_sq": False}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        block_size: int = BLOCK_SIZE,
        min_8bit_size: int = MIN_SIZE,
        state_bits: int = 8,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            block_size=block_size,
            min_8bit_size=min_8bit_size,
            state_bits=state_bits,
            maximize=maximize,
        )

    def _steps(self, group: dict[str, Any], params: list[Any]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        kinds: dict[Any, list[Any]] = {}
        for p in params:
            kinds.setdefault((p.device, p.dtype, is_quantized(self.state[p], "exp_avg")), []).append(p)
        for (_, _, quantized), members in kinds.items():
            states = [self.state[p] for p in members]
            moments = [[state[name] for state in states] for name in self.states]
            options = {
                "step_sizes": [lr / (1 - beta1 ** state["step"]) for state in states],
                "root_scales": [(1 - beta2 ** state["step"]) ** -0.5 for state in states],
                "beta1": beta1,
                "beta2": beta2,
                "eps": group["eps"],
                "decay_before": 1 - lr * group["weight_decay"],
                "maximize": group["maximize"],
            }
            grads = [p.grad for p in members]
            if quantized:
                m, v = ([codes.view(-1) for codes in name] for name in moments)
                scales = [[state[f"{name}_absmax"] for state in states] for name in self.states]
                adam8_(members, grads, m, scales[0], v, scales[1], block_size=group["block_size"], **options)
            else:
                adam_(local(members), local(grads), *map(local, moments), **options)


class AdamW8bit(Adam8bit):
    """`Adam8bit` with torch.optim.AdamW's default weight decay: AdamW with both moments in 8 bits.

    Args, rule, errors and departures are those of `Adam8bit`; `weight_decay` is 0.01 by default.

    Source: arXiv 2110.02861.

    >>> weight = nn.Parameter(torch.ones(64, 64))
    >>> optimizer = AdamW8bit([weight], lr=1e-3)
    >>> weight.grad = torch.ones(64, 64)
    >>> optimizer.step()
    >>> optimizer.state_bytes() / (2 * 4 * weight.numel())
    0.25390625
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int = BLOCK_SIZE,
        min_8bit_size: int = MIN_SIZE,
        state_bits: int = 8,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            block_size=block_size,
            min_8bit_size=min_8bit_size,
            state_bits=state_bits,
            maximize=maximize,
        )


class SGD8bit(_Optimizer8bit):
    """SGD with its momentum in 8 bits.

    With g the gradient plus weight_decay p::

        m = g at the first step, then momentum m + g
        p = p - lr m

    Args: as `Adam8bit`, with `momentum` in (0, 1), default 0.9, and coupled `weight_decay`, as torch.optim.SGD.
    `lr` is 1e-3 by default. Raises as `Adam8bit` does.

    Source: arXiv 2110.02861.

    >>> weight = nn.Parameter(torch.ones(4096))
    >>> optimizer = SGD8bit([weight], lr=0.5)
    >>> weight.grad = torch.ones(4096)
    >>> optimizer.step(); weight[0].item()
    0.5
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        **_RANGES,
        "momentum": Range(low=0, high=1, low_open=True, high_open=True),
    }
    states: ClassVar[Mapping[str, bool]] = {"momentum_buffer": True}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        block_size: int = BLOCK_SIZE,
        min_8bit_size: int = MIN_SIZE,
        state_bits: int = 8,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            block_size=block_size,
            min_8bit_size=min_8bit_size,
            state_bits=state_bits,
            maximize=maximize,
        )

    def _rule(self, group: dict[str, Any], t: int, w: Tensor, g: Tensor, values: dict[str, Tensor]) -> None:
        m = values["momentum_buffer"]
        if group["weight_decay"]:
            g = g.add(w, alpha=group["weight_decay"])
        m.mul_(group["momentum"]).add_(g)  # m is zero at the first step
        w.sub_(m, alpha=group["lr"])


class RMSprop8bit(_Optimizer8bit):
    """RMSprop with its second moment in 8 bits.

    With g the gradient plus weight_decay p::

        v = alpha v + (1 - alpha) g^2
        p = p - lr g / (sqrt(v) + eps)

    Args: as `Adam8bit`, with `alpha` in [0, 1), default 0.99, and coupled `weight_decay`, as torch.optim.RMSprop;
    `lr` is 1e-2 by default. Raises as `Adam8bit` does.

    Source: arXiv 2110.02861. Departure: v is kept with the unsigned map, as in Adam; bitsandbytes takes the signed one
    for every first state, which leaves v half the precision. Its Adagrad, too.

    >>> weight = nn.Parameter(torch.ones(4096))
    >>> optimizer = RMSprop8bit([weight], lr=0.05)
    >>> weight.grad = torch.ones(4096)
    >>> optimizer.step(); round(weight[0].item(), 4)
    0.5
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {
        **_RANGES,
        "alpha": Range(low=0, high=1, high_open=True),
        "eps": _POSITIVE,
    }
    states: ClassVar[Mapping[str, bool]] = {"square_avg": False}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        block_size: int = BLOCK_SIZE,
        min_8bit_size: int = MIN_SIZE,
        state_bits: int = 8,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            alpha=alpha,
            eps=eps,
            weight_decay=weight_decay,
            block_size=block_size,
            min_8bit_size=min_8bit_size,
            state_bits=state_bits,
            maximize=maximize,
        )

    def _rule(self, group: dict[str, Any], t: int, w: Tensor, g: Tensor, values: dict[str, Tensor]) -> None:
        v = values["square_avg"]
        if group["weight_decay"]:
            g = g.add(w, alpha=group["weight_decay"])
        v.mul_(group["alpha"]).addcmul_(g, g, value=1 - group["alpha"])
        w.addcdiv_(g, v.sqrt().add_(group["eps"]), value=-group["lr"])


class Adagrad8bit(_Optimizer8bit):
    """AdaGrad with its sum of squares in 8 bits.

    With g the gradient plus weight_decay p::

        v = v + g^2
        p = p - lr g / (sqrt(v) + eps)

    Args: as `Adam8bit`, with coupled `weight_decay` and `eps` 1e-10, as torch.optim.Adagrad; `lr` is 1e-2 by
    default. Raises as `Adam8bit` does. A growing sum stops where an addend is below half a step of the map: 8 bits
    suit runs with a decaying learning rate.

    Source: arXiv 2110.02861; the map is that of `RMSprop8bit`.

    >>> weight = nn.Parameter(torch.ones(4096))
    >>> optimizer = Adagrad8bit([weight], lr=0.5)
    >>> weight.grad = torch.ones(4096)
    >>> optimizer.step(); round(weight[0].item(), 4)
    0.5
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {**_RANGES, "eps": _POSITIVE}
    states: ClassVar[Mapping[str, bool]] = {"sum": False}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        *,
        block_size: int = BLOCK_SIZE,
        min_8bit_size: int = MIN_SIZE,
        state_bits: int = 8,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            block_size=block_size,
            min_8bit_size=min_8bit_size,
            state_bits=state_bits,
            maximize=maximize,
        )

    def _rule(self, group: dict[str, Any], t: int, w: Tensor, g: Tensor, values: dict[str, Tensor]) -> None:
        v = values["sum"]
        if group["weight_decay"]:
            g = g.add(w, alpha=group["weight_decay"])
        v.addcmul_(g, g)
        w.addcdiv_(g, v.sqrt().add_(group["eps"]), value=-group["lr"])


class Lion8bit(_Optimizer8bit):
    """Lion with its momentum in 8 bits.

        p = (1 - lr weight_decay) p - lr sign(beta1 m + (1 - beta1) g)
        m = beta2 m + (1 - beta2) g

    Args: as `Adam8bit`; `lr` 1e-4 and `betas` (0.9, 0.99) by default (bitsandbytes). Raises as `Adam8bit` does. Where
    gradients hardly change, (1 - beta2) (g - m) can be below half a step of the map, and m stays what it is.

    Source: arXiv 2110.02861 for the state; the rule is that of arXiv 2302.06675.

    >>> weight = nn.Parameter(torch.ones(4096))
    >>> optimizer = Lion8bit([weight], lr=0.5)
    >>> weight.grad = torch.full((4096,), 1e-3)
    >>> optimizer.step(); weight[0].item()
    0.5
    """

    constraints: ClassVar[Mapping[str, Constraint]] = {**_RANGES, "betas": _BETAS}
    states: ClassVar[Mapping[str, bool]] = {"exp_avg": True}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        block_size: int = BLOCK_SIZE,
        min_8bit_size: int = MIN_SIZE,
        state_bits: int = 8,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            block_size=block_size,
            min_8bit_size=min_8bit_size,
            state_bits=state_bits,
            maximize=maximize,
        )

    def _rule(self, group: dict[str, Any], t: int, w: Tensor, g: Tensor, values: dict[str, Tensor]) -> None:
        m, (beta1, beta2) = values["exp_avg"], group["betas"]
        w.mul_(1 - group["lr"] * group["weight_decay"])
        w.sub_(torch.lerp(m, g, 1 - beta1).sign_(), alpha=group["lr"])
        m.lerp_(g, 1 - beta2)


class StableEmbedding(nn.Embedding):
    """An embedding for training with 8-bit state: Xavier-uniform weights and a layer normalisation of its output.

    Gradients of word embeddings vary widely; normalised outputs keep their range. The normalisation is computed in
    float32 and cast back. Give the weight 32-bit state (`AdamW8bit.for_model` does). Position embeddings are
    to be added after it.

    Args: as `torch.nn.Embedding`.

    Source: arXiv 2110.02861; bitsandbytes.

    >>> embedding = StableEmbedding(10, 4, padding_idx=0)
    >>> embedding(torch.tensor([[0, 3]])).shape, embedding.weight[0].abs().sum().item()
    (torch.Size([1, 2, 4]), 0.0)
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, **options: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, **options)
        self.norm = nn.LayerNorm(embedding_dim, device=self.weight.device)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].zero_()

    def forward(self, input: Tensor) -> Tensor:
        embedded = super().forward(input)
        return nn.functional.layer_norm(
            embedded.float(),
            self.norm.normalized_shape,
            self.norm.weight.float(),
            self.norm.bias.float(),
            self.norm.eps,
        ).to(embedded.dtype)
