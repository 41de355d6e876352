"""manifest.json: what a folder of shards holds, written last and atomically, so that it exists only when all is there.

A sample is the tar records ``<key>.tokens.npy`` ([T], smallest unsigned type) and ``<key>.documents.npy`` ([D] uint32,
tokens of each packed document); engine/data/record.py has what samples of labelled tasks hold beside them. Beside
``shard-000000.tar`` lies ``shard-000000.index.npy``: [num_samples] of (offset uint64, num_bytes uint32, crc32 uint32,
num_tokens uint32), the bytes of each sample with its tar headers and padding, their CRC-32 and its length.
``token_counts.npy`` is [vocab_size] int64.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from engine.config.resolve import DataFacts
from engine.data.atomic import write_atomically
from engine.data.record import encode_array
from engine.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKEN_COUNTS = "token_counts.npy"
ANNOTATED_TASKS = frozenset({"token_classification", "sequence_classification", "question_answering"})
"""Whose samples have labels of their own; those of other tasks follow from the tokens."""


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


_VALUES = attrgetter("name", "num_samples", "num_tokens", "num_bytes", "sha256", "index", "index_sha256")
_TYPES = (str, int, int, int, str, str, str)


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
    labels: tuple[str, ...] = ()
    """names of the classes of a labelled task, in the order of their indices"""
    has_labels: bool = True
    """false for data of a labelled task whose labels are not known"""

    @property
    def is_annotated(self) -> bool:
        """Whether its samples have an Annotation."""
        return self.task in ANNOTATED_TASKS

    @property
    def facts(self) -> DataFacts:
        """What a run's settings are checked against."""
        return DataFacts(self.num_samples, self.sequence_tokens, self.vocab_size, self.task, self.has_labels)

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
        content = asdict(self)
        if not self.is_annotated:  # as it was before there were such tasks
            del content["labels"], content["has_labels"]
        return json.dumps(content, indent=1, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str, where: str) -> Manifest:
        """Parse the manifest read from ``where``. Raises DataError for another or a newer format."""
        try:
            content: dict[str, Any] = json.loads(text)
            refuse_newer(content["format_version"], FORMAT_VERSION, where)
            shards = tuple(ShardEntry(**entry) for entry in content.pop("shards"))
            manifest = Manifest(shards=shards, labels=tuple(content.pop("labels", ())), **content)
            _check_types(manifest)
            for shard in shards:  # of a hundred thousand: what is sound is seen at one glance
                values = _VALUES(shard)
                if tuple(map(type, values)) != _TYPES or min(values[1:4]) < 0:
                    _check_types(shard)
            return manifest
        except (ValueError, KeyError, TypeError) as problem:
            raise DataError(
                f"{where}: not a Stillhouse manifest ({problem!r}); build the shards with data_tools/build_shards.py"
            ) from problem


def write_manifest(folder: Path, manifest: Manifest, token_counts: np.ndarray) -> Manifest:
    """Write token_counts.npy and then, last, manifest.json. Returns the manifest with the hash of the counts."""
    counts = encode_array(token_counts.astype("<i8"))
    manifest = replace(manifest, token_counts_sha256=hashlib.sha256(counts).hexdigest())
    write_atomically(folder / TOKEN_COUNTS, counts)
    write_atomically(folder / MANIFEST, manifest.to_json().encode())
    return manifest


def refuse_newer(version: int, known: int, where: str) -> None:
    """Raises DataError for a file of a format that a later version wrote."""
    if version > known:
        raise DataError(
            f"{where}: format version {version} is newer than this Stillhouse reads ({known}); update Stillhouse"
        )


def _check_types(part: Manifest | ShardEntry) -> None:
    for field in fields(part):
        value = getattr(part, field.name)
        if field.type == "int" and (type(value) is not int or value < 0):
            raise ValueError(f"{field.name} is {value!r}, expected a number of 0 or more")
        if field.type == "str" and not isinstance(value, str):
            raise ValueError(f"{field.name} is {value!r}, expected text")
        if field.type == "bool" and not isinstance(value, bool):
            raise ValueError(f"{field.name} is {value!r}, expected true or false")
        if field.type == "tuple[str, ...]" and not all(isinstance(each, str) for each in value):
            raise ValueError(f"{field.name} is {value!r}, expected a list of texts")
