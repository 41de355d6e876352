"""cache.json: what all sidecars of a cache have in common, written once, before the first of them.

It tells a reader how to decode, so that no configuration is needed, and what the targets belong to, so that they are
not used for anything else.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from engine.data.manifest import refuse_newer
from engine.errors import CacheError, DataError

FORMAT_VERSION = 1
IDENTITY = "cache.json"


@dataclass(frozen=True)
class CacheIdentity:
    """Two caches with the same identity hold the same targets for the same shards."""

    codec: dict[str, Any]
    """kind, version and settings"""
    temperature: float
    teacher: str
    """fingerprint of its weights and config"""
    teacher_name: str
    """where it was loaded from; for people, not compared"""
    teacher_precision: str
    tokenizer: str
    """fingerprint"""
    vocab_size: int
    task: dict[str, Any]
    """kind, and for masked language models all that the masks depend on"""
    num_rounds: int
    """different masks of a sample"""
    seed: int
    """of the draws"""
    micro_sequences: int
    """of one forward pass of the teacher"""
    ranks_sha256: str
    """of ranks.npy"""
    head_sha256: str | None = None
    """of head.safetensors, where states are kept"""
    format_version: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @property
    def sha256(self) -> str:
        """The same for the same targets, wherever their teacher was loaded from."""
        return hashlib.sha256(replace(self, teacher_name="").to_json()).hexdigest()

    @staticmethod
    def from_json(content: bytes, where: str) -> CacheIdentity:
        """Raises CacheError for a damaged file, and for one of a newer format."""
        try:
            found: dict[str, Any] = json.loads(content)
            refuse_newer(found["format_version"], FORMAT_VERSION, where)
            return CacheIdentity(**found)
        except DataError as problem:
            raise CacheError(str(problem)) from problem
        except (ValueError, KeyError, TypeError) as problem:
            raise CacheError(
                f"{where}: damaged, or not of a cache ({problem!r}); copy it again, or make the cache anew"
            ) from problem

    def differences(self, other: CacheIdentity, names: tuple[str, str]) -> list[str]:
        """What differs, one a line, with both sides; ``names`` say whose they are."""
        lines = []
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(other, field.name)
            if ours == theirs or field.name == "teacher_name":
                continue
            what = field.name.replace("_", " ")
            if field.name == "teacher":
                ours, theirs = f"{self.teacher_name} {ours[:12]}", f"{other.teacher_name} {theirs[:12]}"
            elif isinstance(ours, dict):
                keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
                what += " " + ", ".join(keys)
                ours, theirs = ([side.get(key) for key in keys] for side in (ours, theirs))
            lines.append(f"{what}: {names[0]} {_short(ours)}, {names[1]} {_short(theirs)}")
        return lines


def _short(value: Any) -> str:
    """Hashes by their first digits."""
    values = value if isinstance(value, list) else [value]
    return ", ".join(text[:12] if re.fullmatch("[0-9a-f]{64}", text := str(each)) else text for each in values)
