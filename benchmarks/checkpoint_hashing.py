"""What the sha256 of a checkpoint's files costs, while they are written and before they are read.

python benchmarks/checkpoint_hashing.py [--gigabytes 1] [--folder DIR] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.digests import sha256_of, write_hashed

REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    weights = torch.randn(int(options.gigabytes * 1e9 / 4))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder, "file.pt")
        plain = _seconds(lambda: _write_plain(weights, path))
        hashed = _seconds(lambda: write_hashed(path, lambda file: torch.save(weights, file)))
        read = _seconds(lambda: path.read_bytes())
        digest = _seconds(lambda: sha256_of(path))
    figures = {
        "gigabytes": options.gigabytes,
        "write_seconds_per_gigabyte": plain / options.gigabytes,
        "write_and_hash_seconds_per_gigabyte": hashed / options.gigabytes,
        "read_seconds_per_gigabyte": read / options.gigabytes,
        "read_and_hash_seconds_per_gigabyte": digest / options.gigabytes,
    }
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<40} {value:8.2f}")
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n")


def _write_plain(weights: torch.Tensor, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(weights, file)
        file.flush()
        os.fsync(file.fileno())


def _seconds(work: Callable[[], object]) -> float:
    """The median of a few."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    main()
