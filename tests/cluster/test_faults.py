"""What a cluster does to a run: each fault ends it in time, names who is at fault, and costs nothing that was saved."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import complete_checkpoints
from tests.cluster import faults
from tests.cluster.commands import Command
from tests.cluster.hosts import Lab, wait_until
from tests.cluster.slurm import Slurm
from tests.cluster.training import Training

HOSTS = ("node1", "node2")
NUM_STEPS = 24
PACE_SECONDS = 0.3
TIMEOUT_SECONDS = 12.0
GONE_SECONDS = 30.0
"""After a fault that is noticed at once."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


def training(lab: Lab, root: Path, name: str, pace_seconds: float = PACE_SECONDS, **sections: Any) -> Training:
    sections = {"cluster": {"timeout_seconds": TIMEOUT_SECONDS}, "checkpoint": {"every_steps": 4}} | sections
    run = {"num_steps": NUM_STEPS} | sections.pop("run", {})
    return Training(lab, root, name, pace_seconds=pace_seconds, run=run, **sections)


@pytest.fixture(scope="module")
def undisturbed(session_lab: Lab, root: Path) -> dict[int, float]:
    """The losses of a run to which nothing happens."""
    run = training(session_lab, root, "calm", pace_seconds=0.0)
    run.wait(run.start(HOSTS))
    assert list(run.losses()) == list(range(1, NUM_STEPS + 1))
    return run.losses()


def ranks(run: Training, host: str) -> list[int]:
    return run.lab.processes(host, "distill.py", "--local_rank", str(run.config)) if run.lab.is_up(host) else []


def all_gone(run: Training) -> bool:
    hosts = [host for host in run.lab.hosts if run.lab.is_up(host)]
    return not any(run.lab.processes(host, str(run.config)) or run.lab.processes(host, "guard.py") for host in hosts)


def ends(run: Training, command: Command, seconds: float, note: Callable[..., None]) -> str:
    """Until launcher, ranks and guards are gone; what was said. The exit code is not 0."""
    began = time.monotonic()
    code = command.wait(seconds)
    wait_until(lambda: all_gone(run), max(1.0, seconds - (time.monotonic() - began)), "the end of all ranks")
    note("seconds_to_the_end", round(time.monotonic() - began, 1))
    assert code != 0, command.output()
    return command.output()


def resumes(run: Training, undisturbed: dict[int, float], hosts: tuple[str, ...] = HOSTS) -> None:
    """The same command again comes to the end that an undisturbed run has, bit for bit."""
    run.wait(run.start(hosts))
    assert run.losses() == undisturbed


def test_a_killed_rank(
    lab: Lab, root: Path, undisturbed: dict[int, float], record_property: Callable[..., None]
) -> None:
    run = training(lab, root, "killed")
    command = run.start(HOSTS)
    run.wait_for_step(6, command)
    (victim,) = ranks(run, "node2")
    os.kill(victim, signal.SIGKILL)
    said = ends(run, command, GONE_SECONDS, record_property)
    assert re.search(r"rank 1 on node2 has given no sign of life for \d+ s \(last heard: \w+, after step \d+\)", said)
    resumes(run, undisturbed)


def test_a_stopped_rank(lab: Lab, root: Path, record_property: Callable[..., None]) -> None:
    """SIGSTOP, as a device or a disk that never answers."""
    run = training(lab, root, "stopped")
    command = run.start(HOSTS)
    run.wait_for_step(5, command)
    (victim,) = ranks(run, "node2")
    os.kill(victim, signal.SIGSTOP)
    said = ends(run, command, TIMEOUT_SECONDS + GONE_SECONDS, record_property)
    assert re.search(r"\[rank 1 on node2\] error: no sign of life for 9 s; last heard: \w+, after step \d+", said)
    assert 'trainer.py", line' in said  # its stack
    assert complete_checkpoints(run.folder / "checkpoints")


@pytest.mark.parametrize("fault", [faults.power, faults.partition, faults.half_open])
def test_a_silent_host(
    lab: Lab,
    root: Path,
    undisturbed: dict[int, float],
    record_property: Callable[..., None],
    fault: Callable[[Lab, str], None],
) -> None:
    """pdsh leaves because ssh was told to ask whether its peer lives."""
    lab.configure_ssh(3)
    run = training(lab, root, fault.__name__)
    command = run.start(HOSTS)
    run.wait_for_step(6, command)
    fault(lab, "node2")
    said = ends(run, command, 2 * TIMEOUT_SECONDS + GONE_SECONDS, record_property)
    assert "rank 1 on node2 has given no sign of life" in said
    if fault is faults.power:
        lab.restart("node2")
        resumes(run, undisturbed)


@pytest.mark.parametrize("save_seconds", [0.0, 2.0], ids=["in_a_step", "in_a_checkpoint"])
def test_a_link_between_two_hosts_that_is_cut(
    lab: Lab, root: Path, record_property: Callable[..., None], save_seconds: float
) -> None:
    """All can talk to rank 0, so nobody is silent, and yet no step ends. What ranks say in a checkpoint waits as long
    as the others live, and they do: the second case hung for ever once."""
    lab.configure_ssh(3)
    name = f"pair{save_seconds:.0f}"
    every = {"every_steps": 4 if save_seconds else 1000}
    run = training(
        lab, root, name, save_seconds=save_seconds, data={"lanes": 6}, batch={"global_sequences": 12}, checkpoint=every
    )
    command = run.start(("node1", "node2", "node3"))
    run.wait_for_step(4, command)
    faults.pair(lab, "node2", "node3")
    said = ends(run, command, 2 * TIMEOUT_SECONDS + GONE_SECONDS, record_property)
    assert "a link between two hosts is cut" in said


