"""What ranks agree on, and the signals that ask a run to stop.

Agreement travels over a gloo group on the CPU, so that asking every step never makes a GPU wait. It waits for as long
as the others live, since one rank may have long work to do alone; ``engine/watch`` tells whether they do, and whether
all of them wait for what never comes.
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from engine.rendezvous import Ranks, read_ranks

__all__ = ["Control", "Ranks", "StopSignal", "leave_group", "read_ranks"]

PATIENCE = timedelta(days=2)


def leave_group(ranks: Ranks) -> None:
    """The end of what ranks do together. A lone rank stays to the end of its process, which may train again: DeepSpeed
    cannot make its groups a second time."""
    if ranks.world_size > 1:
        dist.destroy_process_group()
    else:
        atexit.unregister(_destroy_group)
        atexit.register(_destroy_group)


def _destroy_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class Control:
    """What ranks say to each other besides tensors. Every method is collective.

    ``waiting`` makes the context in which this rank waits for the others: ``Watch.waiting``.
    """

    def __init__(self, ranks: Ranks, waiting: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.ranks, self._waiting = ranks, waiting
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if ranks.world_size > 1 else None

    @property
    def is_main(self) -> bool:
        return self.ranks.rank == 0

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """The sums over all ranks."""
        if self._group is None:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.int64)
        with self._waiting():
            dist.all_reduce(tensor, group=self._group)
        return tensor.tolist()

    def gather(self, item: Any) -> list[Any]:
        """The item of each rank, everywhere."""
        if self._group is None:
            return [item]
        items: list[Any] = [None] * self.ranks.world_size
        with self._waiting():
            dist.all_gather_object(items, item, group=self._group)
        return items

    def from_main(self, item: Any) -> Any:
        """Rank 0's item, everywhere."""
        if self._group is None:
            return item
        items = [item]
        with self._waiting():
            dist.broadcast_object_list(items, src=0, group=self._group)
        return items[0]

    def barrier(self) -> None:
        if self._group is not None:
            with self._waiting():
                dist.barrier(group=self._group)


class StopSignal:
    """While entered, SIGTERM and SIGUSR1 ask for a checkpoint and an orderly end at the next step boundary."""

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
