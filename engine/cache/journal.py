"""Answers to single samples, kept until their shards are whole: what a training run asked its teacher live.

A journal is a file of one process: for each record a line of JSON, then the record's bytes. A process that is killed
leaves a last record that is cut short and is not read. When all records of a shard are in the journals, they become
its sidecar.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from engine.cache.folder import CacheFolder
from engine.cache.sidecar import Record, Sums
from engine.cache.sidecar_writer import SidecarWriter
from engine.data.atomic import files_below
from engine.data.manifest import Manifest

log = logging.getLogger("stillhouse")

JOURNAL = "journal"
_FOLDED = (FileNotFoundError, ValueError, KeyError)
"""What reading raises of a journal that is gone, or was begun anew under its name."""


class Place(NamedTuple):
    """Where a record of a sample is."""

    path: Path
    start: int
    num_bytes: int


class Entry(NamedTuple):
    record: Record
    sums: Sums


class Journal:
    """The records that were kept before, and a file for those of this process."""

    def __init__(
        self, folder: CacheFolder, data: Manifest, places: Mapping[tuple[str, int], Place] | None = None
    ) -> None:
        """``places`` are what ``records_kept`` found, for all ranks together."""
        self._folder = folder.path / JOURNAL
        self._own = self._folder / f"{secrets.token_hex(8)}.journal"
        self._places = dict(records_kept(folder, data) if places is None else places)
        self._sha256 = {entry.name: entry.sha256 for entry in data.shards}
        self._writes = True

    def find(self, shard: str, number: int) -> Record | None:
        """Record ``number`` of a shard, if some run asked for it."""
        place = self._places.get((shard, number))
        try:
            return None if place is None else _read(place, shard, number).record
        except _FOLDED:
            return None

    def add(self, shard: str, number: int, record: Record, sums: Sums) -> None:
        """Keep a record; on disk when this returns, but for a power cut.

        A disk that refuses is told of once: the answer is good for training all the same.
        """
        if not self._writes:
            return
        header = {
            "shard": shard,
            "sha256": self._sha256[shard],
            "number": number,
            "num_bytes": len(record.content),
            "crc32": zlib.crc32(record.content),
            "record": record[1:],
            "sums": sums,
        }
        line = json.dumps(header).encode() + b"\n"
        start = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._own.open("ab", buffering=0) as stream:
                start = stream.tell()
                if stream.write(line + record.content) < len(line) + len(record.content):
                    raise OSError("no space is left")
        except OSError as problem:
            self._writes = False
            with contextlib.suppress(OSError):
                os.truncate(self._own, start)
            log.warning("%s: answers are not kept any more (%s)", self._own, problem.strerror or problem)
            return
        self._places[shard, number] = Place(self._own, start, len(line) + len(record.content))


def records_kept(folder: CacheFolder, data: Manifest) -> dict[tuple[str, int], Place]:
    """By shard and number, what all journals hold. With as many journals as ranks, one rank should look for all."""
    sha256 = {entry.name: entry.sha256 for entry in data.shards}
    places: dict[tuple[str, int], Place] = {}
    for path in sorted(files_below(folder.path / JOURNAL, ".journal")):
        for shard, number, place in _scan(path, sha256):
            places.setdefault((shard, number), place)
    return places


def fold(folder: CacheFolder, data: Manifest) -> None:
    """Make the sidecars of shards whose records are all in journals, and the manifest when none is missing then.

    Journals whose shards all have sidecars are deleted; a run that still writes to one loses answers, no more.
    """
    journals = sorted(files_below(folder.path / JOURNAL, ".journal"))
    found: dict[str, dict[int, Place]] = defaultdict(dict)
    sha256 = {entry.name: entry.sha256 for entry in data.shards}
    for path in journals:
        for shard, number, place in _scan(path, sha256):
            found[shard].setdefault(number, place)
    for entry in data.shards:
        num_records = entry.num_samples * folder.identity.num_rounds
        places = found.get(entry.name, {})
        if len(places) == num_records and not folder.path_of(entry).exists():
            with SidecarWriter(folder.path_of(entry), num_records) as writer:
                try:
                    for number in range(num_records):
                        writer.add(*_read(places[number], entry.name, number))
                except _FOLDED:  # by another process, just now
                    continue
                writer.finish(folder.identity.sha256, entry.name, entry.sha256, folder.identity.num_rounds)
    missing = {entry.name for entry in folder.missing(data)}
    for path in journals:
        if not any(shard in missing for shard, _, _ in _scan(path, sha256)):
            path.unlink(missing_ok=True)
    if not missing:
        folder.write_manifest(data)
        with contextlib.suppress(OSError):  # gone, or a run still writes to it
            (folder.path / JOURNAL).rmdir()


def _scan(path: Path, sha256: Mapping[str, str]) -> Iterator[tuple[str, int, Place]]:
    """Shard, number and place of each whole record of the shards as they are now."""
    try:
        stream = path.open("rb")
    except FileNotFoundError:  # another process has just folded it
        return
    with stream:
        while line := stream.readline():
            start = stream.tell() - len(line)
            try:
                header = json.loads(line)
                content = stream.read(header["num_bytes"])
            except (ValueError, KeyError, TypeError):
                return
            if len(content) != header["num_bytes"] or zlib.crc32(content) != header["crc32"]:
                return
            if sha256.get(header["shard"]) == header["sha256"]:
                yield header["shard"], header["number"], Place(path, start, len(line) + len(content))


def _read(place: Place, shard: str, number: int) -> Entry:
    """Raises KeyError when another record lies there now."""
    with place.path.open("rb") as stream:
        stream.seek(place.start)
        line, content = stream.read(place.num_bytes).split(b"\n", 1)
    header = json.loads(line)
    if (header["shard"], header["number"]) != (shard, number):
        raise KeyError(shard, number)
    return Entry(Record(content, *header["record"]), Sums(*header["sums"]))
