"""One rank's watch over itself and the others."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

from engine.errors import EXIT_LOST_RANK, LostRankError, ReplacedError, StillhouseError
from engine.meeting import Meeting
from engine.watch import judgement
from engine.watch.caller import RollCaller
from engine.watch.launcher import Launcher
from engine.watch.roll import Doing

log = logging.getLogger("stillhouse")

GUARD_SHARE = 0.75
"""Of cluster.timeout_seconds: when the guard ends a rank that stands still, so that its stack is seen before the others
give up on it."""
CHECK_SECONDS = 5.0
"""Between two looks at what needs a disk or the list of processes."""


class Watch:
    """While entered, this rank gives signs of life, and ends when it hangs or the launch has come to its end.

    ``alone_seconds`` says how long a phase may last in which this rank waits for no other. ``check``, when set, is
    asked every few seconds on the first rank of each host; a ReplacedError that it raises ends this process. On
    leaving with an error that comes of lost connections, LostRankError is raised instead, naming who is lost. For one
    rank alone only ``check`` is left of all this.
    """

    def __init__(
        self, meeting: Meeting, timeout_seconds: float, alone_seconds: Mapping[str, float] | None = None
    ) -> None:
        self.check: Callable[[], None] | None = None
        self.now = Doing()
        self._meeting, self._timeout = meeting, timeout_seconds
        self._alone_seconds = alone_seconds or {}
        self._closing = threading.Event()
        alone = meeting.ranks.world_size == 1
        self._caller = None if alone else RollCaller(meeting, timeout_seconds, self.now, self._end)
        self._guard: subprocess.Popen[bytes] | None = None

    def doing(self, phase: str) -> None:
        """The training thread begins ``phase``."""
        self.now.phase = phase
        self.now.moves += 1

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The training thread waits for what the others say, in whatever phase."""
        phase = self.now.phase
        self.doing(judgement.AGREEMENT)
        try:
            yield
        finally:
            self.doing(phase)

    def settle(self) -> None:
        """All ranks leave with the same error; this one may finish a save first."""
        if self._caller is not None:
            self._caller.settle()

    def slow_ranks(self) -> tuple[float, dict[str, float]]:
        """On rank 0: the median of the ranks' own seconds a step, and those of each rank that takes far longer."""
        return self._caller.slow_ranks() if self._caller is not None else (0.0, {})

    def __enter__(self) -> Watch:
        if self._caller is not None:
            faulthandler.enable()
            faulthandler.register(signal.SIGQUIT, all_threads=False)  # the guard asks for it
            self._guard = _start_guard(self._caller.meeting, self._timeout)
            self._caller.start()
        threading.Thread(target=self._look_after_self, name="watch", daemon=True).start()
        if self._meeting.ranks.local_rank == 0:
            threading.Thread(target=self._look_around, name="look-around", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        verdict = None
        if self._caller is not None and error is not None and not self._closing.is_set():
            if judgement.is_lost(error):
                verdict = self._caller.await_verdict(error)
            else:
                self._caller.say_why(error)
        self.close()
        if verdict is not None:
            raise LostRankError(verdict.text, verdict.exit_code) from error

    def close(self) -> None:
        """No more signs of life, and none expected: all ranks have agreed to part. Harmless when called again."""
        self._closing.set()
        if self._caller is not None:
            self._caller.close()
        if self._guard is not None and self._guard.stdin is not None:
            with contextlib.suppress(OSError):
                self._guard.stdin.close()
            self._guard.wait()
            self._guard = None

    def _look_after_self(self) -> None:
        """All that needs no other rank; it must never wait for a network or a disk."""
        moves, since, woken = -1, time.monotonic(), time.monotonic()
        while not self._closing.wait(min(1.0, self._timeout / 20.0)):
            now = time.monotonic()
            if now - woken > CHECK_SECONDS:  # this process was stopped, and the clock went on
                since = now
                if self._caller is not None:
                    self._caller.answered = now
            woken = now
            self._tell_guard()
            if self.now.moves != moves:
                moves, since = self.now.moves, now
            elif self._caller is not None and now - since > self._alone_seconds.get(self.now.phase, float("inf")):
                faulthandler.dump_traceback()
                self._end(f"this rank hangs: {self.now} has lasted {now - since:.0f} s; its stack is above")
            if self._caller is not None and now - self._caller.answered > self._caller.timeout_seconds:
                self._end(judgement.unreachable(self._caller.meeting, now - self._caller.answered))

    def _look_around(self) -> None:
        """What a dead disk may hold up."""
        launcher = Launcher.find()
        while not self._closing.wait(CHECK_SECONDS):
            if launcher.has_ended():
                self._end("the launcher has ended without ending its ranks; this one leaves too")
            try:
                if self.check is not None:
                    self.check()
            except ReplacedError as error:
                self._end(str(error), error.exit_code)
            except StillhouseError as error:
                log.debug("%s; looking again in %.0f s", error, CHECK_SECONDS)

    def _tell_guard(self) -> None:
        if self._guard is not None and self._guard.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self._guard.stdin.write(f"{self.now}\n".encode())
                self._guard.stdin.flush()

    def _end(self, text: str, code: int = EXIT_LOST_RANK, shown: bool = True) -> None:
        """End this process from beside the training thread, which may be where nothing reaches it."""
        if self._closing.is_set():
            return
        if shown:
            log.error("%s", text)
        logging.shutdown()
        sys.stderr.flush()
        if self._caller is not None:
            self._caller.linger()
        os._exit(code)


def _start_guard(meeting: Meeting, timeout_seconds: float) -> subprocess.Popen[bytes]:
    script, name = Path(__file__).with_name("guard.py"), meeting.name(meeting.ranks.rank)
    words = [sys.executable, "-I", str(script), name, str(GUARD_SHARE * timeout_seconds)]
    return subprocess.Popen(words, stdin=subprocess.PIPE)
