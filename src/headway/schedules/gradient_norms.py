"""The gradient norms of a run: recorded beside the optimizer, read from a run's folder, cleaned.

They are what `headway.schedules.schedule_refinement` makes a schedule of.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from headway.constraints import OneOf, check_arguments

__all__ = ["NORMS", "GradNormRecorder", "as_numbers", "clean_norms", "read_norms"]

NORMS = {"l2": 2, "l1": 1}
"""The norms by name: p, for the p-norm over all elements of the gradient."""


class GradNormRecorder:
    """Keep the norm of the whole gradient for every step of an optimizer.

    Given an optimizer, it hangs on it as a step pre-hook until `detach()`. Where the gradient is clipped before
    the step, call `record()` between unscaling and clipping: the hook leaves that step alone. A step that is then
    left out, as by a gradient scaler, leaves no entry of its own. Given parameters, it records when `record()`
    is called and only then; this is the way for `step(closure)`, with the call inside the closure.

    Under DistributedDataParallel every rank records the norm of the averaged gradient: the same number. Shards
    (FSDP2, DTensor) are summed over their ranks, by one all-reduce per mesh dimension; all ranks must record.

    Args:
        optimizer_or_params: an optimizer, or parameters.
        norm: "l2" (default) or "l1"; see `refine_schedule`.

    Attributes:
        norms: the recorded norms, floats, one per step.

    Raises:
        ValueError: for an argument out of its range.

    Source: arXiv 2310.07831.

    >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = torch.optim.SGD([weight], lr=0.5)
    >>> recorder = GradNormRecorder(optimizer)
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     weight.square().sum().div(2).backward()
    ...     optimizer.step()
    >>> recorder.norms
    [5.0, 2.5]
    """

    def __init__(self, optimizer_or_params: Optimizer | Iterable[Tensor], norm: str = "l2") -> None:
        check_arguments({"norm": OneOf(*NORMS)}, norm=norm)
        self.norm = norm
        self.norms: list[float] = []
        self._pending = False  # the last entry belongs to the coming step
        self._optimizer = optimizer_or_params if isinstance(optimizer_or_params, Optimizer) else None
        self._params = [] if isinstance(optimizer_or_params, Optimizer) else list(optimizer_or_params)
        self._hook: Any = None
        if self._optimizer is not None:
            self._hook = self._optimizer.register_step_pre_hook(self._before_step)
        elif not self._params:
            raise ValueError("optimizer_or_params must be an optimizer or at least one parameter, got none")

    def record(self) -> float:
        """Record and return the norm of the present gradients.

        With an optimizer, a second call before the step replaces the first.

        Raises:
            RuntimeError: no parameter has a gradient.
        """
        value = self._measure()
        if self._pending:
            self.norms[-1] = value
        else:
            self.norms.append(value)
        self._pending = self._hook is not None
        return value

    def detach(self) -> None:
        """Take the hook away from the optimizer; the norms stay."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self._pending = None, False

    def state_dict(self) -> dict[str, Any]:
        """The norms so far and their kind, as plain values."""
        return {"norm": self.norm, "norms": list(self.norms), "pending": self._pending}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: it holds norms of another kind.
        """
        if state["norm"] != self.norm:
            raise ValueError(f"norm must be {self.norm!r} in the loaded state, got {state['norm']!r}")
        self.norms = [float(value) for value in state["norms"]]
        self._pending = bool(state["pending"]) and self._hook is not None

    def _before_step(self, *_: Any) -> None:
        if not self._pending:
            self.record()
        self._pending = False

    def _measure(self) -> float:
        params = self._params
        if self._optimizer is not None:
            params = [p for group in self._optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in params if p.grad is not None]
        if not gradients:
            raise RuntimeError("no parameter has a gradient: record() belongs between backward() and step()")
        p = NORMS[self.norm]
        value = _sum_of_powers(gradients, p) ** (1 / p)
        # A fused optimizer under a gradient scaler is handed scaled gradients and divides them itself.
        scale = getattr(self._optimizer, "grad_scale", None)
        return value if scale is None else value / float(scale)


def read_norms(path: str | os.PathLike[str]) -> list[float]:
    """The `grad_norm` of every step that `path`, a metrics.jsonl or a folder that holds one, has; in order of step.

    Of several records of one step the last one counts; records without a `grad_norm`, and an unfinished last line,
    are passed over.

    Raises:
        ValueError: there is no such file, a line cannot be read, or there are fewer than 2 norms.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "metrics.jsonl"
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(
            "norms must be the path of a metrics.jsonl or of a folder that holds one, "
            f"got {os.fspath(path)!r}: {error.strerror or error}"
        ) from error
    found: dict[int, float] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"norms: line {number} of {os.fspath(file)!r}"
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # what a killed run leaves
                break
            raise ValueError(f"{where} is not JSON") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where} must be an object, got {type(record).__name__}")
        if "grad_norm" not in record:
            continue
        step, value = record.get("step"), record["grad_norm"]
        if isinstance(step, bool) or not isinstance(step, int):
            raise ValueError(f"{where} must have a whole number as step, got {step!r}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{where} must have a number as grad_norm, got {value!r}")
        found[step] = float(value)
    if len(found) < 2:
        raise ValueError(f"norms must be 2 or more records with a grad_norm, got {len(found)} in {os.fspath(file)!r}")
    return [found[step] for step in sorted(found)]


