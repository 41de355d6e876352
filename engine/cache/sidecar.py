"""A sidecar: the records of one data shard's samples, in their order, as one tar file.

Its three members have fixed places, so that one read of the beginning finds any record:

``header.json``   2,048 bytes: the SidecarHeader, filled up with spaces
``index.npy``     [num_samples * num_rounds] INDEX_DTYPE, the rounds of a sample one after another
``records.bin``   the records one after another

It is written under another name, synced and linked into place: it is there whole or not at all, and never replaced.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import tarfile
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data.address import BLOCK_BYTES, ByteSource
from engine.data.atomic import link_into_place
from engine.errors import CacheError, DataError

BLOCK = 512
HEADER_BYTES = 2048
INDEX_DTYPE = np.dtype(
    [("input_hash", "<u8"), ("num_bytes", "<u4"), ("crc32", "<u4"), ("nll", "<f4"), ("entropy", "<f4")]
)
"""Of each record: what the teacher saw (see ``input_hash``), its bytes and their CRC-32, and the sums over its
positions of the teacher's -log p of the label and of its entropy, in nats."""
_MAX_RECORD_BYTES = 2_000_000_000
"""One call reads no more."""
_NPY_BYTES = 192
"""Length of the .npy header of an index: NumPy pads it so."""
HEAD_BYTES = BLOCK + HEADER_BYTES + BLOCK + _NPY_BYTES
"""Where the index begins."""


@dataclass(frozen=True)
class SidecarHeader:
    """What a sidecar holds. The same facts stand in the cache's manifest."""

    cache: str
    """sha256 of the cache.json it belongs to"""
    shard: str
    """name of the data shard"""
    shard_sha256: str
    num_samples: int
    num_rounds: int
    num_tokens: int
    """of the samples, a round"""
    num_positions: int
    """positions with targets, all rounds"""
    num_pairs: int
    """ids kept at them; 0 where states are kept"""
    kept_mass: float
    """sum over the positions of the teacher's probability of the kept ids"""
    nll: float
    """sum over the positions of the teacher's -log p of the label, nats"""
    entropy: float
    """sum over the positions of the teacher's entropy, nats"""
    record_bytes: int
    index_sha256: str

    @property
    def num_records(self) -> int:
        return self.num_samples * self.num_rounds

    @staticmethod
    def from_json(content: bytes, where: str) -> SidecarHeader:
        """Raises CacheError."""
        try:
            found = json.loads(content)
            header = SidecarHeader(**found)
            wrong = [f.name for f in fields(header) if type(found[f.name]).__name__ != f.type]
            if wrong:
                raise ValueError(f"{wrong[0]} is {found[wrong[0]]!r}")
            return header
        except (ValueError, TypeError) as problem:
            raise CacheError(f"{where}: its header is damaged ({problem}); {REMEDY}") from problem


REMEDY = "delete this file and run launch/cache_teacher.py again: it makes only what is missing"


class Record(NamedTuple):
    """What the teacher said of one sample in one round."""

    content: bytes
    input_hash: int
    nll: float
    entropy: float


class Sums(NamedTuple):
    """What the header adds up over the records."""

    num_tokens: int
    num_positions: int
    num_pairs: int
    kept_mass: float


def input_hash(key: str, input_ids: np.ndarray, labels: np.ndarray, document_tokens: np.ndarray) -> int:
    """64 bits of all that the teacher saw of a sample and was asked: its key, ids, masks, labels and documents."""
    digest = hashlib.blake2b(key.encode(), digest_size=8)
    for part in (input_ids, labels, document_tokens):
        digest.update(part.astype("<i4").tobytes())
    return int.from_bytes(digest.digest(), "little")


