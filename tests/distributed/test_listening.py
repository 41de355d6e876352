"""What a run's processes listen on: the rendezvous, and gloo's own connections between ranks. Nothing else."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import tiny
from tests.launching import distill, wait_for_step

LISTEN = "0A"


class Listener(NamedTuple):
    address: str
    port: int


def listeners(pid: int) -> list[Listener]:
    """The TCP and UDP sockets of a process that take what comes from elsewhere."""
    found = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.exists() or path.is_symlink()}
    sockets = {link.removeprefix("socket:[").rstrip("]") for link in found if link.startswith("socket:")}
    result = []
    for name in ("tcp", "tcp6", "udp", "udp6"):
        table = Path(f"/proc/{pid}/net/{name}")
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            words = line.split()
            if words[9] in sockets and (words[3] == LISTEN or name.startswith("udp")):
                address, port = words[1].split(":")
                result.append(Listener(_address(address), int(port, 16)))
    return sorted(result)


def _address(text: str) -> str:
    packed = b"".join(struct.pack("<I", int(text[at : at + 8], 16)) for at in range(0, len(text), 8))
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


@pytest.mark.slow
def test_a_run_listens_for_its_ranks_alone(tmp_path: Path) -> None:
    config = tiny.run_config(tmp_path, run={"num_steps": 100_000}, checkpoint={"every_steps": 100_000})
    job = distill(config, tmp_path / "job", world_size=2)
    try:
        wait_for_step(tmp_path / "runs" / "run", 2, job)
        first, second = ([*listeners(rank.pid)] for rank in job.ranks)
    finally:
        job.kill()
    everywhere = {"::", "0.0.0.0"}
    open_to_all = [each for each in first + second if each.address in everywhere]
    assert open_to_all == [Listener("::", job.port)] or open_to_all == [Listener("0.0.0.0", job.port)], (first, second)
    own = {address[4][0] for address in socket.getaddrinfo(socket.gethostname(), None)} | {"127.0.0.1", "::1"}
    assert {each.address for each in first + second} - everywhere <= own, (first, second)
    assert second, "the test sees nothing"
