"""Ask the teacher once: keep its targets for every sample of the data, to train students from.

    deepspeed [--num_gpus N | --hostfile F] launch/cache_teacher.py --config run.yaml [--shards 0-31]
        [--codec sampled] [key.path=value ...]
    python launch/cache_teacher.py --config run.yaml

teacher.model and teacher.cache of the YAML say whose targets go where, its cache section what is kept. Each rank is a
job of its own, and any number of jobs on hosts that share the folder divide the shards among them. Killed, a job is
simply run again: it loses at most the shard in hand. Exit codes: 0 when this job found nothing left to do or was
stopped by a signal, 2 an error that you can act on, 130 interrupted, 1 a fault.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.log import Progress, run_main, setup
from engine.rendezvous import launched_local_rank, launched_rank

if TYPE_CHECKING:
    from engine.capture import Capture, Standing

LOOK_SECONDS = 2.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="the run YAML")
    parser.add_argument("--shards", help="numbers of shards, as 0-31 or 3,7,12 (default: all)")
    parser.add_argument("--codec", help="short for cache.codec.kind=...")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # what DeepSpeed's launcher adds
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that replace the YAML's")
    return parser.parse_intermixed_args()


def parse_shards(text: str | None, num_shards: int) -> list[int]:
    """``0-31`` or ``3,7,12`` as numbers. Raises ConfigError."""
    if text is None:
        return list(range(num_shards))
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError(f"--shards {text}: expected numbers such as 0-31 or 3,7,12")
        numbers |= set(range(int(first), int(last or first) + 1))
    if not numbers or max(numbers) >= num_shards:
        raise ConfigError(f"--shards {text}: the data has shards 0 to {num_shards - 1}")
    return sorted(numbers)


def main() -> int:
    arguments = parse_arguments()
    rank = launched_rank()
    setup(rank)
    import torch

    from engine.capture import Capture
    from engine.config.load import load_config
    from engine.dist import StopSignal

    overrides = ([f"cache.codec.kind={arguments.codec}"] if arguments.codec else []) + arguments.overrides
    config = load_config(arguments.config, overrides)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", launched_local_rank())
        torch.cuda.set_device(device)
    with StopSignal() as stop:
        capture = Capture(config, device)
        wanted = parse_shards(arguments.shards, len(capture.shards.manifest.shards))
        first = capture.standing()
        with Progress(first.num_shards, "shards", rank == 0, first.num_done) as progress:
            capture.run(wanted, stop, Display(progress))
    for line in _summary(capture, stop.received):
        logging.getLogger("stillhouse").info("%s", line)
    return 0


class Display:
    """Looks how far the cache is, at most every few seconds."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._next = progress, 0.0

    def __call__(self, look: Callable[[], Standing]) -> None:
        if self._progress.enabled and time.monotonic() >= self._next:
            now = look()
            self._progress.update(now.num_done, _fields(now))
            self._next = time.monotonic() + LOOK_SECONDS


def _fields(now: Standing) -> dict[str, str]:
    left = now.num_shards - now.num_done - now.num_claimed
    fields = {"claimed": f"{now.num_claimed}", "left": f"{max(0, left)}", "tok/s": f"{now.tokens_a_second:,.0f}"}
    fields["B/position"] = f"{now.bytes_a_position:.1f}"
    if now.tokens_a_second:
        fields["ready in"] = _duration(now.tokens_left / now.tokens_a_second / max(1, now.num_claimed))
    return fields


def _summary(capture: Capture, stopped_by: str | None) -> list[str]:
    now, address = capture.standing(), capture.folder.path
    if now.num_done == now.num_shards:
        return [f"complete: {now.num_shards:,} shards, {capture.folder.num_bytes() / 1e6:,.1f} MB in {address}"]
    lines = [f"{address}: {now.num_done:,} of {now.num_shards:,} shards done; run the same command again for the rest"]
    if stopped_by:
        lines.insert(0, f"{stopped_by} was received: the shard in hand is given up")
    return [*lines, *capture.folder.claims()]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02} h" if minutes >= 60 else f"{max(1, minutes)} min"


if __name__ == "__main__":
    run_main(main)
