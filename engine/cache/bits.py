"""Whole numbers of given widths in a string of bits. Bits of a byte count from the lowest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(values: np.ndarray, widths: np.ndarray) -> bytes:
    """The lowest ``widths`` [K] bits of each of the ``values`` [K] int64, one after another, padded to a byte."""
    ends = np.cumsum(widths)
    if len(ends) == 0 or ends[-1] == 0:
        return b""
    place = np.arange(int(ends[-1])) - np.repeat(ends - widths, widths)
    ones = (np.repeat(values, widths) >> place).astype(np.uint8) & 1
    return np.packbits(ones, bitorder="little").tobytes()


def unpack(contents: Sequence[bytes], counts: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """All numbers of several strings, one after another, int64.

    Args:
        counts: [C, L]: string c holds, for each l in turn, counts[c, l] numbers of widths[l] bits, at most 25.

    Raises ValueError when a string is shorter than that.
    """
    num_bits = counts @ widths
    for content, needed in zip(contents, num_bits.tolist()):
        if 8 * len(content) < needed:
            raise ValueError(f"has {len(content)} of {(needed + 7) // 8} bytes")
    starts = np.cumsum([0] + [8 * len(content) for content in contents[:-1]])
    in_content = np.cumsum(counts * widths, axis=1) - counts * widths
    lists = counts.ravel()
    width = np.repeat(np.tile(widths, len(contents)), lists)
    index = np.arange(len(width)) - np.repeat(np.cumsum(lists) - lists, lists)
    at = np.repeat((starts[:, None] + in_content).ravel(), lists) + index * width
    words = four_bytes_from_each(b"".join(contents)).take(at >> 3, mode="clip")
    return (words >> (at & 7)) & ((1 << width) - 1)


def four_bytes_from_each(content: bytes) -> np.ndarray:
    """[len + 1] int32: the four bytes from each one on, with zeros past the end; they hold 25 bits from any bit."""
    unaligned = np.ndarray(len(content) + 1, "<i4", content + bytes(4), strides=(1,))
    return unaligned.astype(np.int32)
