"""A sidecar: the records of one data shard's samples, in their order, as one tar file.

Its three members have fixed places, so that one read of the beginning finds any record:

``header.json``   2,048 bytes: the SidecarHeader, filled up with spaces
``index.npy``     [num_samples * num_rounds] INDEX_DTYPE, the rounds of a sample one after another
``records.bin``   the records one after another

engine/cache/sidecar_writer.py writes it.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from engine.data.address import ByteSource, sha256_of
from engine.errors import CacheError, DataError

BLOCK = 512
HEADER_BYTES = 2048
INDEX_DTYPE = np.dtype(
    [("input_hash", "<u8"), ("num_bytes", "<u4"), ("crc32", "<u4"), ("nll", "<f4"), ("entropy", "<f4")]
)
"""Of each record: what the teacher saw (see ``input_hash``), its bytes and their CRC-32, and the sums over its
positions of the teacher's -log p of the label and of its entropy, in nats."""
NPY_BYTES = 192
"""Length of the .npy header of an index: NumPy pads it so."""
HEAD_BYTES = BLOCK + HEADER_BYTES + BLOCK + NPY_BYTES
"""Where the index begins."""


@dataclass(frozen=True)
class SidecarHeader:
    """What a sidecar holds. The same facts stand in the cache's manifest."""

    cache: str
    """hash of the identity of the cache that it belongs to"""
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
        self._records_start = BLOCK + padded(end + NPY_BYTES - HEAD_BYTES) + HEAD_BYTES - NPY_BYTES
        expected = padded(self._records_start + self.header.record_bytes) + 2 * BLOCK
        if source.num_bytes != expected:
            raise CacheError(
                f"{address}: {source.num_bytes:,} bytes, expected {expected:,} by its header; the file is cut short "
                f"or damaged: {REMEDY}"
            )
        index = source.read(HEAD_BYTES - NPY_BYTES, end)
        if hashlib.sha256(index).hexdigest() != self.header.index_sha256:
            index = source.read(HEAD_BYTES - NPY_BYTES, end, anew=True)
        if hashlib.sha256(index).hexdigest() != self.header.index_sha256:
            raise CacheError(f"{address}: its index is damaged (sha256 differs); {REMEDY}")
        self.index = np.frombuffer(index, INDEX_DTYPE, offset=NPY_BYTES)
        self._offsets = (
            self._records_start + np.cumsum(self.index["num_bytes"], dtype=np.int64) - self.index["num_bytes"]
        )

    def sha256(self) -> str:
        """Of the whole file as it lies now."""
        return sha256_of(self._source)

    def read(self, number: int) -> Record:
        """Record ``number`` = sample * num_rounds + round. Raises DataError when it is damaged."""
        entry, start = self.index[number], int(self._offsets[number])
        content = self._source.read(start, start + int(entry["num_bytes"]))
        if zlib.crc32(content) != entry["crc32"]:
            content = self._source.read(start, start + int(entry["num_bytes"]), anew=True)
        if zlib.crc32(content) != entry["crc32"]:
            raise DataError(f"{self.place(number)}: flipped bits (its CRC-32 differs); {REMEDY}")
        return Record(content, int(entry["input_hash"]), float(entry["nll"]), float(entry["entropy"]))

    def place(self, number: int) -> str:
        """Where record ``number`` lies, for people."""
        return f"{self.address}, record {number} at byte {int(self._offsets[number]):,}"


def padded(num_bytes: int) -> int:
    return -(-num_bytes // BLOCK) * BLOCK
