"""How patiently servers are asked: retries with back-off, what counts as an outage, and the counts of a process.

A reply that stops short is not thrown away: the next request begins where it stopped. The pauses have full jitter
(Brooker, Exponential backoff and jitter, AWS Architecture Blog 2015), so that a thousand ranks that lost one server do
not come back to it at once.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

from engine.errors import StoreError

log = logging.getLogger("stillhouse")

RETRY_SECONDS = 300.0
TIMEOUT_SECONDS = 30.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 15.0
OUTAGE_SECONDS = 5.0
"""A server that has answered nothing for so long has an outage that the log tells of."""
FORGOTTEN_SECONDS = 60.0
"""An outage that nobody has looked at for so long may have ended: the next failure begins another."""
PROGRESS_BYTES = 64 << 10
"""So many bytes beyond all that came before show a server at work: its patience begins anew."""

Result = TypeVar("Result")


class Busy(Exception):
    """A question that may well be answered the next time."""

    def __init__(self, why: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(why)
        self.retry_after_seconds = retry_after_seconds


class Stat(NamedTuple):
    num_bytes: int
    etag: str | None


class Reply(NamedTuple):
    """What one request brought: all of it, or its beginning and why there is no more."""

    content: bytes
    start: int | None
    """where in the file ``content`` begins; None, without content, where the server would give all of it"""
    num_bytes: int | None
    """of the whole file, where the server says so"""
    etag: str | None
    broken: str | None = None


class Store(Protocol):
    """One request each. Raises Busy for what may pass, FileNotFoundError for a file that is absent, and other errors
    for what no patience mends."""

    def stat(self, address: str, timeout_seconds: float) -> Stat: ...

    def get(self, address: str, start: int, end: int | None, timeout_seconds: float, *, anew: bool) -> Reply:
        """Bytes [start, end) or all from ``start``; ``anew`` asks caches on the way to fetch their copy again."""


class Traffic(NamedTuple):
    """Counts of this process since they were last taken."""

    num_requests: int = 0
    num_retries: int = 0
    num_bytes: int = 0
    waiting_milliseconds: int = 0
    """that readers lost to requests that failed and to the pauses after them, over all threads"""


@dataclass
class _Server:
    """What is known of one host that fails: since when, when it was last seen to, and whether that was told."""

    failing_since: float
    failed: float
    num_retries: int = 0
    told: bool = False


@dataclass
class Client:
    """Any thread may use it; one serves a process, since the counts are the process's."""

    retry_seconds: float = RETRY_SECONDS
    timeout_seconds: float = TIMEOUT_SECONDS
    traffic: Traffic = field(default_factory=Traffic)
    _servers: dict[str, _Server] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def set_patience(self, retry_seconds: float, timeout_seconds: float) -> None:
        """From here on, for all that this process reads."""
        self.retry_seconds, self.timeout_seconds = retry_seconds, timeout_seconds

    def stat(self, address: str, store: Store) -> Stat:
        """Size and ETag of the file."""
        attempts = _Attempts(self, address)
        return attempts.until_answered(lambda: store.stat(address, self.timeout_seconds))

    def read(self, address: str, store: Store, start: int, end: int, stat: Stat, *, anew: bool = False) -> bytes:
        """Bytes [start, end) of the file that ``stat`` is of.

        Raises StoreError when it is another by now, or the server does not know ranges.
        """
        content = bytearray()
        attempts = _Attempts(self, address)
        while len(content) < end - start:
            place = start + len(content)

            def get(place: int = place) -> Reply:
                return store.get(address, place, end, self.timeout_seconds, anew=anew)

            reply = attempts.until_answered(get)
            refuse_replaced(address, stat, reply)
            if reply.start is None:
                raise StoreError(
                    f"{address}: asked for bytes {place:,} to {end:,}, got {stat.num_bytes:,} bytes; "
                    "the server must answer range requests"
                )
            attempts.take(content, reply, place, end - start)
        return bytes(content)

    def read_whole(self, address: str, store: Store, *, anew: bool = False) -> bytes:
        """The file. A server without ranges is asked for all of it again when its reply breaks off."""
        content = bytearray()
        stat: Stat | None = None
        attempts = _Attempts(self, address)
        while stat is None or len(content) < stat.num_bytes:
            place = len(content)

            def get(place: int = place) -> Reply:
                return store.get(address, place, None, self.timeout_seconds, anew=anew)

            reply = attempts.until_answered(get)
            if reply.num_bytes is None:  # nobody can tell whether a reply of unknown length is whole, but its end
                if reply.broken is None:
                    attempts.answered()
                    return bytes(reply.content)
                attempts.failed(Busy(reply.broken))
                continue
            stat = stat or Stat(reply.num_bytes, reply.etag)
            refuse_replaced(address, stat, reply)
            if reply.start is None:
                content.clear()
                continue
            attempts.take(content, reply, place, stat.num_bytes)
        return bytes(content)

    def take(self) -> Traffic:
        """The counts since this was last asked."""
        with self._lock:
            counts, self.traffic = self.traffic, Traffic()
        return counts

    def count(self, **more: int) -> None:
        with self._lock:
            counts = self.traffic._asdict()
            self.traffic = Traffic(**counts | {name: counts[name] + number for name, number in more.items()})

    def answered(self, host: str) -> None:
        with self._lock:
            server = self._servers.pop(host, None)
        if server and server.told:
            seconds = time.monotonic() - server.failing_since
            log.warning("%s answers again, after %.0f s and %d retries", host, seconds, server.num_retries)

    def failing(self, host: str, began: float, why: Busy) -> float:
        """Since when, for all who ask it; a request of the time ``began`` has failed now."""
        now = time.monotonic()
        with self._lock:
            server = self._servers.get(host)
            if server is None or began - server.failed > FORGOTTEN_SECONDS:
                server = self._servers[host] = _Server(began, now)
            server.failed = now
            server.num_retries += 1
            seconds = now - server.failing_since
            if server.told or not OUTAGE_SECONDS <= seconds < self.retry_seconds:
                return server.failing_since
            server.told = True
        log.warning(
            "%s has not answered for %.0f s (%s); it is asked again for up to %.0f s (data.retry_seconds)",
            host, seconds, why, self.retry_seconds,
        )  # fmt: skip
        return server.failing_since


