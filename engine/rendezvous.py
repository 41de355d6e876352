"""Which rank this process is and where the ranks meet, from what the launcher left in the environment.

deepspeed (pdsh) and torchrun say it all: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. ``srun`` and
DeepSpeed's slurm launcher leave nothing but Slurm's variables, ``mpirun`` Open MPI's. What is missing is worked out
here, so that every rank comes to the same answer without asking the others; what is set already is never changed.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from engine.errors import ConfigError

FIRST_PORT, NUM_PORTS = 15_000, 15_000
"""Below the range from which Linux takes ports for outgoing connections."""
INTERACTIVE_STEP = 0xFFFF_FFF0
"""Slurm's numbers from here on are of steps that are no parallel program: the batch script, an interactive shell."""


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    local_rank: int


def read_ranks() -> Ranks:
    """The launcher's word; one rank alone when there is no launcher. Completes the environment for torch.distributed.

    Raises ConfigError when the launcher says which rank this is but not where rank 0 can be found.
    """
    environment = os.environ
    if "RANK" not in environment:
        environment.update(from_slurm(environment) or from_open_mpi(environment) or alone())
    rank = int(environment["RANK"])
    ranks = Ranks(rank, int(environment["WORLD_SIZE"]), int(environment.setdefault("LOCAL_RANK", str(rank))))
    if ranks.world_size > 1 and not _is_loopback(environment.get("MASTER_ADDR", "localhost")):
        _choose_interface(environment["MASTER_ADDR"])
    return ranks


def launched_rank() -> int:
    """The rank of this process, 0 when it has no launcher. Changes nothing."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", *(["SLURM_PROCID"] if in_slurm_step(os.environ) else []))
    return int(next((os.environ[name] for name in names if name in os.environ), "0"))


def launched_local_rank() -> int:
    """The number of this process on its host, 0 when it has no launcher. Changes nothing."""
    names = (
        "LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        *(["SLURM_LOCALID"] if in_slurm_step(os.environ) else []),
    )
    return int(next((os.environ[name] for name in names if name in os.environ), "0"))


def in_slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process: a batch script or a shell in an allocation has Slurm's variables as well."""
    return "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_ID", INTERACTIVE_STEP)) < INTERACTIVE_STEP


def from_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """For a process started by srun; nothing for others."""
    if not in_slurm_step(environment):
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    name = f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}"
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": environment.get("MASTER_PORT") or port_of(name),
    }


def first_host(nodes: str) -> str:
    """The first of a Slurm node list: node[3-5,7],other gives node3. It is where srun puts task 0."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert first is not None
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group())


def from_open_mpi(environment: Mapping[str, str]) -> dict[str, str]:
    """For a process started by mpirun; nothing for others.

    Open MPI does not say where rank 0 is. It is taken to be where mpirun runs, and rank 0 checks that it is.
    """
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return {}
    address = environment.get("MASTER_ADDR") or _of_mpirun(environment)
    return {
        "RANK": environment["OMPI_COMM_WORLD_RANK"],
        "WORLD_SIZE": environment["OMPI_COMM_WORLD_SIZE"],
        "LOCAL_RANK": environment["OMPI_COMM_WORLD_LOCAL_RANK"],
        "MASTER_ADDR": address,
        "MASTER_PORT": environment.get("MASTER_PORT") or port_of(environment.get("PMIX_NAMESPACE", address)),
    }


def _of_mpirun(environment: Mapping[str, str]) -> str:
    if environment["OMPI_COMM_WORLD_SIZE"] == environment["OMPI_COMM_WORLD_LOCAL_SIZE"]:
        return "127.0.0.1"
    found = re.search(r";tcp://([\d.,]+):", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    addresses = [] if found is None else [part for part in found[1].split(",") if not _is_loopback(part)]
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    if not addresses or (environment["OMPI_COMM_WORLD_RANK"] == "0" and not own & set(addresses)):
        raise ConfigError(
            "mpirun does not say where rank 0 is; give its address: deepspeed --launcher openmpi "
            "--launcher_args='-x MASTER_ADDR=ADDRESS', or run the command on the first host of the hostfile"
        )
    return addresses[0]


def is_restart() -> bool:
    """Whether Slurm or torchrun starts this job anew by itself."""
    return any(
        os.environ.get(name, "0") not in ("", "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    )


def alone() -> dict[str, str]:
    """A rendezvous of one, so that ``python launch/distill.py`` needs no launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def port_of(name: str) -> str:
    """The same port on all ranks of a job, and seldom that of another job."""
    return str(FIRST_PORT + zlib.crc32(name.encode()) % NUM_PORTS)


def _is_loopback(address: str) -> bool:
    return address == "localhost" or address.startswith("127.") or address == "::1"


def _choose_interface(master: str) -> None:
    """Tell gloo which interface to use. It takes the one that the own hostname belongs to, and many hosts map their
    own name to a loopback address, which no other host can reach."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        family, _, _, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
    except OSError as problem:
        raise ConfigError(
            f"{socket.gethostname()}: the address of rank 0, MASTER_ADDR={master}, is not known here ({problem}); "
            "give an address that all hosts know"
        ) from problem
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        try:
            probe.connect(target)
            own = probe.getsockname()[0]
        except OSError:
            return  # no way there: joining the group tells it better
    if found := _interfaces(family, own):
        os.environ["GLOO_SOCKET_IFNAME"] = found[0]


def _interfaces(family: int, own: str) -> list[str]:
    """The interface with address ``own``. If that is a loopback (rank 0's own name often leads there), those that
    reach beyond this host, virtual ones last."""
    addresses = {
        name: [part.address for part in parts if part.family == family]
        for name, parts in psutil.net_if_addrs().items()
        if psutil.net_if_stats()[name].isup
    }
    if not _is_loopback(own):
        return [name for name, parts in addresses.items() if own in parts]
    outward = [name for name, parts in addresses.items() if any(not _is_loopback(part) for part in parts)]
    return sorted(outward, key=lambda name: name.startswith(("docker", "virbr", "br-", "veth")))
