"""Kept ids with a weight each, and the mass of the rest, as bytes and back.

A record holds the kept ids of one sample as ranked pairs. The class of a pair is the coarse part of its level (see
engine/cache/levels.py), so that common levels cost few bits. It is varints (positions, length of each list), the
Elias-Fano code of the lists, then the fine parts of the levels, each class with its own number of bits, in the order of
the pairs, and last the level of each position's tail.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.cache import bits, elias_fano, varints
from engine.cache.kept import Kept, in_pieces, joined
from engine.cache.levels import Levels
from engine.cache.ranked import RankedPairs

_EVEN_BITS = 3
"""Fine bits of the lower classes; the classes above each hold twice the levels of the one before."""
_EVEN_CLASSES = 32
_PIECE_BYTES = 1 << 20
"""Records are decoded so many bytes at a time, in arrays of some ten times that."""


class LevelledPairs:
    """The code of pairs whose weights are at most 1, with a tail for each position if ``with_tail``."""

    def __init__(self, ranks: np.ndarray, max_error: float, *, with_tail: bool) -> None:
        """``ranks`` [V]: the number of each id by frequency."""
        self._with_tail = with_tail
        self._levels = Levels(max_error)
        self._log_p = self._levels.log_p()
        first = [number << _EVEN_BITS for number in range(_EVEN_CLASSES + 1)]
        while first[-1] <= self._levels.highest:
            first.append(2 * first[-1])
        self._first = np.array(first[:-1])
        self._fine_bits = np.log2(np.diff(first)).astype(np.int64)
        self._tail_bits = int(self._levels.highest).bit_length()
        self._widths = np.append(self._fine_bits, self._tail_bits)
        self._pairs = RankedPairs(ranks, len(self._first))

    def encode(self, kept: Kept) -> bytes:
        """The record of one sample."""
        level = self._level(kept.values)
        classes = np.searchsorted(self._first, level, side="right") - 1
        values, lengths, order = self._pairs.encode(kept.positions, kept.ids, classes)
        fine = (level - self._first[classes])[order]
        tail = self._level(kept.tail if kept.tail is not None else np.empty(0))
        widths = np.concatenate([self._fine_bits[classes][order], np.full(len(tail), self._tail_bits)])
        header = varints.encode([kept.num_positions, *lengths.tolist()])
        lists = elias_fano.encode(values, lengths, self._pairs.bounds(np.array([kept.num_positions]))[0])
        return header + lists + bits.pack(np.concatenate([fine, tail]), widths)

    def decode(self, records: Sequence[bytes]) -> Kept:
        """Sorted by position, the largest weight first. Raises ValueError when a record is cut short."""
        parts = [self._decode(piece) for piece in in_pieces(records, _PIECE_BYTES)]
        return parts[0] if len(parts) == 1 else joined(parts)

    def _decode(self, records: Sequence[bytes]) -> Kept:
        positions, ids, level, tail_level, num_positions = self._read(records)
        order = _by_position(positions, self._levels.highest - level)
        positions, ids = positions[order], ids[order]
        weights = np.exp(self._log_p[level[order]]).astype(np.float32)
        top_ids = ids[np.searchsorted(positions, np.arange(num_positions))]
        tail = np.exp(self._log_p[tail_level]).astype(np.float32) if self._with_tail else None
        return Kept(positions, ids, weights, top_ids, tail)

    def parts(self, record: bytes) -> dict[str, int]:
        """Bytes of a record by what they are for. Raises ValueError."""
        (num_positions, *lengths), start = varints.decode(record, 1 + self._pairs.num_lists)
        bounds = self._pairs.bounds(np.array([num_positions]))
        ids = int(elias_fano.num_bytes(np.array([lengths]), bounds)[0])
        return {"header": start, "ids": ids, "values": len(record) - start - ids}

    def _read(self, records: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """[K] positions, ids and levels of the pairs, [P] levels of the tails, if there are any, and P."""
        numbers, rests = varints.read_headers(records, 1 + self._pairs.num_lists)
        num_positions, lengths = numbers[:, 0], numbers[:, 1:]
        bounds = self._pairs.bounds(num_positions)
        cuts = elias_fano.num_bytes(lengths, bounds).tolist()
        values = elias_fano.decode([rest[:cut] for rest, cut in zip(rests, cuts)], lengths, bounds)
        positions, ids = self._pairs.decode(values, lengths, num_positions)
        # the fine parts of each class, then the tails: so many numbers of so many bits, for each record
        of_class = lengths.reshape(len(records), len(self._first), self._pairs.num_lists // len(self._first)).sum(
            axis=2
        )
        counts = np.column_stack([of_class, num_positions * self._with_tail])
        fine = bits.unpack([rest[cut:] for rest, cut in zip(rests, cuts)], counts, self._widths)
        coarse = np.repeat(np.tile(np.append(self._first, -1), len(records)), counts.ravel())
        is_tail = coarse < 0
        tail = np.minimum(fine[is_tail], self._levels.highest)
        return positions, ids, (coarse + fine)[~is_tail], tail, int(num_positions.sum())

    def _level(self, p: np.ndarray) -> np.ndarray:
        return self._levels.of(np.log(np.maximum(p, 1e-30)))


def _by_position(positions: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """The order by position, then ``rank``. One sort of numbers that carry their index is the fastest in NumPy."""
    assert len(positions) < 1 << 30, "decode fewer records at a time"
    assert len(positions) == 0 or positions.max() < 1 << 19, "decode fewer records at a time"
    packed = (positions.astype(np.int64) << 44) | (rank.astype(np.int64) << 30) | np.arange(len(positions))
    packed.sort()
    return packed & ((1 << 30) - 1)
