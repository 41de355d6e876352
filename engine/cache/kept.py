"""What a cache keeps of a teacher's distributions: pairs of a position and an id, each with a probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Kept:
    """K pairs at P positions. Positions count from 0 in the record, or in the records laid end to end."""

    positions: np.ndarray
    """[K] integers; rising where a codec encodes, in any order where it decoded"""
    ids: np.ndarray
    """[K] integers"""
    values: np.ndarray
    """[K] float32: what the loss takes for the id's probability"""
    top_ids: np.ndarray
    """[P] integers: the teacher's likeliest id"""
    tail: np.ndarray | None = None
    """[P] float32: mass of all ids that are not kept; None where the values stand for the whole distribution"""

    @property
    def num_positions(self) -> int:
        return len(self.top_ids)

    def cut(self, lengths: Sequence[int]) -> list[Kept]:
        """One for each run of ``lengths`` positions; positions must rise."""
        ends = np.cumsum(lengths)
        starts = ends - lengths
        firsts, lasts = np.searchsorted(self.positions, starts), np.searchsorted(self.positions, ends)
        return [
            Kept(
                self.positions[a:b] - start,
                self.ids[a:b],
                self.values[a:b],
                self.top_ids[start:end],
                None if self.tail is None else self.tail[start:end],
            )
            for a, b, start, end in zip(firsts, lasts, starts, ends)
        ]

    def padded(self) -> tuple[np.ndarray, np.ndarray]:
        """ids [P, K'] int64 and values [P, K'] float32, K' the most that a position has.

        Rows are filled up with their first id and the value 0; a position without any with id 0.
        """
        # NumPy sorts 16 bits by radix, several times faster than wider numbers
        shifts = range(0, max(self.num_positions.bit_length(), 1), 16)
        order = np.lexsort([(self.positions >> shift).astype(np.uint16) for shift in shifts])
        counts = torch.bincount(torch.from_numpy(self.positions), minlength=self.num_positions).numpy()
        starts = np.cumsum(counts) - counts
        shape = len(counts), int(counts.max(initial=0))
        place = np.arange(len(order))
        place += np.repeat(np.arange(shape[0]) * shape[1] - starts, counts)
        at = torch.from_numpy(place)
        sorted_ids = self.ids.astype(np.int64).take(order)
        filled = counts > 0
        first = np.zeros(shape[0], np.int64)
        first[filled] = sorted_ids[starts[filled]]
        ids = np.repeat(first, shape[1])
        values = np.zeros(len(ids), np.float32)
        torch.from_numpy(ids).scatter_(0, at, torch.from_numpy(sorted_ids))
        torch.from_numpy(values).scatter_(0, at, torch.from_numpy(self.values.take(order)))
        return ids.reshape(shape), values.reshape(shape)


def joined(parts: Sequence[Kept]) -> Kept:
    """The parts laid end to end."""
    offsets = np.cumsum([0] + [part.num_positions for part in parts]).tolist()
    tails = [part.tail for part in parts if part.tail is not None]
    return Kept(
        np.concatenate([part.positions + offset for part, offset in zip(parts, offsets)]),
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.top_ids for part in parts]),
        np.concatenate(tails) if tails else None,
    )


def in_pieces(records: Sequence[bytes], num_bytes: int) -> list[list[bytes]]:
    """The records in runs of about ``num_bytes``; one run, perhaps empty, at least."""
    pieces: list[list[bytes]] = [[]]
    size = 0
    for record in records:
        if size >= num_bytes:
            pieces.append([])
            size = 0
        pieces[-1].append(record)
        size += len(record)
    return pieces
