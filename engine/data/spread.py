"""A few places evenly over parts of different lengths, such as samples over shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def spread(lengths: Sequence[int], count: int) -> Iterator[tuple[int, int]]:
    """(part, place inside it) of at most ``count`` places, in order; fewer where there are fewer."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    count = min(count, total)
    for turn in range(count):
        place = total * turn // count
        part = int(np.searchsorted(ends, place, side="right"))
        yield part, place - int(ends[part]) + lengths[part]
