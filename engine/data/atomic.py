"""Files that are there whole or not at all, whatever dies while they are written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        _write_synced(temporary, content)
        move_into_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def move_into_place(temporary: Path, path: Path) -> None:
    """Rename a file already synced, and make the new name itself survive a power cut."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def create_once(path: Path, content: bytes) -> bool:
    """Write ``path`` unless it is there; of several that try, one does. Returns whether it was this one."""
    if path.exists():
        return False
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        _write_synced(temporary, content)
        return link_into_place(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def link_into_place(temporary: Path, path: Path) -> bool:
    """As ``move_into_place``, but a file that is there already stays. Returns whether there was none."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except FileNotFoundError:
        if path.exists():  # another was first, and cleared away what is left of the others' work
            return False
        raise
    except OSError:  # a file system without hard links: what lies between the look and the rename is lost
        if path.exists():
            return False
        os.replace(temporary, path)
    sync_folder(path.parent)
    return True


def files_below(folder: Path, ending: str) -> Iterator[Path]:
    """The files whose names end so, none where there is no folder. Unlike a glob it bears that another job removes a
    folder meanwhile."""
    for inside, _, names in os.walk(folder):
        yield from (Path(inside, name) for name in names if name.endswith(ending))


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make new names in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
