"""One process at a time in a folder that is being filled."""

from __future__ import annotations

import fcntl
from pathlib import Path

from engine.errors import DataError

_LOCK = ".lock"


class FolderLock:
    """Held from its making to ``release``. Raises DataError when another process has it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _LOCK
        self._file = self._path.open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            self._file.close()
            raise DataError(f"{folder}: another process is writing shards there; wait for it to end") from problem
        except OSError:
            pass  # a file system without locks: the guard is lost, nothing else

    def release(self) -> None:
        self._path.unlink(missing_ok=True)
        self._file.close()
