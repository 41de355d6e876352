"""Random numbers that are a pure function of what they are for: no generator, no state, the same for ever.

Data order and masks must not change with a NumPy release, a world size or a resume, so they come from the
SplitMix64 mixer (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014).
"""

from __future__ import annotations

import hashlib

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def fold(*parts: int | str) -> int:
    """A 64-bit key from any mix of integers and strings."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_bits(key: int, count: int) -> np.ndarray:
    """[count] uint64, uniform."""
    with np.errstate(over="ignore"):
        return _mix(np.uint64(key) + _GAMMA * np.arange(1, count + 1, dtype=np.uint64))


def to_unit(bits: np.ndarray) -> np.ndarray:
    """float64 in (0, 1) from uint64: never 0, so its logarithm is finite."""
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def permutation(key: int, count: int) -> np.ndarray:
    """[count] int64: the numbers below ``count`` in random order."""
    return np.argsort(random_bits(key, count), kind="stable")
