"""A nested state in two halves: named tensors, and a JSON skeleton that holds everything else.

    flatten(state)                 ->  tensors {name: tensor}  +  skeleton
    unflatten(skeleton, tensors)   ->  state

The name of a tensor is its path joined with dots (`model.layers.0.weight`), as
`torch.distributed.checkpoint` itself names the parts of a nested state. In the skeleton `None`,
bool, str, lists, finite floats and 64-bit ints stand for themselves; every other value is an object
with one key that says what it is:

    {"tensor": name}    {"tuple": [...]}    {"dict": {key: value}}    {"items": [[key, value], ...]}
    {"float": the 16 hexadecimal digits of a double}    {"int": hexadecimal}

`items` is a dict with int keys. So nothing is rounded, NaN keeps its bits, and reading a skeleton
runs no code from the disk.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Flat", "flatten", "unflatten"]


@dataclass
class Flat:
    """A flattened state: `tensors` by name, the `paths` that lead to them, and the `skeleton`."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    paths: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    skeleton: Any = None


def flatten(state: Any, root: tuple[str, ...] = ()) -> Flat:
    """Split `state` into named tensors and a JSON skeleton.

    Args:
        state: nested dicts (str or int keys), lists and tuples of tensors, str, int, float, bool and None.
            Other mappings, such as `OrderedDict`, count as dicts.
        root: first parts of every tensor's name.

    Raises:
        TypeError: something else is in `state`; the message names its path.

    >>> flat = flatten({"model": {"w": torch.ones(2)}, "betas": (0.9, float("inf"))})
    >>> list(flat.tensors)
    ['model.w']
    >>> flat.skeleton["dict"]["betas"]
    {'tuple': [0.9, {'float': '7ff0000000000000'}]}
    >>> flatten({"optimizer": {"param_groups": [{"alpha": len}]}})
    Traceback (most recent call last):
    ...
    TypeError: optimizer.param_groups[0].alpha is a builtin_function_or_method; a checkpoint holds tensors, \
str, int, float, bool, None, and dicts, lists and tuples of them
    """
    flat = Flat()
    flat.skeleton = _encode(state, root, flat)
    return flat


def unflatten(skeleton: Any, tensor: Callable[[str], Tensor]) -> Any:
    """Rebuild the state that `flatten` took apart; `tensor(name)` gives the tensors.

    Raises:
        ValueError: `skeleton` is not one that `flatten` made.

    >>> state = {3: (torch.ones(2), float("-inf"))}
    >>> flat = flatten(state)
    >>> unflatten(flat.skeleton, flat.tensors.__getitem__)
    {3: (tensor([1., 1.]), -inf)}
    """
    if isinstance(skeleton, list):
        return [unflatten(item, tensor) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if len(skeleton) == 1:
        ((kind, value),) = skeleton.items()
        if kind == "tensor":
            return tensor(value)
        if kind == "tuple":
            return tuple(unflatten(item, tensor) for item in value)
        if kind == "dict":
            return {key: unflatten(item, tensor) for key, item in value.items()}
        if kind == "items":
            return {unflatten(key, tensor): unflatten(item, tensor) for key, item in value}
        if kind == "float":
            return struct.unpack(">d", bytes.fromhex(value))[0]
        if kind == "int":
            return int(value, 16)
    raise ValueError(f"not a part of a skeleton: an object with the keys {sorted(skeleton)}")


def _encode(value: Any, path: tuple[str | int, ...], flat: Flat) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        # JSON readers elsewhere, and Python's own limit on decimal digits, stop at some size; hexadecimal does not.
        return value if -(2**63) <= value < 2**63 else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if isinstance(value, Tensor):
        return {"tensor": _add_tensor(value, path, flat)}
    if kind is list:
        return [_encode(item, (*path, index), flat) for index, item in enumerate(value)]
    if kind is tuple:
        return {"tuple": [_encode(item, (*path, index), flat) for index, item in enumerate(value)]}
    if isinstance(value, Mapping):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(f"{_dotted(path)} has the key {key!r}; keys must be str or int")
        items = [(key, _encode(item, (*path, str(key)), flat)) for key, item in value.items()]
        if all(type(key) is str for key in value):
            return {"dict": dict(items)}
        return {"items": [[_encode(key, path, flat), item] for key, item in items]}
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    raise TypeError(
        f"{_dotted(path)} is a {name}; a checkpoint holds tensors, str, int, float, bool, None, "
        "and dicts, lists and tuples of them"
    )


def _add_tensor(tensor: Tensor, path: tuple[str | int, ...], flat: Flat) -> str:
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else "nested"
        kind = kind if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{_dotted(path)} is a {kind} tensor; a checkpoint holds dense tensors")
    name = ".".join(map(str, path))
    # {"a.b": x, "a": {"b": y}} gives two tensors one name; the skeleton knows which is which.
    while name in flat.tensors:
        name += "~"
    flat.tensors[name] = tensor.detach()
    flat.paths[name] = path
    return name


def _dotted(path: tuple[str | int, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the state"
