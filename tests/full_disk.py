"""A disk that is really full: a tmpfs of a few MB, mounted for a test. Needs root; tests skip where it is refused."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path]:
    """``folder`` as a file system of its own, of ``num_bytes``."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes},nr_inodes=10k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, timeout=10)
    except OSError as problem:
        pytest.skip(f"no small disk can be mounted here: {problem}")
    if done.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


def fill(disk: Path, leave_bytes: int = 0) -> Path:
    """Take all room but ``leave_bytes``. Returns the file to remove."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 65536):
                pass
        except OSError:
            pass
        file.truncate(max(0, file.tell() - leave_bytes))
    return filler
