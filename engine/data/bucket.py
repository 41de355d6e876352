"""One request to an S3 store, through s3fs, which finds the user's keys and end point."""

from __future__ import annotations

import asyncio
from typing import Any

from engine.data.client import Busy, Reply, Stat
from engine.data.web import read_body, refuse

_NO_RETRIES = {"max_attempts": 0}


class Bucket:
    """s3://"""

    def stat(self, address: str, timeout_seconds: float) -> Stat:
        head = _wait("head_object", address, timeout_seconds)
        return Stat(head["ContentLength"], head.get("ETag"))

    def get(self, address: str, start: int, end: int | None, timeout_seconds: float, *, anew: bool) -> Reply:
        """A store has no caches on the way: ``anew`` is any read."""
        span = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if start or end is not None else {}
        limit = None if end is None else end - start
        return _wait("get_object", address, timeout_seconds, limit, **span)


def _wait(method: str, address: str, timeout_seconds: float, *arguments: Any, **fields: Any) -> Any:
    import fsspec

    settings = dict(fsspec.config.conf.get("s3", {}).get("config_kwargs", {}))
    settings |= {"connect_timeout": timeout_seconds, "read_timeout": timeout_seconds, "retries": _NO_RETRIES}
    files, path = fsspec.core.url_to_fs(address, config_kwargs=settings)
    files.retries = 1  # an instance of our own, by its settings: all patience is the client's, which counts it
    return fsspec.asyn.sync(files.loop, _call, files, path, method, address, *arguments, **fields)


async def _call(files: Any, path: str, method: str, address: str, limit_bytes: int | None = None, **fields: Any) -> Any:
    bucket, key, version = files.split_path(path)
    if version:
        fields["VersionId"] = version
    try:
        answer = await files._call_s3(method, Bucket=bucket, Key=key, **fields, **files.req_kw)
    except Exception as problem:  # s3fs and what is below it raise their own types
        if isinstance(problem, FileNotFoundError):
            raise FileNotFoundError(address) from problem
        _refuse(problem, address)
        raise
    if method != "get_object":
        return answer
    try:
        content, broken = await read_body(answer["Body"].raw_stream.content, limit_bytes)
    finally:
        answer["Body"].close()
    total = answer.get("ContentRange", "").rpartition("/")[2]
    num_bytes = int(total) if total.isdigit() else None if fields.get("Range") else answer["ContentLength"]
    begins = int(fields["Range"].removeprefix("bytes=").partition("-")[0]) if "Range" in fields else 0
    return Reply(content, begins, num_bytes, answer.get("ETag"), broken)


def _refuse(problem: BaseException, address: str) -> None:
    """Raises Busy or FileNotFoundError for what botocore says in its own way."""
    from aiohttp import ClientConnectorCertificateError
    from botocore import exceptions

    for error in (problem, problem.__cause__):
        if isinstance(error, exceptions.ClientError):
            answer = error.response.get("ResponseMetadata", {})
            refuse(answer.get("HTTPStatusCode", 0), answer.get("HTTPHeaders", {}), address)
        passing = (exceptions.HTTPClientError, exceptions.ConnectionError, asyncio.TimeoutError, ConnectionError)
        wrong = isinstance(error, exceptions.SSLError) and error.kwargs.get("error")
        if isinstance(error, passing) and not isinstance(wrong, ClientConnectorCertificateError):
            raise Busy(f"{type(error).__name__}: {error}") from problem
