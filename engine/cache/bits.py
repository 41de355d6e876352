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
        counts: [C, L]: string c holds, for each l in turn, counts[c, l] numbers of widths[l] bits.

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
    return at_bits(b"".join(contents), at, width, int(widths.max())).astype(np.int64)


def at_bits(content: bytes, at: np.ndarray, widths: np.ndarray, widest: int) -> np.ndarray:
    """[K] ``widths`` bits, at most ``widest``, which is at most 33, of ``content`` from each bit ``at`` on."""
    if widest <= 25:  # they lie in the four bytes from the first one's on
        octets = np.frombuffer(content + bytes(4), np.uint8).astype(np.uint32)
        words = octets[:-3] | octets[1:-2] << np.uint32(8) | octets[2:-1] << np.uint32(16) | octets[3:] << np.uint32(24)
        low = words[at >> 3]
        low >>= (at & 7).astype(np.uint32)
        low &= (np.uint32(1) << widths.astype(np.uint32)) - np.uint32(1)
        return low.view(np.int32)
    aligned = np.frombuffer(content + bytes(8 + -len(content) % 4), "<u4").astype(np.uint64)
    aligned[:-1] |= aligned[1:] << np.uint64(32)
    low = aligned[at >> 5] >> (at & 31).astype(np.uint64)
    return low.astype(np.int64) & ((np.int64(1) << widths) - 1)
