"""The launcher above a rank. Killed with SIGKILL it cannot end its ranks, which would train on unseen."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run")


@dataclass(frozen=True)
class Launcher:
    """The launching processes above this one, on this host."""

    processes: tuple[psutil.Process, ...]

    @staticmethod
    def find() -> Launcher:
        """Those of deepspeed and torchrun: a shell above them may end while its run goes on (nohup, tmux)."""
        return Launcher(tuple(parent for parent in psutil.Process().parents() if _launches(parent)))

    def has_ended(self) -> bool:
        return not all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in self.processes)


def _launches(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()[:4]
    except psutil.Error:
        return False
    return any(name in word for word in words for name in LAUNCHERS)
