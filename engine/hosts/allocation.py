"""The hosts that a launch should have, from a hostfile or from Slurm, and how to start one rank on each."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.errors import ConfigError
from engine.rendezvous import in_slurm_step


def read_hostfile(path: str) -> dict[str, int]:
    """Slots of each host, as deepspeed reads them. Raises ConfigError."""
    slots: dict[str, int] = {}
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as problem:
        raise ConfigError(f"--hostfile {path}: cannot be read ({problem.strerror})") from problem
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        found = re.match(r"(\S+)\s+slots=(\d+)", line.strip())
        if found is None or found[1] in slots:
            raise ConfigError(f"{path}:{number}: expected each host once, as in 'node1 slots=8', found {line!r}")
        slots[found[1]] = int(found[2])
    if not slots:
        raise ConfigError(f"{path}: names no host; expected lines such as 'node1 slots=8'")
    return slots


def expand(nodes: str) -> list[str]:
    """The names in a Slurm node list: n[1-2,07],head gives n1, n2, n07, head."""
    names = []
    for stem, ranges, ending in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[]*)", nodes):
        if not ranges:
            names.append(stem + ending)
            continue
        for part in ranges.split(","):
            first, _, last = part.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            names += [f"{stem}{number:0{len(first)}d}{ending}" for number in numbers]
    return names


def hosts_of_ranks(environment: Mapping[str, str], hostfile: str | None = None) -> list[str]:
    """The host that each rank should be on, where the launch says so: ranks fill one host after the other."""
    if hostfile is not None:
        return [host for host, slots in read_hostfile(hostfile).items() for _ in range(slots)]
    if not in_slurm_step(environment):
        return []
    names = expand(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))
    tasks: list[int] = []
    for each in environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", each):
            tasks += [int(found[1])] * int(found[2] or 1)
    return [name for name, count in zip(names, tasks) for _ in range(count)] if len(tasks) == len(names) else []


def launch_words(
    environment: Mapping[str, str], command: Sequence[str], hostfile: str | None, world_size: int | None
) -> list[str] | None:
    """What starts ``command`` (a script and its arguments) on all hosts; None when a launcher has done so already.

    Raises ConfigError where there are no hosts to start it on.
    """
    if "RANK" in environment or "OMPI_COMM_WORLD_RANK" in environment or in_slurm_step(environment):
        return None
    if hostfile is not None:
        return [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile, *command]
    if "SLURM_JOB_ID" in environment:
        num_nodes = int(environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
        # a rank a device where the job has that many tasks, else one a host: enough to find an odd one
        num_tasks = int(environment.get("SLURM_NTASKS", "0"))
        if num_tasks != world_size or num_tasks % num_nodes:
            num_tasks = num_nodes
        tasks = [f"--nodes={num_nodes}", f"--ntasks={num_tasks}", f"--ntasks-per-node={num_tasks // num_nodes}"]
        return ["srun", *tasks, "--kill-on-bad-exit=1", sys.executable, "-u", *command]
    raise ConfigError(
        "--cluster needs hosts: run it inside a Slurm allocation (salloc, sbatch), or give --hostfile HOSTS, or start "
        "it as a run is started (srun, torchrun, deepspeed --hostfile HOSTS launch/preflight.py ...)"
    )
