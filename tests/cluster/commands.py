"""Programs on a host: started from its console, so that no fault of the network reaches them."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


class Command:
    """A running program of a host, with the face of a Popen. Its output goes to ``log``."""

    def __init__(
        self, host_pid: int, command: str | Sequence[str], environment: dict[str, str], folder: Path, log: Path
    ) -> None:
        words = ["bash", "-c", command] if isinstance(command, str) else list(command)
        self.log = log
        self.text = command if isinstance(command, str) else shlex.join(command)
        entered = ["nsenter", f"--target={host_pid}", *NAMESPACES, "bash", "-c", 'cd "$0" && exec "$@"', str(folder)]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*entered, *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the program itself, as the machine outside counts."""
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and self._process.poll() is None:
            if found := children(self._process.pid):
                return found[0]
            time.sleep(0.01)
        raise ProcessLookupError(f"{self.text}: has ended\n{self.output()}")

    def poll(self) -> int | None:
        return self._process.poll()

    def wait(self, timeout: float = 60.0) -> int:
        """The exit code. Raises AssertionError with the output when there is none by then; the program is killed."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.text}: still running after {timeout} s\n{self.output()}") from None

    def send_signal(self, number: int) -> None:
        """To the program alone, not to what it started."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to the program and to what it started in its own process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def output(self) -> str:
        return self.log.read_text(errors="replace")
