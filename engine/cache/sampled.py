"""The ``sampled`` codec: a few ids a position, drawn from the teacher, that teach without bias what all of them would.

The target of id i is count_i / num_draws, whose expectation is the teacher's p_i (random-sampling KD, arXiv
2503.16870, draws independently). Here the draws are systematic: one uniform offset a position and equal strides along
the cumulative distribution, so that an id's count is never more than one from num_draws * p_i.

A record holds the draws of one sample as ranked pairs of three classes: the teacher's likeliest id (whose count
follows from the others), counts of two and more, and counts of one; then, as one more sorted list, the running sum of
the second class's counts less two. It is a few varints, then the Elias-Fano code of the lists.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.cache import elias_fano, varints
from engine.cache.distribution import Distributions
from engine.cache.drawing import counted, draw_systematically
from engine.cache.kept import Kept, in_pieces, joined
from engine.cache.ranked import RankedPairs

_PIECE_BYTES = 1 << 17
"""Records are decoded so many bytes at a time: their arrays stay in a core's caches and in memory that malloc keeps."""
_TOP, _MANY, _ONE = range(3)


class SampledCodec:
    """Draws to bytes and back, for one ranking of the vocabulary."""

    def __init__(self, rank_of_id: np.ndarray, num_draws: int) -> None:
        """``rank_of_id`` [V]: 0 for the most frequent id."""
        self.num_draws = num_draws
        self._pairs = RankedPairs(rank_of_id, 3)

    def select(self, teacher: Distributions, offsets: Tensor) -> Kept:
        """The draws of these rows. The likeliest id of those drawn is the teacher's own if its share is a stride."""
        drawn = draw_systematically(teacher, offsets, self.num_draws)
        likeliest = teacher.mass.gather(1, drawn).argmax(dim=1, keepdim=True)
        return counted(drawn, drawn.gather(1, likeliest).squeeze(1))

    def encode(self, kept: Kept) -> bytes:
        """The record of one sample."""
        counts = np.rint(kept.values * self.num_draws).astype(np.int64)
        classes = np.where(counts > 1, _MANY, _ONE)
        classes[kept.ids == kept.top_ids[kept.positions]] = _TOP
        values, lengths, order = self._pairs.encode(kept.positions, kept.ids, classes)
        more = np.cumsum(np.append(0, counts[order][classes[order] == _MANY] - 2))
        header = np.array([kept.num_positions, more[-1] + 1, *lengths])
        lists = elias_fano.encode(np.concatenate([values, more]), *(part[0] for part in self._lists(header[None])))
        return varints.encode(header.tolist()) + lists

    def decode(self, records: Sequence[bytes]) -> Kept:
        """Raises ValueError when a record is cut short."""
        parts = [self._decode(piece) for piece in in_pieces(records, _PIECE_BYTES)]
        return parts[0] if len(parts) == 1 else joined(parts)

    def parts(self, record: bytes) -> dict[str, int]:
        """``values`` is what the running sum of the counts adds to the lists of pairs. Raises ValueError."""
        header, start = varints.decode(record, 2 + self._pairs.num_lists)
        lengths, bounds = self._lists(np.array([header], np.int64))
        ids = int(elias_fano.num_bytes(lengths[:, :-1], bounds[:, :-1])[0])
        return {"header": start, "ids": ids, "values": len(record) - start - ids}

    def _decode(self, records: Sequence[bytes]) -> Kept:
        numbers, codes = varints.read_headers(records, 2 + self._pairs.num_lists)
        lengths, bounds = self._lists(numbers)
        values = elias_fano.decode(codes, lengths, bounds)
        of_class = self._of_class(lengths[:, :-1])
        counts = np.repeat(np.tile(np.array([0, 2, 1], values.dtype), len(records)), of_class.ravel())
        # a record's lists of pairs, then the running sum; ``place`` counts the pairs, ``first`` all numbers
        pairs, place, first = [values[:0]], 0, 0
        for top, many, one in of_class.tolist():
            last = first + top + many + one
            pairs.append(values[first:last])
            more = values[last : last + many + 1]
            counts[place + top : place + top + many] += more[1:] - more[:-1]
            place += last - first
            first = last + many + 1
        num_positions = numbers[:, 0]
        positions, ids = self._pairs.decode(np.concatenate(pairs), lengths[:, :-1], num_positions)
        return self._kept(positions, ids, counts.astype(np.float32), int(num_positions.sum()))

    def _kept(self, positions: np.ndarray, ids: np.ndarray, counts: np.ndarray, num_positions: int) -> Kept:
        """``counts`` [K] are 0 for the likeliest ids, which have what the others leave of the draws."""
        others = torch.bincount(torch.from_numpy(positions), torch.from_numpy(counts), num_positions).numpy()
        likeliest = np.flatnonzero(counts == 0.0)
        at = positions[likeliest].astype(np.int64)
        counts[likeliest] = self.num_draws - others[at]
        counts /= self.num_draws
        top_ids = np.zeros(num_positions, ids.dtype)
        top_ids[at] = ids[likeliest]
        return Kept(positions, ids, counts, top_ids)

    def _lists(self, headers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lengths and bounds [R, S] of the lists of records: those of the pairs, then the running sum of the counts.

        ``headers`` [R, 1 + S] are the numbers that records begin with: number of positions, bound of the running sum,
        lengths of the lists of pairs.
        """
        lengths = headers[:, 2:]
        num_many = self._of_class(lengths)[:, _MANY, None] + 1
        bounds = self._pairs.bounds(headers[:, 0])
        return np.append(lengths, num_many, axis=1), np.append(bounds, headers[:, 1:2], axis=1)

    def _of_class(self, lengths: np.ndarray) -> np.ndarray:
        """[R, 3] how many pairs of each class, for the lists of pairs."""
        return lengths.reshape(-1, 3, self._pairs.num_lists // 3).sum(axis=2)
