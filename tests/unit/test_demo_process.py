from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from launch.demo_process import run_shown, tail

CHATTER = """
import sys
print("launcher chatter", flush=True)
sys.stderr.write("step 1\\rstep 2\\rstep 3\\nlast words")
sys.exit(3)
"""
STOPPED = """
import signal, sys, time
def save(*_):
    sys.stderr.write("checkpoint written\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
sys.stderr.write("ready\\n")
time.sleep(60)
"""


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


@pytest.mark.parametrize("show_stdout", [True, False])
def test_stderr_is_shown_and_all_is_kept(tmp_path: Path, capfdbinary: pytest.CaptureFixture, show_stdout: bool) -> None:
    log = tmp_path / "logs" / "stage.log"
    assert run_shown(python(CHATTER), log, os.environ, tmp_path, show_stdout) == 3
    shown = capfdbinary.readouterr().err
    assert b"step 1\rstep 2\rstep 3\nlast words" in shown
    assert (b"launcher chatter" in shown) == show_stdout
    assert sorted(log.read_text().splitlines()) == ["last words", "launcher chatter", "step 3"]


def test_a_second_run_is_added_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"
    for word in ("first", "second"):
        run_shown(python(f"print('{word}')"), log, os.environ, tmp_path)
    assert log.read_text() == "first\nsecond\n"
    assert tail(log, 1) == "second"


def test_in_a_terminal_the_process_has_one_of_the_same_width(tmp_path: Path) -> None:
    program = "import os, sys; print(sys.stderr.isatty(), os.get_terminal_size(2).columns, file=sys.stderr)"
    outer = (
        "import fcntl, os, struct, sys, termios; from pathlib import Path; from launch.demo_process import run_shown;"
        "fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack('HHHH', 30, 97, 0, 0));"
        f"run_shown([sys.executable, '-c', {program!r}], Path('stage.log'), os.environ, Path('.'))"
    )
    reader, writer = pty.openpty()
    try:
        subprocess.run(python(outer), stderr=writer, cwd=tmp_path, timeout=60, check=True)
    finally:
        os.close(writer)
        os.close(reader)
    assert (tmp_path / "stage.log").read_text() == "True 97\n"


def test_an_interrupt_waits_for_the_checkpoint_and_leaves_nothing_running(tmp_path: Path) -> None:
    log = tmp_path / "stage.log"

    def interrupt_once_ready() -> None:
        while not (log.exists() and "ready" in log.read_text()):
            stop.wait(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    stop = threading.Event()
    watcher = threading.Thread(target=interrupt_once_ready, daemon=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
    watcher.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_shown(python(STOPPED), log, os.environ, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert log.read_text().splitlines() == ["ready", "checkpoint written"]
