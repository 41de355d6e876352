"""The ``top_k`` and ``top_p`` codecs: the likeliest ids with their log-probabilities, and the mass of the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.cache.distribution import Distributions
from engine.cache.kept import Kept
from engine.cache.levelled import LevelledPairs


class TopCodec:
    """Keeps at most ``max_k`` ids; fewer, but ``min_k`` at least, where they reach the mass ``p``."""

    def __init__(self, ranks: np.ndarray, *, max_k: int, min_k: int, p: float, max_error: float) -> None:
        """``ranks`` [V]: the number of each id by frequency."""
        self._max_k, self._min_k, self._p = min(max_k, len(ranks)), min_k, p
        self._pairs = LevelledPairs(ranks, max_error, with_tail=True)

    def select(self, teacher: Distributions, offsets: Tensor) -> Kept:
        """The likeliest ids of each row; nothing is drawn."""
        mass, ids = teacher.mass.topk(self._max_k, dim=1)
        p = mass.double() / teacher.total.unsqueeze(1)
        before = p.cumsum(dim=1) - p
        keep = before < self._p
        keep[:, : self._min_k] = True
        tail = (1.0 - (p * keep).sum(dim=1)).clamp_min(0.0)
        positions = torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(ids)
        parts = positions[keep], ids[keep], p[keep].float(), ids[:, 0], tail.float()
        return Kept(*(part.cpu().numpy() for part in parts))

    def encode(self, kept: Kept) -> bytes:
        """The record of one sample."""
        return self._pairs.encode(kept)

    def decode(self, records: Sequence[bytes]) -> Kept:
        """Sorted by position, the likeliest id first; kept probabilities and tail are scaled to the sum of 1.

        Raises ValueError when a record is cut short.
        """
        kept = self._pairs.decode(records)
        assert kept.tail is not None
        starts = np.searchsorted(kept.positions, np.arange(kept.num_positions))
        total = np.add.reduceat(np.append(kept.values, 0.0), starts) + kept.tail
        values = (kept.values / total[kept.positions]).astype(np.float32)
        return Kept(kept.positions, kept.ids, values, kept.top_ids, (kept.tail / total).astype(np.float32))

    def parts(self, record: bytes) -> dict[str, int]:
        """``ids`` hold the classes too, the coarse part of the values. Raises ValueError."""
        return self._pairs.parts(record)
