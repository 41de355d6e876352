"""A rank that dies, stands still or leaves is named by the others, and all of them end."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EXIT_LOST_RANK
from tests import tiny
from tests.launching import Job, distill, finish, wait_for_step


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watch")


def start(root: Path, name: str, timeout_seconds: float = 10.0, **sections: Any) -> Job:
    config = tiny.run_config(
        root,
        run={"name": name, "num_steps": 100_000},
        checkpoint={"every_steps": 1000},
        cluster={"timeout_seconds": timeout_seconds},
        data={"lanes": 6},
        batch={"global_sequences": 12},
        **sections,
    )
    return distill(config, root / name, world_size=3)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named(root: Path, victim: int) -> None:
    name = f"killed{victim}"
    job = start(root, name, timeout_seconds=120.0)
    wait_for_step(root / "runs" / name, 5, job)
    os.kill(job.ranks[victim].pid, signal.SIGKILL)
    codes = job.wait(60)
    assert codes[victim] == -signal.SIGKILL
    left = [rank for rank in range(3) if rank != victim]
    assert [codes[rank] for rank in left] == [EXIT_LOST_RANK] * 2, job.output()
    said = job.logs[left[0]].read_text()
    if victim == 0:
        assert "rank 0 on" in said
        assert "has not answered" in said
    else:
        assert re.search(
            rf"rank {victim} on \S+ has given no sign of life for \d+ s \(last heard: \w+, after step \d+", said
        )


@pytest.mark.slow
def test_a_stopped_rank_shows_its_stack_and_ends_the_run(root: Path) -> None:
    job = start(root, "stopped")
    wait_for_step(root / "runs" / "stopped", 5, job)
    os.kill(job.ranks[1].pid, signal.SIGSTOP)
    codes = job.wait(60)
    assert [codes[0], codes[2]] == [EXIT_LOST_RANK] * 2, job.output()
    # the fault handler may crash over a thread that runs on, and the rank, woken, may hear that it was given up
    assert codes[1] in (-signal.SIGABRT, -signal.SIGSEGV, EXIT_LOST_RANK), job.output()
    said = job.logs[1].read_text()
    assert re.search(r"no sign of life for 8 s; last heard: \w+, after step \d+. Its stack:", said)
    assert 'trainer.py", line' in said  # of the training thread
    assert "rank 1 on" in job.logs[0].read_text()


@pytest.mark.slow
def test_a_rank_that_leaves_with_an_error_is_quoted(root: Path) -> None:
    job = start(root, "left", timeout_seconds=120.0)
    wait_for_step(root / "runs" / "left", 5, job)
    os.kill(job.ranks[2].pid, signal.SIGINT)
    codes = job.wait(60)
    assert codes[2] == 130
    assert all(code not in (0, None) for code in codes), job.output()
    assert re.search(r"rank 2 on \S+ has left after step \d+: KeyboardInterrupt", job.logs[0].read_text())


def test_a_rank_that_never_comes_is_told(root: Path) -> None:
    script = root / "meet.py"
    script.write_text(
        "import sys\n"
        "from engine.log import run_main\n"
        "from engine.meeting import meet\n"
        "from engine.rendezvous import read_ranks\n"
        "run_main(lambda: meet(read_ranks(), 3.0) and 0)\n"
    )
    job = Job([str(script)], 3, root)
    job.kill(1)
    codes = job.wait(60)
    assert (codes[0], codes[2]) == (EXIT_LOST_RANK, EXIT_LOST_RANK), job.output()
    assert "1 of 3 ranks did not come within 3 s: rank 1" in job.logs[0].read_text()


LIMITED = """
from datetime import timedelta
import deepspeed.comm
import torch
from engine.dist import PATIENCE, Control, read_ranks
from engine.meeting import meet
from engine.zero import init_distributed
init_distributed(meet(read_ranks()), 60.0)
made = [torch.distributed.group.WORLD, deepspeed.comm.new_group([0, 1]), Control(read_ranks())._group]
limits = [group._get_backend(torch.device("cpu")).options._timeout for group in made]
assert limits == [timedelta(seconds=60), timedelta(seconds=60), PATIENCE], limits
torch.distributed.destroy_process_group()
"""


def test_groups_that_deepspeed_makes_have_the_time_out_too(tmp_path: Path) -> None:
    """They exchange the gradients: with torch's half an hour a link that is cut in a step is noticed that late."""
    finish(Job(["-c", LIMITED], 2, tmp_path))
