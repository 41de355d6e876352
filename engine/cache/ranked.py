"""Pairs (position, id), each with a small number, its class, as sorted lists of numbers, and back.

Ids are numbered by their frequency in the data. The numbers, with the position above them, are kept in sorted lists,
one for each class and each range of frequencies. So a rare id costs more bits than a frequent one, a rare class more
than a common one, and nothing is stored to tell the positions apart.
"""

from __future__ import annotations

import numpy as np

_FIRST_BITS, _MORE_BITS = 4, 2
"""Ranges of ranks hold 16, 64, 256, ... ids: powers of two, so that position and rank come apart by a shift."""


class RankedPairs:
    """The lists for one ranking of the vocabulary and ``num_classes`` classes: classes in turn, in each the ranges."""

    def __init__(self, rank_of_id: np.ndarray, num_classes: int) -> None:
        """``rank_of_id`` [V]: 0 for the most frequent id."""
        self._rank_of_id = rank_of_id.astype(np.int64)
        self._id_of_rank = np.argsort(self._rank_of_id).astype(np.int32)
        widths: list[int] = []
        starts = [0]
        while (left := len(rank_of_id) - starts[-1]) > 0:
            widths.append(min(_FIRST_BITS + _MORE_BITS * len(widths), max(1, (left - 1).bit_length())))
            starts.append(starts[-1] + (1 << widths[-1]))
        self._starts = np.array(starts[:-1])
        self._widths = np.array(widths)
        self._of_lists = np.tile([self._widths, self._starts], num_classes)
        self.num_lists = num_classes * len(widths)

    def bounds(self, num_positions: np.ndarray) -> np.ndarray:
        """[R, num_lists] of the lists of records of ``num_positions`` [R]."""
        return num_positions[:, None] << self._of_lists[0]

    def encode(
        self, positions: np.ndarray, ids: np.ndarray, classes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The lists of one record, one after another, and the length of each.

        Last, [K] the order in which the pairs will be read back, as indices into those given.
        """
        rank = self._rank_of_id[ids]
        range_of = np.searchsorted(self._starts, rank, side="right") - 1
        list_of = classes * len(self._widths) + range_of
        value = (positions.astype(np.int64) << self._widths[range_of]) | (rank - self._starts[range_of])
        # NumPy sorts 16 bits by radix; after that the whole is almost sorted, which is quick as well
        order = np.argsort(list_of.astype(np.uint16), kind="stable")
        order = order[np.argsort((list_of << 48 | value)[order], kind="stable")]
        return value[order], np.bincount(list_of, minlength=self.num_lists), order

    def decode(
        self, values: np.ndarray, lengths: np.ndarray, num_positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """[K] positions, counted through all records, and [K] ids.

        Args:
            values: [K] the lists of all records.
            lengths: [R, num_lists] of each list.
            num_positions: [R] of each record.
        """
        each = lengths.ravel()
        widths, starts = np.tile(self._of_lists.astype(values.dtype), len(lengths))
        width = np.repeat(widths, each)
        positions = values >> width
        rank = positions << width
        np.subtract(values, rank, out=rank)
        rank += np.repeat(starts, each)
        before = (np.cumsum(num_positions) - num_positions).astype(values.dtype)
        positions += np.repeat(before, lengths.sum(axis=1))
        return positions, self._id_of_rank.take(rank)
