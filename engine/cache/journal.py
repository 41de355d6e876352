"""Answers to single samples, kept until their shards are whole: what a training run asked its teacher live.

A journal is a file of one process: for each record a line of JSON, then the record's bytes. A process that is killed
leaves a last record that is cut short and is not read. When all records of a shard are in the journals, they become
its sidecar.
"""

from __future__ import annotations

import json
import secrets
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from engine.cache.folder import CacheFolder
from engine.cache.sidecar import Record, SidecarWriter, Sums
from engine.data.manifest import Manifest

JOURNAL = "journal"


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

    def __init__(self, folder: CacheFolder) -> None:
        self._folder = folder.path / JOURNAL
        self._own = self._folder / f"{secrets.token_hex(8)}.journal"
        self._places: dict[tuple[str, int], Place] = {}
        for path in sorted(self._folder.glob("*.journal")):
            for shard, number, place in _scan(path):
                self._places.setdefault((shard, number), place)

    def find(self, shard: str, number: int) -> Record | None:
        """Record ``number`` of a shard, if some run asked for it."""
        place = self._places.get((shard, number))
        try:
            return None if place is None else _read(place).record
        except FileNotFoundError:  # its shards have become sidecars meanwhile
            return None

    def add(self, shard: str, number: int, record: Record, sums: Sums) -> None:
        """Keep a record; on disk when this returns, but for a power cut."""
        header = {
            "shard": shard,
            "number": number,
            "num_bytes": len(record.content),
            "crc32": zlib.crc32(record.content),
            "record": record[1:],
            "sums": sums,
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._own.open("ab") as stream:
            start = stream.tell()
            line = json.dumps(header).encode() + b"\n"
            stream.write(line + record.content)
        self._places[shard, number] = Place(self._own, start, len(line) + len(record.content))


def fold(folder: CacheFolder, data: Manifest) -> None:
    """Make the sidecars of shards whose records are all in journals, and the manifest when none is missing then.

    Journals whose shards all have sidecars are deleted; a run that still writes to one loses answers, no more.
    """
    journals = sorted((folder.path / JOURNAL).glob("*.journal"))
    found: dict[str, dict[int, Place]] = defaultdict(dict)
    for path in journals:
        for shard, number, place in _scan(path):
            found[shard].setdefault(number, place)
    for entry in data.shards:
        num_records = entry.num_samples * folder.identity.num_rounds
        places = found.get(entry.name, {})
        if len(places) == num_records and not folder.path_of(entry).exists():
            with SidecarWriter(folder.path_of(entry), num_records) as writer:
                for number in range(num_records):
                    writer.add(*_read(places[number]))
                writer.finish(folder.identity.sha256, entry.name, entry.sha256, folder.identity.num_rounds)
    missing = {entry.name for entry in folder.missing(data)}
    for path in journals:
        if not any(shard in missing for shard, _, _ in _scan(path)):
            path.unlink(missing_ok=True)
    if not missing:
        folder.write_manifest(data)
        if (folder.path / JOURNAL).is_dir() and not any((folder.path / JOURNAL).iterdir()):
            (folder.path / JOURNAL).rmdir()


def _scan(path: Path) -> Iterator[tuple[str, int, Place]]:
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
            yield header["shard"], header["number"], Place(path, start, len(line) + len(content))


def _read(place: Place) -> Entry:
    with place.path.open("rb") as stream:
        stream.seek(place.start)
        line, content = stream.read(place.num_bytes).split(b"\n", 1)
    header = json.loads(line)
    return Entry(Record(content, *header["record"]), Sums(*header["sums"]))
