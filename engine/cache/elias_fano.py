"""Elias-Fano codes of several sorted lists in one string of bytes, decoded all at once by NumPy.

Elias, "Efficient storage and retrieval by content and address of static files", JACM 1974; Fano, 1971. A sorted list
of n numbers below u is cut at bit l = floor(log2(u / n)): the low parts are stored as they are, l bits each, the high
parts in unary, about 2 bits each. That is within 0.6 bits a number of the information in a random set.

Bits of a byte count from the lowest. Bytes: the high bits of all lists, one after another, padded to a byte; then the
low bits likewise. How many numbers each list holds, and their bounds, must be known to the reader.
"""

from __future__ import annotations

import numpy as np

MAX_BOUND = 1 << 33
"""Low parts are at most 33 bits: what two aligned words of four bytes hold from any bit of the first on."""


def encode(values: np.ndarray, lengths: np.ndarray, bounds: np.ndarray) -> bytes:
    """The lists one after another, sorted each.

    Args:
        values: [sum(lengths)] int64, each list's below its bound.
        lengths: [S] int64, of each list.
        bounds: [S] int64, at most MAX_BOUND.
    """
    assert len(bounds) == 0 or bounds.max() <= MAX_BOUND
    which = np.repeat(np.arange(len(lengths)), lengths)
    low_bits = _low_bits(lengths, bounds)
    starts = np.cumsum(lengths) - lengths
    high = (values >> low_bits[which]) + np.arange(len(values)) - starts[which]
    last = starts + lengths - 1
    widths = np.where(lengths > 0, high[np.minimum(last, len(values) - 1)] + 1, 0) if len(values) else lengths
    ones = high + (np.cumsum(widths) - widths)[which]
    unary = np.zeros(int(widths.sum()), np.uint8)
    unary[ones] = 1
    parts = [np.packbits(unary, bitorder="little").tobytes()]
    low = [
        _bits_of(values[start : start + length], bits)
        for start, length, bits in zip(starts, lengths, low_bits)
        if length and bits
    ]
    if low:
        parts.append(np.packbits(np.concatenate(low), bitorder="little").tobytes())
    return b"".join(parts)


def decode(content: bytes, lengths: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, int]:
    """The lists one after another, [sum(lengths)] int64, and how many bytes of ``content`` they took.

    Raises ValueError when ``content`` does not hold them.
    """
    total = int(lengths.sum())
    if total == 0:
        return np.empty(0, np.int64), 0
    low_bits = _low_bits(lengths, bounds)
    num_low_bytes = int((lengths * low_bits).sum() + 7) // 8
    unary = np.unpackbits(np.frombuffer(content, np.uint8, max(0, len(content) - num_low_bytes)), bitorder="little")
    ones = np.flatnonzero(unary.view(bool))[:total]
    if len(ones) < total:
        raise ValueError(f"holds {len(ones)} of {total} numbers")
    num_high_bytes = int(ones[-1]) // 8 + 1
    starts = np.cumsum(lengths) - lengths
    before = np.where(starts > 0, ones[np.maximum(starts - 1, 0)] + 1, 0)
    low_start = np.cumsum(lengths * low_bits) - lengths * low_bits + 8 * num_high_bytes
    shift = np.repeat(low_bits, lengths)
    index = np.arange(total)
    high = ones - index
    high += np.repeat(starts - before, lengths)
    at = index * shift
    at += np.repeat(low_start - starts * low_bits, lengths)
    low = _words_at(content, at).astype(np.int64)
    low &= np.repeat((1 << low_bits) - 1, lengths)
    high <<= shift
    high |= low
    return high, num_high_bytes + num_low_bytes


def _words_at(content: bytes, at: np.ndarray) -> np.ndarray:
    """[K] uint64: at least 33 bits of ``content`` from each bit on. NumPy gathers unaligned words slowly."""
    words = np.frombuffer(content + bytes(8 + -len(content) % 4), "<u4").astype(np.uint64)
    words[:-1] |= words[1:] << np.uint64(32)
    return words[at >> 5] >> (at & 31).astype(np.uint64)


def _low_bits(lengths: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    ratio = np.maximum(bounds // np.maximum(lengths, 1), 1)
    return np.frexp(ratio.astype(np.float64))[1].astype(np.int64) - 1


def _bits_of(values: np.ndarray, count: int) -> np.ndarray:
    """[n * count] uint8: the lowest ``count`` bits of each value."""
    return ((values[:, None] >> np.arange(count)) & 1).astype(np.uint8).ravel()
