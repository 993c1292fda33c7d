"""A seeded pseudo-random permutation of any size, evaluated point by point without storing it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["permute"]

WORD = 2**64 - 1
ROUND_NUMBERS = np.arange(1, 7, dtype=np.uint64)[:, None]
GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
SECOND_FACTOR = np.uint64(0x94D049BB133111EB)
HALF_WORD = np.uint64(32)


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
    cycle-walking constructions; the round functions here mix with the multipliers of SplitMix64, as speed and not
    secrecy is wanted.

    Example:
        >>> sorted(permute(range(7), 7, seed=0).tolist())
        [0, 1, 2, 3, 4, 5, 6]
        >>> int(permute(123_456_789, 10**9, seed=0)) < 10**9
        True
    """
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    position, period = np.asarray(index), np.asarray(epoch)
    if position.shape != period.shape:
        position, period = np.broadcast_arrays(position, period)
    shape = position.shape
    position, period = position.ravel(), period.ravel()
    if position.size and (position.min() < 0 or position.max() >= size):
        raise ValueError(f"index must be in [0, {size}), got {position.min()} to {position.max()}")
    image = position.astype(np.uint64)
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    keys = _keys(seed, period.astype(np.uint64))  # [6, n]
    image = _feistel(image, a, b, keys)
    outside = np.flatnonzero(image >= size)
    while outside.size:
        image[outside] = _feistel(image[outside], a, b, keys[:, outside])
        outside = outside[image[outside] >= size]
    return image.astype(np.int64).reshape(shape)


def _feistel(x: NDArray[np.uint64], a: int, b: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    size_left, size_right = np.uint64(a), np.uint64(b)
    left, right = np.divmod(x, size_right)
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _round(right ^ key)) % size_left
        else:
            right = (right + _round(left ^ key)) % size_right
    return left * size_right + right


def _round(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """32 bits from 64: two multiplications, each followed by its upper half. `x` is overwritten."""
    x *= FIRST_FACTOR
    x ^= x >> HALF_WORD
    x *= SECOND_FACTOR
    x >>= HALF_WORD
    return x


def _keys(seed: int, epoch: NDArray[np.uint64]) -> NDArray[np.uint64]:
    start = _mix(np.full(1, seed & WORD, dtype=np.uint64))
    return _mix(_mix(start ^ epoch) + ROUND_NUMBERS)  # [6, n]


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # The golden-ratio increment of SplitMix64 keeps 0 from being a fixed point.
    x = x + GOLDEN_RATIO
    x = (x ^ (x >> np.uint64(30))) * FIRST_FACTOR
    x = (x ^ (x >> np.uint64(27))) * SECOND_FACTOR
    return x ^ (x >> np.uint64(31))
