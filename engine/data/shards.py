"""Shards: tar files of sequences, read at random by their index.

Formats are in engine/data/manifest.py and engine/data/record.py.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from engine.data.address import (
    BLOCK_BYTES,
    PIPE,
    ByteSource,
    LocalFile,
    OnceCache,
    RemoteFile,
    beside,
    is_remote,
    is_safe_name,
    read_bytes,
    sha256_of,
)
from engine.data.annotation import check_annotation
from engine.data.manifest import TOKEN_COUNTS, Manifest, ShardEntry
from engine.data.record import (
    INDEX_DTYPES,
    DamagedRecord,
    Decoded,
    decode,
    diagnose,
    read_array,
)
from engine.errors import DataError
from engine.schema import Sample

CACHE_BYTES = 512 << 20
_MAX_OPEN_SHARDS = 256


@dataclass(frozen=True)
class _OpenShard:
    source: ByteSource
    index: np.ndarray
    """[num_samples] one of INDEX_DTYPES"""


class ShardSet:
    """The shards of one manifest; any thread may read any sample at any time. ``cache_bytes`` bounds the blocks of
    remote shards kept in memory. To read shuffled windows without fetching a block twice it must hold the windows being
    read at once: about 2 * BLOCK_BYTES a lane, more for long sequences.
    """

    def __init__(
        self, address: str, manifest: Manifest, *, allow_pipe: bool = False, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.address = address
        self.manifest = manifest
        self._allow_pipe = allow_pipe
        self._opened: OnceCache[int, _OpenShard] = OnceCache(_MAX_OPEN_SHARDS)
        self._blocks: OnceCache[tuple[str, int], bytes] = OnceCache(cache_bytes // BLOCK_BYTES)

    @staticmethod
    def open(manifest_address: str, *, allow_pipe: bool = False, cache_bytes: int = CACHE_BYTES) -> ShardSet:
        """Read the manifest at a path, an http(s):// or s3:// address, or from a ``pipe:`` command.

        ``allow_pipe`` lets the address and the manifest name ``pipe:`` commands, which are run by a shell.
        Raises DataError when the manifest is missing, of another format, or names a file that is refused.
        """
        packed = ShardSet.pack(manifest_address, allow_pipe=allow_pipe)
        return ShardSet.unpack(manifest_address, packed, allow_pipe=allow_pipe, cache_bytes=cache_bytes)

    @staticmethod
    def pack(manifest_address: str, *, allow_pipe: bool = False) -> bytes:
        """The manifest for ``unpack`` on other ranks; of 100,000 shards 10 MB."""
        return zlib.compress(_read_whole(manifest_address, allow_pipe), level=1)

    @staticmethod
    def unpack(
        manifest_address: str, packed: bytes, *, allow_pipe: bool = False, cache_bytes: int = CACHE_BYTES
    ) -> ShardSet:
        """As ``open``, of a manifest read before."""
        manifest = Manifest.from_json(zlib.decompress(packed).decode("utf-8", "replace"), manifest_address)
        shards = ShardSet(manifest_address, manifest, allow_pipe=allow_pipe, cache_bytes=cache_bytes)
        for name in (name for entry in manifest.shards for name in (entry.name, entry.index)):
            if not is_safe_name(name):  # then it is a command or refused
                shards.address_of(name)
        return shards

    def token_counts(self) -> np.ndarray:
        """[vocab_size] int64: how often each id occurs in the data. Raises DataError when missing or damaged."""
        address = self.address_of(TOKEN_COUNTS)
        content = read_bytes(address, self.manifest.token_counts_sha256)
        if hashlib.sha256(content).hexdigest() != self.manifest.token_counts_sha256:
            raise DataError(f"{address}: not the file that the manifest names (sha256 differs); copy or build it again")
        return _load_array(content, address, (np.dtype("<i8"),), self.manifest.vocab_size)

    def read(self, shard: int, index: int) -> Sample:
        """Sample ``index`` of shard number ``shard``.

        Raises DataError, naming shard, key and byte offset, when the shard is missing or cut short, the record is
        damaged or unsafe, or a token id lies outside the vocabulary.
        """
        entry = self.manifest.shards[shard]
        opened = self._opened.get(shard, lambda: self._open(entry))
        offset, num_bytes, crc32 = opened.index[index].item()[:3]
        record = opened.source.read(offset, offset + num_bytes)
        if zlib.crc32(record) != crc32:  # perhaps by a proxy on the way
            record = opened.source.read(offset, offset + num_bytes, anew=True)
        try:
            if zlib.crc32(record) != crc32:
                raise diagnose(record)
            decoded = decode(record)
            self._check(decoded)
        except DamagedRecord as damage:
            raise DataError(
                f"{self.address_of(entry.name)}, sample {damage.key} (number {index}), at byte {offset:,}: {damage}; "
                f"copy or build this shard again (data_tools/verify_shards.py lists all that is damaged)"
            ) from damage
        return Sample(
            entry.name, decoded.key, decoded.token_ids, decoded.document_tokens, annotation=decoded.annotation
        )

    def lengths(self, shard: int) -> np.ndarray:
        """[num_samples] tokens of each sample of shard number ``shard``. Raises DataError where the index has none."""
        entry = self.manifest.shards[shard]
        index = self._opened.get(shard, lambda: self._open(entry)).index
        if "num_tokens" not in (index.dtype.names or ()):
            raise DataError(
                f"{self.address_of(entry.index)}: an older index, without the samples' lengths, which "
                "data.sort_samples needs; build the shards again, or set data.sort_samples: 0"
            )
        return index["num_tokens"]

    def check(self, shard: int) -> None:
        """Raises DataError when the shard or its index is missing, cut short or another file."""
        entry = self.manifest.shards[shard]
        self._opened.get(shard, lambda: self._open(entry))

    def sha256(self, shard: int) -> str:
        """Hash of the whole shard as it lies now. Raises DataError when it cannot be read."""
        return sha256_of(self._source(self.address_of(self.manifest.shards[shard].name)))

    def address_of(self, name: str) -> str:
        """Where a file named by the manifest lies. Raises DataError when the name is refused."""
        if name.startswith(PIPE):
            _check_pipe(name, self._allow_pipe)
            return name
        return beside(self.address, name)

    def _check(self, decoded: Decoded) -> None:
        key, token_ids, document_tokens, annotation = decoded
        num_tokens = len(token_ids)
        if not 0 < num_tokens <= self.manifest.sequence_tokens:
            raise DamagedRecord(f"{num_tokens} tokens, expected 1 to {self.manifest.sequence_tokens}", key)
        documents = document_tokens.tolist()
        if sum(documents) != num_tokens or 0 in documents:
            raise DamagedRecord(f"documents of {documents} tokens do not add up to its {num_tokens} tokens", key)
        highest = int(token_ids.max())
        if highest >= self.manifest.vocab_size:
            raise DamagedRecord(f"token id {highest}, expected below {self.manifest.vocab_size}", key)
        if (annotation is not None) != self.manifest.is_annotated:
            found = "labels" if annotation else "no labels"
            raise DamagedRecord(f"holds {found}, which is not what {self.manifest.task} has", key)
        if annotation is not None:
            check_annotation(annotation, num_tokens, self.manifest, key)

    def _open(self, entry: ShardEntry) -> _OpenShard:
        address = self.address_of(entry.name)
        source = self._source(address)
        if source.num_bytes != entry.num_bytes:
            raise DataError(
                f"{address}: {source.num_bytes:,} bytes, expected {entry.num_bytes:,} by the manifest; "
                "the file is cut short or another one: copy or build it again"
            )
        index = self._read_index(entry)
        ends = index["offset"] + index["num_bytes"]
        if len(index) and max(int(index["offset"].max()), int(ends.max())) > entry.num_bytes:
            raise DataError(f"{address}: its index {entry.index} points past its end; build the shard again")
        return _OpenShard(source, index)

    def _source(self, address: str) -> ByteSource:
        if address.startswith(PIPE):
            with tempfile.NamedTemporaryFile(prefix="stillhouse-", suffix=".tar") as spool:
                _run_pipe(address, spool.file)
                return LocalFile(spool.name)
        return RemoteFile(address, self._blocks) if is_remote(address) else LocalFile(address)

    def _read_index(self, entry: ShardEntry) -> np.ndarray:
        address = self.address_of(entry.index)
        content = _read_whole(address, self._allow_pipe, entry.index_sha256)
        if hashlib.sha256(content).hexdigest() != entry.index_sha256:
            raise DataError(
                f"{address}: not the index that the manifest names (sha256 differs); copy or build {entry.name} again"
            )
        return _load_array(content, address, INDEX_DTYPES, entry.num_samples)


def _load_array(content: bytes, address: str, dtypes: Sequence[np.dtype], length: int) -> np.ndarray:
    try:
        array = read_array(content)
    except Exception as problem:  # NumPy's reader raises by the damage
        raise DataError(f"{address}: not a .npy file ({problem}); build the shards again") from problem
    if array.dtype not in dtypes or array.shape != (length,):
        raise DataError(f"{address}: {array.dtype} of shape {array.shape}, expected {dtypes[0]} of shape ({length},)")
    return array


def _read_whole(address: str, allow_pipe: bool, sha256: str | None = None) -> bytes:
    if not address.startswith(PIPE):
        return read_bytes(address, sha256)
    _check_pipe(address, allow_pipe)
    content = io.BytesIO()
    _run_pipe(address, content)
    return content.getvalue()


def _check_pipe(address: str, allow_pipe: bool) -> None:
    if not allow_pipe:
        raise DataError(
            f"refused {address!r}: pipe: addresses run shell commands; set data.allow_pipe: true in your own "
            "configuration if you trust it"
        )


def _run_pipe(address: str, target: IO[bytes]) -> None:
    from webdataset.gopen import gopen

    try:
        with gopen(address, "rb") as stream:
            shutil.copyfileobj(stream, target, BLOCK_BYTES)
        target.flush()
    except OSError as problem:
        raise DataError(f"{address}: the command failed ({problem})") from problem
