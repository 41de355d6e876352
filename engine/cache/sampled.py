"""The ``sampled`` codec: a few ids a position, drawn from the teacher, that teach without bias what all of them would.

The target of id i is count_i / num_draws, whose expectation is the teacher's p_i (random-sampling KD, arXiv
2503.16870, draws independently). Here the draws are systematic: one uniform offset a position and equal strides along
the cumulative distribution, so that an id's count is never more than one from num_draws * p_i.

A record holds the draws of one sample. Ids are numbered by their frequency in the data; the numbers, with the position
above them, are kept in sorted lists, one for each range of frequencies and each of three roles: the largest count of a
position (which follows from the others), counts of two and more, and counts of one. Rare ids so cost more bits than
frequent ones, and nothing is stored to tell the positions apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.cache import elias_fano

_FIRST_BITS, _MORE_BITS = 4, 2
"""Ranges of ranks hold 16, 64, 256, ... ids: powers of two, so that position and rank come apart by a shift."""
_TOP, _MANY, _ONE = range(3)


@dataclass(frozen=True)
class Draws:
    """What was drawn at P positions: K different pairs of a position and an id."""

    num_positions: int
    positions: np.ndarray
    """[K] int64, in no order"""
    ids: np.ndarray
    """[K] int64"""
    counts: np.ndarray
    """[K] int64; they sum to the number of draws at each position"""


def draw_systematically(p: Tensor, offsets: Tensor, num_draws: int) -> Draws:
    """``num_draws`` equal strides along the cumulative distribution of each row.

    Args:
        p: [P, V] probabilities; each row may sum to anything positive.
        offsets: [P] uniform in [0, 1).
    """
    cumulative = p.cumsum(dim=1)
    strides = torch.arange(num_draws, device=p.device, dtype=p.dtype)
    points = (offsets.to(p).unsqueeze(1) + strides) * (cumulative[:, -1:] / num_draws)
    return counted(torch.searchsorted(cumulative, points, right=True).clamp_(max=p.shape[1] - 1))


def counted(drawn: Tensor) -> Draws:
    """[P, num_draws] drawn ids, sorted in each row -> each id once, with its count."""
    is_first = torch.ones_like(drawn, dtype=torch.bool)
    is_first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    first = is_first.flatten().nonzero().squeeze(1)
    counts = torch.diff(first, append=first.new_tensor([drawn.numel()]))
    positions, ids = first // drawn.shape[1], drawn.flatten()[first]
    return Draws(drawn.shape[0], positions.cpu().numpy(), ids.cpu().numpy(), counts.cpu().numpy())


class SampledCodec:
    """Draws to bytes and back, for one ranking of the vocabulary."""

    def __init__(self, rank_of_id: np.ndarray, num_draws: int) -> None:
        """``rank_of_id`` [V]: 0 for the most frequent id."""
        self.num_draws = num_draws
        self._rank_of_id = rank_of_id.astype(np.int64)
        self._id_of_rank = np.argsort(self._rank_of_id)
        widths: list[int] = []
        starts = [0]
        while starts[-1] < len(rank_of_id):
            widths.append(_FIRST_BITS + _MORE_BITS * len(widths))
            starts.append(starts[-1] + (1 << widths[-1]))
        self._starts = np.array(starts[:-1])
        self._num_ranges = len(widths)
        self._widths = np.tile(np.array(widths), 3)

    def encode(self, draws: Draws) -> bytes:
        """The record of one sample."""
        num_positions, position = draws.num_positions, draws.positions
        rank = self._rank_of_id[draws.ids]
        range_of = np.searchsorted(self._starts, rank, side="right") - 1
        role = np.where(draws.counts > 1, _MANY, _ONE)
        by_count = np.lexsort((rank, -draws.counts, position))
        role[by_count[np.diff(position[by_count], prepend=-1) > 0]] = _TOP
        list_of = role * self._num_ranges + range_of
        value = (position << self._widths[list_of]) | (rank - self._starts[range_of])
        order = np.lexsort((value, list_of))
        lengths = np.bincount(list_of, minlength=len(self._widths))
        many = draws.counts[order][role[order] == _MANY]
        more = np.cumsum(many - 2)
        bound = np.array([more[-1] + 1 if len(more) else 0])
        return b"".join(
            [
                _varints([num_positions, *lengths, *bound]),
                elias_fano.encode(value[order], lengths, num_positions << self._widths),
                elias_fano.encode(more, np.array([len(more)]), bound),
            ]
        )

    def decode(self, record: bytes) -> Draws:
        """Raises ValueError when the record is cut short."""
        (num_positions, *numbers), start = _read_varints(record, len(self._widths) + 2)
        lengths, bound = np.array(numbers[:-1]), np.array(numbers[-1:])
        value, num_bytes = elias_fano.decode(record[start:], lengths, num_positions << self._widths)
        num_top, num_many = lengths.reshape(3, -1).sum(axis=1)[:_ONE]
        more, _ = elias_fano.decode(record[start + num_bytes :], np.array([num_many]), bound)
        width = np.repeat(self._widths, lengths)
        position = value >> width
        value &= np.repeat((1 << self._widths) - 1, lengths)
        value += np.repeat(np.tile(self._starts, 3), lengths)
        counts = np.ones(len(value), np.int64)
        counts[num_top : num_top + num_many] = np.diff(more, prepend=0) + 2
        others = np.bincount(position[num_top:], counts[num_top:], num_positions)
        counts[:num_top] = self.num_draws - others[position[:num_top]]
        return Draws(num_positions, position, self._id_of_rank[value], counts)


def _varints(numbers: list[int]) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    out = bytearray()
    for number in map(int, numbers):
        while number > 127:
            out.append(number & 127 | 128)
            number >>= 7
        out.append(number)
    return bytes(out)


def _read_varints(content: bytes, count: int) -> tuple[list[int], int]:
    """``count`` numbers, and where they end. Raises ValueError when ``content`` ends before."""
    numbers, number, shift = [], 0, 0
    for place, byte in enumerate(content):
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(number)
            number, shift = 0, 0
            if len(numbers) == count:
                return numbers, place + 1
    raise ValueError(f"ends after {len(numbers)} of {count} numbers")
