"""Which launch of a run may write into its folder: the newest.

    runs/<name>/incarnations/000007.json    one file a launch, made by whoever comes first to that number

A host that was cut off does not know that the run goes on elsewhere, and a launcher killed with SIGKILL leaves its
ranks behind. So every launch takes the next number. One that finds a higher number has been replaced: it completes no
checkpoint, removes none, and leaves. What it may still have written in between does not count: the file of each launch
says after which step it took over, and later steps of earlier launches are no part of the run's history.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.atomic import create_once, write_atomically
from engine.errors import CheckpointError, ReplacedError

FOLDER = "incarnations"


@dataclass(frozen=True)
class Incarnation:
    """One launch of the run in ``run_folder``."""

    run_folder: Path
    number: int

    @staticmethod
    def take(run_folder: Path, after: int = 0) -> Incarnation:
        """The next number, higher than ``after``: from now on every earlier launch is replaced. For rank 0."""
        folder = run_folder / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        number = max(after, last_number(run_folder)) + 1
        who = {"host": socket.gethostname(), "unix_seconds": round(time.time(), 3)}
        who |= {"slurm_job": os.environ["SLURM_JOB_ID"]} if "SLURM_JOB_ID" in os.environ else {}
        while not create_once(_path(run_folder, number), json.dumps(who).encode()):
            number += 1
        return Incarnation(run_folder, number)

    def took_over_after(self, step: int) -> None:
        """Say after which step this launch goes on; what earlier ones did later is void. For rank 0, once it has
        loaded all that it goes on from: a launch that fails before voids nothing."""
        path = _path(self.run_folder, self.number)
        write_atomically(path, json.dumps(json.loads(path.read_text()) | {"resumed_step": step}).encode())

    def check(self) -> None:
        """Raises ReplacedError when a later launch has taken over, CheckpointError when the folder does not answer."""
        if self.number == 0:  # a store that belongs to no run
            return
        later = _path(self.run_folder, self.number + 1)
        try:
            content = later.read_text()
        except FileNotFoundError:
            return
        except OSError as problem:
            raise CheckpointError(f"{later}: cannot be looked for ({problem})") from problem
        try:
            who = json.loads(content)
        except ValueError:
            who = {}
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(who.get("unix_seconds", time.time())))
        raise ReplacedError(
            f"{self.run_folder}: this launch (number {self.number}) has been replaced by another, number "
            f"{self.number + 1}, started on {who.get('host', 'another host')} at {since}; this one leaves"
        )


def last_number(run_folder: Path) -> int:
    """Of the newest launch; 0 when there was none."""
    return max((int(path.stem) for path in (run_folder / FOLDER).glob("*.json")), default=0)


class History:
    """What the launches of a run did that still counts."""

    def __init__(self, run_folder: Path) -> None:
        self._resumed_steps: dict[int, int] = {}
        for path in (run_folder / FOLDER).glob("*.json"):
            content = _read(path)
            if "resumed_step" in content:
                self._resumed_steps[int(path.stem)] = content["resumed_step"]

    def holds(self, step: int, number: int) -> bool:
        """Whether ``step`` as launch ``number`` did it was not done again by a later one."""
        return all(step <= resumed for later, resumed in self._resumed_steps.items() if later > number)


def _path(run_folder: Path, number: int) -> Path:
    return run_folder / FOLDER / f"{number:06d}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{path}: cannot be read ({problem})") from problem
