"""The roll call: each rank says again and again that it lives and what it does; rank 0 hears who has fallen silent.

All of it goes through the store of the meeting, a few hundred small values a second at any number of ranks.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass

from torch.distributed import Store

from engine.errors import EXIT_LOST_RANK
from engine.meeting import Meeting

BEATS_A_SECOND = 256
"""What the store is asked to take in all."""
VERDICT, TROUBLE = "verdict", "trouble"


@dataclass
class Doing:
    """What the training thread is at; it writes, other threads read."""

    step: int = 0
    """steps done"""
    phase: str = "starting"
    moves: int = 0
    """phases begun so far"""
    own_seconds: float = 0.0
    """a step's time without what was waited for others, as of the last record"""

    def __str__(self) -> str:
        return f"{self.phase}, after step {self.step}"


@dataclass(frozen=True)
class Beat:
    """A sign of life."""

    number: int
    step: int
    phase: str
    own_seconds: float
    left: str = ""
    """why the rank leaves, when it does so on its own account"""
    exit_code: int = 0


Heard = dict[int, tuple[Beat, float]]
"""of each rank its last beat, and the seconds since it came"""


@dataclass(frozen=True)
class Verdict:
    """Why a launch ends, and with which exit code."""

    text: str
    exit_code: int = EXIT_LOST_RANK


class Roll:
    """One rank's end of the roll call. Every method may wait for the store, and raises its errors."""

    def __init__(self, meeting: Meeting, timeout_seconds: float) -> None:
        self._ranks = meeting.ranks
        self._store: Store = meeting.another_client(timeout_seconds)
        self._heard: dict[int, tuple[Beat, float]] = {}

    def say(self, beat: Beat) -> None:
        self._store.set(f"beat/{self._ranks.rank}", json.dumps(asdict(beat)))

    def listen(self) -> Heard:
        """Waits until every rank has spoken once."""
        now = time.monotonic()
        for rank, content in enumerate(
            self._store.multi_get([f"beat/{rank}" for rank in range(self._ranks.world_size)])
        ):
            beat = Beat(**json.loads(content))
            before = self._heard.get(rank)
            if before is None or before[0].number != beat.number:
                self._heard[rank] = beat, now
        return {rank: (beat, now - since) for rank, (beat, since) in self._heard.items()}

    def judge(self, verdict: Verdict) -> None:
        """The first that is given counts."""
        self._store.compare_set(VERDICT, "", json.dumps(asdict(verdict)))

    def verdict(self) -> Verdict | None:
        return Verdict(**json.loads(self._store.get(VERDICT))) if self._store.check([VERDICT]) else None

    def report_trouble(self) -> None:
        """This rank has lost its connection to others."""
        self._store.set(TROUBLE, "1")

    def in_trouble(self) -> bool:
        return bool(self._store.check([TROUBLE]))


def interval_seconds(world_size: int, timeout_seconds: float) -> float:
    """Between two beats of a rank."""
    return max(min(1.0, timeout_seconds / 20.0), world_size / BEATS_A_SECOND)
