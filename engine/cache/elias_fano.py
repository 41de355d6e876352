"""Elias-Fano codes of many sorted lists, decoded all at once by NumPy.

Elias, "Efficient storage and retrieval by content and address of static files", JACM 1974; Fano, 1971. A sorted list
of n numbers below u is cut at bit l = floor(log2(u / n)): the low parts are stored as they are, l bits each, the high
parts in unary, about 2 bits each. That is within 0.6 bits a number of the information in a random set.

Bits of a byte count from the lowest. A code is two strings, the high and the low bits of its lists one after another,
each padded to a byte. How many numbers each list holds, and their bounds, must be known to the reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_BOUND = 1 << 33
"""Low parts are at most 33 bits: what two aligned words of four bytes hold from any bit of the first on."""


class Code(NamedTuple):
    high: bytes
    low: bytes


def encode(values: np.ndarray, lengths: np.ndarray, bounds: np.ndarray) -> Code:
    """The lists one after another, sorted each.

    Args:
        values: [sum(lengths)] int64, each list's below its bound.
        lengths: [S] int64, of each list.
        bounds: [S] int64, at most MAX_BOUND.
    """
    assert len(bounds) == 0 or bounds.max() <= MAX_BOUND
    if len(values) == 0:
        return Code(b"", b"")
    low_bits = _low_bits(lengths, bounds)
    starts = np.cumsum(lengths) - lengths
    shift = np.repeat(low_bits, lengths)
    high = (values >> shift) + np.arange(len(values)) - np.repeat(starts, lengths)
    widths = np.where(lengths > 0, high[np.maximum(starts + lengths, 1) - 1] + 1, 0)
    unary = np.zeros(int(widths.sum()), np.uint8)
    unary[high + np.repeat(np.cumsum(widths) - widths, lengths)] = 1
    ends = np.cumsum(shift)
    place = np.arange(int(ends[-1])) - np.repeat(ends - shift, shift)
    low = (np.repeat(values, shift) >> place).astype(np.uint8) & 1
    return Code(*(np.packbits(bits, bitorder="little").tobytes() for bits in (unary, low)))


def num_low_bytes(lengths: np.ndarray, bounds: np.ndarray) -> int:
    """How many bytes the low bits of these lists take."""
    return (int((lengths * _low_bits(lengths, bounds)).sum()) + 7) // 8


def decode(codes: Sequence[Code], lengths: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The lists of all codes one after another, [lengths.sum()].

    Args:
        lengths: [C, S] int64: each code has S lists.
        bounds: [C, S] int64.

    Raises ValueError when the codes do not hold them.
    """
    lists, of_code = lengths.ravel(), lengths.sum(axis=1)
    total = int(of_code.sum())
    if total == 0:
        return np.empty(0, np.int64)
    wide = np.int64 if max(int(bounds.max()), 8 * sum(len(code.low) for code in codes)) >= 1 << 31 else np.int32
    unary = np.unpackbits(np.frombuffer(b"".join(code.high for code in codes), np.uint8), bitorder="little")
    ones = np.flatnonzero(unary.view(bool))
    if len(ones) != total:
        raise ValueError(f"holds {len(ones)} of {total} numbers")
    high_start, low_start = (8 * _starts([len(code[part]) for code in codes]) for part in (0, 1))
    starts = _starts(lists)
    # a list begins after the last one of the list before it, or where its code begins
    before = np.where(starts > 0, ones[starts - 1] + 1, 0)
    is_first = (starts.reshape(lengths.shape) == _starts(of_code)[:, None]).ravel()
    before[is_first] = np.repeat(high_start, lengths.shape[1])[is_first]
    low_bits = _low_bits(lists, bounds.ravel())
    taken = (lists * low_bits).reshape(lengths.shape)
    at_list = low_start[:, None] + np.cumsum(taken, axis=1) - taken
    shift = np.repeat(low_bits.astype(wide), lists)
    index = np.arange(total, dtype=wide)
    high = ones.astype(wide)
    high -= index
    high += np.repeat((starts - before).astype(wide), lists)
    high <<= shift
    at = index
    at *= shift
    at += np.repeat((at_list.ravel() - starts * low_bits).astype(wide), lists)
    high |= _bits_at(b"".join(code.low for code in codes), at, shift, int(low_bits.max()))
    return high


def _bits_at(content: bytes, at: np.ndarray, count: np.ndarray, most: int) -> np.ndarray:
    """[K] ``count`` bits, at most ``most``, of ``content`` from each bit ``at`` on."""
    if most <= 25:  # they lie in the four bytes from the first one's on
        octets = np.frombuffer(content + bytes(4), np.uint8).astype(np.uint32)
        words = octets[:-3] | octets[1:-2] << np.uint32(8) | octets[2:-1] << np.uint32(16) | octets[3:] << np.uint32(24)
        low = words[at >> 3]
        low >>= (at & 7).astype(np.uint32)
        low &= (np.uint32(1) << count.astype(np.uint32)) - np.uint32(1)
        return low.view(np.int32)
    aligned = np.frombuffer(content + bytes(8 + -len(content) % 4), "<u4").astype(np.uint64)
    aligned[:-1] |= aligned[1:] << np.uint64(32)
    low = aligned[at >> 5] >> (at & 31).astype(np.uint64)
    return low.astype(np.int64) & ((np.int64(1) << count) - 1)


def _starts(sizes: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes


def _low_bits(lengths: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    ratio = np.maximum(bounds // np.maximum(lengths, 1), 1)
    return np.frexp(ratio.astype(np.float64))[1].astype(np.int64) - 1
