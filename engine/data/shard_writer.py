"""Writing one shard: a tar file of samples, and its index. Formats are in engine/data/manifest.py and record.py."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np

from engine.data.atomic import move_into_place, write_atomically
from engine.data.manifest import ShardEntry
from engine.data.record import DOCUMENTS, EXAMPLE, INDEX_DTYPE, LABELS, PIECES, TOKENS, encode_array, token_dtype
from engine.schema import Annotation


class ShardWriter:
    """Writes one shard and its index; the bytes depend on the samples alone. Use as a context manager.

    On success both files are synced and renamed into place and ``entry`` is set; after an exception neither exists.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        """``path`` is FOLDER/NAME.tar; ``dtype`` of the token ids from engine.data.record.token_dtype."""
        from webdataset import TarWriter

        self.path = path
        self.entry: ShardEntry | None = None
        self._dtype = dtype
        self._lengths: list[int] = []
        self._offsets = [0]
        self._partial = path.with_name(f".{path.name}.partial")
        self._stream = self._partial.open("wb")
        self._tar = TarWriter(self._stream, user="", group="", mode=0o644, mtime=0, encoder=False, compress=False)
        self._tar.tarstream.format = tarfile.USTAR_FORMAT  # TarWriter's own ``format`` does not reach the tar file

    @property
    def num_samples(self) -> int:
        return len(self._offsets) - 1

    @property
    def num_bytes(self) -> int:
        """Bytes of the samples so far."""
        return self._offsets[-1]

    def add(
        self, key: str, token_ids: np.ndarray, document_tokens: np.ndarray, annotation: Annotation | None = None
    ) -> None:
        """Append a sample: ids [T], tokens of each of its documents [D]. The key holds no dot and no slash."""
        members = {"__key__": key, DOCUMENTS: encode_array(document_tokens.astype("<u4"))}
        members[TOKENS] = encode_array(token_ids.astype(self._dtype))
        if annotation is not None:
            dtype = token_dtype(int(annotation.labels.max(initial=0)) + 1)
            members[LABELS] = encode_array(annotation.labels.astype(dtype))
            members[PIECES] = encode_array(annotation.piece_tokens.astype("<u4"))
            if annotation.example:
                members[EXAMPLE] = annotation.example
        self._tar.write(members)
        self._lengths.append(len(token_ids))
        self._offsets.append(self._tar.tarstream.offset)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._stream.close()
            self._partial.unlink(missing_ok=True)

    def _finish(self) -> None:
        self._tar.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        num_bytes = self._stream.tell()
        index, sha256 = _scan(self._partial, self._offsets)
        index["num_tokens"] = self._lengths
        index_content = encode_array(index)
        index_path = self.path.with_suffix(".index.npy")
        write_atomically(index_path, index_content)
        move_into_place(self._partial, self.path)
        self.entry = ShardEntry(
            name=self.path.name,
            num_samples=len(index),
            num_tokens=sum(self._lengths),
            num_bytes=num_bytes,
            sha256=sha256,
            index=index_path.name,
            index_sha256=hashlib.sha256(index_content).hexdigest(),
        )


def _scan(path: Path, offsets: list[int]) -> tuple[np.ndarray, str]:
    """The index [n] and the sha256 of a tar file, from what the disk holds rather than what was meant to be written."""
    index = np.zeros(len(offsets) - 1, INDEX_DTYPE)
    index["offset"], index["num_bytes"] = offsets[:-1], np.diff(offsets)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for sample, num_bytes in enumerate(index["num_bytes"].tolist()):
            record = stream.read(num_bytes)
            index["crc32"][sample] = zlib.crc32(record)
            digest.update(record)
        digest.update(stream.read())
    return index, digest.hexdigest()
