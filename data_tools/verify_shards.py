"""Check every byte, record and number of a set of shards.

    python data_tools/verify_shards.py shards/manifest.json

Prints each problem found, and exits with 1 if there was any. --quick looks at the presence and size of every file, at
the indexes, and at the first and last record of each shard.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from data_tools.problems import conclude
from data_tools.processes import process_pool
from engine.data.shards import ShardSet
from engine.errors import DataError
from engine.log import Progress, run_main


class ShardReport(NamedTuple):
    """What one shard holds, and what is wrong with it."""

    problems: list[str]
    token_counts: np.ndarray
    """[V] int64, of the records read"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check every byte, record and number of a set of shards.")
    parser.add_argument("manifest", help="path or address of manifest.json")
    parser.add_argument("--quick", action="store_true", help="sizes, indexes, and two records of each shard")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("--allow-pipe", action="store_true", help="run the pipe: commands that the manifest names")
    options = parser.parse_args(argv)
    shards = ShardSet.open(options.manifest, allow_pipe=options.allow_pipe)
    num_shards = len(shards.manifest.shards)
    problems = _of_manifest(shards)
    token_counts = np.zeros(shards.manifest.vocab_size, np.int64)
    with Progress(total=num_shards, label="shards") as progress:
        for done, report in enumerate(_reports(shards, options), 1):
            problems += report.problems
            token_counts += report.token_counts
            progress.update(done)
    if not options.quick:
        problems += _of_token_counts(shards, token_counts)
    checked = "sizes, indexes and two records of each" if options.quick else "every byte and record"
    held = f"{shards.manifest.num_samples:,} samples, {shards.manifest.num_tokens:,} tokens"
    return conclude(problems, f"{options.manifest}: {num_shards} shards, {held}", checked)


def verify_shard(shards: ShardSet, number: int, *, quick: bool) -> ShardReport:
    """Check shard ``number`` alone. Raises nothing for damage: it is in the report."""
    entry = shards.manifest.shards[number]
    token_counts = np.zeros(shards.manifest.vocab_size, np.int64)
    problems: list[str] = []
    try:
        shards.check(number)
        address = shards.address_of(entry.name)
        if not quick and shards.sha256(number) != entry.sha256:
            problems.append(f"{address}: its sha256 is not the manifest's")
    except DataError as problem:
        return ShardReport([str(problem)], token_counts)
    keys: Counter[str] = Counter()
    every = range(entry.num_samples)
    for index in sorted({*every[:1], *every[-1:]}) if quick else every:
        try:
            sample = shards.read(number, index)
        except DataError as problem:
            problems.append(str(problem))
            continue
        keys[sample.key] += 1
        np.add.at(token_counts, sample.token_ids, 1)
    problems += [f"{address}: {times} samples have the key {key}" for key, times in keys.items() if times > 1]
    num_tokens = int(token_counts.sum())
    if not quick and not problems and num_tokens != entry.num_tokens:
        problems.append(f"{address}: {num_tokens:,} tokens, expected {entry.num_tokens:,} by the manifest")
    return ShardReport(problems, token_counts)


def _reports(shards: ShardSet, options: argparse.Namespace) -> Iterator[ShardReport]:
    numbers = range(len(shards.manifest.shards))
    workers = min(options.workers, len(numbers))
    if workers <= 1:
        yield from (verify_shard(shards, number, quick=options.quick) for number in numbers)
        return
    with process_pool(workers, _open_in_process, options.manifest, options.allow_pipe, options.quick) as pool:
        try:
            yield from pool.map(_verify_in_process, numbers)
        except BrokenProcessPool as problem:
            raise DataError("a process died, perhaps for want of memory; try fewer --workers") from problem


def _of_manifest(shards: ShardSet) -> list[str]:
    names = Counter(name for entry in shards.manifest.shards for name in (entry.name, entry.index))
    return [f"{shards.address}: names {name} {times} times" for name, times in names.items() if times > 1]


def _of_token_counts(shards: ShardSet, found: np.ndarray) -> list[str]:
    try:
        expected = shards.token_counts()
    except DataError as problem:
        return [str(problem)]
    differing = np.flatnonzero(found != expected)
    if not len(differing):
        return []
    first = int(differing[0])
    return [
        f"{shards.address}: token counts differ for {len(differing):,} ids; id {first} occurs {found[first]:,} times, "
        f"expected {expected[first]:,}"
    ]


_shards: ShardSet
_quick: bool


def _open_in_process(address: str, allow_pipe: bool, quick: bool) -> None:
    global _shards, _quick
    _shards, _quick = ShardSet.open(address, allow_pipe=allow_pipe), quick


def _verify_in_process(number: int) -> ShardReport:
    return verify_shard(_shards, number, quick=_quick)


if __name__ == "__main__":
    run_main(main)
