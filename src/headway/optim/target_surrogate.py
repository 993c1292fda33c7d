"""Target surrogates: one expensive gradient at the model's outputs pays for several cheap steps of its parameters.

    z_t = f(theta_t),   g_t = d loss / d z at z_t
    theta_{t+1} = a few steps on  theta -> mean[ lr * g_t * (f(theta) - z_t) + (f(theta) - z_t)^2 / 2 ]

Source: arXiv 2302.02607.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from headway.constraints import Constraint, OneOf, Range, check_arguments
from headway.optim.checks import refuse_complex, refuse_sharded
from headway.optim.line_search import backtrack

__all__ = ["TargetSurrogate", "autograd_target_grad"]

_CALLABLE = "callable"  # stands for a callable `inner` in the groups and so in a state_dict

# The search for the target step, official code: a larger first guess, the retreat, the share of the slope, the range.
_OUTER_EXPAND, _OUTER_BETA, _OUTER_C, _OUTER_RANGE = 1.8, 0.9, 0.5, (1e-4, 1e4)


class TargetSurrogate(Optimizer):
    """Steps on a quadratic (or KL) model of the loss in output space, each for one call of the loss's gradient.

    With outputs z = f(theta) of any shape, outer step t = 1, 2, ... does::

        z_t = f(theta_t);  g_t = target_grad(z_t)                              the only expensive call
        eta_t = lr | lr / sqrt(t) | lr * total_steps^(-t / total_steps)        schedule
        S(theta) = mean[ eta_t * g_t * (f(theta) - z_t) + (f(theta) - z_t)^2 / 2 ]
        theta_{t+1} = inner_steps steps of `inner` on S, started at theta_t

    where S(theta_t) = 0, and g_t must be the gradient of the **sum** of per-sample losses: that of their mean over b
    samples makes the step b times smaller. If each loss is L-smooth in z and eta_t <= 1/L, S is, up to scale and a
    constant, an upper bound of the loss, so that full-batch steps never increase it. L is 1 for (z - y)^2 / 2, 2 for
    (z - y)^2, 1/4 for the logistic loss, at most 1/2 for softmax cross-entropy. On mini-batches use schedule `sqrt` or
    few inner steps: many of them fit the noise of the batch.

    With geometry `kl`, z are probabilities in (0, 1), the quadratic is the divergence z log(z / z_t) - z + z_t, and its
    exact minimiser over all z is the mirror step z_t exp(-eta_t g_t).

    `step(forward, target_grad)` calls `forward` again for every evaluation of S, on the same batch: outputs must not
    change between calls at the same parameters, so put dropout and batch normalisation in evaluation mode or
    hold their random state in `forward`. `.grad` of the parameters is left as it was. For one process: under data
    parallelism a rank's surrogate holds its own outputs only. Settings, `lr` among them, hold for all groups.

    Args:
        params: parameters, or groups of them.
        lr: the step size in target space, the paper's eta, > 0. Default 1.0, which is 1/L of the squared loss. With
            `line_search` the first guess of the search.
        inner_steps: >= 1. Default 5 (official experiments, which sweep 1 to 100).
        inner: `linesearch` (default, official code): gradient descent with Armijo backtracking; or a function from a
            list of parameters to an optimizer, built anew at every step, so that no momentum is carried over.
        schedule: `constant` (default), `sqrt` or `exp`, as above.
        total_steps: outer steps of `exp`, >= 1. Default None; needed by `exp`.
        geometry: `euclidean` (default) or `kl`.
        line_search: None (default) or `sls`: eta_t starts at 1.8 times its previous value and shrinks by 0.9 until
            loss(z_t - eta g_t) <= loss(z_t) - eta ||g_t||^2 / 2, within [1e-4, 1e4]; then the schedule applies. It
            needs `loss_value` in `step`, and no further gradient.
        c: share of the slope in the inner search, in (0, 1). Default 0.1 (official experiments).
        beta: its retreat, in (0, 1). Default 0.9 (official code).
        expand: its first trial relative to the last step taken, >= 1. Default 2.0; the official experiments use
            2^(1 / batches per epoch).
        init_step: its step before the first expansion, anew at every outer step, > 0. Default 10. For features far
            larger than 1 it costs many trials.
        grad_tol: the inner loop ends where the gradient norm of S is at most this, >= 0. Default 1e-6 (official code).

    Raises:
        ValueError: an argument outside its range, also in a group, or unequal over groups; `exp` without `total_steps`;
            complex or sharded parameters. From `step`: a target gradient of another shape than the outputs; `kl` with
            outputs outside (0, 1); `line_search` without `loss_value`.
        RuntimeError: from `step`: outputs without a graph.
        FloatingPointError: from `step`: NaN or infinity in outputs, target gradient, loss or surrogate.

    A step that raises leaves the parameters untouched. A `state_dict` holds the settings, the outer counter and the
    last searched step, except a callable `inner`: the optimizer that loads the state has to be built with it.

    Source: Lavington, Vaswani, Babanezhad, Schmidt, Le Roux, arXiv 2302.02607, and the authors' code
    (WilderLavington/Target-Based-Surrogates-For-Stochastic-Optimization at 205dde6). The code leaves out the 1/2 and
    takes 1/stepsize as its `eta`: its stepsize s is lr = s / 2 here, its inner step a is 2 a, its init_step of 10 is
    20. Departures from it: S is taken relative to z_t, which changes it by a constant and saves digits; an inner search
    that fails (100 trials, or a step below 1e-6) leaves the parameters where the code takes the last step; the
    loop ends before a step at a vanishing gradient, not after; `sls` uses the step it found, not half of it; `kl` has
    the terms -z + z_t, without which the mirror step is not its minimiser unless outputs sum to one.

    Cost of a step: one `target_grad`, one `forward` per evaluation of S and one backward per inner step.
    Memory: two copies of the parameters while it runs. State: three numbers.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> X, y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0], [2.0], [0.0]])
        >>> optimizer = TargetSurrogate(layer.parameters(), lr=1.0, inner_steps=20)
        >>> gradient = autograd_target_grad(lambda z, y: (z - y).square().sum() / 2, y)
        >>> for _ in range(20):
        ...     report = optimizer.step(lambda: layer(X), gradient)
        >>> bool((layer(X) - y).square().sum() < 1e-4), report["oracle_calls"]
        (True, 1)
    """

    step_protocol: ClassVar[str] = "outputs"
    constraints: ClassVar[Mapping[str, Constraint]] = {
        "lr": Range(low=0, low_open=True),
        "inner_steps": Range(low=1, integer=True),
        "schedule": OneOf("constant", "sqrt", "exp"),
        "total_steps": Range(low=1, integer=True, optional=True),
        "geometry": OneOf("euclidean", "kl"),
        "line_search": OneOf(None, "sls"),
        "c": Range(low=0, low_open=True, high=1, high_open=True),
        "beta": Range(low=0, low_open=True, high=1, high_open=True),
        "expand": Range(low=1),
        "init_step": Range(low=0, low_open=True),
        "grad_tol": Range(low=0),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        inner_steps: int = 5,
        inner: str | Callable[[list[Tensor]], Optimizer] = "linesearch",
        schedule: str = "constant",
        total_steps: int | None = None,
        geometry: str = "euclidean",
        line_search: str | None = None,
        c: float = 0.1,
        beta: float = 0.9,
        expand: float = 2.0,
        init_step: float = 10.0,
        grad_tol: float = 1e-6,
    ) -> None:
        settings = {
            "lr": lr,
            "inner_steps": inner_steps,
            "schedule": schedule,
            "total_steps": total_steps,
            "geometry": geometry,
            "line_search": line_search,
            "c": c,
            "beta": beta,
            "expand": expand,
            "init_step": init_step,
            "grad_tol": grad_tol,
        }
        check_arguments(self.constraints, **settings)
        if not callable(inner) and inner != "linesearch":
            raise ValueError(f"inner must be 'linesearch' or a function, got {inner!r}")
        self._inner = inner if callable(inner) else None
        super().__init__(params, {**settings, "inner": _CALLABLE if callable(inner) else inner})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Raises `ValueError` as the constructor does."""
        first = self.param_groups[0] if self.param_groups else {**self.defaults, **param_group}
        group = {**{name: first[name] for name in self.defaults}, **param_group}
        check_arguments(self.constraints, **{name: group[name] for name in self.constraints})
        if group["schedule"] == "exp" and group["total_steps"] is None:
            raise ValueError("total_steps must be given with schedule 'exp', got None")
        for name in self.defaults:
            shared = self.defaults[name] if name == "inner" else first[name]
            if group[name] != shared:
                raise ValueError(f"{name} must be the same in all groups, got {group[name]!r} beside {shared!r}")
        super().add_param_group(group)
        try:
            refuse_complex(self.param_groups[-1]["params"])
            refuse_sharded("TargetSurrogate", self.param_groups[-1]["params"], "it differentiates the outputs itself")
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        forward: Callable[[], Tensor],
        target_grad: Callable[[Tensor], Tensor],
        loss_value: Callable[[Tensor], Any] | None = None,
    ) -> dict[str, Any]:
        """One outer step.

        Args:
            forward: () -> z, the outputs on this step's batch, with a graph.
            target_grad: detached z -> d loss / d z of the same shape. Called once.
            loss_value: detached z -> loss, a number; for `line_search`.

        Returns:
            `surrogate`: S at the new parameters; `surrogate_increased`: whether an inner step made it larger;
            `inner_steps` and `forward_calls` that it took; `eta`; `oracle_calls` = 1.
        """
        group = self.param_groups[0]
        if any(each["lr"] != group["lr"] for each in self.param_groups):
            raise ValueError(f"lr must be the same in all groups, got {[each['lr'] for each in self.param_groups]}")
        if group["line_search"] is not None and loss_value is None:
            raise ValueError("loss_value must be given with line_search 'sls', got None")
        params = [p for each in self.param_groups for p in each["params"] if p.requires_grad]
        with torch.enable_grad():
            z = forward()
        if not z.requires_grad:
            raise RuntimeError("forward must return outputs with a path to the parameters, got a tensor without graph")
        surrogate = _Surrogate(forward, z.detach(), group["geometry"])
        g = target_grad(z.detach())
        if g.shape != z.shape:
            raise ValueError(f"target_grad must return a tensor of shape {tuple(z.shape)}, got {tuple(g.shape)}")
        surrogate.g = g.detach().to(surrogate.z)
        if not bool(torch.isfinite(surrogate.g).all()):
            raise FloatingPointError("TargetSurrogate: the target gradient is not finite; nothing was changed")

        searched = self._search(group, surrogate, loss_value) if loss_value and group["line_search"] else None
        t = group.get("outer_steps", 0) + 1
        surrogate.eta = _scheduled(group["lr"] if searched is None else searched, t, group)
        before = [p.detach().clone() for p in params]
        try:
            with torch.enable_grad():
                start = surrogate.at(z)
            run = self._descend if group["inner"] == "linesearch" else self._optimise
            steps, value, increased = run(group, surrogate, params, start)
            if not math.isfinite(value):
                raise FloatingPointError("TargetSurrogate: the surrogate is not finite; nothing was changed")
        except BaseException:
            torch._foreach_copy_(params, before)
            raise
        group["outer_steps"] = t
        if searched is not None:
            group["searched_lr"] = searched
        return {
            "surrogate": value,
            "surrogate_increased": increased,
            "inner_steps": steps,
            "forward_calls": surrogate.calls,
            "eta": surrogate.eta,
            "oracle_calls": 1,
        }

    def _search(self, group: dict[str, Any], surrogate: _Surrogate, loss_value: Callable[[Tensor], Any]) -> float:
        """The eta that decreases the loss at z_t - eta g_t."""
        z, g = surrogate.z, surrogate.g
        start = float(loss_value(z))
        if not math.isfinite(start):
            raise FloatingPointError(f"TargetSurrogate: the loss is not finite, {start}; nothing was changed")
        found = backtrack(
            lambda eta: float(loss_value(z - eta * g)),
            start,
            -float(g.square().sum()),
            _OUTER_EXPAND * group.get("searched_lr", group["lr"]),
            c=_OUTER_C,
            beta=_OUTER_BETA,
        )
        low, high = _OUTER_RANGE
        return min(max(found.step, low), high)

    def _descend(
        self, group: dict[str, Any], surrogate: _Surrogate, params: list[Tensor], start: Tensor
    ) -> tuple[int, float, bool]:
        """Gradient descent with backtracking; the graph of the accepted trial gives the next gradient."""
        reached, step = start, group["init_step"]
        for count in range(group["inner_steps"]):
            moving, gradients = _differentiate(reached, params)
            # Norm and squares in float64: those of float32 gradients can underflow.
            slope = -sum(float(g.double().square().sum()) for g in gradients)
            if math.sqrt(-slope) <= group["grad_tol"]:
                return count, reached.item(), False
            origin = [p.detach().to(_compute_dtype(p), copy=True) for p in moving]
            gradients = [g.to(x) for g, x in zip(gradients, origin, strict=True)]
            trial = reached

            def value_at(a: float, origin=origin, gradients=gradients, moving=moving) -> float:  # type: ignore[no-untyped-def]
                nonlocal trial
                torch._foreach_copy_(moving, torch._foreach_add(origin, gradients, alpha=-a))
                trial = surrogate()
                return trial.item()

            found = backtrack(
                value_at,
                reached.item(),
                slope,
                group["expand"] * step,
                c=group["c"],
                beta=group["beta"],
                min_step=1e-6,
            )
            if not found.found:
                torch._foreach_copy_(moving, origin)
                return count, reached.item(), False
            reached, step = trial, found.step
        return group["inner_steps"], reached.item(), False

    def _optimise(
        self, group: dict[str, Any], surrogate: _Surrogate, params: list[Tensor], start: Tensor
    ) -> tuple[int, float, bool]:
        """Steps of an optimizer built for this surrogate."""
        assert self._inner is not None
        inner = self._inner(params)
        kept = [p.grad for p in params]
        reached, increased, count = start, False, 0
        try:
            while count < group["inner_steps"]:
                moving, gradients = _differentiate(reached, params)
                if math.sqrt(sum(float(g.double().square().sum()) for g in gradients)) <= group["grad_tol"]:
                    break
                for p in params:
                    p.grad = None
                for p, g in zip(moving, gradients, strict=True):
                    p.grad = g.to(p)
                inner.step()
                count += 1
                previous, reached = reached.item(), surrogate()
                increased = increased or reached.item() > previous
                if not math.isfinite(reached.item()):
                    break
        finally:
            for p, grad in zip(params, kept, strict=True):
                p.grad = grad
        return count, reached.item(), increased

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As in torch. Raises `ValueError` if the state belongs to a callable `inner` and this optimizer has none."""
        if any(saved["inner"] == _CALLABLE for saved in state_dict["param_groups"]) and self._inner is None:
            raise ValueError("inner must be the function that the state was saved with, got none")
        super().load_state_dict(dict(state_dict))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inner": self._inner}


class _Surrogate:
    """S at the present parameters, with a graph; counts the calls of `forward`, the first of which gave z_t."""

    def __init__(self, forward: Callable[[], Tensor], z: Tensor, geometry: str) -> None:
        self.forward = forward
        self.kl = geometry == "kl"
        self.z = z.to(torch.float32) if z.dtype in (torch.bfloat16, torch.float16) else z
        self.g = torch.zeros_like(self.z)
        self.eta = 0.0
        self.calls = 1
        if not bool(torch.isfinite(self.z).all()):
            raise FloatingPointError("TargetSurrogate: the outputs are not finite; nothing was changed")
        self._check(self.z)

    def __call__(self) -> Tensor:
        self.calls += 1
        with torch.enable_grad():
            return self.at(self.forward())

    def at(self, z: Tensor) -> Tensor:
        z = z.to(self.z)
        difference = z - self.z
        if self.kl:
            self._check(z)
            divergence = z * (z / self.z).log() - difference
        else:
            divergence = difference.square() / 2
        return (self.eta * self.g * difference + divergence).mean()

    def _check(self, z: Tensor) -> None:
        if self.kl and not bool(((z > 0) & (z < 1)).all()):
            raise ValueError("outputs must be in (0, 1) with geometry 'kl'")


def autograd_target_grad(loss_fn_sum: Callable[[Tensor, Any], Tensor], y: Any) -> Callable[[Tensor], Tensor]:
    """The `target_grad` of an ordinary loss: z -> d loss_fn_sum(z, y) / d z, by automatic differentiation.

    The loss must **sum** over samples (`reduction="sum"`).

    >>> loss = torch.nn.MSELoss(reduction="sum")
    >>> autograd_target_grad(loss, torch.tensor([1.0, 0.0]))(torch.tensor([3.0, 0.5]))
    tensor([4., 1.])
    """

    def target_grad(z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            return torch.autograd.grad(loss_fn_sum(z, y), z)[0]

    return target_grad


def _scheduled(lr: float, t: int, group: Mapping[str, Any]) -> float:
    if group["schedule"] == "sqrt":
        return lr / math.sqrt(t)
    if group["schedule"] == "exp":
        return lr * group["total_steps"] ** (-t / group["total_steps"])
    return lr


def _differentiate(value: Tensor, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that take part in `value`, and their gradients."""
    gradients = torch.autograd.grad(value, params, allow_unused=True)
    pairs = [(p, g) for p, g in zip(params, gradients, strict=True) if g is not None]
    if any(g.layout != torch.strided for _, g in pairs):
        raise RuntimeError("TargetSurrogate does not support sparse gradients")
    return [p for p, _ in pairs], [g for _, g in pairs]


def _compute_dtype(p: Tensor) -> torch.dtype:
    return torch.float32 if p.dtype in (torch.bfloat16, torch.float16) else p.dtype
