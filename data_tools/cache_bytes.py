"""Where the bytes of a cache go. The parts add up to all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from data_tools.cache_records import RecordReader
from engine.cache.folder import HEAD, MANIFEST, RANKS, CacheFolder
from engine.cache.identity import IDENTITY
from engine.cache.sidecar import Sidecar
from engine.data.address import beside, read_bytes
from engine.errors import MissingError

SURVEYED_RECORDS = 2000
INSIDE = {"ids": "ids", "values": "values", "states": "states", "header": "headers of records"}
"""The parts that codecs tell of, by the names they are shown under."""


def split_bytes(folder: CacheFolder, sidecars: Sequence[Sidecar], reader: RecordReader) -> dict[str, int]:
    """Bytes by what they are for. What lies inside the records is estimated from some, when there are many."""
    split = _inside_records(sidecars, reader)
    split["index and hashes"] = sum(sidecar.index.nbytes for sidecar in sidecars)
    around = sum(s.num_bytes - s.index.nbytes - s.header.record_bytes for s in sidecars)
    split["headers, padding of sidecars"] = around
    for name in (RANKS, HEAD, IDENTITY, MANIFEST):
        try:
            split[name] = len(read_bytes(beside(folder.address, name)))
        except MissingError:
            continue  # no head where no states are kept, no manifest before the cache is complete
    return split


def survey_stride(sidecars: Sequence[Sidecar]) -> int:
    """One record in so many is looked into."""
    return max(1, sum(sidecar.header.num_records for sidecar in sidecars) // SURVEYED_RECORDS)


def _inside_records(sidecars: Sequence[Sidecar], reader: RecordReader) -> dict[str, int]:
    total = sum(sidecar.header.record_bytes for sidecar in sidecars)
    stride = survey_stride(sidecars)
    found: Counter[str] = Counter()
    first = 0
    for sidecar in sidecars:
        for number in range(-first % stride, sidecar.header.num_records, stride):
            found.update(reader.parts(sidecar, number))
        first += sidecar.header.num_records
    surveyed = found.total()
    names = [name for name in INSIDE if name in found]
    split, done, given = {}, 0, 0
    for name in names:  # what is rounded off one part goes to the next, so that the sum stays
        done += found[name]
        split[INSIDE[name]] = round(total * done / surveyed) - given
        given += split[INSIDE[name]]
    return split
