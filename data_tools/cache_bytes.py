"""Where the bytes of a cache go. The parts add up to all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from data_tools.cache_records import RecordReader
from engine.cache.folder import HEAD, RANKS, CacheFolder
from engine.cache.identity import IDENTITY
from engine.cache.manifest import MANIFEST
from engine.cache.sidecar import INDEX_DTYPE, SidecarHeader
from engine.data.address import beside, read_bytes
from engine.errors import MissingError

SURVEYED_RECORDS = 2000
INSIDE = {"ids": "ids", "values": "values", "states": "states", "header": "headers of records"}
"""The parts that codecs tell of, by the names they are shown under."""


class SidecarFacts(NamedTuple):
    """Of a sidecar that is not kept open: a cache may have more of them than a process may have files."""

    name: str
    num_bytes: int
    header: SidecarHeader

    @property
    def index_bytes(self) -> int:
        return self.header.num_records * INDEX_DTYPE.itemsize


def split_bytes(folder: CacheFolder, sidecars: Sequence[SidecarFacts], reader: RecordReader) -> dict[str, int]:
    """Bytes by what they are for. What lies inside the records is estimated from some, when there are many."""
    split = _inside_records(folder, sidecars, reader)
    split["index and hashes"] = sum(sidecar.index_bytes for sidecar in sidecars)
    around = sum(s.num_bytes - s.index_bytes - s.header.record_bytes for s in sidecars)
    split["headers, padding of sidecars"] = around
    for name in (RANKS, HEAD, IDENTITY, MANIFEST):
        try:
            split[name] = len(read_bytes(beside(folder.address, name)))
        except MissingError:
            continue  # no head where no states are kept, no manifest before the cache is complete
    return split


def survey_stride(sidecars: Sequence[SidecarFacts]) -> int:
    """One record in so many is looked into."""
    return max(1, sum(sidecar.header.num_records for sidecar in sidecars) // SURVEYED_RECORDS)


def _inside_records(folder: CacheFolder, sidecars: Sequence[SidecarFacts], reader: RecordReader) -> dict[str, int]:
    total = sum(sidecar.header.record_bytes for sidecar in sidecars)
    stride = survey_stride(sidecars)
    found: Counter[str] = Counter()
    first = 0
    for facts in sidecars:
        if numbers := range(-first % stride, facts.header.num_records, stride):
            sidecar = folder.sidecar_called(facts.name)
            for number in numbers:
                found.update(reader.parts(sidecar, number))
        first += facts.header.num_records
    surveyed = found.total()
    names = [name for name in INSIDE if name in found]
    split, done, given = {}, 0, 0
    for name in names:  # what is rounded off one part goes to the next, so that the sum stays
        done += found[name]
        split[INSIDE[name]] = round(total * done / surveyed) - given
        given += split[INSIDE[name]]
    return split
