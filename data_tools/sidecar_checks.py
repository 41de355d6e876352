"""What can be wrong with one sidecar: each problem is a line, and nothing is raised for damage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from data_tools.cache_checks import AGAIN, CacheCheck
from data_tools.cache_records import States
from engine.cache.folder import sidecar_name
from engine.cache.manifest import MANIFEST
from engine.cache.recording import NOTHING, hashes_and_lengths
from engine.cache.sidecar import REMEDY, Record, Sidecar, Sums
from engine.data.address import beside
from engine.errors import DataError, MissingError, StillhouseError
from engine.schema import Sample


class SidecarReport(NamedTuple):
    """What is wrong with one sidecar, and how much of it was looked at."""

    problems: list[str]
    num_records: int = 0
    num_positions: int = 0


def check_sidecar(check: CacheCheck, shard: int, *, quick: bool) -> SidecarReport:
    """The sidecar of data shard number ``shard``; ``quick`` looks at two records and at no hash of the whole file."""
    entry = check.shards.manifest.shards[shard]
    name = sidecar_name(entry.name)
    try:
        sidecar = check.folder.sidecar(entry)
    except MissingError:
        address = beside(check.folder.address, name)
        return SidecarReport([f"{address}: missing: no targets for the data shard {entry.name}; {AGAIN}"])
    except StillhouseError as problem:
        return SidecarReport([str(problem)])
    problems = [*_of_manifest(check, name, sidecar, quick), *_of_index(sidecar)]
    every = range(sidecar.header.num_records)
    wanted = sorted({*every[:1], *every[-1:]}) if quick else every
    totals, num_compared = Sums(0, 0, 0, 0.0), 0
    for number in wanted:
        found = _check_record(check, shard, sidecar, number)
        if isinstance(found, str):
            problems.append(found)
        else:
            totals = Sums(*np.add(totals, found).astype(int).tolist())
            num_compared += 1
    if num_compared == len(every):
        problems += _of_totals(sidecar, totals)
    return SidecarReport(problems, len(wanted), totals.num_positions)


def _of_manifest(check: CacheCheck, name: str, sidecar: Sidecar, quick: bool) -> Iterator[str]:
    entry = (check.entries or {}).get(name)
    if entry is None:
        return
    remedy = f"{MANIFEST} or this file was changed: copy both again, or delete both and {AGAIN}"
    if entry.num_bytes != sidecar.num_bytes:
        yield f"{sidecar.address}: {sidecar.num_bytes:,} bytes, expected {entry.num_bytes:,} by {MANIFEST}; {remedy}"
    header = asdict(sidecar.header)
    for key in header.keys() | entry.header.keys():
        if header.get(key) != (expected := entry.header.get(key)):
            yield f"{sidecar.address}: its header says {key} {header.get(key)}, {MANIFEST} {expected}; {remedy}"
    if not quick and sidecar.sha256() != entry.sha256:
        yield f"{sidecar.address}: its sha256 is not that of {MANIFEST}; {remedy}"


def _of_index(sidecar: Sidecar) -> Iterator[str]:
    header, index = sidecar.header, sidecar.index
    for name, found in (
        ("record_bytes", int(index["num_bytes"].sum(dtype=np.int64))),
        ("nll", float(index["nll"].sum(dtype=np.float64))),
        ("entropy", float(index["entropy"].sum(dtype=np.float64))),
    ):
        if found != getattr(header, name):
            yield f"{sidecar.address}: its header says {name} {getattr(header, name)}, its index {found}; {REMEDY}"


def _of_totals(sidecar: Sidecar, totals: Sums) -> Iterator[str]:
    header = sidecar.header
    for name, found in (
        ("num_tokens", totals.num_tokens // header.num_rounds),
        ("num_positions", totals.num_positions),
        ("num_pairs", totals.num_pairs),
    ):
        if found != (said := getattr(header, name)):
            yield f"{sidecar.address}: its header says {name} {said:,}, its records {found:,}; {REMEDY}"


def _check_record(check: CacheCheck, shard: int, sidecar: Sidecar, number: int) -> Sums | str:
    """What the record adds to the header's sums, or what is wrong with it."""
    try:
        record = sidecar.read(number)
    except DataError as problem:
        return str(problem)
    sample_number, turn = divmod(number, sidecar.header.num_rounds)
    try:
        sample = check.shards.read(shard, sample_number)
    except DataError as problem:
        return f"{sidecar.place(number)}: cannot be compared with its sample: {problem}"
    what = f"{sidecar.place(number)}, for {sample.name}, round {turn}"
    if record == NOTHING[0]:
        return f"{what}: is empty: the sample was damaged when the cache was made; {REMEDY}"
    num_positions = None
    if check.is_of_task:
        labelled = check.task.label([sample], [turn])
        (hashed,), (num_positions,) = hashes_and_lengths([sample], labelled)
        if record.input_hash != hashed:
            return f"{what}: is not for the key, ids, documents and masks that the run gives to its models; {REMEDY}"
    return _decode(check, record, sample, num_positions, what)


def _decode(check: CacheCheck, record: Record, sample: Sample, num_positions: int | None, what: str) -> Sums | str:
    """``num_positions`` with a label; None where the run's task is not the cache's."""
    num_tokens = len(sample.token_ids)
    if check.reader is None:
        return f"{what}: cannot be decoded without the files that the cache lacks"
    try:
        decoded = check.reader.decode(record.content)
    except ValueError as problem:
        return f"{what}: does not decode ({problem}); {REMEDY}"
    found = len(decoded.hidden) if isinstance(decoded, States) else decoded.num_positions
    if fault := check.reader.fault(decoded, found if num_positions is None else num_positions, num_tokens):
        return f"{what}: {fault}; {REMEDY}"
    return Sums(num_tokens, found, 0 if isinstance(decoded, States) else len(decoded.ids), 0.0)
