"""The sha256 of a checkpoint's files: made while they are written, looked at before they are read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from engine.errors import CheckpointError

BLOCK_BYTES = 4 << 20
READERS = 4


class WrittenFile(NamedTuple):
    """A file that has reached the disk."""

    path: Path
    num_bytes: int
    sha256: str


class HashingFile:
    """Passes on what is written, in the order in which it lies in the file, and hashes it on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest = file, hashlib.sha256()
        self.name = file.name

    def write(self, content: Any) -> int:
        self._digest.update(content)
        return self._file.write(content)

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def write_hashed(path: Path, write: Callable[[IO[bytes]], None]) -> WrittenFile:
    """Let ``write`` fill the file at ``path``, and sync it."""
    with path.open("wb") as file:
        hashing = HashingFile(file)
        write(cast(IO[bytes], hashing))
        file.flush()
        os.fsync(file.fileno())
    return WrittenFile(path, path.stat().st_size, hashing.sha256)


class Digests:
    """What a checkpoint's meta.json says of its files. Each file is looked at once."""

    def __init__(self, checkpoint: Path, recorded: Mapping[str, str] | None) -> None:
        """``recorded`` is None for a checkpoint of an older format, whose files are taken as they are."""
        self.checkpoint, self._recorded = checkpoint, recorded
        self._sound: set[Path] = set()

    def check(self, path: Path) -> None:
        """Raises CheckpointError for a file that is not the one that was written, or that meta.json does not name."""
        path = path.absolute()
        if self._recorded is None or path in self._sound:
            return
        name = path.relative_to(self.checkpoint.absolute()).as_posix()
        expected = self._recorded.get(name)
        if expected is None:
            raise CheckpointError(f"{path}: refused, since the checkpoint's meta.json has no sha256 of it")
        try:
            found = sha256_of(path)
        except OSError as problem:
            raise CheckpointError(f"{path}: cannot be read ({problem})") from problem
        if found != expected:
            raise CheckpointError(f"{path}: refused, its sha256 is {found} and meta.json says {expected}")
        self._sound.add(path)

    def check_all(self, paths: Iterable[Path]) -> None:
        """As ``check``, several at a time."""
        with ThreadPoolExecutor(READERS, thread_name_prefix="digests") as pool:
            for _ in pool.map(self.check, paths):
                pass


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
