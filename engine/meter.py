"""Sums and times of the steps between two records, kept on the device: nothing here makes the host wait."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Meter:
    """Adds up metric vectors; ``take`` gives the sums over all ranks and starts anew."""

    def __init__(self, num_metrics: int, device: torch.device) -> None:
        self._sums = torch.zeros(num_metrics, dtype=torch.float64, device=device)
        self._losses: list[tuple[Tensor, tuple[str, ...]]] = []

    def add(self, metrics: Tensor, loss: Tensor, names: tuple[str, ...]) -> None:
        """``loss`` and ``names`` of the micro-batch are kept until the next ``not_finite``."""
        self._sums += metrics
        self._losses.append((loss.detach(), names))

    def take(self) -> list[float]:
        """Collective. [num_metrics] sums over all ranks; this is where the host waits for the device."""
        sums = self._sums.clone()
        self._sums.zero_()
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(sums)
        return sums.tolist()

    def not_finite(self) -> list[str]:
        """Names of the sequences in this rank's micro-batches whose loss was NaN or Inf; waits for the device."""
        if not self._losses:
            return []
        finite = torch.stack([loss for loss, _ in self._losses]).isfinite().tolist()
        found = [name for fine, (_, names) in zip(finite, self._losses) if not fine for name in names]
        self._losses.clear()
        return found


class PhaseTimer:
    """Seconds this rank spent in each phase. On a GPU the device's own clock is read, when the record is made.

    ``note`` is told each phase as it begins.
    """

    def __init__(self, device: torch.device, note: Callable[[str], None] = lambda name: None) -> None:
        self._cuda = device.type == "cuda"
        self._note = note
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str, *, on_device: bool = True) -> Iterator[None]:
        self._note(name)
        if self._cuda and on_device:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            begin_seconds = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - begin_seconds

    def take(self) -> dict[str, float]:
        """Seconds a phase since the last call."""
        if self._events:
            torch.cuda.synchronize()
        for name, begin, end in self._events:
            self._seconds[name] += begin.elapsed_time(end) / 1000.0
        self._events.clear()
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds
