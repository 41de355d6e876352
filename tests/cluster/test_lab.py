"""The hosts are what the tests on them take them for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import faults
from tests.cluster.hosts import HEAD, ROOT, Lab, wait_until
from tests.cluster.network import FOLDERS, call
from tests.cluster.slurm import Slurm

PING = "ping -c 1 -W 1 {}"


def can_reach(lab: Lab, one: str, other: str) -> bool:
    return "1 received" in lab.run(one, PING.format(lab.address(other)), check=False)


def test_every_host_is_reached_by_ssh_under_its_own_name(lab: Lab) -> None:
    for host in [HEAD, *lab.nodes]:
        for other in lab.nodes:
            assert lab.run(host, f"ssh {other} hostname").strip() == other
    answers = lab.run("node1", f"pdsh -R ssh -w {','.join(lab.nodes)} hostname -I").splitlines()
    assert {line.strip() for line in answers} == {f"{node}: {lab.address(node)}" for node in lab.nodes}


def test_programs_come_from_this_environment_and_this_tree(lab: Lab) -> None:
    ask = "python -c 'import sys, engine; print(sys.prefix, engine.__file__)'"
    expected = f"{sys.prefix} {ROOT / 'engine' / '__init__.py'}"
    assert lab.run("node1", ask).strip() == expected
    assert lab.run("node1", ["ssh", "node2", ask]).strip() == expected


def test_hosts_have_processes_and_memory_of_their_own(lab: Lab) -> None:
    sleeper = lab.start("node1", "touch /dev/shm/own /run/own && exec sleep 1000")
    wait_until(lab.inside("node1", Path("/run/own")).exists, 10, "the sleeper")
    assert "sleep" not in lab.run("node2", "ps -eo comm; ls /dev/shm /run")
    assert "sleep" in lab.run("node1", "ps -eo comm")
    assert lab.processes("node1", "sleep", "1000") == [sleeper.pid]
    assert lab.processes("node2", "sleep") == []
    lab.run("node1", "echo mine > $FOLDER/file", env={"FOLDER": str(lab.local)})
    assert (lab.inside("node1", lab.local) / "file").read_text() == "mine\n"
    assert not (lab.inside("node2", lab.local) / "file").exists()


def test_a_folder_is_shared_unless_a_host_has_another_view_of_it(lab: Lab, tmp_path: Path) -> None:
    shared, other = tmp_path / "shared", tmp_path / "other"
    for folder in (shared, other):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    ask = ["cat", str(shared / "name")]
    assert [lab.run(node, ask) for node in lab.nodes] == ["shared"] * 3
    lab.view("node2", shared, other, read_only=True)
    lab.view("node3", shared)
    assert lab.run("node1", ask) == "shared"
    assert lab.run("node1", ["ssh", "node2", *ask]) == "other"
    assert "Read-only" in lab.run("node2", f"touch {shared}/new", check=False)
    assert lab.run("node3", ["ls", str(shared)]) == ""
    lab.unview("node2", shared)
    assert lab.run("node2", ask) == "shared"
    lab.reset()
    assert lab.run("node3", ask) == "shared"


def test_a_partition_silences_a_host_until_it_is_healed(lab: Lab) -> None:
    assert can_reach(lab, "node1", "node2")
    faults.partition(lab, "node2")
    assert not can_reach(lab, "node1", "node2")
    assert not can_reach(lab, "node2", "node1")
    assert can_reach(lab, "node1", "node3")
    faults.heal(lab, "node2")
    wait_until(lambda: can_reach(lab, "node1", "node2"), 10, "the healed link")


def test_a_half_open_link_carries_packets_one_way(lab: Lab) -> None:
    def send(sender: str, receiver: str) -> str:
        """What the receiver got of one datagram."""
        listen = "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(2)\n"
        listen += "s.bind(('', 5555)); open('/run/bound', 'w').close()\n"
        listen += "try: print(s.recv(9).decode())\nexcept TimeoutError: print('nothing')"
        lab.run(receiver, "rm -f /run/bound")
        listener = lab.start(receiver, ["python3", "-c", listen])
        wait_until(lab.inside(receiver, Path("/run/bound")).exists, 10, "the listener")
        lab.run(sender, f"echo -n hello > /dev/udp/{lab.address(receiver)}/5555")
        assert listener.wait() == 0
        return listener.output().strip()

    lab.run("node2", PING.format(lab.address("node1")))
    faults.half_open(lab, "node2")
    assert send("node2", "node1") == "hello"
    assert send("node1", "node2") == "nothing"


def test_two_hosts_that_cannot_talk_still_reach_a_third(lab: Lab) -> None:
    faults.pair(lab, "node1", "node2")
    assert not can_reach(lab, "node1", "node2")
    assert can_reach(lab, "node3", "node1")
    assert can_reach(lab, "node3", "node2")
    faults.heal(lab, "node1")
    faults.heal(lab, "node2")
    assert can_reach(lab, "node1", "node2")


def test_a_slow_link_is_limited_at_both_ends(lab: Lab) -> None:
    faults.rate(lab, "node2", "20mbit")
    limited = call("tc", "qdisc", "show", "dev", lab.network.cable(lab.hosts["node2"].number))
    assert "rate 20Mbit" in limited
    assert "rate 20Mbit" in lab.run("node2", "tc qdisc show dev eth0")
    faults.heal(lab, "node2")
    assert "tbf" not in lab.run("node2", "tc qdisc show dev eth0")


@pytest.mark.parametrize("fault", [faults.crash, faults.power])
def test_a_dead_host_comes_back(lab: Lab, fault: object) -> None:
    assert callable(fault)
    victim = lab.start("node2", "exec sleep 1000")
    pid = victim.pid
    fault(lab, "node2")
    assert victim.wait(10) != 0
    assert not Path(f"/proc/{pid}").exists()
    assert lab.run("node1", "ssh node2 true; echo $?").strip().endswith("255")
    lab.restart("node2")
    assert lab.run("node1", "ssh node2 hostname").strip() == "node2"


def test_a_crashed_host_answers_and_one_without_power_does_not(lab: Lab) -> None:
    faults.crash(lab, "node2")
    assert "refused" in lab.run("node1", f"exec 3<>/dev/tcp/{lab.address('node2')}/22", check=False)
    faults.power(lab, "node3")
    assert "refused" not in lab.run("node1", f"timeout 2 bash -c ': <>/dev/tcp/{lab.address('node3')}/22'", check=False)


def test_two_labs_live_side_by_side_and_leave_nothing(session_lab: Lab) -> None:
    with Lab(1) as other:
        index = other.network.index
        assert index != session_lab.network.index
        assert other.run(HEAD, "ssh node1 hostname -I").strip() == other.address("node1")
    assert remains(index) == ""
    assert session_lab.run(HEAD, "ssh node1 hostname").strip() == "node1"


def test_the_next_lab_takes_away_what_a_killed_one_left(session_lab: Lab, tmp_path: Path) -> None:
    hold = "import time; from tests.cluster.hosts import Lab\n"
    hold += "with Lab(1) as lab: print(lab.network.index, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        index = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
    assert remains(index) != ""
    with Lab(1):
        pass
    assert remains(index) == ""


def test_a_lab_that_cannot_start_leaves_nothing(session_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    labs = []

    def fail(lab: Lab, name: str) -> None:
        labs.append(lab)
        raise RuntimeError("no sshd")

    monkeypatch.setattr(Lab, "_wait_for_ssh", fail)
    with pytest.raises(RuntimeError, match="no sshd"), Lab(1):
        pass
    assert remains(labs[0].network.index) == ""


def remains(index: int) -> str:
    names = call("ip", "netns", "list").split() + call("ip", "-brief", "link").replace("@", " ").split()
    names += [path.name for path in FOLDERS.iterdir()]
    return " ".join(name for name in names if name.startswith((f"lab{index}-", f"lab{index}n", f"cluster-lab-{index}"))
                    or name == f"lab{index}")  # fmt: skip


def test_a_job_runs_on_two_nodes(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text(
        "#!/bin/bash\nsrun bash -c 'echo $SLURM_PROCID $(hostname) $CUDA_VISIBLE_DEVICES'\n"
    )
    job = slurm.submit(
        ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--output=job.out", "job.sh"], tmp_path
    )
    slurm.wait_for_state(job, "COMPLETED")
    ranks = sorted((tmp_path / "job.out").read_text().splitlines())
    nodes = {line.split()[1] for line in ranks}
    assert [line.split()[0] for line in ranks] == ["0", "1"]
    assert len(nodes) == 2
    assert nodes <= set(slurm.lab.nodes)
    assert all(line.split()[2] == "0" for line in ranks)


def test_a_job_of_a_lost_node_is_requeued_elsewhere(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "job.sh").write_text("#!/bin/bash\nhostname\n[ ${SLURM_RESTART_COUNT:-0} -gt 0 ] || sleep 1000\n")
    words = ["--requeue", "--open-mode=append", "--output=job.out", "job.sh"]
    job = slurm.submit(words, tmp_path)
    slurm.wait_for_state(job, "RUNNING")
    lost = slurm.field(job, "NodeList")
    wait_until(lambda: lost in (tmp_path / "job.out").read_text(), 10, "the job's first line")
    faults.power(slurm.lab, lost)
    slurm.wait_for_state(job, "PENDING")
    slurm.start_now(job)
    slurm.wait_for_state(job, "COMPLETED")
    first, second = (tmp_path / "job.out").read_text().split()
    assert first == lost
    assert second in set(slurm.lab.nodes) - {lost}
    slurm.lab.restart(lost)
    slurm.start_node(lost)
    slurm.wait_for_nodes()