def test_a_launcher_that_was_killed(lab: Lab, root: Path, undisturbed: dict[int, float]) -> None:
    """It can end nobody, on no host. Its ranks leave by themselves, and the next launch waits for their port."""
    run = training(lab, root, "orphans", pace_seconds=0.6)
    command = run.start(HOSTS)
    run.wait_for_step(5, command)
    command.kill()
    old = {host: ranks(run, host) for host in HOSTS}
    assert all(old.values())
    again = run.start(HOSTS)
    wait_until(lambda: not any(pid in ranks(run, host) for host in HOSTS for pid in old[host]), 60, "the orphans to go")
    run.wait(again)
    assert run.losses() == undisturbed


def test_a_slow_host_is_named(lab: Lab, root: Path) -> None:
    run = training(
        lab, root, "slow", pace_seconds=0.05, run={"num_steps": 100_000}, checkpoint={"every_steps": 100_000}
    )
    command = run.start(HOSTS)
    run.wait_for_step(3, command)
    (victim,) = ranks(run, "node2")
    enough = threading.Event()

    def hold_back() -> None:
        """Twenty of every twenty-five milliseconds."""
        while not enough.wait(0.005):
            os.kill(victim, signal.SIGSTOP)
            time.sleep(0.02)
            os.kill(victim, signal.SIGCONT)

    holding = threading.Thread(target=hold_back)
    holding.start()
    try:
        said = "slow, in seconds of a step's own work: rank 1 on node2"
        wait_until(lambda: said in (run.folder / "log.txt").read_text(), 60, f"{said!r} in log.txt")
    finally:
        enough.set()
        holding.join()
    assert all("ranks/median_own_seconds" in record for record in run.records()[-3:])


def test_a_run_folder_that_cannot_be_written(lab: Lab, root: Path, undisturbed: dict[int, float]) -> None:
    run = training(lab, root, "readonly")
    command = run.start(HOSTS)
    run.wait_for_step(5, command)
    checkpoints = run.folder / "checkpoints"
    lab.view("node1", checkpoints, checkpoints, read_only=True)
    assert command.wait(GONE_SECONDS) != 0
    assert "Read-only file system" in command.output()
    assert "the last complete checkpoint is" in command.output()
    lab.unview("node1", checkpoints)
    resumes(run, undisturbed)


def script(run: Training, nodes: int) -> Path:
    words, environment = run.script(nodes)
    path = run.work / "job.sh"
    exports = "".join(f"export {name}={value}\n" for name, value in environment.items())
    path.write_text(
        f"#!/bin/bash\n#SBATCH --nodes={nodes} --ntasks-per-node=1 --requeue --open-mode=append --output=job.out\n"
        f"{exports}exec srun --kill-on-bad-exit=1 python {' '.join(words)}\n"
    )
    return path


def test_slurm_moves_the_run_from_a_lost_node(
    slurm: Slurm, root: Path, undisturbed: dict[int, float], record_property: Callable[..., None]
) -> None:
    run = training(slurm.lab, root, "moved")
    job = slurm.submit(["--nodelist=node1,node2", str(script(run, 2))], run.work)
    wait_until(lambda: run.last_step() >= 6, 120, "step 6")
    faults.power(slurm.lab, "node2")
    began = time.monotonic()
    slurm.wait_for_state(job, "PENDING", seconds=60)
    record_property("seconds_to_requeue", round(time.monotonic() - began, 1))
    before = run.last_step()
    slurm.run(f"scontrol update JobId={job} ReqNodeList=")
    slurm.start_now(job)
    wait_until(lambda: run.last_step() > before, 120, "a new step")
    record_property("seconds_to_a_new_step", round(time.monotonic() - began, 1))
    slurm.wait_for_state(job, "COMPLETED", seconds=120)
    assert run.losses() == undisturbed


def test_the_ranks_of_a_cut_off_node_are_fenced(slurm: Slurm, root: Path, record_property: Callable[..., None]) -> None:
    """A run on one node needs nobody, so it trains on when its node is cut off, into the same folder."""
    calm = training(slurm.lab, root, "calm1", pace_seconds=0.0)
    calm.wait(calm.start(HOSTS[:1]))
    run = training(slurm.lab, root, "split", pace_seconds=2.0)
    batch = script(run, 1)
    batch.write_text(batch.read_text().replace("exec", "[ -z $SLURM_RESTART_COUNT ] || export PACE_SECONDS=0\nexec"))
    job = slurm.submit(["--nodelist=node1", str(batch)], run.work)
    wait_until(lambda: run.last_step() >= 3, 120, "step 3")
    commands = slurm.lab.processes("node1", "distill.py", str(run.config))
    (old,) = [pid for pid in commands if Path(f"/proc/{pid}/comm").read_text().startswith("python")]
    faults.partition(slurm.lab, "node1")
    slurm.wait_for_state(job, "PENDING", seconds=60)
    before = run.last_step()
    wait_until(lambda: run.last_step() > before, 30, "a step of the old rank: there will be two of the same run")
    slurm.run(f"scontrol update JobId={job} ReqNodeList=")
    slurm.start_now(job)
    wait_until(lambda: (run.folder / "incarnations" / "000002.json").exists(), 120, "the second launch")
    taken = time.monotonic()
    wait_until(lambda: old not in slurm.lab.processes("node1", str(run.config)), 30, "the old rank to leave")
    record_property("seconds_to_fence", round(time.monotonic() - taken, 1))
    slurm.wait_for_state(job, "COMPLETED", seconds=120)
    assert run.losses() == calm.losses()
    assert [(path / "COMPLETE").read_text() for path in complete_checkpoints(run.folder / "checkpoints")][-1] == "2"
    assert "this launch (number 1) has been replaced by another, number 2" in (run.folder / "log.txt").read_text()
