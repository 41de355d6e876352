"""Hosts that differ, on hosts of their own: found before a model loads, and named."""

from __future__ import annotations

import importlib.metadata
import shlex
from pathlib import Path

from tests import tiny
from tests.cluster.hosts import ROOT, Lab
from tests.cluster.slurm import Slurm
from tests.cluster.training import Training

HOSTS = ("node1", "node2")


def spoil(lab: Lab, root: Path, other: Path) -> None:
    """Give node2 another transformers, another checkout, other data and a run folder of its own."""
    ours = Path(str(importlib.metadata.distribution("transformers")._path))  # type: ignore[attr-defined]
    (other / "dist-info").mkdir(parents=True)
    (other / "dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.20.1\n")
    lab.view("node2", ours, other / "dist-info")
    source = ROOT / "engine" / "schedule.py"
    (other / "schedule.py").write_text(source.read_text() + "# a change that nobody has committed\n")
    lab.view("node2", source, other / "schedule.py")
    tiny.shards(other / "train", "causal_lm", seed=5)
    lab.view("node2", root / "train", other / "train")
    (root / "runs").mkdir()
    lab.view("node2", root / "runs")


def test_a_host_with_everything_otherwise_is_named_before_a_model_loads(lab: Lab, tmp_path: Path) -> None:
    run = Training(lab, tmp_path)
    spoil(lab, tmp_path, tmp_path / "other")
    launcher = run.start(HOSTS)
    assert launcher.wait(90) != 0
    output = launcher.output()
    version = importlib.metadata.version("transformers")
    for words in (
        "the hosts of this run are not alike:",
        f"transformers: {version} on node1; 5.20.1 on node2",
        "run.output: shared on node1; rank 0's file is not seen on node2",
    ):
        assert words in output, output
    lines = output.splitlines()
    for words in ("the engine's source: ", f"data.manifest {tmp_path}"):
        line = next(line for line in lines if words in line)
        assert "on node1; " in line
        assert line.endswith("on node2")
    assert "teacher: " not in output
    assert list((tmp_path / "runs").iterdir()) == []


def test_preflight_starts_itself_in_a_job_and_shows_every_host(slurm: Slurm, tmp_path: Path) -> None:
    run = Training(slurm.lab, tmp_path)
    words = ["python", str(ROOT / "launch" / "preflight.py"), "--config", str(run.config), "--cluster"]
    script = run.work / "job.sh"
    script.write_text(f"#!/bin/bash\n#SBATCH --nodes=2 --output=job.out\nexec {shlex.join(words)} --world-size 4\n")
    job = slurm.submit([f"--nodelist={','.join(HOSTS)}", str(script)], run.work)
    slurm.wait_for_state(job, "COMPLETED", seconds=90)
    output = (run.work / "job.out").read_text()
    assert "Cluster     2 hosts, 2 ranks, cpu over gloo: node1, node2" in output
    assert "Verdict     YES" in output


def test_preflight_over_a_hostfile_names_the_host_that_is_down(lab: Lab, tmp_path: Path) -> None:
    run = Training(lab, tmp_path)
    hostfile = str(lab.hostfile(1, HOSTS))
    lab.stop("node2")
    words = ["python", str(ROOT / "launch" / "preflight.py"), "--config", str(run.config), "--cluster"]
    command = lab.start("node1", [*words, "--hostfile", hostfile, "--join-seconds", "5"], folder=run.work)
    assert command.wait(90) != 0
    assert "Verdict     NO: 1 of 2 ranks did not come within 5 s: rank 1 of node2;" in command.output()
