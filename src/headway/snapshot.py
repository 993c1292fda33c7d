"""Where a run stands, held so that it can go back there: random generators, and whatever has a state.

state = rng_state();  ...;  set_rng_state(state)
before = Snapshot(model, optimizer);  ...;  before.restore()
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["Snapshot", "Stateful", "put_back", "rng_state", "set_rng_state"]


class Stateful(Protocol):
    """What has a state: modules, optimizers, schedules, samplers, scalers."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take a state over."""
        ...


class Snapshot:
    """The states of some objects and of the random generators, to return to as often as wanted.

    Costs one copy of every tensor, on the tensor's own device, or a file. `restore` puts modules back
    in place, so that optimizers and compiled graphs keep their parameters.

    Args:
        owners: objects with `state_dict` and `load_state_dict`.
        rng: also hold the global random generators (`rng_state`). Default True.
        file: hold the states in this file instead of memory; replaced if it exists. Default None.

    Raises:
        OSError: the file cannot be written.

    >>> model = torch.nn.Linear(2, 1)
    >>> before = Snapshot(model)
    >>> weight = model.weight.detach().clone()
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> before.restore()
    >>> bool((model.weight == weight).all())
    True
    """

    def __init__(self, *owners: Stateful, rng: bool = True, file: str | Path | None = None) -> None:
        self.owners = owners
        self.file = None if file is None else Path(file)
        states = [owner.state_dict() for owner in owners]
        generators = rng_state() if rng else None
        if self.file is None:
            self._states = _copy(states)
        else:
            torch.save(states, self.file)
        self._generators = generators

    def restore(self) -> None:
        """Put every object, and the generators, back to where they were."""
        put_back(self.owners, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """What is held, for a checkpoint; `put_back` takes it in another process."""
        states = self._states if self.file is None else torch.load(self.file, weights_only=True)
        return {"owners": states, "generators": self._generators}


def put_back(owners: Sequence[Stateful], state: Mapping[str, Any]) -> None:
    """Put objects, in the order in which a `Snapshot` took them, and the generators to where its state says."""
    for owner, own_state in zip(owners, state["owners"], strict=True):
        # Optimizers keep the very tensors that they are given: they get copies.
        owner.load_state_dict(own_state if isinstance(owner, torch.nn.Module) else _copy(own_state))
    if state["generators"] is not None:
        set_rng_state(state["generators"])


def _copy(value: Any) -> Any:
    """A copy that shares no tensor and no container with `value`."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_copy(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


def rng_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's global generators, as tensors and plain numbers.

    Keys: `python`, `numpy`, `torch`, and `cuda` (one tensor per device) where CUDA is available.

    Raises:
        ValueError: NumPy's global generator has been replaced by one of another kind.

    >>> state = rng_state()
    >>> first = torch.rand(2), random.random(), np.random.rand()
    >>> set_rng_state(state)
    >>> again = torch.rand(2), random.random(), np.random.rand()
    >>> bool((first[0] == again[0]).all()) and first[1:] == again[1:]
    True
    """
    version, words, gauss = random.getstate()
    generator = np.random.get_state(legacy=False)
    if generator["bit_generator"] != "MT19937":
        raise ValueError(f"NumPy's global generator must be MT19937, got {generator['bit_generator']}")
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "key": torch.tensor(generator["state"]["key"].astype(np.int64)),
            "pos": int(generator["state"]["pos"]),
            "has_gauss": int(generator["has_gauss"]),
            "gauss": float(generator["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators back to where `rng_state` found them.

    CUDA devices that the snapshot does not know, or that are not here, are left alone.
    """
    python, numpy = state["python"], state["numpy"]
    words = {"key": numpy["key"].numpy().astype(np.uint32), "pos": numpy["pos"]}
    np.random.set_state(
        {"bit_generator": "MT19937", "state": words, "has_gauss": numpy["has_gauss"], "gauss": numpy["gauss"]}
    )
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, device_state in enumerate(state.get("cuda", ())[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, device)
