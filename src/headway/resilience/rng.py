"""The state of every global random generator that a training run draws from, in a form a checkpoint can hold."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["rng_state", "set_rng_state"]


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
