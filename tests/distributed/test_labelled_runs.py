"""Runs on labelled data: the same however a step is cut, and a killed run in stages is the one that was not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import labelled
from tests.launching import Job, distill, finish, wait_for_step

TASKS = ("token_classification", "sequence_classification", "question_answering")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("labelled")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [record["loss/objective"] for record in records(folder) if "loss/objective" in record]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_ranks_micro_batches_and_padding_change_nothing(root: Path, task: str) -> None:
    """Widths differ from batch to batch; the loss is that of the step as a whole."""
    folder = root / task
    folder.mkdir()
    terms = [
        {"kind": "forward_kl", "temperature": 2.0},
        {"kind": "hidden_mse", "layers": [[1, 2]]},
        {"kind": "relation_kl", "heads": 4, "layers": [[1, 2]]},
        {"kind": "cross_entropy", "weight": 0.5},
    ]
    evaluation = {"manifest": str(folder / "shards" / "dev" / "manifest.json"), "every_steps": 4}
    for name, world_size, micro in (("one", 1, 8), ("two", 2, 2)):
        config = labelled.run_config(
            folder,
            task,
            run={"name": name},
            losses=terms,
            batch={"micro_sequences": micro},
            data={"sort_samples": 8},
            evaluation=evaluation,
            zero={"zero_optimization": {"stage": 2 if world_size == 1 else 3}},
        )
        finish(distill(config, folder / name, world_size))
    one, two = (folder / "runs" / name for name in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), rel=2e-4)
    scored = [[each for each in records(run) if "eval/student_loss" in each] for run in (one, two)]
    assert len(scored[0]) == 2
    for ours, theirs in zip(*scored):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert theirs[key] == pytest.approx(value, rel=1e-3, abs=1e-3), key


def staged(root: Path, name: str) -> dict[str, Any]:
    return labelled.run_config(
        root,
        "token_classification",
        run={"name": name, "num_steps": 12},
        checkpoint={"every_steps": 3},
        losses=[{"kind": "logits_mse"}],
        evaluation={"manifest": str(root / "shards" / "dev" / "manifest.json"), "every_steps": 4},
        stages=[
            {"name": "hidden", "losses": [{"kind": "hidden_mse", "layers": [[1, 2]]}], "freeze": ["head"],
             "optimizer": {"projection_learning_rate": 0.05}, "run": {"num_steps": 6}},
            {"name": "thaw", "unfreeze": ["head", "encoder"], "losses": [{"kind": "forward_kl"}]},
            {"name": "labels", "teacher": {"kind": "none"}, "losses": [{"kind": "cross_entropy"}]},
        ],
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["02-thaw-1", "04-labels"])
def test_killed_in_a_stage_it_goes_on_there(root: Path, stage: str) -> None:
    folder = root / "stages"
    folder.mkdir(exist_ok=True)
    calm = folder / "runs" / "calm"
    if not calm.exists():
        finish(distill(staged(folder, "calm"), folder / "calm", world_size=2))
    name = f"killed-{stage}"
    job = distill(staged(folder, name), folder / name, world_size=2)
    run = folder / "runs" / name
    wait_for_step(run / "stages" / stage, 5, job)
    os.kill(job.ranks[1].pid, signal.SIGKILL)
    job.wait(60)
    before = {path.name for path in (run / "stages").glob("*/FINISHED/..")}
    again: Job = distill(staged(folder, name), folder / f"{name}-again", world_size=2)
    finish(again)
    assert "02-thaw-1" not in before
    for each in ("01-hidden", "02-thaw-1", "03-thaw-2", "04-labels"):
        assert (run / "stages" / each / "FINISHED").is_file()
        ours, theirs = (load_file(at / "stages" / each / "export" / "model.safetensors") for at in (run, calm))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), each
    assert (run / "export" / "model.safetensors").read_bytes() == (calm / "export" / "model.safetensors").read_bytes()
    said = again.logs[0].read_text()
    assert f"resuming {run}/stages/{stage}/checkpoints" in said
    assert "01-hidden 6/6" not in said, "a stage that was done is not done again"
    page = (run / "report.html").read_text()
    assert all(f">{each}</a>" in page for each in ("01-hidden", "04-labels"))


@pytest.mark.slow
def test_frozen_parts_stay_and_others_move(root: Path) -> None:
    folder = root / "stages"
    folder.mkdir(exist_ok=True)
    if not (folder / "runs" / "calm").exists():
        finish(distill(staged(folder, "calm"), folder / "calm", world_size=2))
    exports = [
        load_file(folder / "runs" / "calm" / "stages" / name / "export" / "model.safetensors")
        for name in ("01-hidden", "02-thaw-1", "03-thaw-2")
    ]
    for name in exports[0]:
        is_head = name.startswith("classifier")
        assert torch.equal(exports[0][name], exports[1][name]) != is_head, name
        assert not torch.equal(exports[1][name], exports[2][name]), name
