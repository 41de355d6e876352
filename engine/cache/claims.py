"""Which of several jobs makes which shard: a file for each claim, in a folder that all of them see.

A claim is made with O_EXCL, so one job gets it. Its owner touches it every few seconds; one that was not touched for
long, or whose process is known to be gone, may be taken by another. Taking one by mistake costs work and no more:
a sidecar that is there is never replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.data.atomic import files_below

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0


@dataclass(frozen=True)
class Owner:
    """The process that holds a claim."""

    host: str
    pid: int
    namespace: str
    """the machine's boot and the process namespace: where ``pid`` means something"""
    started: str
    """when the process began, in the kernel's ticks, since a number is used again"""

    @staticmethod
    def here() -> Owner:
        return Owner(socket.gethostname(), os.getpid(), _namespace(), _started(os.getpid()) or "")

    def is_gone(self) -> bool:
        """Whether the process is known to have ended. A process elsewhere is never known to."""
        return self.namespace != "" and self.namespace == _namespace() and _started(self.pid) != self.started


@dataclass(frozen=True)
class Claim:
    """Of one shard, by one job."""

    name: str
    owner: Owner
    age_seconds: float
    """since its owner last touched it, by the clock of the folder's file system"""

    @property
    def is_stale(self) -> bool:
        return self.age_seconds > STALE_SECONDS or self.owner.is_gone()


class Claims:
    """The claims in ``folder``. While entered, those of this job are kept alive."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._owner = Owner.here()
        self._token = secrets.token_hex(8)
        self._held: set[Path] = set()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> Claims:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._heart.join()
        for path in list(self._held):
            self._drop(path)

    def take(self, name: str) -> bool:
        """Whether this job now has the claim called ``name``; a stale one is taken over."""
        path = self._path(name)
        found = self._read(path)
        if found is not None and found.is_stale:
            self._remove_stale(path)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w") as stream:
                json.dump({"name": name, "token": self._token, "owner": asdict(self._owner)}, stream)
        except OSError:  # a full disk
            path.unlink(missing_ok=True)
            raise
        self._held.add(path)
        return True

    def release(self, name: str) -> None:
        self._drop(self._path(name))

    def all(self) -> list[Claim]:
        """Those that other jobs and this one hold, stale ones too."""
        paths = sorted(files_below(self._folder, ".claim"))
        return [claim for path in paths if (claim := self._read(path)) is not None]

    def _path(self, name: str) -> Path:
        return self._folder / f"{name.replace('/', '--')}.claim"

    def _remove_stale(self, path: Path) -> None:
        """Of several jobs that see the same stale claim, one moves it away. A live one moved by mistake is put back."""
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return
        moved = self._read(aside)
        if moved is not None and not moved.is_stale:
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink(missing_ok=True)

    def _drop(self, path: Path) -> None:
        self._held.discard(path)
        with contextlib.suppress(OSError, ValueError):
            if json.loads(path.read_text())["token"] == self._token:
                path.unlink()

    def _read(self, path: Path) -> Claim | None:
        """None when it is gone. One that is still empty has no owner yet, but an age."""
        try:
            with path.open() as stream:  # opening makes NFS ask its server how old the file is
                age = self._now() - os.fstat(stream.fileno()).st_mtime
                content = stream.read()
        except OSError:
            return None
        try:
            found = json.loads(content)
            return Claim(found["name"], Owner(**found["owner"]), age)
        except (ValueError, KeyError, TypeError):
            return Claim(path.name.removesuffix(".claim"), Owner("unknown", 0, "", ""), age)

    def _now(self) -> float:
        """The time as the file system stamps it: hosts' own clocks may differ by more than a claim lives."""
        clock = self._folder / f".clock-{self._token}"
        try:
            clock.touch()
            now = clock.stat().st_mtime
            clock.unlink()
            return now
        except OSError:
            return 0.0  # a folder that cannot be written makes no claim stale

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            for path in list(self._held):
                with contextlib.suppress(OSError):
                    os.utime(path)


def _namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """None when there is no such process, or only its zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[18] if state not in ("Z", "X") else None


def waiting(claims: list[Claim]) -> Iterator[str]:
    """A line for each claim, for people."""
    for claim in claims:
        yield f"{claim.name} is being made by process {claim.owner.pid} on {claim.owner.host}"