_reader = threading.local()


def read_until(closing: threading.Event) -> None:
    """From here on this thread waits for no server that fails once ``closing`` is set: what it reads is not wanted."""
    _reader.closing = closing


class _Attempts:
    """The tries of one question."""

    def __init__(self, client: Client, address: str) -> None:
        parts = urlsplit(address)
        self._client, self._address, self._host = client, address, f"{parts.scheme}://{parts.netloc}"
        self._failing_since: float | None = None
        self._num_failures = self._num_pauses = 0
        self._longest_bytes = 0
        self._began = 0.0

    def until_answered(self, question: Callable[[], Result]) -> Result:
        """Raises StoreError, naming how long it was tried, when the server's time is up."""
        while True:
            self._began = time.monotonic()
            self._client.count(num_requests=1, num_retries=int(self._num_failures > 0))
            try:
                result = question()
            except Busy as problem:
                self.failed(problem)
                continue
            if not isinstance(result, Reply):
                self.answered()
            elif result.content:
                self._client.count(num_bytes=len(result.content))
                self._began = time.monotonic()
            return result

    def take(self, content: bytearray, reply: Reply, place: int, wanted_bytes: int) -> None:
        """Add a reply to what came before; pause where it broke off. One that is longer than it may be, or of another
        place than was asked for, is not used at all."""
        num_bytes = len(reply.content)
        if reply.start != place or len(content) + num_bytes > wanted_bytes:
            self.failed(Busy(f"a reply of {num_bytes:,} bytes from {reply.start}, which nobody asked for"))
            return
        content += reply.content
        if len(content) - self._longest_bytes >= PROGRESS_BYTES:
            self._failing_since, self._num_pauses = None, 0
            self.answered()
        self._longest_bytes = max(self._longest_bytes, len(content))
        if len(content) < wanted_bytes:
            self.failed(Busy(reply.broken or f"a reply that ended after {num_bytes:,} bytes"))
        else:
            self.answered()

    def answered(self) -> None:
        self._client.answered(self._host)

    def failed(self, problem: Busy) -> None:
        """Pause before the next try. Raises StoreError when there shall be none: this question or, whatever was asked,
        its host has failed for too long."""
        now, client = time.monotonic(), self._client
        self._num_failures += 1
        if self._failing_since is None:
            self._failing_since = self._began
        since = min(self._failing_since, client.failing(self._host, self._began, problem))
        left = since + client.retry_seconds - now
        if left <= 0:
            raise StoreError(
                f"{self._address}: cannot be read after {self._num_failures} tries and {now - since:.0f} s of failures "
                f"({problem}); look at the server, or raise data.retry_seconds"
            ) from problem
        pause = random.uniform(0, min(FIRST_PAUSE_SECONDS * 2**self._num_pauses, LONGEST_PAUSE_SECONDS))
        if problem.retry_after_seconds is not None:  # not all at the very second that the server named
            pause = problem.retry_after_seconds + random.uniform(0, FIRST_PAUSE_SECONDS)
        self._num_pauses = min(self._num_pauses + 1, 16)
        closing: threading.Event | None = getattr(_reader, "closing", None)
        if closing is None:
            time.sleep(min(pause, left))
        elif closing.wait(min(pause, left)):
            raise StoreError(f"{self._address}: given up, its reader is closed") from problem
        client.count(waiting_milliseconds=round(1000 * (time.monotonic() - self._began)))


def refuse_replaced(address: str, stat: Stat, reply: Reply) -> None:
    """Raises StoreError when ``reply`` is of another file than ``stat``."""
    changes = []
    if reply.num_bytes is not None and reply.num_bytes != stat.num_bytes:
        changes.append(f"{stat.num_bytes:,} bytes before, {reply.num_bytes:,} now")
    if reply.etag and stat.etag and reply.etag.removeprefix("W/") != stat.etag.removeprefix("W/"):
        changes.append(f"ETag {stat.etag} before, {reply.etag} now")
    if changes:
        raise StoreError(
            f"{address}: the file was replaced while it was read ({'; '.join(changes)}); shards never change: put the "
            "old one back, or start a run on the new ones. Mirrors of a server must give the same ETag"
        )


CLIENT = Client()
