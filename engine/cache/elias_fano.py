"""Elias-Fano codes of many sorted lists, decoded all at once by NumPy.

Elias, "Efficient storage and retrieval by content and address of static files", JACM 1974; Fano, 1971. A sorted list
of n numbers below u is cut at bit l = floor(log2(u / n)): the low parts are stored as they are, l bits each, the high
parts in unary, about 2 bits each. That is within 0.6 bits a number of the information in a random set.

Bits of a byte count from the lowest. A code is the high bits of its lists one after another, then their low bits, each
of the two padded to a byte. How many numbers each list holds, and their bounds, must be known to the reader; the number
of bits follows from them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.cache.bits import four_bytes_from_each, pack

_MOST_LOW_BITS = 25
"""Four bytes hold so many from any bit of the first on. A longer high part costs a bit for each 2^25 of the bound."""


def encode(values: np.ndarray, lengths: np.ndarray, bounds: np.ndarray) -> bytes:
    """The lists one after another, sorted each.

    Args:
        values: [sum(lengths)] int64, each list's below its bound.
        lengths: [S] int64, of each list.
        bounds: [S] int64.
    """
    low_bits, high_sizes = _sizes(lengths, bounds)
    shift = np.repeat(low_bits, lengths)
    unary = np.zeros(high_sizes.sum(), np.uint8)
    begins = np.repeat(_starts(high_sizes) - _starts(lengths), lengths)
    unary[(values >> shift) + np.arange(len(values)) + begins] = 1
    return np.packbits(unary, bitorder="little").tobytes() + pack(values, shift)


def decode(codes: Sequence[bytes], lengths: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The lists of all codes one after another, [lengths.sum()], int32 where that holds them.

    Args:
        lengths: [C, S] int64: each code has S lists.
        bounds: [C, S] int64.

    Raises ValueError when the codes do not hold them.
    """
    low_bits, high_sizes = _sizes(lengths, bounds)
    high_begins, high_bytes = _begins(high_sizes)
    low_begins, low_bytes = _begins(lengths * low_bits)
    for code, size in zip(codes, (high_bytes + low_bytes).tolist()):
        if len(code) != size:
            raise ValueError(f"has {len(code)} of {size} bytes")
    cuts = high_bytes.tolist()
    ones = _ones(b"".join(code[:cut] for code, cut in zip(codes, cuts)))
    words = four_bytes_from_each(b"".join(code[cut:] for code, cut in zip(codes, cuts)))
    lists, low_bits, total = lengths.ravel(), low_bits.ravel(), int(lengths.sum())
    if len(ones) != total:
        raise ValueError(f"holds {len(ones)} of {total} numbers")
    # every pass over all numbers counts: half as wide where that holds them, and in place
    wide = np.int64 if max(bounds.max(initial=0), 8 * len(words)) >= 1 << 31 else np.int32
    starts = _starts(lists)
    index = np.arange(total, dtype=wide)
    values = ones.astype(wide)
    values -= index
    values += np.repeat((starts - high_begins).astype(wide), lists)
    shift = np.repeat(low_bits.astype(wide), lists)
    values <<= shift
    at = index
    at *= shift
    at += np.repeat((low_begins - starts * low_bits).astype(wide), lists)
    low = words.take(at >> 3, mode="clip")  # none is outside, and not to ask saves time
    at &= 7
    low >>= at
    low &= np.repeat((1 << low_bits.astype(np.int32)) - 1, lists)
    values |= low
    return values


def num_bytes(lengths: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """[C] how long the code of each row of lists is."""
    low_bits, high_sizes = _sizes(lengths, bounds)
    return _begins(high_sizes)[1] + _begins(lengths * low_bits)[1]


def _ones(content: bytes) -> np.ndarray:
    """Which bits are set."""
    bits = np.unpackbits(np.frombuffer(content, np.uint8), bitorder="little")
    return np.flatnonzero(bits.view(bool))


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes


def _begins(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of lists of ``sizes`` [C, S] bits, each code padded to a byte: [C * S] where they begin, [C] bytes of a code."""
    num_bytes = (sizes.sum(axis=1) + 7) // 8
    in_code = np.cumsum(sizes, axis=1) - sizes
    return (in_code + 8 * _starts(num_bytes)[:, None]).ravel(), num_bytes


def _sizes(lengths: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many low bits a number of each list has, and how many high bits the list has."""
    ratio = np.maximum(bounds // np.maximum(lengths, 1), 1)
    low_bits = np.minimum(np.frexp(ratio.astype(np.float64))[1] - 1, _MOST_LOW_BITS).astype(np.int64)
    return low_bits, np.where(lengths > 0, (bounds - 1 >> low_bits) + lengths, 0)
