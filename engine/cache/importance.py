"""The ``sampled`` codec with a proposal of its own: draws from the teacher's distribution flattened or sharpened.

With proposal temperature t an id is drawn with probability r_i in proportion to p_i^(1/t), and its weight is
count_i / num_draws * p_i / r_i, whose expectation is p_i (importance sampling; arXiv 2503.16870 tries 0.8 to 1.2). The
weights are kept as levels, so a pair costs some 6 bits more than a mere count.

The likeliest id need not weigh the most. A record is a varint (positions), for each position the place of the likeliest
id among its pairs, heaviest first, in as many bits as num_draws - 1 needs, padded to a byte; then the levelled pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.cache import bits, varints
from engine.cache.distribution import TILE_IDS, Distributions, sums_of_tiles
from engine.cache.drawing import counted, draw_systematically
from engine.cache.kept import Kept
from engine.cache.levelled import LevelledPairs
from engine.errors import CacheError

_MAX_ERROR = 0.01
"""Of the logarithm of a weight."""
_SCALE = 2.0**-10
"""Levels end at 1, and a single draw of an id that the proposal hardly ever gives weighs far more."""


class ImportanceCodec:
    """``num_draws`` draws at ``proposal_temperature``."""

    def __init__(self, ranks: np.ndarray, num_draws: int, proposal_temperature: float) -> None:
        """``ranks`` [V]: the number of each id by frequency."""
        self._num_draws, self._exponent = num_draws, 1.0 / proposal_temperature
        self._place_bits = (num_draws - 1).bit_length()
        self._pairs = LevelledPairs(ranks, _MAX_ERROR, with_tail=False)

    def select(self, teacher: Distributions, offsets: Tensor) -> Kept:
        memory = teacher.mass.new_zeros(teacher.mass.numel() + TILE_IDS)
        mass = torch.pow(teacher.mass, self._exponent, out=memory[:-TILE_IDS].view_as(teacher.mass))
        tile_mass = sums_of_tiles(mass)
        total = tile_mass.sum(dim=1)
        proposal = Distributions(mass, tile_mass, total, teacher.nll, teacher.entropy)
        drawn = draw_systematically(proposal, offsets, self._num_draws)
        likeliest = mass.gather(1, drawn).argmax(dim=1, keepdim=True)
        kept = counted(drawn, drawn.gather(1, likeliest).squeeze(1))
        at = kept.positions, kept.ids
        p = teacher.mass[at].double() / teacher.total[kept.positions]
        r = mass[at].double() / total[kept.positions]
        return replace(kept, values=(kept.values * (p / r).cpu().numpy()).astype(np.float32))

    def encode(self, kept: Kept) -> bytes:
        """The record of one sample. Raises CacheError for a weight past all bounds."""
        largest = kept.values.max(initial=0.0)
        if largest * _SCALE > 1.0:
            raise CacheError(
                f"a draw weighs {largest:.0f}, more than the {1 / _SCALE:.0f} that can be kept; bring "
                "cache.codec.proposal_temperature nearer to 1, or raise num_draws"
            )
        pairs = self._pairs.encode(replace(kept, values=kept.values * np.float32(_SCALE)))
        read = self._pairs.decode([pairs])  # in the order of a reader
        likeliest = np.flatnonzero(read.ids == kept.top_ids[read.positions])
        places = likeliest - _starts(read)
        return varints.encode([kept.num_positions]) + bits.pack(places, np.full(len(places), self._place_bits)) + pairs

    def decode(self, records: Sequence[bytes]) -> Kept:
        """Sorted by position, the largest weight first. Raises ValueError when a record is cut short."""
        counts, rests = varints.read_headers(records, 1)
        places = bits.unpack(rests, counts, np.array([self._place_bits]))
        cuts = (self._place_bytes(count) for count in counts[:, 0].tolist())
        kept = self._pairs.decode([rest[cut:] for rest, cut in zip(rests, cuts)])
        top_ids = kept.ids[np.minimum(_starts(kept) + places, len(kept.ids) - 1)]
        return replace(kept, values=kept.values / np.float32(_SCALE), top_ids=top_ids)

    def parts(self, record: bytes) -> dict[str, int]:
        """``ids`` hold the classes too, the coarse part of the weights. Raises ValueError."""
        (num_positions,), start = varints.decode(record, 1)
        places = self._place_bytes(num_positions)
        parts = self._pairs.parts(record[start + places :])
        return parts | {"header": parts["header"] + start, "values": parts["values"] + places}

    def _place_bytes(self, num_positions: int) -> int:
        return (num_positions * self._place_bits + 7) // 8


def _starts(kept: Kept) -> np.ndarray:
    """[P]: where the pairs of each position begin."""
    return np.searchsorted(kept.positions, np.arange(kept.num_positions))
