"""One stage of the demo as a process: its progress is shown, all that it says is kept in a log."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import tty
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 1 << 16


def run_shown(
    words: list[str], log: Path, environment: Mapping[str, str], folder: Path, show_stdout: bool = True
) -> int:
    """Run ``words`` in ``folder`` and return the exit code.

    What it says goes to our stderr and to ``log``, or to ``log`` alone for a stdout that is not to be shown. Where
    ours is a terminal the process gets one too, and draws its bar. An interrupt asks it and its children to stop, and
    waits for the checkpoint that they write; a second one kills them.
    """
    reader, writer = _terminal() if sys.stderr.isatty() else os.pipe()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as kept, open(reader, "rb", buffering=0) as stream:
        process = subprocess.Popen(
            words,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=writer if show_stdout else kept,
            stderr=writer,
            start_new_session=True,  # a signal to the group reaches the ranks behind the launcher
        )
        os.close(writer)
        try:
            _forward(stream, kept)
            return process.wait()
        except BaseException:
            try:
                _signal_group(process.pid, signal.SIGTERM)
                _forward(stream, kept)
            finally:
                _signal_group(process.pid, signal.SIGKILL)
                process.wait()
            raise


def tail(log: Path, num_lines: int) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(lines[-num_lines:])


def _terminal() -> tuple[int, int]:
    """A pseudo terminal of our terminal's size, which passes bytes on as they are."""
    reader, writer = pty.openpty()
    tty.setraw(writer)
    size = fcntl.ioctl(sys.stderr.fileno(), termios.TIOCGWINSZ, bytes(8))
    fcntl.ioctl(writer, termios.TIOCSWINSZ, size)
    return reader, writer


def _forward(stream: BinaryIO, kept: BinaryIO) -> None:
    """Until every process has closed its end. Of a line that is drawn over and over, the log keeps the last state."""
    line = b""
    while chunk := _read(stream):
        sys.stderr.buffer.write(chunk)
        sys.stderr.flush()
        *whole, line = (line + chunk).split(b"\n")
        line = line[line.rfind(b"\r", 0, -1) + 1 :]
        for done in whole:
            kept.write(done.rstrip(b"\r").rsplit(b"\r", 1)[-1] + b"\n")
        kept.flush()
    kept.write(line)


def _read(stream: BinaryIO) -> bytes:
    try:
        return stream.read(CHUNK_BYTES)
    except OSError:  # how a terminal tells the end
        return b""


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)
