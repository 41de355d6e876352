"""Files that are there whole or not at all, whatever dies while they are written."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, fsync, rename."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    move_into_place(temporary, path)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a file already synced, and make the new name itself survive a power cut."""
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
