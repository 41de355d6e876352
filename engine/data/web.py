"""One request to a web server, through fsspec's session, which has the user's own headers and proxies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from engine.data.client import Busy, Reply, Stat

_PASSING = frozenset({408, 425, 429})
_NEVER = frozenset({501, 505})
"""What such a server does not know today it does not learn."""


class Web:
    """http(s)://"""

    def stat(self, address: str, timeout_seconds: float) -> Stat:
        return _wait(_stat, address, timeout_seconds)

    def get(self, address: str, start: int, end: int | None, timeout_seconds: float, *, anew: bool) -> Reply:
        return _wait(_get, address, start, end, timeout_seconds, anew)


def _wait(question: Any, address: str, *arguments: Any) -> Any:
    import aiohttp
    import fsspec

    files = fsspec.core.url_to_fs(address)[0]
    try:
        return fsspec.asyn.sync(files.loop, question, files, address, *arguments)
    except (aiohttp.InvalidURL, aiohttp.ClientConnectorCertificateError, aiohttp.TooManyRedirects):
        raise
    except (aiohttp.ClientError, asyncio.TimeoutError, ConnectionError) as problem:
        raise Busy(f"{type(problem).__name__}: {problem}") from problem


async def _stat(files: Any, address: str, timeout_seconds: float) -> Stat:
    """By HEAD; of the first byte where HEAD is refused, as for an address signed for GET, or tells no size."""
    async with await _request(files, "HEAD", address, {}, timeout_seconds) as response:
        if response.status < 300 and response.headers.get("Content-Encoding", "identity") == "identity":
            length = response.headers.get("Content-Length")
            if length is not None:
                return Stat(int(length), response.headers.get("ETag"))
        elif response.status in (404, 410) or is_passing(response.status):
            refuse(response.status, response.headers, address)
    async with await _request(files, "GET", address, {"Range": "bytes=0-0"}, timeout_seconds) as response:
        if response.status == 416:  # of an empty file no byte is the first
            return Stat(0, response.headers.get("ETag"))
        refuse(response.status, response.headers, address)
        num_bytes = _place(response)[1]
        if num_bytes is None:
            raise OSError("the server does not tell how long the file is")
        return Stat(num_bytes, response.headers.get("ETag"))


async def _get(files: Any, address: str, start: int, end: int | None, timeout_seconds: float, anew: bool) -> Reply:
    headers = {"Cache-Control": "no-cache", "Pragma": "no-cache"} if anew else {}
    if start or end is not None:
        headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    async with await _request(files, "GET", address, headers, timeout_seconds) as response:
        etag = response.headers.get("ETag")
        if response.status == 416:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            return Reply(b"", start, int(total) if total.isdigit() else None, etag, "no such range of the file")
        refuse(response.status, response.headers, address)
        begins, num_bytes = _place(response)
        if response.status == 206 and begins is None:
            begins = start
        if response.status == 200 and "Range" in headers and (start or num_bytes != end):
            return Reply(b"", None, num_bytes, etag)
        limit = None if end is None else end - start
        content, broken = await read_body(response.content, limit)
        return Reply(content, begins, num_bytes, etag, broken)


def _place(response: Any) -> tuple[int | None, int | None]:
    """Where the body begins in the file, and the length of the file, as far as the server says."""
    if response.status == 206:
        span, _, total = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        first = span.partition("-")[0]
        return (int(first) if first.isdigit() else None), (int(total) if total.isdigit() else None)
    length = response.headers.get("Content-Length")
    encoded = response.headers.get("Content-Encoding", "identity") != "identity"
    return 0, None if length is None or encoded else int(length)


async def _request(files: Any, method: str, address: str, headers: Mapping[str, str], timeout_seconds: float) -> Any:
    """``timeout_seconds`` is for connecting and for each wait for more bytes: a slow reply may take its time."""
    import aiohttp

    session = await files.set_session()
    settings = dict(files.kwargs)
    all_headers = {**settings.pop("headers", {}), "Accept-Encoding": "identity", **headers}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_seconds, sock_read=timeout_seconds)
    settings = {"allow_redirects": True, **settings, "timeout": timeout}
    return await session.request(method, files.encode_url(address), headers=all_headers, **settings)


async def read_body(stream: Any, limit_bytes: int | None) -> tuple[bytes, str | None]:
    """What comes, and why there is no more. Of a reply that is too long a little more than ``limit_bytes``."""
    content = bytearray()
    try:
        while chunk := await stream.readany():
            content += chunk
            if limit_bytes is not None and len(content) > limit_bytes:
                break
    except Exception as problem:  # whatever ends a reply, its beginning is good
        content += b"".join(getattr(stream, "_buffer", ()))  # aiohttp keeps to itself what came just before the end
        return bytes(content), f"a reply that broke off after {len(content):,} bytes ({type(problem).__name__})"
    return bytes(content), None


def is_passing(status: int) -> bool:
    return status in _PASSING or (status >= 500 and status not in _NEVER)


def refuse(status: int, headers: Mapping[str, str], address: str) -> None:
    """Raises by the status of a reply that is not the file."""
    if status < 300:
        return
    if status in (404, 410):
        raise FileNotFoundError(address)
    if is_passing(status):
        raise Busy(f"status {status}", _seconds(headers.get("Retry-After") or headers.get("retry-after")))
    raise PermissionError(f"status {status}; the server refuses")


def _seconds(retry_after: str | None) -> float | None:
    """Of a number or a date."""
    if retry_after is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(retry_after))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(timezone.utc)).total_seconds())
    return None
