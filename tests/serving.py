"""A web server for tests: a folder over http, with range requests and failures on demand."""

from __future__ import annotations

import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import s3fs


class Server:
    """Serves a folder, with range requests unless told otherwise; ``failures`` answers of 503 come first."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.failures, self.ranges = folder, 0, True
        self.requests: list[tuple[str, str | None]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"


class Handler(BaseHTTPRequestHandler):
    def __init__(self, owner: Server, *arguments: object) -> None:
        self.owner = owner
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = self.owner.folder / self.path.partition("?")[0].lstrip("/")
        if self.owner.failures > 0:
            self.owner.failures -= 1
            self.answer(503, b"")
        elif not path.is_file():
            self.answer(404, b"")
        else:
            content, wanted = path.read_bytes(), self.headers.get("Range")
            if self.command == "GET":
                self.owner.requests.append((path.name, wanted))
            if wanted and self.owner.ranges:
                start, end = wanted.removeprefix("bytes=").split("-")
                self.answer(206, content[int(start) : int(end) + 1])
            else:
                self.answer(200, content)

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if self.owner.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def as_s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3:// leads to ``server``, which answers as an S3 store does to reads, at least of the fields s3fs looks at."""
    for name, value in (("ENDPOINT_URL", server.address), ("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x")):
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()  # those of another test know another address
