"""Slurm over the hosts of a lab: slurmctld and munged on the head, a slurmd on every node.

A lost node is noticed in about ten seconds. The GPUs are two null devices a node: what is scheduled is real, they are
not. Jobs' programs live in the node's own processes, so faults of hosts are faults of nodes.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.commands import Command
from tests.cluster.hosts import HEAD, ROOT, SBIN, Lab, wait_until

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
GPUS_PER_NODE = 2
CPUS_PER_NODE = 4
CONFIG = """\
ClusterName=lab
SlurmctldHost={head}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=1,defer_batch
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=5
MessageTimeout=3
TCPTimeout=2
KillWait=5
MinJobAge=3600
JobRequeue=1
GresTypes=gpu
"""


def missing() -> str | None:
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    if absent := [program for program in PROGRAMS if shutil.which(program, path=path) is None]:
        return f"no {', '.join(absent)} here: run tests/cluster/install.sh"
    return None


class Slurm:
    """The daemons start with the first :meth:`make_ready` and die with the hosts."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.folder = lab.folder / "slurm"
        self._daemons: dict[tuple[str, str], Command] = {}
        self._write_files()

    def _write_files(self) -> None:
        for folder in ("etc", "state", "spool", "log", "munge", "devices"):
            (self.folder / folder).mkdir(parents=True, mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        for number in range(GPUS_PER_NODE):
            os.mknod(self.folder / "devices" / f"nvidia{number}", 0o20666, os.makedev(1, 3))
        lines = [CONFIG.format(head=HEAD, address=self.lab.address(HEAD), folder=self.folder)]
        for node in self.lab.nodes:
            lines.append(
                f"NodeName={node} NodeAddr={self.lab.address(node)} CPUs={CPUS_PER_NODE} Sockets=1 "
                f"CoresPerSocket={CPUS_PER_NODE} ThreadsPerCore=1 RealMemory=4000 Gres=gpu:{GPUS_PER_NODE}\n"
            )
        lines.append(f"PartitionName=main Nodes={','.join(self.lab.nodes)} Default=YES MaxTime=INFINITE State=UP\n")
        etc = self.folder / "etc"
        (etc / "slurm.conf").write_text("".join(lines))
        devices = f"{self.folder}/devices/nvidia[0-{GPUS_PER_NODE - 1}]"
        (etc / "gres.conf").write_text(f"NodeName={','.join(self.lab.nodes)} Name=gpu File={devices}\n")
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # named, slurmd does not look for one and fail
        self.lab.environment["SLURM_CONF"] = str(etc / "slurm.conf")

    def make_ready(self) -> None:
        """Every daemon up, no job, every node idle."""
        munge = self.folder / "munge"
        paths = [f"--{name}={munge / name}" for name in ("socket", "pid-file", "seed-file", "log-file")]
        self._keep(HEAD, ["munged", "--foreground", f"--key-file={munge / 'key'}", *paths])
        wait_until((munge / "socket").exists, 10, "munged")
        self._keep(HEAD, ["slurmctld", "-D"])
        for node in self.lab.nodes:
            self.start_node(node)
        self.cancel_all()
        self.wait_for_nodes()

    def start_node(self, node: str) -> None:
        """Start slurmd on a node that was restarted."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self._keep(node, ["slurmd", "-D"])

    def _keep(self, host: str, words: list[str]) -> None:
        running = self._daemons.get((host, words[0]))
        if running is None or running.poll() is not None:
            log = self.folder / "log" / f"{words[0]}-{host}.out"
            self._daemons[host, words[0]] = self.lab.start(host, words, log=log)

    def kill_controller(self) -> None:
        """SIGKILL; the next :meth:`make_ready` or :meth:`start_controller` brings it back with its saved state."""
        self._daemons.pop((HEAD, "slurmctld")).kill()

    def start_controller(self) -> None:
        self._keep(HEAD, ["slurmctld", "-D"])

    def wait_for_nodes(self, seconds: float = 60.0) -> None:
        """Until every node is idle. One that was set down comes back when its slurmd reports."""
        wait_until(lambda: set(self.node_states().values()) == {"idle"}, seconds, f"idle nodes; logs: {self.folder}")

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo --noheader --Node --format='%N %T'", check=False).splitlines()
        return dict(line.split() for line in lines if len(line.split()) == 2)

    def run(self, command: str | Sequence[str], *, folder: Path = ROOT, check: bool = True) -> str:
        """A Slurm command on the head."""
        return self.lab.run(HEAD, command, folder=folder, check=check, timeout=60)

    def submit(self, words: Sequence[str], folder: Path, env: dict[str, str] | None = None) -> int:
        """``sbatch words`` from ``folder``; the job's number."""
        output = self.lab.run(HEAD, ["sbatch", "--parsable", *words], folder=folder, env=env)
        return int(output.strip().splitlines()[-1].split(";")[0])

    def field(self, job: int, name: str) -> str:
        """A field of ``scontrol show job``, such as JobState, RestartCnt, NodeList or Reason; "" where it has none."""
        found = re.search(rf"\b{name}=(\S*)", self.run(f"scontrol --oneliner show job {job}", check=False))
        return found[1] if found else ""

    def state(self, job: int) -> str:
        return self.field(job, "JobState")

    def wait_for_state(self, job: int, *states: str, seconds: float = 60.0) -> str:
        """Raises AssertionError at once when the job ends in another state."""

        def reached() -> str:
            state = self.state(job)
            assert state in states or state not in ENDED, f"job {job}: {state}\n{self.describe(job)}"
            return state if state in states else ""

        return str(wait_until(reached, seconds, f"job {job} to be {' or '.join(states)}"))

    def describe(self, job: int) -> str:
        """All that Slurm says of the job, and its output."""
        text = self.run(f"scontrol show job {job}", check=False)
        output = Path(self.field(job, "StdOut"))
        return text + (output.read_text(errors="replace") if output.is_file() else "")

    def queue(self) -> list[int]:
        """Jobs that wait or run; an array's waiting part counts once, under its first number."""
        return [int(word) for word in self.run("squeue --noheader --format=%A", check=False).split()]

    def start_now(self, job: int) -> None:
        """A requeued job otherwise waits two minutes."""
        self.run(f"scontrol update JobId={job} StartTime=now")

    def requeue(self, job: int) -> None:
        self.run(f"scontrol requeue {job}")

    def cancel(self, job: int, *words: str) -> None:
        self.run(["scancel", *words, str(job)])

    def cancel_all(self) -> None:
        self.run("scancel --user=root", check=False)
        wait_until(lambda: not self.run("squeue --noheader", check=False).strip(), 60, "an empty queue")
