"""The network of a lab: a bridge, and a network namespace a host, wired to it.

No two labs of a machine share a name or an address.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import IO

FOLDERS = Path("/var/tmp")
LOCKS = Path("/run/lock")
MAX_LABS = 200
FIRST_NODE = 10
"""node1 is 10.77.I.11 in lab I; the head is 10.77.I.10, the machine outside 10.77.I.1."""


def call(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def attempt(*words: str) -> None:
    """Of a thing to be taken away that may be gone already."""
    subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


class Network:
    """Names and addresses of lab ``index``; the lock on the index is held until :meth:`close`.

    Labs whose process is dead hold no lock: what they left is taken away by whoever comes next.
    """

    def __init__(self) -> None:
        for index in _remains():
            if dead := _try_lock(index):
                _sweep(index)
                dead.close()
        for self.index in range(1, MAX_LABS):
            self._lock = _try_lock(self.index)
            if self._lock is not None:
                break
        else:
            raise RuntimeError(f"{MAX_LABS - 1} labs are up on this machine")
        _sweep(self.index)
        self.bridge = f"lab{self.index}"
        self.subnet = f"10.77.{self.index}"
        self.outside = f"{self.subnet}.1"
        self.folder = FOLDERS / f"cluster-lab-{self.index}"
        self.folder.mkdir(mode=0o755)

    def open(self) -> None:
        call("ip", "link", "add", self.bridge, "type", "bridge")
        call("ip", "address", "add", f"{self.outside}/24", "dev", self.bridge)
        call("ip", "link", "set", self.bridge, "up")

    def close(self) -> None:
        _sweep(self.index)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def address(self, number: int) -> str:
        return f"{self.subnet}.{FIRST_NODE + number}"

    def namespace(self, number: int) -> str:
        return f"lab{self.index}-{number}"

    def cable(self, number: int) -> str:
        """The outer end of a host's cable; the host sees the other end as eth0."""
        return f"lab{self.index}n{number}"

    def table(self, number: int) -> str:
        """The nftables table that drops what comes out of a host's cable."""
        return f"lab{self.index}n{number}"

    def wire(self, number: int) -> None:
        """A new network for a host, with the address it always has."""
        self.unwire(number)
        namespace, cable = self.namespace(number), self.cable(number)
        mac = f"02:4c:41:42:{self.index:02x}:{number:02x}"  # the same after a restart: neighbours remember it
        call("ip", "netns", "add", namespace)
        call("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "address", mac, "netns", namespace)
        call("ip", "link", "set", cable, "master", self.bridge, "up")
        call("ip", "-n", namespace, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
        call("ip", "-n", namespace, "link", "set", "lo", "up")
        call("ip", "-n", namespace, "link", "set", "eth0", "up")
        call("ip", "-n", namespace, "route", "add", "default", "via", self.outside)

    def unwire(self, number: int) -> None:
        attempt("nft", "delete", "table", "netdev", self.table(number))
        attempt("ip", "link", "delete", self.cable(number))
        attempt("ip", "netns", "delete", self.namespace(number))


def _try_lock(index: int) -> IO[str] | None:
    LOCKS.mkdir(parents=True, exist_ok=True)
    lock = (LOCKS / f"cluster-lab-{index}").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    return lock


def _remains() -> set[int]:
    """Labs that left a network or a folder, dead or alive."""
    names = [*_namespaces(), *_links(), *(path.name for path in FOLDERS.glob("cluster-lab-*"))]
    found = [re.fullmatch(r"(?:cluster-lab-|lab)(\d+)(?:[-n]\d+)?", name) for name in names]
    return {int(match[1]) for match in found if match}


def _links() -> list[str]:
    return [link["ifname"] for link in json.loads(call("ip", "-json", "link", "show"))]


def _sweep(index: int) -> None:
    """Everything of lab ``index`` goes. Only for who holds its lock."""
    namespaces = [name for name in _namespaces() if name.startswith(f"lab{index}-")]
    for namespace in namespaces:
        _kill_all(namespace)
    for link in _links():
        if link == f"lab{index}" or link.startswith(f"lab{index}n"):
            attempt("ip", "link", "delete", link)
    for namespace in namespaces:
        attempt("ip", "netns", "delete", namespace)
        attempt("nft", "delete", "table", "netdev", namespace.replace("-", "n"))
    shutil.rmtree(FOLDERS / f"cluster-lab-{index}", ignore_errors=True)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in call("ip", "netns", "list").splitlines() if line.strip()]


def _kill_all(namespace: str) -> None:
    deadline = time.monotonic() + 10
    while pids := call("ip", "netns", "pids", namespace).split():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{namespace}: processes {pids} do not die")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.02)
