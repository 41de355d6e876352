"""The process beside a rank: it hears what the rank does, and ends it when nothing is heard.

    python -I guard.py NAME SECONDS < beats

It outlives what stops a whole interpreter: SIGSTOP, a library that hangs with the interpreter's lock, a page that a
dead disk never delivers. Needs the standard library alone, so that it costs a few milliseconds and megabytes.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

POLL_SECONDS = 1.0
STOPPED_SECONDS = 5.0
DUMP_SECONDS = 5.0


def watch(name: str, limit_seconds: float) -> None:
    rank, doing, last = os.getppid(), "starting", time.monotonic()
    while os.getppid() == rank:
        asked = time.monotonic()
        ready, _, _ = select.select([0], [], [], POLL_SECONDS)
        now = time.monotonic()
        if now - asked > STOPPED_SECONDS:  # this process was stopped too: Ctrl-Z, or a suspended machine
            last = now
        if ready:
            heard = os.read(0, 1 << 16)
            if not heard:
                return
            doing, last = heard.decode(errors="replace").splitlines()[-1], now
        elif now - last > limit_seconds:
            _end(rank, f"[{name}] error: no sign of life for {limit_seconds:.0f} s; last heard: {doing}. Its stack:\n")
            return


def _end(rank: int, message: str) -> None:
    os.write(2, message.encode())
    for number in (signal.SIGCONT, signal.SIGABRT):  # the rank's fault handler writes its stack
        os.kill(rank, number)
    deadline = time.monotonic() + DUMP_SECONDS
    while os.getppid() == rank and time.monotonic() < deadline:
        time.sleep(0.05)
    if os.getppid() == rank:
        os.kill(rank, signal.SIGKILL)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to a whole process group: the rank may go on to a checkpoint
    with contextlib.suppress(ProcessLookupError):
        watch(sys.argv[1], float(sys.argv[2]))
