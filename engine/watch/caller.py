"""The thread that takes part in the roll call, and on rank 0 judges what it hears."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from torch.distributed import DistError

from engine.meeting import Meeting
from engine.watch import judgement
from engine.watch.roll import Beat, Doing, Heard, Roll, Verdict, interval_seconds

SILENCE_SHARE = 0.9
"""Of cluster.timeout_seconds: when a silent rank is taken for lost, before an exchange runs into the whole of it."""
TROUBLE_INTERVALS = 3.0
"""The same in beats, once some rank has lost a connection."""
STOPPED_SECONDS = 5.0
SETTLE_SECONDS = 600.0
"""How long a rank may finish a save after the launch has come to its end."""


class End(Protocol):
    def __call__(self, text: str, code: int, shown: bool) -> None: ...


class RollCaller:
    """Says what ``doing`` is at every interval; ``end`` is called when the launch is over and the training thread has
    not noticed by itself."""

    def __init__(self, meeting: Meeting, timeout_seconds: float, doing: Doing, end: End) -> None:
        self.meeting = meeting
        self.answered = time.monotonic()
        """when the store last did"""
        self.verdict: Verdict | None = None
        self._interval = interval_seconds(meeting.ranks.world_size, timeout_seconds)
        self.timeout_seconds = max(timeout_seconds, 2.0 * TROUBLE_INTERVALS * self._interval)
        """the setting, or what so many ranks need"""
        self._doing, self._end = doing, end
        self._is_main = meeting.ranks.rank == 0
        self._roll = Roll(meeting, timeout_seconds)
        self._heard: Heard = {}
        self._number = 0
        self._left, self._exit_code = "", 0
        self._trouble_since: float | None = None
        self._listened = time.monotonic()
        self._settling = False
        self._lost = threading.Event()
        self._wake, self._closing = threading.Event(), threading.Event()

    def start(self) -> None:
        """Collective in effect: rank 0 listens once all have spoken."""
        self._say()
        threading.Thread(target=self._call, name="roll-call", daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        self._wake.set()

    def slow_ranks(self) -> tuple[float, dict[str, float]]:
        return judgement.slow_ranks(self.meeting, self._heard)

    def await_verdict(self, error: BaseException) -> Verdict:
        """The training thread has lost its connection to other ranks: who is at fault?"""
        self._lost.set()
        self._wake.set()
        patience = 4.0 * TROUBLE_INTERVALS * self._interval
        deadline = time.monotonic() + patience
        while self.verdict is None and time.monotonic() < deadline:
            time.sleep(self._interval / 4.0)
        self.linger()
        problem = str(error).splitlines()[0][:200]
        return self.verdict or Verdict(f"{judgement.unreachable(self.meeting, patience)} ({problem})")

    def say_why(self, error: BaseException) -> None:
        """This rank leaves with an error of its own; let the others know it, those that have not the same."""
        self._left, self._exit_code = f"{type(error).__name__}: {error}"[:2000], getattr(error, "exit_code", 1)
        number = self._number
        self._wake.set()
        deadline = time.monotonic() + TROUBLE_INTERVALS * self._interval
        while time.monotonic() < deadline and (self._number == number or (self._is_main and not self._all_left())):
            time.sleep(0.02)
            self._wake.set()

    def settle(self) -> None:
        """This rank still has a save to finish before it leaves with the others."""
        self._settling = True

    def linger(self) -> None:
        """The store ends with rank 0: let the others read it first."""
        if self._is_main:
            time.sleep(TROUBLE_INTERVALS * self._interval)

    def _call(self) -> None:
        while not self._closing.is_set():
            self._wake.wait(self._interval)
            self._wake.clear()
            try:
                self._say()
                if self._lost.is_set():
                    self._roll.report_trouble()
                if self._is_main:
                    self._listen()
                verdict = self._roll.verdict()
            except (DistError, RuntimeError, OSError):
                self._closing.wait(self._interval)
                continue  # rank 0 is gone or cut off: the watch counts how long
            self.answered = time.monotonic()
            if verdict is not None:
                self._accept(verdict)

    def _say(self) -> None:
        self._number += 1
        doing = self._doing
        self._roll.say(
            Beat(self._number, doing.step, doing.phase, doing.moves, doing.own_seconds, self._left, self._exit_code)
        )

    def _listen(self) -> None:
        now = time.monotonic()
        if now - self._listened > max(STOPPED_SECONDS, TROUBLE_INTERVALS * self._interval):
            self._roll.pardon()
        self._listened = now
        self._heard = self._roll.listen()
        if self._trouble_since is None and (self._lost.is_set() or self._roll.in_trouble()):
            self._trouble_since = time.monotonic()
        limit, trouble_seconds = SILENCE_SHARE * self.timeout_seconds, 0.0
        if self._trouble_since is not None:
            limit, trouble_seconds = TROUBLE_INTERVALS * self._interval, time.monotonic() - self._trouble_since
        verdict = judgement.judge(self.meeting, self._heard, limit, self.timeout_seconds, trouble_seconds)
        if verdict is not None:
            self._roll.judge(verdict)

    def _accept(self, verdict: Verdict) -> None:
        """The training thread often notices by itself, and leaves in better order."""
        self.verdict = verdict
        begin, patience = time.monotonic(), TROUBLE_INTERVALS * self._interval
        while time.monotonic() < begin + (SETTLE_SECONDS if self._settling else patience):
            if self._lost.is_set() or self._left or self._closing.is_set():
                return
            time.sleep(0.05)
        self._end(verdict.text, verdict.exit_code, self._is_main)

    def _all_left(self) -> bool:
        return all(sign.beat.left for sign in self._heard.values())
