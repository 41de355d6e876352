"""Check a cache of a teacher's targets: every byte and record, and that it belongs to the data and the task of a run.

    python data_tools/verify_cache.py --config run.yaml [--quick] [--against-teacher N] [key.path=value ...]

teacher.cache of the YAML names the cache, data.manifest the data. Prints each problem found, and exits with 1 if there
was any. --quick looks at the presence, size, header and index of every sidecar, and at its first and last record.
--against-teacher asks teacher.model about N samples anew and tells how far the cache is from it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import torch

from data_tools.cache_against_teacher import compare_with_teacher
from data_tools.cache_checks import CacheCheck
from data_tools.problems import conclude
from data_tools.processes import process_pool
from data_tools.sidecar_checks import SidecarReport, check_sidecar
from engine.config.load import load_config
from engine.errors import CacheError
from engine.log import Progress, run_main


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    config = load_config(options.config, options.overrides)
    try:
        check = CacheCheck(config)
    except CacheError as problem:
        print(problem)
        print(f"{config.teacher.cache}: nothing could be checked: 1 problem")
        return 1
    num_shards = len(check.shards.manifest.shards)
    problems, num_records, num_positions = list(check.problems), 0, 0
    with Progress(total=num_shards, label="shards") as progress:
        for done, report in enumerate(_reports(check, options), 1):
            problems += report.problems
            num_records += report.num_records
            num_positions += report.num_positions
            progress.update(done)
    if options.against_teacher:
        lines, more = compare_with_teacher(config, check, options.against_teacher)
        print("\n".join(lines))
        problems += more
    problems = list(dict.fromkeys(problems))  # the teacher is asked about records that may have been read before
    checked = "sizes, headers, indexes and two records of each" if options.quick else "every byte and record"
    records = f"{num_records:,} records with targets at {num_positions:,} positions"
    return conclude(problems, f"{check.folder.address}: {num_shards} shards, {records}", checked)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run YAML")
    parser.add_argument("--quick", action="store_true", help="sizes, headers, indexes, and two records of each sidecar")
    parser.add_argument("--against-teacher", type=int, default=0, metavar="N", help="ask the teacher about N samples")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the YAML's")
    return parser.parse_intermixed_args(argv)


def _reports(check: CacheCheck, options: argparse.Namespace) -> Iterator[SidecarReport]:
    numbers = range(len(check.shards.manifest.shards))
    workers = min(options.workers, len(numbers))
    if workers <= 1:
        yield from (check_sidecar(check, number, quick=options.quick) for number in numbers)
        return
    with process_pool(workers, _open_in_process, options.config, options.overrides) as pool:
        try:
            yield from pool.map(partial(_check_in_process, quick=options.quick), numbers)
        except BrokenProcessPool as problem:
            raise CacheError("a process died, perhaps for want of memory; try fewer --workers") from problem


_check: CacheCheck


def _open_in_process(config: str, overrides: Sequence[str]) -> None:
    global _check
    torch.set_num_threads(1)
    _check = CacheCheck(load_config(config, overrides))


def _check_in_process(number: int, quick: bool) -> SidecarReport:
    return check_sidecar(_check, number, quick=quick)


if __name__ == "__main__":
    run_main(main)
