"""The roll call: each rank says again and again that it lives and what it does; rank 0 hears who has fallen silent.

All of it goes through the store of the meeting, a few hundred small values a second at any number of ranks.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

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

    number: int = 0
    step: int = 0
    phase: str = "starting"
    moves: int = 0
    own_seconds: float = 0.0
    left: str = ""
    """why the rank leaves, when it does so on its own account"""
    exit_code: int = 0


class Sign(NamedTuple):
    """What is known of a rank."""

    beat: Beat
    silent_seconds: float
    """since the beat came"""
    still_seconds: float
    """since the rank began a phase"""


Heard = dict[int, Sign]


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
        now = time.monotonic()
        # of each rank its last beat, when it came, and when it first told of the phase that it is in
        self._heard = {rank: (Beat(), now, now) for rank in range(self._ranks.world_size)}

    def say(self, beat: Beat) -> None:
        self._store.set(_key(self._ranks.rank), json.dumps(asdict(beat)))

    def listen(self) -> Heard:
        """What each rank last said; a rank that has not spoken yet is silent since the meeting."""
        now = time.monotonic()
        spoke = [rank for rank, (beat, *_) in self._heard.items() if beat.number or self._store.check([_key(rank)])]
        for rank, content in zip(spoke, self._store.multi_get([_key(rank) for rank in spoke]) if spoke else []):
            before, _, moved = self._heard[rank]
            beat = Beat(**json.loads(content))
            if before.number != beat.number:
                self._heard[rank] = beat, now, now if before.moves != beat.moves else moved
        return {rank: Sign(beat, now - came, now - moved) for rank, (beat, came, moved) in self._heard.items()}

    def pardon(self) -> None:
        """This process was stopped for a while; what it did not hear meanwhile counts for nothing."""
        now = time.monotonic()
        self._heard = {rank: (beat, now, now) for rank, (beat, *_) in self._heard.items()}

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


def _key(rank: int) -> str:
    return f"beat/{rank}"


def interval_seconds(world_size: int, timeout_seconds: float) -> float:
    """Between two beats of a rank."""
    return max(min(1.0, timeout_seconds / 20.0), world_size / BEATS_A_SECOND)
