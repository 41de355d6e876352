"""manifest.json: what a folder of shards holds, written last and atomically, so that it exists only when all is there.

A sample is the tar records ``<key>.tokens.npy`` ([T], smallest unsigned type) and ``<key>.documents.npy`` ([D] uint32,
tokens of each packed document). Beside ``shard-000000.tar`` lies ``shard-000000.index.npy``: [num_samples + 1] uint64,
the byte offset of each sample and of the end of the last. ``token_counts.npy`` is [vocab_size] int64.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from engine.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKEN_COUNTS = "token_counts.npy"


@dataclass(frozen=True)
class ShardEntry:
    """One tar file. ``name`` is relative to the manifest."""

    name: str
    num_samples: int
    num_tokens: int
    num_bytes: int
    sha256: str
    index: str
    """name of the index file"""
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """A data set of packed sequences for one task and one tokenizer."""

    task: str
    tokenizer: str
    """fingerprint of the tokenizer"""
    vocab_size: int
    """number of ids the tokenizer has"""
    pad_id: int
    sequence_tokens: int
    num_documents: int
    shards: tuple[ShardEntry, ...]
    token_counts_sha256: str
    command: str
    """the command that made it"""
    format_version: int = FORMAT_VERSION

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def samples_per_shard(self) -> list[int]:
        return [shard.num_samples for shard in self.shards]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str, where: str) -> Manifest:
        """Parse the manifest read from ``where``. Raises DataError for another or a newer format."""
        try:
            content: dict[str, Any] = json.loads(text)
            version = content["format_version"]
            if version > FORMAT_VERSION:
                raise DataError(
                    f"{where}: format version {version} is newer than this Stillhouse reads ({FORMAT_VERSION}); update Stillhouse"
                )
            shards = tuple(ShardEntry(**entry) for entry in content.pop("shards"))
            return Manifest(shards=shards, **content)
        except (ValueError, KeyError, TypeError) as problem:
            raise DataError(
                f"{where}: not a Stillhouse manifest ({problem!r}); build the shards with data_tools/build_shards.py"
            ) from problem
