"""Who a process is, from what each launcher leaves in its environment."""

from __future__ import annotations

import os

import psutil
import pytest

from engine import rendezvous
from engine.errors import ConfigError
from engine.rendezvous import first_host, launched_rank, read_ranks

OWNED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")
SRUN = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost,node[3-4]",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "PMIX_NAMESPACE": "171",
    "OMPI_MCA_orte_hnp_uri": "171.0;tcp://127.0.0.1,192.0.2.44:5293;tcp6://[fd00::2]:57929",
}  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in OWNED and not name.startswith(("SLURM_", "OMPI_", "PMIX_"))
    }
    monkeypatch.setattr(os, "environ", kept)
    return monkeypatch


def test_a_launcher_that_says_it_all_is_believed() -> None:
    os.environ.update(SRUN, RANK="5", WORLD_SIZE="6", LOCAL_RANK="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1234")
    assert read_ranks() == rendezvous.Ranks(5, 6, 2)
    assert os.environ["MASTER_PORT"] == "1234"


def test_alone_without_a_launcher() -> None:
    assert read_ranks() == rendezvous.Ranks(0, 1, 0)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_a_task_of_srun() -> None:
    os.environ.update(SRUN)
    assert launched_rank() == 3
    assert read_ranks() == rendezvous.Ranks(3, 4, 1)
    assert os.environ["MASTER_ADDR"] == "localhost"
    port = os.environ["MASTER_PORT"]
    assert rendezvous.from_slurm(SRUN | {"SLURM_PROCID": "0"})["MASTER_PORT"] == port
    assert rendezvous.from_slurm(SRUN | {"SLURM_JOB_ID": "78"})["MASTER_PORT"] != port
    assert rendezvous.from_slurm(SRUN | {"MASTER_PORT": "999"})["MASTER_PORT"] == "999"


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967290"}, {"SLURM_STEP_ID": "4294967291"}], ids=str)
def test_a_shell_in_an_allocation_is_no_task(step: dict[str, str]) -> None:
    os.environ.update({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"} | step)
    assert launched_rank() == 0
    assert read_ranks().world_size == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"), ("node[3-5,7],other", "node3"), ("gpu-a[01-16]", "gpu-a01"), ("x,y", "x"),
        ("r[1-2]n[05,7]-ib,z", "r1n05-ib"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_process_of_mpirun() -> None:
    found = rendezvous.from_open_mpi(MPIRUN)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"]) == ("1", "2", "0")
    assert found["MASTER_ADDR"] == "192.0.2.44"
    assert rendezvous.from_open_mpi(MPIRUN | {"MASTER_ADDR": "node7"})["MASTER_ADDR"] == "node7"
    assert rendezvous.from_open_mpi(MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})["MASTER_ADDR"] == "127.0.0.1"


def test_rank_0_elsewhere_than_mpirun_is_told() -> None:
    with pytest.raises(ConfigError, match="-x MASTER_ADDR=ADDRESS"):
        rendezvous.from_open_mpi(MPIRUN | {"OMPI_COMM_WORLD_RANK": "0"})


def test_gloo_is_told_the_interface_that_leads_to_rank_0() -> None:
    outward = [
        (name, part.address)
        for name, parts in psutil.net_if_addrs().items()
        for part in parts
        if part.family.name == "AF_INET" and not part.address.startswith("127.")
    ]
    if not outward:
        pytest.skip("this machine has no network but its loopback")
    name, address = outward[0]
    os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR=address, MASTER_PORT="1")
    read_ranks()
    assert os.environ["GLOO_SOCKET_IFNAME"] == name


def test_an_address_that_this_host_does_not_know_is_told() -> None:
    os.environ.update(RANK="1", WORLD_SIZE="2", MASTER_ADDR="nowhere.invalid", MASTER_PORT="1")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=nowhere\.invalid, is not known here"):
        read_ranks()
