"""The shared library of native kernels: found, loaded and set up on first use.

`setup.py` builds it from the C sources in `native/`; it knows neither Python nor PyTorch. Its loops exist for AVX-512,
AVX2 and plain C, all with the same results, and it computes on PyTorch's own OpenMP threads, as many as
`torch.get_num_threads()` says. Without the library, or with `HEADWAY_KERNELS=reference` in the environment, every
kernel runs its plain-torch reference.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["available", "dense_alike", "instruction_set", "library", "pointers", "sizes", "takes", "why_not"]

_PATH = Path(__file__).with_name("_native.so")
# Raised here and in native/parallel.c with every change of a signature.
_VERSION = 3
_INSTRUCTION_SETS = ("plain C", "AVX2", "AVX-512")

_size, _int, _double, _pointer = ctypes.c_size_t, ctypes.c_int, ctypes.c_double, ctypes.c_void_p
_SIGNATURES = {
    "headway_adagrad": [_size, *[_pointer] * 6, *[_double] * 7, _int],
    "headway_adam": [_size, _pointer, _int, *[_pointer] * 9, *[_double] * 8, _int, _int],
    "headway_adam8": [_size, _pointer, _int, _size, *[_pointer] * 8, *[_double] * 6, _int, _int],
    "headway_clamp": [_size, _pointer, _pointer, _double, _int],
    "headway_code": [_int, _int, _size, _size, _pointer, _pointer, _pointer, _int],
    "headway_first_nonfinite": [_size, _pointer, _pointer, _pointer, _pointer, _int],
    "headway_kth_largest": [_size, _pointer, _pointer, _size, _pointer, _int],
    "headway_project": [_size, _pointer, _pointer, _pointer, _int, _int],
    "headway_projections": [_size, _pointer, _pointer, _pointer, _pointer, _int, _int],
    "headway_set_map": [_int, _pointer, _pointer],
    "headway_squared_norms": [_size, _pointer, _pointer, _pointer, _int],
}


def library() -> ctypes.CDLL | None:
    """The loaded library, or None; `why_not` says why.

    Raises:
        ValueError: `HEADWAY_KERNELS` is neither empty, `native` nor `reference`.
    """
    return _load(os.environ.get("HEADWAY_KERNELS", ""))[0]


def available() -> bool:
    """Whether kernels run natively.

    >>> available() == (why_not() == "")
    True
    """
    return library() is not None


def why_not() -> str:
    """Why `library` is None, in a line; empty if it is not."""
    return _load(os.environ.get("HEADWAY_KERNELS", ""))[1]


def instruction_set(most: str = "AVX-512") -> str:
    """Choose the best instruction set that the processor has, up to `most`, and return its name.

    Called by `library` at load; `most` (`plain C`, `AVX2` or `AVX-512`) serves tests and benchmarks.
    """
    loaded = library()
    if loaded is None:
        raise RuntimeError(why_not())
    return _INSTRUCTION_SETS[loaded.headway_set_path(_INSTRUCTION_SETS.index(most))]


@functools.cache
def _load(wanted: str) -> tuple[ctypes.CDLL | None, str]:
    if wanted not in ("", "native", "reference"):
        raise ValueError(f"HEADWAY_KERNELS must be 'native' or 'reference', got {wanted!r}")
    if wanted == "reference":
        return None, "HEADWAY_KERNELS=reference is set"
    if not _PATH.exists():
        return None, "the native kernels were not built: install a C compiler, then reinstall headway"
    try:
        loaded = ctypes.CDLL(str(_PATH))
        version = loaded.headway_version()
    except (OSError, AttributeError) as error:
        return None, f"the native kernels cannot be loaded: {error}"
    if version != _VERSION:
        return None, f"the native kernels are of version {version}, not {_VERSION}: reinstall headway"
    for name, arguments in _SIGNATURES.items():
        getattr(loaded, name).argtypes = arguments
    loaded.headway_set_path(len(_INSTRUCTION_SETS) - 1)
    loaded.headway_set_pool.argtypes = [_pointer, _pointer]
    loaded.headway_set_pool.restype = None
    # PyTorch makes the symbols of its own libgomp global; where it has none, the kernels run on one thread.
    process = ctypes.CDLL(None)
    if hasattr(process, "GOMP_parallel") and hasattr(process, "omp_get_thread_num"):
        loaded.headway_set_pool(
            ctypes.cast(process.GOMP_parallel, _pointer), ctypes.cast(process.omp_get_thread_num, _pointer)
        )
    return loaded, ""


def takes(tensor: Tensor, dtypes: Iterable[torch.dtype] = (torch.float32,)) -> bool:
    """Whether a kernel can work on the tensor's memory: a plain tensor of one of `dtypes` on the CPU, without gaps."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype in dtypes
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and _is_dense(tensor)
        and not tensor.is_neg()
        and not torch.compiler.is_compiling()
    )


def dense_alike(tensor: Tensor, *others: Tensor) -> bool:
    """Whether the others have the same shape and hold their elements in the same order as `tensor`, itself dense."""
    shape, contiguous = tensor.shape, tensor.is_contiguous()
    return all(
        other.shape == shape and (other.is_contiguous() if contiguous else other.stride() == tensor.stride())
        for other in others
    )


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array:
    """The addresses of the tensors' elements, as a C array."""
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def sizes(tensors: Sequence[Tensor]) -> ctypes.Array:
    """The numbers of elements of the tensors, as a C array."""
    return (ctypes.c_size_t * len(tensors))(*[tensor.numel() for tensor in tensors])


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
