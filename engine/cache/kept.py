"""What a cache keeps of a teacher's distributions: pairs of a position and an id, each with a probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
        order = np.argsort(
            self.positions.astype(np.uint16 if self.num_positions <= 1 << 16 else np.int64), kind="stable"
        )
        positions = self.positions[order]
        counts = np.bincount(positions, minlength=self.num_positions)
        width = int(counts.max(initial=0))
        starts = np.cumsum(counts) - counts
        slots = np.arange(len(positions)) - np.repeat(starts, counts)
        sorted_ids = self.ids[order]
        first = np.zeros(self.num_positions, np.int64)
        first[counts > 0] = sorted_ids[starts[counts > 0]]
        ids = np.repeat(first[:, None], width, axis=1)
        values = np.zeros((self.num_positions, width), np.float32)
        at = positions * width + slots
        ids.ravel()[at] = sorted_ids
        values.ravel()[at] = self.values[order]
        return ids, values


def joined(parts: Sequence[Kept]) -> Kept:
    """The parts laid end to end."""
    offsets = np.cumsum([0] + [part.num_positions for part in parts])
    tails = [part.tail for part in parts if part.tail is not None]
    return Kept(
        np.concatenate([part.positions + offset for part, offset in zip(parts, offsets)]),
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.top_ids for part in parts]),
        np.concatenate(tails) if tails else None,
    )
