"""The student's state on its way to disk and back: copied at once, written from a thread."""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch import Tensor

from engine.digests import Digests, WrittenFile, write_hashed
from engine.errors import CheckpointError
from engine.zero.loading import weights_only


class SnapshotWriter(CheckpointEngine):
    """Copies state to host memory at once and writes it from a thread, so that a save costs a memory copy."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "SnapshotWriter"
        self.pending: list[Future[WrittenFile]] = []
        self.digests: Digests | None = None
        """of the checkpoint that is being loaded"""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True

    def save(self, state_dict: Any, path: str) -> None:
        snapshot = _to_host(state_dict, {})
        num_bytes = _tensor_bytes(snapshot)
        try:
            _check_room(path, num_bytes)
        except CheckpointError as problem:  # told through the future: raising would leave the other ranks in a barrier
            refused: Future[WrittenFile] = Future()
            refused.set_exception(problem)
            self.pending.append(refused)
            return
        self.pending.append(self._thread.submit(_write, snapshot, path, num_bytes))

    def load(self, path: str, map_location: Any = None) -> Any:
        if self.digests is not None:
            self.digests.check(Path(path))
        with weights_only():
            return torch.load(path, map_location=map_location, weights_only=True)


def _check_room(path: str, num_bytes: int) -> None:
    try:
        free = shutil.disk_usage(Path(path).parent).free
    except OSError as problem:  # a stale mount, a disk with errors
        raise CheckpointError(
            f"{path}: could not be written ({problem}); look at that disk and run the same command again: it resumes "
            "from the last complete checkpoint"
        ) from problem
    if num_bytes > free:
        raise CheckpointError(
            f"{path}: needs {num_bytes / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB free; "
            "free some space and run the same command again: it resumes from the last complete checkpoint"
        )


def _write(snapshot: Any, path: str, num_bytes: int) -> WrittenFile:
    try:
        return write_hashed(Path(path), lambda file: torch.save(snapshot, file))
    except (OSError, RuntimeError) as problem:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(
            f"{path}: could not be written ({problem}); it needs {num_bytes / 1e6:,.1f} MB"
        ) from problem


def _to_host(item: Any, copies: dict[tuple[Any, ...], Tensor]) -> Any:
    """A deep copy with every tensor in host memory; one that occurs twice is copied once."""
    if isinstance(item, Tensor):
        name = (item.device, item.data_ptr(), item.storage_offset(), tuple(item.shape), item.stride(), item.dtype)
        if name not in copies or item.numel() == 0:
            copies[name] = item.detach().to("cpu", copy=True)
        return copies[name]
    if isinstance(item, dict):
        return type(item)((key, _to_host(value, copies)) for key, value in item.items())
    if type(item) in (list, tuple, set):
        return type(item)(_to_host(value, copies) for value in item)
    return item


def _tensor_bytes(item: Any) -> int:
    if isinstance(item, Tensor):
        return item.numel() * item.element_size()
    if isinstance(item, dict):
        return sum(_tensor_bytes(value) for value in item.values())
    return sum(_tensor_bytes(value) for value in item) if isinstance(item, (list, tuple, set)) else 0
