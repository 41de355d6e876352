"""A run that was killed and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import complete_checkpoints, newest
from engine.zero import consolidate
from tests import tiny
from tests.launching import distill, finish, wait_for_step

STEPS = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


def settings(root: Path, name: str, stage: int, **run: Any) -> dict[str, Any]:
    """Dropout is on: its generators must survive as well."""
    return tiny.run_config(
        root,
        run={"name": name, "num_steps": STEPS, **run},
        student={
            "config": tiny.LLAMA | {"num_hidden_layers": 2, "attention_dropout": 0.1},
            "init": None,
            "layers": None,
        },
        checkpoint={"every_steps": 4},
        zero={"zero_optimization": {"stage": stage}},
    )


def outcome(root: Path, name: str) -> tuple[dict[str, torch.Tensor], list[tuple[int, float]]]:
    folder = root / "runs" / name
    assert newest(folder / "checkpoints").name == f"step_{STEPS:08d}"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [(record["step"], record["loss/objective"]) for record in records if "loss/objective" in record]
    return consolidate(newest(folder / "checkpoints")), losses


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Callable[[int], Any]:
    """What a run under a ZeRO stage comes to when nothing happens to it; made once a stage."""

    @functools.cache
    def run(stage: int) -> Any:
        name = f"calm{stage}"
        finish(distill(settings(root, name, stage), root / name, world_size=2))
        return outcome(root, name)

    return run


def same(ours: Any, theirs: Any) -> None:
    assert ours[1] == theirs[1]
    assert [step for step, _ in ours[1]] == list(range(1, STEPS + 1))
    for name, tensor in theirs[0].items():
        assert torch.equal(ours[0][name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "victims"), [(2, (0,)), (2, (0, 1)), (3, (1,))], ids=str)
def test_killed_and_resumed_is_undisturbed(
    root: Path, undisturbed: Callable[[int], Any], stage: int, victims: tuple[int, ...]
) -> None:
    name = f"killed{stage}" + "".join(map(str, victims))
    config = settings(root, name, stage)
    for step in (9, 22):
        job = distill(config, root / name, world_size=2)
        wait_for_step(root / "runs" / name, step, job)
        for rank in victims:
            job.kill(rank)
        job.kill()  # what a launcher does with the rest
    finish(distill(config, root / name, world_size=2))
    same(outcome(root, name), undisturbed(stage))


@pytest.mark.slow
def test_a_signal_ends_all_ranks_with_a_checkpoint(root: Path, undisturbed: Callable[[int], Any]) -> None:
    name = "signalled"
    config = settings(root, name, 2)
    job = distill(config, root / name, world_size=2)
    wait_for_step(root / "runs" / name, 6, job)
    os.kill(job.ranks[1].pid, signal.SIGTERM)  # one rank alone: the others must learn of it
    assert job.wait() == [0, 0], job.output()
    stopped_at = int(newest(root / "runs" / name / "checkpoints").name.removeprefix("step_"))
    assert 6 <= stopped_at < STEPS
    finish(distill(config, root / name, world_size=2))
    same(outcome(root, name), undisturbed(2))


def test_what_a_kill_left_half_written_is_cleared_away(root: Path) -> None:
    config = settings(root, "half", 2, num_steps=4)
    finish(distill(config, root / "half"))
    folder = root / "runs" / "half" / "checkpoints"
    (folder / "step_00000099.tmp" / "state").mkdir(parents=True)
    (folder / "step_00000098").mkdir()
    config["run"]["num_steps"] = 8
    finish(distill(config, root / "half"))
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000004", "step_00000008"]
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000004", "step_00000008"]
