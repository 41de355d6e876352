"""Where bytes lie (local files, ``http(s)://``, ``s3://``) and how a range of them is read from any thread."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from engine.errors import DataError, MissingError

PIPE = "pipe:"
BLOCK_BYTES = 4 << 20
"""A remote file is read in aligned blocks of this size, so that a shuffled window is a few requests."""

_REMOTE = ("http", "https", "s3")
_RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0)
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteSource(Protocol):
    """A file of ``num_bytes`` bytes that any thread may read."""

    num_bytes: int

    def read(self, start: int, end: int) -> bytes:
        """Bytes [start, end); fewer only when the file ends early."""


def is_remote(address: str) -> bool:
    """Whether ``address`` needs the network. Raises DataError for a scheme that is not supported."""
    scheme, separator, _ = address.partition("://")
    if separator and scheme not in _REMOTE:
        raise DataError(f"{address}: cannot read {scheme}:// addresses; use a path, http://, https:// or s3://")
    return bool(separator)


def beside(manifest_address: str, name: str) -> str:
    """The address of file ``name`` of the folder that holds the manifest.

    Raises DataError when the name leads out of that folder: a manifest from elsewhere must not choose what is read.
    """
    if not _SAFE_NAME.fullmatch(name):
        raise DataError(
            f"{manifest_address}: refused the file name {name!r}; a manifest may only name files below its own "
            "folder, made of letters, digits and . _ - /"
        )
    if not is_remote(manifest_address):
        return str(Path(manifest_address).parent / name)
    parts = urlsplit(manifest_address)
    return urlunsplit(parts._replace(path=parts.path.rpartition("/")[0] + "/" + name))


def read_bytes(address: str) -> bytes:
    """The whole file. Raises DataError when it is missing or cannot be read."""
    if is_remote(address):
        return _ask(address, lambda files, path: files.cat_file(path))
    try:
        return Path(address).read_bytes()
    except OSError as problem:
        raise _unreadable(address, problem) from problem


def sha256_of(source: ByteSource) -> str:
    """Of the whole file as it lies now. Raises DataError when it cannot be read."""
    digest = hashlib.sha256()
    for start in range(0, source.num_bytes, BLOCK_BYTES):
        digest.update(source.read(start, min(start + BLOCK_BYTES, source.num_bytes)))
    return digest.hexdigest()


class LocalFile:
    """pread rather than mmap: a file cut short under our feet is an error to report, not a SIGBUS."""

    def __init__(self, address: str) -> None:
        self._address = address
        try:
            self._descriptor = os.open(address, os.O_RDONLY)
        except OSError as problem:
            raise _unreadable(address, problem) from problem
        weakref.finalize(self, os.close, self._descriptor)
        self.num_bytes = os.fstat(self._descriptor).st_size

    def read(self, start: int, end: int) -> bytes:
        try:
            return os.pread(self._descriptor, end - start, start)
        except OSError as problem:
            raise _unreadable(self._address, problem) from problem


class OnceCache(Generic[Key, Value]):
    """The ``capacity`` most recently used values; each is made once, however many threads ask for it."""

    def __init__(self, capacity: int) -> None:
        self._capacity = max(1, capacity)
        self._lock = threading.Lock()
        self._values: OrderedDict[Key, Future[Value]] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        with self._lock:
            future = self._values.get(key)
            if future is not None:
                self._values.move_to_end(key)
            else:
                made_here = self._values[key] = Future()
                if len(self._values) > self._capacity:
                    self._values.popitem(last=False)
        if future is not None:
            return future.result()
        try:
            made_here.set_result(make())
        except BaseException as problem:
            with self._lock:
                self._values.pop(key, None)
            made_here.set_exception(problem)
        return made_here.result()


class RemoteFile:
    """A file behind http(s):// or s3://, read by range requests through ``blocks``, which all files share."""

    def __init__(self, address: str, blocks: OnceCache[tuple[str, int], bytes]) -> None:
        self._address = address
        self._blocks = blocks
        self.num_bytes: int = _ask(address, lambda files, path: files.size(path)) or 0

    def read(self, start: int, end: int) -> bytes:
        first, last = start // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        blocks = b"".join(self._block(block) for block in range(first, last + 1))
        return blocks[start - first * BLOCK_BYTES : end - first * BLOCK_BYTES]

    def _block(self, block: int) -> bytes:
        return self._blocks.get((self._address, block), lambda: self._fetch(block))

    def _fetch(self, block: int) -> bytes:
        start = block * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, self.num_bytes)
        content: bytes = _ask(self._address, lambda files, path: files.cat_file(path, start=start, end=end))
        if len(content) != end - start:
            raise DataError(
                f"{self._address}: asked for bytes {start:,} to {end:,}, got {len(content):,} bytes; "
                "the server must answer range requests"
            )
        return content


def _ask(address: str, question: Callable[[Any, str], Any]) -> Any:
    """The answer of the file system behind ``address``; tries again a few times, but not for a file that is absent."""
    import fsspec

    for pause_seconds in (*_RETRY_SECONDS, None):
        try:
            files, path = fsspec.core.url_to_fs(address)
            return question(files, path)
        except Exception as problem:  # each file system behind fsspec raises its own types
            if _is_absent(problem) or isinstance(problem, ImportError):
                raise _unreadable(address, problem) from problem
            if pause_seconds is None:
                raise _unreadable(address, problem, tries=len(_RETRY_SECONDS) + 1) from problem
            time.sleep(pause_seconds)
    raise AssertionError("the last try either returns or raises")


def _is_absent(problem: BaseException) -> bool:
    """fsspec's http file system also calls a file absent when the server was too busy to say how long it is."""
    hidden = problem.__cause__
    by_http = type(hidden).__module__.startswith("aiohttp") and getattr(hidden, "status", None) != 404
    return isinstance(problem, FileNotFoundError) and not by_http and not isinstance(hidden, asyncio.TimeoutError)


def _unreadable(address: str, problem: Exception, tries: int = 1) -> DataError:
    if _is_absent(problem):
        return MissingError(f"{address}: no such file; check the path, or copy or build the shards there")
    after = f" after {tries} tries" if tries > 1 else ""
    return DataError(f"{address}: cannot be read{after} ({type(problem).__name__}: {problem.__cause__ or problem})")
