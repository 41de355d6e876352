"""Writes sidecars: under another name, synced and linked into place. One is there whole or not at all, and never
replaced."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import tarfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np

from engine.cache.sidecar import (
    BLOCK,
    HEAD_BYTES,
    HEADER_BYTES,
    INDEX_DTYPE,
    NPY_BYTES,
    Record,
    SidecarHeader,
    Sums,
    padded,
)
from engine.data.atomic import link_into_place
from engine.errors import CacheError

_MAX_RECORD_BYTES = 2_000_000_000
"""One call reads no more."""


class SidecarWriter:
    """Writes ``path``. Use as a context manager: after an exception nothing is left."""

    def __init__(self, path: Path, num_records: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        self._index = np.zeros(num_records, INDEX_DTYPE)
        self._count = self._record_bytes = 0
        self._records_start = HEAD_BYTES + padded(self._index.nbytes + NPY_BYTES) - NPY_BYTES + BLOCK
        self._stream = self._partial.open("w+b")
        self._stream.seek(self._records_start)
        self._sums = Sums(0, 0, 0, 0.0)

    def add(self, record: Record, sums: Sums) -> None:
        """The next record."""
        content = record.content
        if len(content) >= _MAX_RECORD_BYTES:
            raise CacheError(
                f"{self.path}: record {self._count} has {len(content):,} bytes, and {_MAX_RECORD_BYTES:,} are too "
                "many; keep fewer layers, or build shards of shorter sequences"
            )
        self._index[self._count] = (
            record.input_hash, len(content), zlib.crc32(content), record.nll, record.entropy
        )  # fmt: skip
        self._stream.write(content)
        self._count += 1
        self._record_bytes += len(content)
        self._sums = Sums(
            self._sums.num_tokens + sums.num_tokens,
            self._sums.num_positions + sums.num_positions,
            self._sums.num_pairs + sums.num_pairs,
            self._sums.kept_mass + sums.kept_mass,
        )

    def finish(self, cache: str, shard: str, shard_sha256: str, num_rounds: int) -> None:
        """Put the file in its place. When another job was first, its file stays."""
        assert self._count == len(self._index)
        index = _npy(self._index)
        header = SidecarHeader(
            cache=cache,
            shard=shard,
            shard_sha256=shard_sha256,
            num_samples=self._count // num_rounds,
            num_rounds=num_rounds,
            num_tokens=self._sums.num_tokens // num_rounds,
            num_positions=self._sums.num_positions,
            num_pairs=self._sums.num_pairs,
            kept_mass=float(self._sums.kept_mass),
            nll=float(self._index["nll"].sum(dtype=np.float64)),
            entropy=float(self._index["entropy"].sum(dtype=np.float64)),
            record_bytes=self._record_bytes,
            index_sha256=hashlib.sha256(index).hexdigest(),
        )
        text = json.dumps(asdict(header), indent=1).encode().ljust(HEADER_BYTES)
        if len(text) != HEADER_BYTES:
            raise CacheError(f"{self.path}: the shard's name is too long for a header of {HEADER_BYTES:,} bytes")
        self._stream.write(bytes(-self._record_bytes % BLOCK + 2 * BLOCK))
        self._stream.seek(0)
        self._stream.write(_tar_header("header.json", len(text)) + text + _tar_header("index.npy", len(index)))
        self._stream.write(index.ljust(padded(len(index)), b"\0") + _tar_header("records.bin", self._record_bytes))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        link_into_place(self._partial, self.path)

    def __enter__(self) -> SidecarWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with contextlib.suppress(OSError):  # a full disk refuses what was still to be written
                self._stream.close()
        finally:
            self._partial.unlink(missing_ok=True)


def _tar_header(name: str, num_bytes: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = num_bytes, 0o644
    return member.tobuf(tarfile.GNU_FORMAT)  # ustar itself ends at 8 GiB


def _npy(index: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, index, version=(1, 0))
    assert len(content.getvalue()) == index.nbytes + NPY_BYTES
    return content.getvalue()
