"""Random numbers that are a pure function of what they are for: no generator, no state, the same for ever.

Data order and masks must not change with a NumPy release, a world size or a resume, so they come from the
SplitMix64 mixer (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
"""

from __future__ import annotations

import hashlib

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def fold(*parts: int | str) -> int:
    """A 64-bit key from any mix of integers and strings."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def bits_at(keys: np.ndarray | np.uint64, indices: np.ndarray) -> np.ndarray:
    """uint64, uniform: number ``indices`` of the stream of ``keys``. The two broadcast; any element costs the same."""
    z = indices.astype(np.uint64) + np.uint64(1)
    z *= _GAMMA
    z = z + keys
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def random_bits(key: int, count: int) -> np.ndarray:
    """[count] uint64, uniform: the first numbers of a stream."""
    return bits_at(np.uint64(key), np.arange(count, dtype=np.uint64))


def permutation(key: int, count: int) -> np.ndarray:
    """[count] int64: the numbers below ``count`` in random order."""
    return np.argsort(random_bits(key, count), kind="stable")
