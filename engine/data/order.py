"""Which sample is sequence ``c`` of the run: a pure function of the seed, so its position is one integer.

An epoch lays the samples of all shards, in an order drawn by (seed, epoch), end to end and cuts that line into
``lanes`` equal ranges. Inside a lane the samples are shuffled in windows of ``shuffle_samples``. Sequence c belongs
to lane ``c mod lanes`` at offset ``c div lanes``. Nothing here depends on the number of ranks, of micro-batches or
of threads, so none of them can change what a step trains on.

``sort_samples`` brings sequences of about one length into one step: a shuffled window is cut into blocks of so many
samples, each block is sorted by length, and its places are shuffled again, in every lane alike.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engine.data.stateless import fold, permutation
from engine.errors import DataError
from engine.schedule import samples_of_epoch


@dataclass(frozen=True)
class Location:
    """Sample ``index`` of shard number ``shard``, met in ``epoch``."""

    epoch: int
    shard: int
    index: int


class DataOrder:
    """The order of a data set whose shard ``i`` holds ``samples_per_shard[i]`` samples.

    ``epoch_samples`` ends an epoch early; over the epochs all samples come, in turns. ``lengths(i)`` gives the tokens
    of each sample of shard i, when ``sort_samples`` asks for them.
    Raises DataError when there are fewer samples than lanes.
    """

    def __init__(
        self,
        samples_per_shard: Sequence[int],
        *,
        seed: int,
        lanes: int,
        shuffle_samples: int,
        epoch_samples: int | None = None,
        sort_samples: int = 0,
        lengths: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        self.num_samples = int(sum(samples_per_shard))
        if self.num_samples < lanes:
            raise DataError(
                f"the data holds {self.num_samples:,} samples, fewer than data.lanes = {lanes}; "
                f"set data.lanes to at most {self.num_samples}"
            )
        self.lanes = lanes
        self.lane_samples = samples_of_epoch(self.num_samples, lanes, epoch_samples) // lanes
        self.sequences_per_epoch = self.lane_samples * lanes
        self._seed = seed
        self._window = max(1, shuffle_samples)
        self._sort_samples, self._lengths = sort_samples, lengths
        self._counts = np.asarray(samples_per_shard, dtype=np.int64)
        self._lines: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: dict[int, tuple[tuple[int, int], np.ndarray]] = {}
        """by lane: the window that it is in, and its order. A lane never goes back, so one each is enough, and a rank
        keeps those of its own lanes alone"""

    def locate(self, sequence: int) -> Location:
        """Where sequence ``sequence`` of the run lies."""
        epoch, in_epoch = divmod(sequence, self.sequences_per_epoch)
        offset, lane = divmod(in_epoch, self.lanes)
        window, in_window = divmod(offset, self._window)
        start = lane * self.lane_samples + window * self._window
        return self._on_line(epoch, start + int(self._window_order(epoch, lane, window)[in_window]))

    def _window_order(self, epoch: int, lane: int, window: int) -> np.ndarray:
        kept = self._windows.get(lane)
        if kept is None or kept[0] != (epoch, window):
            size = min(self._window, self.lane_samples - window * self._window)
            order = permutation(fold("window", self._seed, epoch, lane, window), size)
            if self._sort_samples:
                order = self._sorted(epoch, lane, window, order)
            kept = self._windows[lane] = (epoch, window), order
        return kept[1]

    def _sorted(self, epoch: int, lane: int, window: int, order: np.ndarray) -> np.ndarray:
        """``order`` in blocks of about one length at each place. The places are shuffled without regard to the lane,
        so that a step finds the same rank of its block in every lane."""
        assert self._lengths is not None
        start = lane * self.lane_samples + window * self._window
        found = [self._on_line(epoch, start + place) for place in order.tolist()]
        lengths = np.array([self._lengths(location.shard)[location.index] for location in found])
        blocks = []
        for first in range(0, len(order), self._sort_samples):
            block = slice(first, first + self._sort_samples)
            ranked = order[block][np.argsort(lengths[block], kind="stable")]
            blocks.append(ranked[permutation(fold("sorted", self._seed, epoch, window, first), len(ranked))])
        return np.concatenate(blocks)

    def _on_line(self, epoch: int, on_line: int) -> Location:
        """The samples left over by the cut are rotated, so that over epochs none is favoured."""
        if epoch not in self._lines:
            shards = permutation(fold("shards", self._seed, epoch), len(self._counts))
            self._lines[epoch] = shards, np.cumsum(self._counts[shards])
            if len(self._lines) > 2:
                self._lines.popitem(last=False)
        shards, ends = self._lines[epoch]
        left_over = self.num_samples - self.sequences_per_epoch
        place = (on_line + epoch * left_over) % self.num_samples
        which = int(np.searchsorted(ends, place, side="right"))
        shard = int(shards[which])
        return Location(epoch, shard, int(place - ends[which] + self._counts[shard]))
