"""Where the teacher's weights lie: host memory of a rank at its peak, seconds of the teacher a step, and the losses.

Runs the same few steps of a run with each placement, on ranks of this host, and looks at the kernel's count of each
rank's memory: anonymous (its own) and mapped from files (weights not yet read into memory of its own, shared by the
ranks of a host). Compared with the replicated teacher, losses must be equal to 1e-6 in fp32.

    python benchmarks/teacher_placement.py --config run.yaml --world-size 2 [key.path=value ...]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from measuring import ROOT, leave_nothing_behind, print_table, write_json

WAYS = {
    "replicated": [],
    "replicated, offload": ["teacher.offload=cpu"],
    "zero3": ["teacher.placement=zero3"],
    "zero3, offload": ["teacher.placement=zero3", "teacher.offload=cpu"],
    "tensor_parallel": ["teacher.placement=tensor_parallel", "teacher.tp_size=WORLD"],
}
LOOK_SECONDS = 0.01


def main() -> None:
    arguments = parse_arguments()
    leave_nothing_behind()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (way, overrides) in enumerate(WAYS.items()):
            if arguments.ways and way not in arguments.ways:
                continue
            words = [word.replace("WORLD", str(arguments.world_size)) for word in overrides]
            words += [f"run.output={folder}", f"run.name=way{number}", f"run.num_steps={arguments.steps}"]
            peaks = run(arguments, [*words, "tracking.every_steps=1", *arguments.overrides])
            lines = (Path(folder) / f"way{number}" / "metrics.jsonl").read_text().splitlines()
            records = [record for record in map(json.loads, lines) if "loss/objective" in record]
            figures[way] = {
                "peak_bytes": peaks,
                "losses": [record["loss/objective"] for record in records],
                "teacher_seconds": min(record["seconds/teacher"] for record in records),
            }
    first = next(iter(figures.values()))["losses"]
    rows = []
    for way, found in figures.items():
        own, mapped = (max(peak[kind] for peak in found["peak_bytes"]) / 1e6 for kind in ("RssAnon", "RssFile"))
        off = max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(found["losses"], first))
        rows.append([way, f"{own:,.0f}", f"{mapped:,.0f}", f"{found['teacher_seconds']:.3f}", f"{off:.1e}"])
    print_table(["placement", "own MB, peak", "mapped MB", "teacher s/step", "loss off by"], rows)
    write_json(arguments.output, {"world_size": arguments.world_size, "ways": figures})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a run with an online teacher")
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS))
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the YAML's")
    return parser.parse_intermixed_args()


def run(arguments: argparse.Namespace, overrides: list[str]) -> list[dict[str, int]]:
    """Bytes at the peak of each rank, by kind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "launch" / "distill.py"), "--config", arguments.config, *overrides]
    ranks = []
    for rank in range(arguments.world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": arguments.world_size, "MASTER_PORT": port}
        environment = os.environ | {key: str(value) for key, value in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
    peaks = [{"RssAnon": 0, "RssFile": 0} for _ in ranks]
    try:
        while any(rank.poll() is None for rank in ranks):
            for rank, peak in zip(ranks, peaks):
                with suppress(OSError):
                    look(rank.pid, peak)
            time.sleep(LOOK_SECONDS)
    finally:
        for rank in ranks:
            rank.kill()
    if codes := [rank.returncode for rank in ranks if rank.returncode]:
        raise SystemExit(f"{' '.join(command)} ended with {codes}")
    return peaks


def look(pid: int, peak: dict[str, int]) -> None:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in peak:
            peak[name] = max(peak[name], int(value.split()[0]) * 1024)


if __name__ == "__main__":
    main()
