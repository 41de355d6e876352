"""Where the ranks of a launch find each other, and who did not come."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import DistError, HashStore, PrefixStore, Store, TCPStore

from engine.errors import LostRankError
from engine.rendezvous import Ranks

POLL_SECONDS = 0.05
JOIN_SECONDS = 300.0
"""How long ranks wait for the last of them: hosts read their programs from a shared disk at different speeds."""


@dataclass(frozen=True)
class Meeting:
    """A store of small values that all ranks of this launch see; rank 0, or torchrun's agent, serves it."""

    ranks: Ranks
    store: Store
    host_of: tuple[str, ...]
    """host of each rank; on ranks other than 0 all but the own and that of rank 0 are empty"""

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.host_of[rank]}"

    def another_client(self, timeout_seconds: float) -> Store:
        """The same values over a connection of its own, for a thread that must not wait behind others."""
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return _prefixed(_connect(host, port, timeout_seconds))


def meet(ranks: Ranks, join_seconds: float = JOIN_SECONDS, expected: Sequence[str] = ()) -> Meeting:
    """Come together at MASTER_ADDR:MASTER_PORT; ``expected`` is the host of each rank, where that is known. Collective.

    Raises LostRankError, naming the ranks that did not come and the hosts that did, or where rank 0 was looked for.
    """
    if ranks.world_size == 1:
        return Meeting(ranks, HashStore(), (socket.gethostname(),))
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    served_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    own = socket.gethostname()
    try:
        if ranks.rank == 0 and not served_by_agent:
            server = _connect(host, port, join_seconds, is_master=True)
        else:
            server = _connect(host, port, join_seconds)
    except (DistError, RuntimeError, OSError) as problem:
        raise LostRankError(_unreachable(own, host, port, ranks.rank, join_seconds, str(problem))) from problem
    store = _prefixed(server)
    store.set(f"host/{ranks.rank}", own)
    hosts = [""] * ranks.world_size
    if ranks.rank == 0:
        hosts = _await_all(store, ranks.world_size, join_seconds, expected)
        store.set("all here", own)
    else:
        try:
            store.wait(["all here"], timedelta(seconds=join_seconds + 10.0))
        except (DistError, RuntimeError) as problem:
            raise LostRankError(f"{own}: rank 0 at {host}:{port} ended before all ranks were there") from problem
        hosts[0] = store.get("all here").decode()
    hosts[ranks.rank] = own
    return Meeting(ranks, store, tuple(hosts))


def _await_all(store: Store, world_size: int, join_seconds: float, expected: Sequence[str]) -> list[str]:
    deadline = time.monotonic() + join_seconds
    missing = list(range(world_size))
    while missing := [rank for rank in missing if not store.check([f"host/{rank}"])]:
        if time.monotonic() > deadline:
            here = sorted({store.get(f"host/{rank}").decode() for rank in range(world_size) if rank not in missing})
            absent = dict.fromkeys(expected[rank] for rank in missing if len(expected) == world_size)
            where = f" of {', '.join(list(absent)[:20])}" if absent else ""
            raise LostRankError(
                f"{len(missing)} of {world_size} ranks did not come within {join_seconds:.0f} s: "
                f"{show_numbers(missing)}{where}; there are the ranks of {', '.join(here[:20])}"
                f"{' ...' if len(here) > 20 else ''}. Look at what the other hosts said, and whether they can reach "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            )
        time.sleep(POLL_SECONDS)
    return [store.get(f"host/{rank}").decode() for rank in range(world_size)]


def show_numbers(numbers: list[int]) -> str:
    """ranks 2, 5-7, at most a dozen runs."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    shown = ", ".join("-".join(map(str, run)) for run in runs[:12]) + (" ..." if len(runs) > 12 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}"


def _prefixed(store: Store) -> Store:
    """torchrun's agent keeps its store when it starts the ranks again; what the last attempt said must not count."""
    return PrefixStore(f"stillhouse/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _connect(host: str, port: int, timeout_seconds: float, is_master: bool = False) -> TCPStore:
    timeout = timedelta(seconds=timeout_seconds)
    return TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timeout)


def _unreachable(own: str, host: str, port: int, rank: int, seconds: float, problem: str) -> str:
    first = problem.splitlines()[0][:200]
    if rank == 0 and "EADDRINUSE" in problem:
        return (
            f"{own}: port {port} is taken, by an earlier launch that still runs or by another program; "
            "end it, or set MASTER_PORT (deepspeed: --master_port)"
        )
    if rank == 0:
        return f"{own}: rank 0 cannot listen at MASTER_ADDR={host}, port {port}: {first}"
    return (
        f"{own}: rank 0 at {host}:{port} could not be reached within {seconds:.0f} s ({first}); look whether it "
        "started, and whether a firewall stands between the hosts"
    )
