"""The set of pairs (position, id) of a record, each with a small number, its class, in few bits.

Ids are numbered by their frequency in the data. The numbers, with the position above them, are kept in sorted lists,
one for each class and each range of frequencies. So a rare id costs more bits than a frequent one, a rare class more
than a common one, and nothing is stored to tell the positions apart.

A record: varints (positions, length of each list, bytes of the high bits), then the Elias-Fano code of the lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from engine.cache import elias_fano, varints

_FIRST_BITS, _MORE_BITS = 4, 2
"""Ranges of ranks hold 16, 64, 256, ... ids: powers of two, so that position and rank come apart by a shift."""


class Pairs(NamedTuple):
    """Of several records, one after another; K pairs in all."""

    num_positions: np.ndarray
    """[R] of each record"""
    positions: np.ndarray
    """[K] counted through all records"""
    ids: np.ndarray
    """[K]"""
    of_class: np.ndarray
    """[R, C] how many pairs of each class: records one after another, in each the classes"""
    num_bytes: list[int]
    """[R] of each record that the pairs took"""


class RankedPairs:
    """The code for one ranking of the vocabulary and ``num_classes`` classes."""

    def __init__(self, rank_of_id: np.ndarray, num_classes: int) -> None:
        """``rank_of_id`` [V]: 0 for the most frequent id."""
        self._rank_of_id = rank_of_id.astype(np.int64)
        self._id_of_rank = np.argsort(self._rank_of_id).astype(np.int32)
        self._num_classes = num_classes
        widths: list[int] = []
        starts = [0]
        while (left := len(rank_of_id) - starts[-1]) > 0:
            widths.append(min(_FIRST_BITS + _MORE_BITS * len(widths), max(1, (left - 1).bit_length())))
            starts.append(starts[-1] + (1 << widths[-1]))
        self._starts = np.array(starts[:-1])
        self._widths = np.array(widths)

    def encode(
        self, num_positions: int, positions: np.ndarray, ids: np.ndarray, classes: np.ndarray
    ) -> tuple[bytes, np.ndarray]:
        """The bytes, and [K] the order in which the pairs will be read back, as indices into those given."""
        rank = self._rank_of_id[ids]
        range_of = np.searchsorted(self._starts, rank, side="right") - 1
        list_of = classes * len(self._widths) + range_of
        value = (positions.astype(np.int64) << self._widths[range_of]) | (rank - self._starts[range_of])
        order = np.lexsort((value, list_of))
        lengths = np.bincount(list_of, minlength=self._num_classes * len(self._widths))
        bounds = np.tile(num_positions << self._widths, self._num_classes)
        code = elias_fano.encode(value[order], lengths, bounds)
        header = varints.encode([num_positions, *lengths.tolist(), len(code.high)])
        return header + code.high + code.low, order

    def decode(self, records: Sequence[bytes]) -> Pairs:
        """Raises ValueError when a record is cut short."""
        num_lists = self._num_classes * len(self._widths)
        numbers, codes, num_bytes = [], [], []
        low_bits = np.tile(self._widths, self._num_classes)
        for record in records:
            header, start = varints.decode(record, num_lists + 2)
            end = start + header[-1]
            high = record[start:end]
            numbers.append(header)
            codes.append((start, high))
        table = np.array(numbers).reshape(len(records), num_lists + 2)
        num_positions, lengths = table[:, 0], table[:, 1:-1]
        bounds = num_positions[:, None] << low_bits
        whole = []
        for number, (record, (start, high)) in enumerate(zip(records, codes)):
            first = start + len(high)
            end = first + elias_fano.num_low_bytes(lengths[number], bounds[number])
            if end > len(record):
                raise ValueError(f"is {len(record)} bytes, expected {end} of them or more")
            whole.append(elias_fano.Code(high, record[first:end]))
            num_bytes.append(end)
        value = elias_fano.decode(whole, lengths, bounds)
        of_list = lengths.ravel()
        width = np.repeat(np.tile(low_bits.astype(value.dtype), len(records)), of_list)
        position = value >> width
        position <<= width
        value ^= position
        position >>= width
        if len(records) > 1:
            bases = np.cumsum(num_positions) - num_positions
            position += np.repeat(bases.astype(position.dtype), lengths.sum(axis=1))
        starts = np.tile(np.tile(self._starts, self._num_classes), len(records)).astype(value.dtype)
        value += np.repeat(starts, of_list)
        of_class = lengths.reshape(len(records), self._num_classes, -1).sum(axis=2)
        return Pairs(num_positions, position, self._id_of_rank[value], of_class, num_bytes)
