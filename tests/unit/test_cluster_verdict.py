"""What preflight says of a cluster, on figures of hosts that are not there; who starts it, and where ranks belong."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from engine.hosts.allocation import expand, hosts_of_ranks, launch_words
from engine.hosts.facts import HostFacts
from engine.hosts.measure import AllReduce, Speed
from engine.hosts.verdict import SOURCE, Cluster, Need, judge

FACTS = {("package", name): "1.0" for name in ("torch", "deepspeed", "transformers")} | {("source", SOURCE): "abc"}
SPEED = Speed("", 0, 7e14, 3e12, 79 * 10**9, 80 * 10**9, 1 << 34, 10**13, 1e-4, 2e-4, 2.5e9)


def lines_of(num_hosts: int, odd: dict[str, Any], **changes: Any) -> tuple[list[str], bool]:
    """Hosts all alike but for what ``odd`` replaces in node042."""
    names = [f"node{number:03d}" for number in range(1, num_hosts + 1)]
    speeds = [
        replace(SPEED, host=name, rank=rank, **(odd if name == "node042" else {})) for rank, name in enumerate(names)
    ]
    hosts = [HostFacts(name, rank, FACTS) for rank, name in enumerate(names)]
    whole = Cluster("cuda", "runs", hosts, [], speeds, [AllReduce(64 << 20, 0.004, num_hosts)], Need(10**10, 10**9, 3))
    return judge(replace(whole, **changes))


def test_of_a_hundred_hosts_the_odd_one_is_named_and_the_rest_summed_up() -> None:
    lines, ready = lines_of(100, {"matmul_flops": 4.2e14})
    assert ready
    assert "Cluster     100 hosts, 100 ranks, cuda over NCCL: node[001-100]" in lines
    assert "Slowest     node042, 0.60 of the median" in lines
    assert "  node042: computes or copies at 0.60 of the median host's speed" in lines
    assert lines[lines.index("") + 2].split()[:3] == ["node042", "1", "0.60"]
    assert len(lines) < 40
    assert max(map(len, lines)) <= 80


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    assert AllReduce(10**9, 0.5, 4).bus_bytes == 2 * 3 / 4 * 2e9
    assert AllReduce(10**9, 0.5, 1).bus_bytes == 0


@pytest.mark.parametrize(
    ("odd", "changes", "ready", "words"),
    [
        ({"clock_seconds": -1.5}, {}, True, "node042: its clock is -1.5 s off rank 0's"),
        ({"clock_seconds": -31.0}, {}, False, "node042: its clock is -31.0 s off rank 0's"),
        ({"link_bytes": 1e9}, {}, True, "node042: its link has 0.40 of the median's bandwidth"),
        ({"shm_bytes": 60 << 20}, {}, True, "node042: /dev/shm has 62.9 MB free, 67.1 MB are used"),
        ({"free_bytes": 40 * 10**9}, {}, True, "node042: GPU memory is in use by another program"),
        ({"free_bytes": 9 * 10**9}, {}, False, "node042: 9.0 GB of GPU memory free, the run needs 10.0 GB"),
        ({"disk_bytes": 10**8}, {}, False, "runs: 100.0 MB free, 3 checkpoints need 1.0 GB"),
        ({}, {"need": None, "plan_problem": "the batch does not divide"}, False, "  the batch does not divide"),
    ],
)
def test_what_is_wrong_is_said(odd: dict[str, Any], changes: dict[str, Any], ready: bool, words: str) -> None:
    lines, said = lines_of(50, odd, **changes)
    assert said is ready
    assert any(words in line for line in lines), lines
    assert ("Verdict     YES, the hosts are ready for this run" in lines) is ready


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("node3", ["node3"]),
        ("n[1-2,07],head", ["n1", "n2", "n07", "head"]),
        ("n[098-101].x,m[1,3]", ["n098.x", "n099.x", "n100.x", "n101.x", "m1", "m3"]),
    ],
)
def test_slurm_node_lists(nodes: str, expected: list[str]) -> None:
    assert expand(nodes) == expected


def test_where_each_rank_belongs(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# ours\nb slots=2\n\na slots=1\n")
    assert hosts_of_ranks({}, str(tmp_path / "hosts")) == ["b", "b", "a"]
    step = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-3]"}
    assert hosts_of_ranks(step | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}) == ["n1", "n1", "n2", "n2", "n3"]
    assert hosts_of_ranks({"SLURM_JOB_NODELIST": "n[1-3]"}) == []
    (tmp_path / "hosts").write_text("a\n")
    with pytest.raises(ConfigError, match=r"hosts:1: expected each host once"):
        hosts_of_ranks({}, str(tmp_path / "hosts"))


def test_who_starts_the_ranks() -> None:
    command = ["preflight.py", "--cluster"]
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS": "32", "SLURM_PROCID": "0"}
    one_each = launch_words(job, command, None, 8)
    assert one_each is not None
    assert one_each[:4] == ["srun", "--nodes=4", "--ntasks=4", "--ntasks-per-node=1"]
    assert one_each[-2:] == command
    one_a_device = launch_words(job, command, None, 32)
    assert one_a_device is not None
    assert one_a_device[2:4] == ["--ntasks=32", "--ntasks-per-node=8"]
    over_ssh = launch_words({}, command, "hosts", 8)
    assert over_ssh == [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "hosts", *command]
    for started in ({"RANK": "0"}, job | {"SLURM_STEP_ID": "0"}, {"OMPI_COMM_WORLD_RANK": "0"}):
        assert launch_words(started, command, "hosts", 8) is None
    with pytest.raises(ConfigError, match="--cluster needs hosts: run it inside a Slurm allocation"):
        launch_words({}, command, None, None)
