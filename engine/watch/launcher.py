"""The launcher above a rank. Killed with SIGKILL it cannot end its ranks, which would train on unseen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import psutil

LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run")
REMOTE_END = "deepspeed.launcher.launch"
"""What DeepSpeed starts on each host; over ssh there is no other launcher above it on that host."""


@dataclass(frozen=True)
class Launcher:
    """The launching processes above this one, on this host."""

    processes: tuple[psutil.Process, ...]

    @staticmethod
    def find() -> Launcher:
        return Launcher(tuple(_launching(psutil.Process().parents())))

    def has_ended(self) -> bool:
        return not all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in self.processes)


def _launching(above: list[psutil.Process]) -> Iterator[psutil.Process]:
    """Those of deepspeed and torchrun. A shell above them may end while its run goes on (nohup, tmux), but what ssh
    started for a launcher on another host ends with the connection."""
    found = [(process, _words(process)) for process in above]
    launchers = [number for number, (_, words) in enumerate(found) if any(name in words for name in LAUNCHERS)]
    for number in launchers:
        yield found[number][0]
    if not launchers or REMOTE_END not in found[launchers[-1]][1]:
        return
    for process, words in found[launchers[-1] + 1 :]:
        yield process
        if words.startswith("sshd"):
            return


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:4])
    except psutil.Error:
        return ""
