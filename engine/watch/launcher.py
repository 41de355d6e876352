"""The launcher above a rank. Killed with SIGKILL it cannot end its ranks, which would train on unseen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

PROGRAMS = ("deepspeed", "torchrun")
MODULES = ("deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run")
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
    launchers = [number for number, (_, words) in enumerate(found) if _launches(words)]
    for number in launchers:
        yield found[number][0]
    if not launchers or REMOTE_END not in found[launchers[-1]][1]:
        return
    for process, words in found[launchers[-1] + 1 :]:
        yield process
        if words[0].startswith("sshd"):
            return


def _launches(words: list[str]) -> bool:
    """A Python that runs one of them; a shell or a folder of that name does not."""
    if not Path(words[0]).name.startswith("python"):
        return False
    if "-m" in words[:4]:
        return words[words.index("-m") + 1] in MODULES
    return len(words) > 1 and Path(words[1]).name in PROGRAMS


def _words(process: psutil.Process) -> list[str]:
    try:
        return [*process.cmdline()[:5], "", ""]
    except psutil.Error:
        return [""]
