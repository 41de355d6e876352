"""Where the ranks of a launch find each other, and who did not come."""

from __future__ import annotations

import json
import os
import resource
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

from torch.distributed import DistError, HashStore, PrefixStore, Store, TCPStore

from engine.errors import LostRankError
from engine.rendezvous import Ranks

ATTEMPT = "attempt"
POLL_SECONDS = 0.05
PORT_SECONDS = 60.0
"""How long rank 0 waits for its port."""
CONNECT_SECONDS = 5.0
LEAD_SECONDS = 10.0
"""Other ranks wait longer than rank 0, which knows who is missing."""
JOIN_SECONDS = 300.0
"""How long ranks wait for the last of them: hosts read their programs from a shared disk at different speeds."""


@dataclass(frozen=True)
class Meeting:
    """A store of small values that all ranks of this launch see; rank 0, or torchrun's agent, serves it."""

    ranks: Ranks
    store: Store
    host_of: tuple[str, ...]
    """host of each rank; on ranks other than 0 all but the own and that of rank 0 are empty"""
    attempt: str = ""
    """a word that no other launch or attempt has: torchrun's agent keeps its store when it starts ranks again"""

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.host_of[rank]}"

    def another_client(self, timeout_seconds: float) -> Store:
        """The same values over a connection of its own, for a thread that must not wait behind others.

        Raises LostRankError.
        """
        try:
            return PrefixStore(self.attempt, _connect(timeout_seconds))
        except (DistError, RuntimeError, OSError) as problem:
            raise LostRankError(f"{self.name(self.ranks.rank)}: rank 0 has gone: {_first_line(problem)}") from problem


def meet(ranks: Ranks, join_seconds: float = JOIN_SECONDS, expected: Sequence[str] = ()) -> Meeting:
    """Come together at MASTER_ADDR:MASTER_PORT; ``expected`` is the host of each rank, where that is known. Collective.

    An earlier launch or attempt may still be there: it is waited for, and not taken for this one.
    Raises LostRankError, naming the ranks that did not come and the hosts that did, or where rank 0 was looked for.
    """
    own = socket.gethostname()
    if ranks.world_size == 1:
        return Meeting(ranks, HashStore(), (own,))
    if ranks.rank == 0:
        served_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        _allow_files()
        server = _open_store(own, min(join_seconds, PORT_SECONDS), is_master=not served_by_agent)
        attempt = secrets.token_hex(8)
        server.set(ATTEMPT, attempt)
        hosts = _receive(PrefixStore(attempt, server), ranks.world_size, join_seconds, own, expected)
    else:
        attempt, main_host = _join(own, ranks.rank, join_seconds)
        hosts = [main_host, *[""] * (ranks.world_size - 1)]
        hosts[ranks.rank] = own
        server = _connect(join_seconds)
    return Meeting(ranks, PrefixStore(attempt, server), tuple(hosts), attempt)


def _allow_files() -> None:
    """Rank 0 has four descriptors open for each rank; 1,024 is a common limit, and a soft one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _open_store(own: str, patience_seconds: float, is_master: bool) -> Store:
    """On rank 0. An earlier launch whose launcher was killed leaves its port within seconds."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            return _connect(patience_seconds, is_master)
        except (DistError, RuntimeError, OSError) as problem:
            is_taken = "EADDRINUSE" in str(problem)
            if is_taken and time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            told = (
                f"{own}: port {port} is taken, by an earlier launch that still runs or by another program; end it, or "
                "set MASTER_PORT (deepspeed: --master_port)"
                if is_taken
                else f"{own}: rank 0 cannot listen at MASTER_ADDR={host}, port {port}: {_first_line(problem)}"
            )
            raise LostRankError(told) from problem


def _receive(store: Store, world_size: int, join_seconds: float, own: str, expected: Sequence[str]) -> list[str]:
    """On rank 0: the host of each rank, once all are there."""
    store.set("guest/0", json.dumps([own, ""]))
    deadline = time.monotonic() + join_seconds
    missing = list(range(world_size))
    while missing := [rank for rank in missing if not store.check([f"guest/{rank}"])]:
        if time.monotonic() > deadline:
            _refuse(store, world_size, missing, join_seconds, expected)
        time.sleep(POLL_SECONDS)
    guests = [json.loads(store.get(f"guest/{rank}")) for rank in range(world_size)]
    for _, token in guests:
        store.set(f"welcome/{token}", own)
    return [host for host, _ in guests]


def _join(own: str, rank: int, join_seconds: float) -> tuple[str, str]:
    """On other ranks: the attempt that has begun, and the host of rank 0.

    It happens in a thread of its own: a store whose rank 0 stands still may never let go of who asks it.
    """
    found: list[tuple[str, str]] = []
    problems = ["no answer"]
    ended = threading.Event()

    def ask() -> None:
        token = secrets.token_hex(8)
        while not ended.is_set() and not found:
            try:
                server = _connect(min(join_seconds, CONNECT_SECONDS))
                attempt = server.get(ATTEMPT).decode()
                store = PrefixStore(attempt, server)
                store.set(f"guest/{rank}", json.dumps([own, token]))
                while server.get(ATTEMPT).decode() == attempt and not ended.is_set():  # only a living rank 0 answers
                    if store.check([f"welcome/{token}"]):
                        found.append((attempt, store.get(f"welcome/{token}").decode()))
                        return
                    time.sleep(POLL_SECONDS)
            except (DistError, RuntimeError, OSError) as problem:  # what was there was an earlier launch, and has ended
                problems.append(str(problem).splitlines()[0][:200])
                time.sleep(POLL_SECONDS)

    asking = threading.Thread(target=ask, name="meeting", daemon=True)
    asking.start()
    asking.join(join_seconds + LEAD_SECONDS)
    ended.set()
    asking.join(CONNECT_SECONDS)
    if found:
        return found[0]
    raise LostRankError(
        f"{own}: rank 0 at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} did not answer within "
        f"{join_seconds:.0f} s ({problems[-1]}); look whether it started, whether all other ranks did, and whether a "
        "firewall stands between the hosts"
    )


def _refuse(
    store: Store, world_size: int, missing: list[int], join_seconds: float, expected: Sequence[str]
) -> NoReturn:
    present = [rank for rank in range(world_size) if rank not in missing]
    here = sorted({json.loads(store.get(f"guest/{rank}"))[0] for rank in present})
    absent = dict.fromkeys(expected[rank] for rank in missing if len(expected) == world_size)
    where = f" of {', '.join(list(absent)[:20])}" if absent else ""
    raise LostRankError(
        f"{len(missing)} of {world_size} ranks did not come within {join_seconds:.0f} s: {show_numbers(missing)}{where}"
        f"; there are the ranks of {', '.join(here[:20])}{' ...' if len(here) > 20 else ''}. Look at what the other "
        f"hosts said, and whether they can reach {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    )


def runs_of(numbers: Sequence[int]) -> list[list[int]]:
    """First and last of each run of numbers that follow each other; one number where there is one."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return runs


def show_numbers(numbers: list[int]) -> str:
    """ranks 2, 5-7, at most a dozen runs."""
    runs = runs_of(numbers)
    shown = ", ".join("-".join(map(str, run)) for run in runs[:12]) + (" ..." if len(runs) > 12 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"


def _connect(timeout_seconds: float, is_master: bool = False) -> TCPStore:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=timeout_seconds)
    return TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timeout)


def _first_line(problem: BaseException) -> str:
    return str(problem).splitlines()[0][:200]
