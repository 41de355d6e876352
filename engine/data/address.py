"""Where bytes lie (local files, ``http(s)://``, ``s3://``) and how a range of them is read from any thread."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from engine.data.bucket import Bucket
from engine.data.client import CLIENT, Store
from engine.data.web import Web
from engine.errors import DataError, MissingError, StoreError

PIPE = "pipe:"
BLOCK_BYTES = 4 << 20
"""A remote file is read in aligned blocks of this size, so that a shuffled window is a few requests."""

_REMOTE = ("http", "https", "s3")
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class ByteSource(Protocol):
    """A file of ``num_bytes`` bytes that any thread may read."""

    num_bytes: int

    def read(self, start: int, end: int, *, anew: bool = False) -> bytes:
        """Bytes [start, end); fewer only when the file ends early. ``anew`` distrusts copies on the way."""


def is_remote(address: str) -> bool:
    """Whether ``address`` needs the network. Raises DataError for a scheme that is not supported."""
    scheme, separator, _ = address.partition("://")
    if separator and scheme not in _REMOTE:
        raise DataError(f"{address}: cannot read {scheme}:// addresses; use a path, http://, https:// or s3://")
    return bool(separator)


def is_safe_name(name: str) -> bool:
    """Whether the name stays in its folder."""
    return _SAFE_NAME.fullmatch(name) is not None


def beside(manifest_address: str, name: str) -> str:
    """The address of file ``name`` of the folder that holds the manifest.

    Raises DataError when the name leads out of that folder: a manifest from elsewhere must not choose what is read.
    """
    if not is_safe_name(name):
        raise DataError(
            f"{manifest_address}: refused the file name {name!r}; a manifest may only name files below its own "
            "folder, made of letters, digits and . _ - /"
        )
    if not is_remote(manifest_address):
        return str(Path(manifest_address).parent / name)
    parts = urlsplit(manifest_address)
    return urlunsplit(parts._replace(path=parts.path.rpartition("/")[0] + "/" + name))


def read_bytes(address: str, sha256: str | None = None) -> bytes:
    """The whole file. Raises DataError when it is missing or cannot be read; of a server that refuses, StoreError.

    With a ``sha256`` a copy from the network that has another is fetched anew once; to judge it is the caller's.
    """
    if is_remote(address):
        with _naming(address):
            content = CLIENT.read_whole(address, _store_of(address))
            if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
                content = CLIENT.read_whole(address, _store_of(address), anew=True)
            return content
    with _naming(address):
        return Path(address).read_bytes()


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
        with _naming(address):
            self._descriptor = os.open(address, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.num_bytes = os.fstat(self._descriptor).st_size

    def read(self, start: int, end: int, *, anew: bool = False) -> bytes:
        with _naming(self._address):
            return os.pread(self._descriptor, end - start, start)


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

    def forget(self, key: Key) -> None:
        """The value is made anew when it is next asked for."""
        with self._lock:
            self._values.pop(key, None)


class RemoteFile:
    """A file behind http(s):// or s3://, read by range requests through ``blocks``, which all files share."""

    def __init__(self, address: str, blocks: OnceCache[tuple[str, int], bytes]) -> None:
        self._address = address
        self._blocks = blocks
        self._store = _store_of(address)
        with _naming(address):
            self._stat = CLIENT.stat(address, self._store)
        self.num_bytes = self._stat.num_bytes

    def read(self, start: int, end: int, *, anew: bool = False) -> bytes:
        first, last = start // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        blocks = b"".join(self._block(block, anew) for block in range(first, last + 1))
        return blocks[start - first * BLOCK_BYTES : end - first * BLOCK_BYTES]

    def _block(self, block: int, anew: bool) -> bytes:
        key = (self._address, block)
        if anew:
            self._blocks.forget(key)
        return self._blocks.get(key, lambda: self._fetch(block, anew))

    def _fetch(self, block: int, anew: bool) -> bytes:
        start = block * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, self.num_bytes)
        with _naming(self._address):
            return CLIENT.read(self._address, self._store, start, end, self._stat, anew=anew)


def _store_of(address: str) -> Store:
    return Bucket() if address.startswith("s3://") else Web()


@contextmanager
def _naming(address: str) -> Iterator[None]:
    """Errors of whatever reads say of which file they are, and what can be done."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as problem:
        raise MissingError(f"{address}: no such file; check the path, or copy or build the shards there") from problem
    except Exception as problem:  # each file system raises its own types
        why = f"{type(problem).__name__}: {problem.__cause__ or problem}"
        if is_remote(address):  # refused, not damaged: the next record would be refused as well
            raise StoreError(
                f"{address}: cannot be read ({why}); look at the keys, the date to which the address is signed, and "
                "the server's certificate, then run the same command again"
            ) from problem
        raise DataError(f"{address}: cannot be read ({why})") from problem
