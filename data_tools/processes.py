"""Pools of processes that end with their parent, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from engine.errors import DataError

_BATCHES_AHEAD = 4

Tag = TypeVar("Tag")
Work = TypeVar("Work")
Result = TypeVar("Result")


def map_in_order(
    batches: Iterable[tuple[Tag, Work]], function: Callable[[Work], Result], pool: ProcessPoolExecutor, workers: int
) -> Generator[tuple[Tag, Result], None, None]:
    """The tag of each batch and what ``function`` makes of it in the ``pool``, in their order; then the pool is closed.

    Raises what ``function`` does, and DataError when a process dies.
    """
    waiting: deque[tuple[Tag, Future[Result]]] = deque()
    try:
        for tag, work in batches:
            waiting.append((tag, pool.submit(function, work)))
            if len(waiting) >= _BATCHES_AHEAD * workers:
                first, oldest = waiting.popleft()
                yield first, oldest.result()
        for tag, oldest in waiting:
            yield tag, oldest.result()
    except BrokenProcessPool as problem:
        raise DataError(
            "a worker process died, perhaps for want of memory; run the same command again to go on after the last "
            f"finished shard, with fewer than --workers {workers} if memory is short"
        ) from problem
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def process_pool(workers: int, prepare: Callable[..., None], *arguments: Any) -> ProcessPoolExecutor:
    """Fresh processes (spawn: nothing of the parent's threads is inherited), each of which first calls ``prepare``."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, initializer=_start, initargs=(prepare, arguments))


def _start(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells of an interrupt, once
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    prepare(*arguments)


def _leave_with_parent() -> None:
    """A pool's process would outlive a killed parent: it holds the other end of its queue itself, and waits."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