class SidecarWriter:
    """Writes ``path``. Use as a context manager: after an exception nothing is left."""

    def __init__(self, path: Path, num_records: int) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        self._index = np.zeros(num_records, INDEX_DTYPE)
        self._count = self._record_bytes = 0
        self._records_start = HEAD_BYTES + _padded(self._index.nbytes + _NPY_BYTES) - _NPY_BYTES + BLOCK
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

    def finish(self, cache: str, shard: str, shard_sha256: str, num_rounds: int) -> SidecarHeader:
        """Put the file in its place. When another job was first, its file stays and its header is returned."""
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
        self._stream.write(index.ljust(_padded(len(index)), b"\0") + _tar_header("records.bin", self._record_bytes))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        link_into_place(self._partial, self.path)
        return header

    def __enter__(self) -> SidecarWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with contextlib.suppress(OSError):  # a full disk refuses what was still to be written
                self._stream.close()
        finally:
            self._partial.unlink(missing_ok=True)


class Sidecar:
    """An opened sidecar: any thread may read any record.

    Raises CacheError for a file that is cut short, damaged, of another cache, or of another shard.
    """

    def __init__(self, source: ByteSource, address: str) -> None:
        self.address = address
        self.num_bytes = source.num_bytes
        self._source = source
        head = source.read(0, HEAD_BYTES)
        if len(head) < HEAD_BYTES or not head.startswith(b"header.json\0"):
            raise CacheError(f"{address}: not a sidecar of a cache, or cut short; {REMEDY}")
        self.header = SidecarHeader.from_json(head[BLOCK : BLOCK + HEADER_BYTES], address)
        end = HEAD_BYTES + self.header.num_records * INDEX_DTYPE.itemsize
        self._records_start = BLOCK + _padded(end + _NPY_BYTES - HEAD_BYTES) + HEAD_BYTES - _NPY_BYTES
        expected = _padded(self._records_start + self.header.record_bytes) + 2 * BLOCK
        if source.num_bytes != expected:
            raise CacheError(
                f"{address}: {source.num_bytes:,} bytes, expected {expected:,} by its header; the file is cut short "
                f"or damaged: {REMEDY}"
            )
        index = head[HEAD_BYTES - _NPY_BYTES :] + source.read(HEAD_BYTES, end)
        if hashlib.sha256(index).hexdigest() != self.header.index_sha256:
            raise CacheError(f"{address}: its index is damaged (sha256 differs); {REMEDY}")
        self.index = np.frombuffer(index, INDEX_DTYPE, offset=_NPY_BYTES)
        self._offsets = (
            self._records_start + np.cumsum(self.index["num_bytes"], dtype=np.int64) - self.index["num_bytes"]
        )

    def sha256(self) -> str:
        """Of the whole file as it lies now."""
        digest = hashlib.sha256()
        for start in range(0, self.num_bytes, BLOCK_BYTES):
            digest.update(self._source.read(start, min(start + BLOCK_BYTES, self.num_bytes)))
        return digest.hexdigest()

    def read(self, number: int) -> Record:
        """Record ``number`` = sample * num_rounds + round. Raises DataError when it is damaged."""
        entry, start = self.index[number], int(self._offsets[number])
        content = self._source.read(start, start + int(entry["num_bytes"]))
        if zlib.crc32(content) != entry["crc32"]:
            raise DataError(f"{self.place(number)}: flipped bits (its CRC-32 differs); {REMEDY}")
        return Record(content, int(entry["input_hash"]), float(entry["nll"]), float(entry["entropy"]))

    def place(self, number: int) -> str:
        """Where record ``number`` lies, for people."""
        return f"{self.address}, record {number} at byte {int(self._offsets[number]):,}"


def _tar_header(name: str, num_bytes: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = num_bytes, 0o644
    return member.tobuf(tarfile.GNU_FORMAT)  # ustar itself ends at 8 GiB


def _npy(index: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.lib.format.write_array(content, index, version=(1, 0))
    assert len(content.getvalue()) == index.nbytes + _NPY_BYTES
    return content.getvalue()


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK) * BLOCK
