"""Pools of processes that end with their parent, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any


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
