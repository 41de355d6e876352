"""A web server for tests: a folder over http, with range requests and failures on demand."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import s3fs


@dataclass
class Fault:
    """What goes wrong with one reply to a GET."""

    status: int | None = None
    retry_after: str | None = None
    keep_bytes: int | None = None
    """the connection is closed after so many of the promised bytes"""
    more_bytes: int = 0
    """sent, and promised, beyond what was asked for"""
    hang_seconds: float = 0.0
    drip_seconds: float = 0.0
    """between any two pieces of 1,024 bytes"""
    flip: bool = False
    """a bit of the first byte"""
    shift_bytes: int = 0
    """the reply is of a place so much later, and says so"""


class Server:
    """Serves a folder, with range requests unless told otherwise.

    ``failures`` answers of 503 come first, to anything; then each GET takes one of ``faults``. Of the rest
    ``busy_share`` is answered by 503, at random.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.failures, self.ranges, self.etag = folder, 0, True, True
        self.faults: deque[Fault] = deque()
        self.busy_share, self.random = 0.0, random.Random(0)
        self.requests: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.num_refused = 0
        self.head_status: int | None = None
        """of all answers to HEAD"""
        self.absent: set[str] = set()
        """names that are answered by 503, always"""
        self.port = 0
        self.start()
        self.address = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, again at the same port after ``stop``."""
        self.server = QuietServer(("127.0.0.1", self.port), partial(Handler, self))
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Gone: connections are refused, and those that are open are closed."""
        self.server.shutdown()
        self.server.server_close()
        for connection in list(self.server.open):
            connection.close_connection = True
            with contextlib.suppress(OSError):
                connection.connection.shutdown(socket.SHUT_RDWR)


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *arguments: object) -> None:
        self.open: set[Handler] = set()
        super().__init__(*arguments)  # type: ignore[arg-type]

    def handle_error(self, *_: object) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, owner: Server, *arguments: object) -> None:
        self.owner = owner
        super().__init__(*arguments)  # type: ignore[arg-type]

    def setup(self) -> None:
        super().setup()
        self.server.open.add(self)  # type: ignore[attr-defined]

    def finish(self) -> None:
        self.server.open.discard(self)  # type: ignore[attr-defined]
        super().finish()

    def do_GET(self) -> None:
        owner, path = self.owner, self.owner.folder / self.path.partition("?")[0].lstrip("/")
        if owner.failures > 0 or path.name in owner.absent:
            owner.failures = max(0, owner.failures - 1)
            self.answer(503, b"")
        elif self.command == "HEAD" and owner.head_status is not None:
            self.answer(owner.head_status, b"")
        elif not path.is_file():
            self.answer(404, b"")
        elif owner.random.random() < owner.busy_share:
            owner.num_refused += 1
            self.answer(503, b"busy")
        else:
            fault = owner.faults.popleft() if owner.faults and self.command == "GET" else Fault()
            self.give(path, fault)

    do_HEAD = do_GET

    def give(self, path: Path, fault: Fault) -> None:
        content, wanted = path.read_bytes(), self.headers.get("Range")
        tag = f'"{path.stat().st_mtime_ns:x}-{len(content):x}"' if self.owner.etag else None
        if self.command == "GET":
            self.owner.requests.append((path.name, wanted))
            self.owner.headers.append(dict(self.headers))
        time.sleep(fault.hang_seconds)
        if fault.status is not None:
            self.answer(fault.status, b"", {"Retry-After": fault.retry_after} if fault.retry_after else {})
        elif wanted and self.owner.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) + fault.shift_bytes
            end = min(int(last) + 1 + fault.shift_bytes if last else len(content), len(content))
            headers = {"ETag": tag, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
            if start >= len(content):
                self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            else:
                self.answer(206, content[start:end], headers, fault)
        else:
            self.answer(200, content, {"ETag": tag}, fault)

    def answer(
        self, status: int, content: bytes, headers: dict[str, str | None] | None = None, fault: Fault | None = None
    ) -> None:
        fault = fault or Fault()
        content = content + b"x" * fault.more_bytes
        if fault.flip:
            content = bytes([content[0] ^ 1]) + content[1:]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if self.owner.ranges:
            self.send_header("Accept-Ranges", "bytes")
        for name, value in (headers or {}).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "GET":
            return
        if fault.keep_bytes is not None:
            self.wfile.write(content[: fault.keep_bytes])
            self.close_connection = True
            return
        step = 1024 if fault.drip_seconds else max(1, len(content))
        for start in range(0, len(content), step):
            self.wfile.write(content[start : start + step])
            self.wfile.flush()
            time.sleep(fault.drip_seconds)

    def log_message(self, *_: object) -> None:
        pass


def as_s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3:// leads to ``server``, which answers as an S3 store does to reads, at least of the fields s3fs looks at."""
    for name, value in (("ENDPOINT_URL", server.address), ("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x")):
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()  # those of another test know another address


def in_a_hurry(monkeypatch: pytest.MonkeyPatch, retry_seconds: float = 5.0, timeout_seconds: float = 5.0) -> None:
    """Pauses that a test can wait for, and fresh counts."""
    from engine.data import client

    monkeypatch.setattr(client, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(client, "LONGEST_PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(client.CLIENT, "retry_seconds", retry_seconds)
    monkeypatch.setattr(client.CLIENT, "timeout_seconds", timeout_seconds)
    monkeypatch.setattr(client.CLIENT, "_servers", {})  # a port may have been another server's
    client.CLIENT.take()