def _sum_of_powers(gradients: Iterable[Any], p: int) -> float:
    """The sum of |x|^p, p = 1 or 2, over all elements of all gradients, shards of other ranks included."""
    kinds: dict[tuple[Any, ...], list[Tensor]] = {}
    for gradient in gradients:
        mesh: Any = None
        dimensions: tuple[int, ...] = ()
        if hasattr(gradient, "placements"):
            if any(placement.is_partial() for placement in gradient.placements):
                from torch.distributed.tensor import Replicate

                gradient = gradient.redistribute(
                    placements=[Replicate() if placed.is_partial() else placed for placed in gradient.placements]
                )
            mesh = gradient.device_mesh
            dimensions = tuple(d for d, placed in enumerate(gradient.placements) if not placed.is_replicate())
            gradient = gradient.to_local()
        if gradient.is_sparse:
            gradient = gradient.coalesce().values()
        kinds.setdefault((mesh, dimensions, gradient.device, gradient.dtype), []).append(gradient)
    total = 0.0
    for (mesh, dimensions, _, dtype), tensors in kinds.items():
        parts = torch._foreach_norm(tensors, p, dtype=torch.promote_types(dtype, torch.float32))
        norm = torch.linalg.vector_norm(torch.stack(parts), p)
        if dimensions:
            power = _power(norm.double(), p)
            for dimension in dimensions:
                torch.distributed.all_reduce(power, group=mesh.get_group(dimension))
            total += power.item()
        else:
            total += _power(norm.item(), p)
    return total


def _power(x: Any, p: int) -> Any:
    # Python's ** raises where a product is infinite.
    return x if p == 1 else x * x


def as_numbers(value: Any) -> np.ndarray | None:
    """A one-dimensional float64 array of the numbers in a sequence, array or tensor; None if it is something else."""
    if isinstance(value, Tensor):
        value = value.detach().double().cpu().numpy()
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        return None
    try:
        array = np.asarray(value)
    except ValueError:  # sequences of different lengths
        return None
    return array.astype(np.float64) if array.ndim == 1 and array.dtype.kind in "iuf" else None


def clean_norms(norms: Any) -> np.ndarray:
    """Norms as float64 of shape (T,), those that are not finite interpolated from their neighbours.

    Raises:
        ValueError: fewer than 2 are finite, or a finite one is not > 0.
    """
    values = as_numbers(norms)
    if values is None:
        raise ValueError(f"norms must be a sequence of numbers, got {norms!r}")
    shown = repr(norms) if len(values) <= 8 else f"{len(values)} values"
    finite = np.isfinite(values)
    if finite.sum() < 2:
        raise ValueError(f"norms must hold at least 2 finite numbers, got {shown}")
    refused = np.flatnonzero(finite & (values <= 0))
    if refused.size:
        place = int(refused[0])
        raise ValueError(f"norms must be > 0, got {values[place]:g} at position {place} of {shown}")
    places = np.arange(len(values))
    return np.interp(places, places[finite], values[finite])
