"""The ``sampled`` codec: a few ids a position, drawn from the teacher, that teach without bias what all of them would.

The target of id i is count_i / num_draws, whose expectation is the teacher's p_i (random-sampling KD, arXiv
2503.16870, draws independently). Here the draws are systematic: one uniform offset a position and equal strides along
the cumulative distribution, so that an id's count is never more than one from num_draws * p_i.

A record holds the draws of one sample as ranked pairs of three classes: the teacher's likeliest id (whose count
follows from the others), counts of two and more, and counts of one; then, as a sorted list, the running sum of the
second class's counts less two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.cache import elias_fano, varints
from engine.cache.distribution import TILE_IDS, Distributions
from engine.cache.kept import Kept
from engine.cache.ranked import RankedPairs

_TOP, _MANY, _ONE = range(3)
_BELOW_ONE = 1.0 - 1e-9


def draw_systematically(teacher: Distributions, offsets: Tensor, num_draws: int) -> Tensor:
    """[C, num_draws] ids, rising: equal strides along the cumulative distribution of each row.

    The cumulative distribution is formed over tiles of ids first, and inside a tile only where a draw falls.
    ``offsets`` [C] float64 are uniform in [0, 1).
    """
    tiles = teacher.mass.view(-1, TILE_IDS)
    ends = teacher.tile_mass.cumsum(dim=1)
    num_rows, num_tiles = ends.shape
    strides = torch.arange(num_draws, device=ends.device, dtype=torch.float64)
    points = (offsets.unsqueeze(1) + strides).mul_(1.0 / num_draws).clamp_(max=_BELOW_ONE) * ends[:, -1:]
    tile = torch.searchsorted(ends, points, right=True)
    in_all = (tile + torch.arange(num_rows, device=ends.device).unsqueeze(1) * num_tiles).flatten()
    met, which = torch.unique_consecutive(in_all, return_inverse=True)
    inside = tiles[met].double().cumsum_(dim=1)
    mass = inside[:, -1:].clone()
    begin = ends.flatten()[met] - teacher.tile_mass.flatten()[met]
    share = ((points.flatten() - begin[which]) / mass.squeeze(1)[which]).clamp_(0.0, _BELOW_ONE)
    # one rising line through all tiles that were met: number m covers (2m, 2m + 1]
    line = inside.div_(mass).add_(torch.arange(0, 2 * len(met), 2, device=ends.device).unsqueeze(1))
    in_line = torch.searchsorted(line.flatten(), share + 2 * which, right=True)
    return tile * TILE_IDS + (in_line - which * TILE_IDS).view_as(tile)


def counted(drawn: Tensor, top_ids: Tensor) -> Kept:
    """[P, num_draws] drawn ids, rising in each row -> each id once, with its share of the draws."""
    is_first = torch.ones_like(drawn, dtype=torch.bool)
    is_first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    first = is_first.flatten().nonzero().squeeze(1)
    counts = torch.diff(first, append=first.new_tensor([drawn.numel()]))
    positions, ids = first // drawn.shape[1], drawn.flatten()[first]
    shares = counts.float() / drawn.shape[1]
    return Kept(*(part.cpu().numpy() for part in (positions, ids, shares, top_ids)))


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
        pairs, order = self._pairs.encode(kept.num_positions, kept.positions, kept.ids, classes)
        more = np.cumsum(counts[order][classes[order] == _MANY] - 2)
        bounds = np.array([more[-1] + 1 if len(more) else 0])
        code = elias_fano.encode(more, np.array([len(more)]), bounds)
        return b"".join([pairs, varints.encode(bounds.tolist()), code.high, code.low])

    def decode(self, records: Sequence[bytes]) -> Kept:
        """Raises ValueError when a record is cut short."""
        pairs = self._pairs.decode(records)
        num_top, num_many, _ = pairs.of_class.T
        more = self._read_more(records, pairs.num_bytes, num_many)
        num_pairs = pairs.of_class.sum(axis=1)
        starts = np.cumsum(num_pairs) - num_pairs
        counts = np.ones(len(pairs.ids), np.int32)
        is_top = np.zeros(len(counts), bool)
        place = 0
        for start, top, many in zip(starts.tolist(), num_top.tolist(), num_many.tolist()):
            is_top[start : start + top] = True
            first = start + top
            if many:
                counts[first] = more[place] + 2
                np.subtract(
                    more[place + 1 : place + many], more[place : place + many - 1], out=counts[first + 1 : first + many]
                )
                counts[first + 1 : first + many] += 2
                place += many
        counts[is_top] = 0
        others = np.bincount(pairs.positions, counts, int(pairs.num_positions.sum()))
        top_positions = pairs.positions[is_top]
        counts[is_top] = self.num_draws - others[top_positions].astype(np.int32)
        top_ids = np.zeros(len(others), pairs.ids.dtype)
        top_ids[top_positions] = pairs.ids[is_top]
        return Kept(pairs.positions, pairs.ids, counts.astype(np.float32) / np.float32(self.num_draws), top_ids)

    def _read_more(self, records: Sequence[bytes], starts: list[int], num_many: np.ndarray) -> np.ndarray:
        codes, bounds = [], []
        for record, start, length in zip(records, starts, num_many.tolist()):
            (bound,), taken = varints.decode(record[start:], 1)
            bounds.append(bound)
            low = elias_fano.num_low_bytes(np.array([length]), np.array([bound]))
            codes.append(elias_fano.Code(record[start + taken : len(record) - low], record[len(record) - low :]))
        return elias_fano.decode(codes, num_many[:, None], np.array(bounds)[:, None])
