"""One run under every launcher: the same losses, step by step, whoever starts the ranks."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.commands import Command
from tests.cluster.hosts import Lab
from tests.cluster.slurm import Slurm
from tests.cluster.training import PORT, Training

HOSTS = ("node1", "node2")
NUM_STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launchers")


def training(lab: Lab, root: Path, name: str) -> Training:
    return Training(lab, root, name, run={"num_steps": NUM_STEPS})


@pytest.fixture(scope="module")
def expected(session_lab: Lab, root: Path) -> dict[int, float]:
    """The losses under the default launcher."""
    run = training(session_lab, root, "pdsh")
    finish(run, [run.start(HOSTS)])
    assert list(run.losses()) == list(range(1, NUM_STEPS + 1))
    return run.losses()


def finish(run: Training, commands: list[Command]) -> None:
    """Until the run is done, with a process of its own on every host."""
    used: set[str] = set()
    while any(command.poll() is None for command in commands):
        used.update(host for host in HOSTS if run.lab.processes(host, "python", "distill.py", str(run.config)))
        time.sleep(0.2)
    for command in commands:
        run.wait(command)
    assert used == set(HOSTS)


def openmpi(run: Training) -> list[Command]:
    return [run.start(HOSTS, launcher="openmpi", launcher_args="--allow-run-as-root")]


def torchrun(run: Training) -> list[Command]:
    script, _ = run.script(len(HOSTS))
    common = ["--nnodes=2", "--nproc-per-node=1", f"--master-addr={run.lab.address('node1')}", f"--master-port={PORT}"]
    return [
        run.lab.start(host, ["torchrun", *common, f"--node-rank={number}", *script], folder=run.work)
        for number, host in enumerate(HOSTS)
    ]


@pytest.mark.parametrize("launch", [openmpi, torchrun])
def test_launchers_over_ssh_or_by_hand(
    lab: Lab, root: Path, expected: dict[int, float], launch: Callable[[Training], list[Command]]
) -> None:
    run = training(lab, root, launch.__name__)
    finish(run, launch(run))
    assert run.losses() == expected


def batch_script(run: Training, line: list[str]) -> Path:
    path = run.work / "job.sh"
    directives = "#SBATCH --nodes=2 --ntasks-per-node=1 --output=job.out\n"  # two nodes, so no host runs both ranks
    path.write_text(f"#!/bin/bash\n{directives}exec {shlex.join(line)}\n")
    return path


def srun(run: Training) -> list[str]:
    script, _ = run.script(len(HOSTS))
    return ["srun", "--kill-on-bad-exit=1", "python", *script]


def deepspeed_slurm(run: Training) -> list[str]:
    script, _ = run.script(len(HOSTS))
    hostfile = str(run.lab.hostfile(1, HOSTS))
    words = ["deepspeed", "--hostfile", hostfile, "--launcher", "slurm", "--launcher_args=--kill-on-bad-exit=1"]
    return [*words, "--no_ssh_check", f"--master_addr={run.lab.address('node1')}", *script]


@pytest.mark.parametrize("line", [srun, deepspeed_slurm])
def test_launchers_within_a_job(
    slurm: Slurm,
    root: Path,
    expected: dict[int, float],
    line: Callable[[Training], list[str]],
) -> None:
    run = training(slurm.lab, root, line.__name__)
    job = slurm.submit([f"--nodelist={','.join(HOSTS)}", str(batch_script(run, line(run)))], run.work)
    slurm.wait_for_state(job, "COMPLETED", seconds=180)
    assert run.losses() == expected, slurm.describe(job)
