"""Files of one JSON object a line that a kill or a full disk leaves readable."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError
from engine.log import logger

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """The records of the file, in order; none when there is no file. Lines torn by a kill are left out."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    *lines, _ = content.split(b"\n")
    return [record for record in map(_parse, lines) if record is not None]


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def metrics_record(step: int, metrics: Mapping[str, float]) -> Record:
    """A record that is valid JSON: NaN and infinities become null and are named under ``nonfinite``."""
    values = {name: float(value) for name, value in metrics.items()}
    nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
    record: Record = {"step": step, **{name: None if name in nonfinite else value for name, value in values.items()}}
    if nonfinite:
        record["nonfinite"] = nonfinite
    return record


class RecordFile:
    """Appends records, each with one write. While the disk refuses, records are kept and written with the next one."""

    def __init__(self, path: Path, keep: Callable[[Record], bool] = lambda record: True) -> None:
        """Open ``path`` as a new file of that name, without torn lines and records that ``keep`` refuses.

        Whoever still has the old file open, a launch that this one replaces, writes to nowhere.
        Raises CheckpointError when the file cannot be read or written.
        """
        self.path = path
        self._unwritten = b""
        self._warned = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._drop(keep)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            self._size_bytes = os.fstat(self._file).st_size
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror}; make the run folder writable") from error

    def append(self, record: Record) -> None:
        self._unwritten += json.dumps(record, allow_nan=False).encode() + b"\n"
        self._write()

    def close(self) -> None:
        if self._unwritten:
            self._write()
        os.close(self._file)
        if self._unwritten:
            num_lost = self._unwritten.count(b"\n")
            logger.error("%s: the last %d records could not be written; free space on its disk", self.path, num_lost)

    def _drop(self, keep: Callable[[Record], bool]) -> None:
        kept = [record for record in read_records(self.path) if keep(record)]
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def _write(self) -> None:
        try:
            written = os.write(self._file, self._unwritten)
            if written < len(self._unwritten):
                os.ftruncate(self._file, self._size_bytes)  # a full disk takes half a line
                raise OSError(errno.ENOSPC, "no space left on the disk")
        except OSError as error:
            if not self._warned:
                logger.warning("%s: %s; training goes on and the records are kept", self.path, error.strerror)
            self._warned = True
            return
        self._size_bytes += written
        self._unwritten = b""
        self._warned = False
