"""What a cluster can do, measured for some seconds: clocks, links, bandwidth of all-reduces, speed of each host."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

ALL_REDUCE_BYTES = (1 << 20, 8 << 20, 64 << 20)
NUM_PINGS = 10
_LINK_BYTES = 4 << 20
_SLOW_SECONDS = 2.0
"""After an all-reduce that took so long, no larger one is tried."""


@dataclass(frozen=True)
class Speed:
    """Of one rank and its host."""

    host: str
    rank: int
    matmul_flops: float
    """a second, in bf16 on a GPU, fp32 on a CPU"""
    copy_bytes: float
    """a second, read and written, in the device's own memory"""
    free_bytes: int | None
    """of the GPU's memory"""
    total_bytes: int | None
    shm_bytes: int
    """free in /dev/shm"""
    disk_bytes: int
    """free where the run's output goes"""
    clock_seconds: float = 0.0
    """ahead of rank 0's"""
    round_trip_seconds: float = 0.0
    link_bytes: float = 0.0
    """a second, from rank 0 over TCP"""


@dataclass(frozen=True)
class AllReduce:
    num_bytes: int
    seconds: float
    num_ranks: int

    @property
    def bus_bytes(self) -> float:
        """Bus bandwidth a second, 2 (n - 1) / n x bytes / time: what each link carries, whatever the number of ranks
        n; the convention of NCCL's nccl-tests (doc/PERFORMANCE.md)."""
        return 2 * (self.num_ranks - 1) / self.num_ranks * self.num_bytes / self.seconds


def measure_rank(host: str, rank: int, device: torch.device, output: Path) -> Speed:
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (None, None)
    size, copied = (8192, 1 << 30) if device.type == "cuda" else (512, 64 << 20)
    if free is not None and free < 4 << 30:
        size, copied = 2048, 64 << 20
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left = torch.ones(size, size, dtype=dtype, device=device)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matmul_seconds = _best_seconds(lambda: left @ left, device)
    copy_seconds = _best_seconds(lambda: target.copy_(source), device)
    return Speed(
        host,
        rank,
        2.0 * size**3 / matmul_seconds,
        2.0 * copied / copy_seconds,
        free,
        total,
        shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
        shutil.disk_usage(_existing(output)).free,
    )


def measure_links(own: Speed, leaders: Sequence[int], group: dist.ProcessGroup) -> Speed:
    """Clock, round trip and link of each host against rank 0, one host after the other. Collective for ``leaders``,
    the first ranks of the hosts; the first of them is rank 0.

    A clock's offset is taken from the fastest of several round trips, as if both ways took the same time (Cristian
    1989): wrong by at most half that round trip.
    """
    for leader in leaders[1:]:
        if own.rank == 0:
            _answer(leader, group)
        elif own.rank == leader:
            return _ask(own, group)
    return own


def _ask(own: Speed, group: dist.ProcessGroup) -> Speed:
    number, best = torch.zeros(1, dtype=torch.float64), (float("inf"), 0.0)
    for _ in range(NUM_PINGS):
        before = time.time()
        dist.send(number, 0, group)
        dist.recv(number, 0, group)
        after = time.time()
        best = min(best, (after - before, (before + after) / 2 - number.item()))
    block = torch.empty(_LINK_BYTES, dtype=torch.uint8)
    seconds = []
    for _ in range(2):
        before = time.perf_counter()
        dist.send(number, 0, group)
        dist.recv(block, 0, group)
        seconds.append(time.perf_counter() - before)
    link = _LINK_BYTES / max(1e-9, min(seconds))
    return replace(own, clock_seconds=best[1], round_trip_seconds=best[0], link_bytes=link)


def _answer(leader: int, group: dist.ProcessGroup) -> None:
    number = torch.zeros(1, dtype=torch.float64)
    for _ in range(NUM_PINGS):
        dist.recv(number, leader, group)
        dist.send(torch.tensor([time.time()], dtype=torch.float64), leader, group)
    block = torch.zeros(_LINK_BYTES, dtype=torch.uint8)
    for _ in range(2):
        dist.recv(number, leader, group)
        dist.send(block, leader, group)


def measure_all_reduce(device: torch.device) -> list[AllReduce]:
    """Over all ranks on the group that gradients use; the slowest rank's time counts. Collective."""
    found = []
    for num_bytes in ALL_REDUCE_BYTES:
        tensor = torch.zeros(num_bytes // 4, device=device)
        seconds = _best_seconds(lambda tensor=tensor: dist.all_reduce(tensor), device, 4)  # type: ignore[misc]
        slowest = torch.tensor([seconds], device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        found.append(AllReduce(num_bytes, slowest.item(), dist.get_world_size()))
        if slowest.item() > _SLOW_SECONDS:  # the same answer on all ranks
            break
    return found


def _best_seconds(work: Callable[[], Tensor | None], device: torch.device, times: int = 10) -> float:
    """Of several; the first warms up and does not count."""
    seconds = []
    for _ in range(times):
        before = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - before)
    return max(1e-9, min(seconds[1:]))


def _existing(path: Path) -> Path:
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
