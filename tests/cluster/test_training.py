"""The run that fault tests hit: it spans hosts, is hit in the middle, and goes on where it was."""

from __future__ import annotations

from pathlib import Path

from tests.cluster import faults
from tests.cluster.hosts import Lab
from tests.cluster.training import Training

HOSTS = ("node1", "node2")


def test_a_run_that_lost_a_host_goes_on_from_its_checkpoint(lab: Lab, tmp_path: Path) -> None:
    run = Training(lab, tmp_path, pace_seconds=0.3, run={"num_steps": 12})
    first = run.start(HOSTS)
    last = run.wait_for_step(4, first)
    assert last < 12
    faults.crash(lab, "node2")
    assert first.wait(60) != 0
    assert run.last_step() < 12
    lab.restart("node2")
    second = run.start(HOSTS)
    run.wait(second)
    assert "resuming" in second.output()
    assert sorted(run.losses()) == list(range(1, 13))
