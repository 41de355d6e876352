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
WAKE_SECONDS = 0.1
SHOW_SECONDS = 0.2
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
    """Have the rank write its stacks, and end it.

    SIGQUIT shows the training thread, which stands still in its handler meanwhile: the kernel gives it to the main
    thread once that one is awake. SIGABRT then shows all threads and ends the process; over a thread that runs on it
    may crash, which ends the process as well.
    """
    os.write(2, message.encode())
    os.kill(rank, signal.SIGCONT)
    steps = ((signal.SIGQUIT, WAKE_SECONDS), (signal.SIGABRT, SHOW_SECONDS), (signal.SIGKILL, DUMP_SECONDS))
    for number, seconds in steps:
        deadline = time.monotonic() + seconds
        while os.getppid() == rank and time.monotonic() < deadline:
            time.sleep(0.02)
        if os.getppid() != rank:
            return
        os.kill(rank, number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to a whole process group: the rank may go on to a checkpoint
    with contextlib.suppress(ProcessLookupError):
        watch(sys.argv[1], float(sys.argv[2]))
