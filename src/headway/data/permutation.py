"""A seeded pseudo-random permutation of any size, evaluated point by point without storing it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["permute"]

ROUNDS = 6
WORD = 2**64 - 1


def permute(index: ArrayLike, size: int, *, seed: int, epoch: ArrayLike = 0) -> NDArray[np.int64]:
    """Image of `index` under the permutation of {0, ..., size - 1} that belongs to `seed` and `epoch`.

    A Feistel network over Z_a x Z_b, with a = ceil(sqrt(size)) and b = ceil(size / a), writes x = l b + r and repeats

        l <- (l + F_1(r)) mod a,   r <- (r + F_2(l)) mod b,   l <- (l + F_3(r)) mod a, ...

    for six rounds. Each round can be undone, so the whole is a bijection of {0, ..., a b - 1}. Images of `size` or
    more are sent through again until they fall below it (cycle walking), which keeps it a bijection; as a b exceeds
    `size` by less than a, that is rare. F_k is a 64-bit mixing function keyed by (seed, epoch, k).

    Args:
        index: whole numbers in [0, size), of any shape.
        size: number of elements, >= 1. Time and memory depend on the shape of `index` only.
        seed: whole number; taken modulo 2**64.
        epoch: whole numbers >= 0 that broadcast with `index`; each selects its own permutation.

    Returns:
        int64 array of the broadcast shape.

    Raises:
        ValueError: `size` < 1 or an index outside [0, size).

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), the generalised Feistel and
    cycle-walking constructions; the rounds here are keyed by the SplitMix64 finaliser, as speed and not secrecy is
    wanted.

    Example:
        >>> sorted(permute(range(7), 7, seed=0).tolist())
        [0, 1, 2, 3, 4, 5, 6]
        >>> int(permute(123_456_789, 10**9, seed=0)) < 10**9
        True
    """
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    position, period = np.broadcast_arrays(np.asarray(index), np.asarray(epoch))
    shape = position.shape
    position, period = position.ravel(), period.ravel()
    if position.size and (position.min() < 0 or position.max() >= size):
        raise ValueError(f"index must be in [0, {size}), got {position.min()} to {position.max()}")
    image = position.astype(np.uint64)
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    keys = _keys(seed, period.astype(np.uint64))  # [ROUNDS, n]
    image = _feistel(image, a, b, keys)
    outside = np.flatnonzero(image >= size)
    while outside.size:
        image[outside] = _feistel(image[outside], a, b, keys[:, outside])
        outside = outside[image[outside] >= size]
    return image.astype(np.int64).reshape(shape)


def _feistel(x: NDArray[np.uint64], a: int, b: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    modulus = np.uint64(a), np.uint64(b)
    left, right = np.divmod(x, modulus[1])
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _mix(right ^ key) % modulus[0]) % modulus[0]
        else:
            right = (right + _mix(left ^ key) % modulus[1]) % modulus[1]
    return left * modulus[1] + right


def _keys(seed: int, epoch: NDArray[np.uint64]) -> NDArray[np.uint64]:
    start = _mix(np.full(1, seed & WORD, dtype=np.uint64))
    return _mix(_mix(start ^ epoch) + np.arange(1, ROUNDS + 1, dtype=np.uint64)[:, None])


def _mix(x: NDArray[np.uint64]) -> NDArray[Any]:
    # SplitMix64: the golden-ratio increment keeps 0 from being a fixed point.
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
