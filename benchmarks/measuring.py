"""What every benchmark shares: the machine, peak memory, cases in child processes, tables and JSON."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULT = "RESULT "
"""What the line of a child process that holds its figures begins with."""


def machine() -> dict[str, Any]:
    """Where the figures come from; a load above the number of the benchmark's threads means others were at work."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_json(path: Path | None, figures: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), **figures}, indent=1) + "\n")


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """The first column to the left, figures to the right."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]))


class PeakMemory:
    """Bytes at the peak since this object was made, over what was in use then.

    On a GPU those of torch's allocator, else of the process: the kernel's high-water mark, set back through
    clear_refs where it lets us; otherwise the mark of the whole life of the process, so a case should have one of
    its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()
            return
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._base = _status_bytes("VmRSS")

    def take(self) -> int:
        if self._cuda:
            return torch.cuda.max_memory_allocated() - self._base
        return _status_bytes("VmHWM") - self._base


def peak_process_bytes() -> int:
    """The whole process at its peak, from start to now.

    Not ru_maxrss: a process begins with that of the one that started it, however large that was.
    """
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"the kernel tells no {name}")


def available_bytes() -> int:
    """Memory that a new process can have without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel tells no MemAvailable")


def leave_nothing_behind() -> None:
    """A signal ends this process as Ctrl-C does: through its ``finally`` and ``with``, which end what it started."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("stopped"))


def in_child(script: str, case: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run ``script --case JSON`` in a fresh process and give what it passed to ``give_result``.

    The child and whatever it starts are ended with this process, in whichever way that ends.
    """
    child = subprocess.Popen(
        [sys.executable, script, "--case", json.dumps(case)],
        env={**os.environ, **(environment or {})},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    try:
        told, errors = child.communicate()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    found = [line for line in told.splitlines() if line.startswith(RESULT)]
    if child.returncode != 0 or not found:
        raise SystemExit(f"{case} ended with {child.returncode}:\n{told[-2000:]}\n{errors[-4000:]}")
    return json.loads(found[-1].removeprefix(RESULT))


def _die_with_parent() -> None:
    """Linux: SIGKILL for this process when the one that started it is gone, even by a SIGKILL of its own."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def give_result(figures: Mapping[str, Any]) -> None:
    print(RESULT + json.dumps(figures), flush=True)


def first_to_die() -> None:
    """Ask the kernel to end this process, and no other, should the machine's memory run out."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def by_turns(ways: Mapping[str, Callable[[], Any]], repeats: int, at_most_seconds: float) -> dict[str, list[float]]:
    """Seconds of each way, A B A B, after one unmeasured turn: a slow moment of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    started = time.perf_counter()
    for turn in range(repeats + 1):
        if turn > 1 and time.perf_counter() - started > at_most_seconds:
            break
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if turn > 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds
