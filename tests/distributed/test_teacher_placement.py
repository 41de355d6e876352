"""Wherever the teacher's weights lie, the student has the same losses, and nothing of the teacher in its checkpoint."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from engine.checkpoint import newest
from engine.zero import consolidate
from tests import tiny
from tests.launching import Job, distill, finish

STEPS = 4
LOSSES = [
    {"kind": "forward_kl", "weight": 0.5, "temperature": 2.0},
    {"kind": "cross_entropy", "weight": 0.5},
    {"kind": "hidden_cosine", "layers": "spread"},
]
UNPACKED = "causal_lm unpacked"
TENSOR_PARALLEL = {"placement": "tensor_parallel", "tp_size": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("placement")


def settings(root: Path, name: str, stage: int, task: str, teacher: dict[str, Any]) -> dict[str, Any]:
    folder = root / task
    folder.mkdir(exist_ok=True)
    if task == UNPACKED and not (folder / "train").exists():
        tiny.model_folder(folder / "teacher", "causal_lm")
        tiny.shards(folder / "train", "causal_lm", packed=False)
        tiny.shards(folder / "heldout", "causal_lm", packed=False, num_samples=24, seed=1)
    return tiny.run_config(
        folder,
        task.removesuffix(" unpacked"),
        run={"name": name, "num_steps": STEPS},
        teacher=teacher,
        losses=LOSSES,
        evaluation={"manifest": str(folder / "heldout" / "manifest.json"), "every_steps": 2, "max_sequences": 16},
        zero={"zero_optimization": {"stage": stage}},
    )


def records_of(root: Path, task: str, name: str) -> list[dict[str, Any]]:
    lines = (root / task / "runs" / name / "metrics.jsonl").read_text().splitlines()
    names = ("loss/", "eval/")
    found = [{key: v for key, v in json.loads(line).items() if key.startswith(names)} for line in lines]
    return [record for record in found if record]


@pytest.fixture(scope="module")
def replicated(root: Path) -> Callable[..., list[dict[str, Any]]]:
    """Losses of the run with whole teachers; made once for each way of the student."""

    @functools.cache
    def run(stage: int, world_size: int, task: str) -> list[dict[str, Any]]:
        name = f"whole_{stage}_{world_size}"
        finish(distill(settings(root, name, stage, task, {}), root / task / name, world_size))
        return records_of(root, task, name)

    return run


CASES = [
    (2, 2, "causal_lm", {"placement": "zero3"}),
    (3, 2, "causal_lm", {"placement": "zero3", "offload": "cpu"}),
    (3, 2, "masked_lm", {"placement": "zero3"}),
    (2, 2, "causal_lm", TENSOR_PARALLEL),
    (3, 4, "causal_lm", TENSOR_PARALLEL),
    (2, 2, UNPACKED, TENSOR_PARALLEL),
    (3, 4, "causal_lm", {"placement": "zero3"}),
    (2, 2, "masked_lm", {"offload": "cpu"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world_size", "task", "teacher"), CASES, ids=str)
def test_the_student_has_the_same_losses(
    root: Path, replicated: Callable[..., Any], stage: int, world_size: int, task: str, teacher: dict[str, Any]
) -> None:
    """In training and in evaluation, layers' states too. Adding up in another order may show in the last digit."""
    whole = replicated(stage, world_size, task)
    name = "_".join([str(stage), str(world_size), *map(str, teacher.values())])
    finish(distill(settings(root, name, stage, task, teacher), root / task / name, world_size))
    found = records_of(root, task, name)
    assert [record.keys() for record in found] == [record.keys() for record in whole]
    assert sum("loss/hidden_cosine" in record for record in found) == STEPS
    exact = teacher.get("placement") != "tensor_parallel"
    for ours, theirs in zip(found, whole):
        if exact:
            assert ours == theirs
            continue
        # a KL is a small difference of logarithms near 5, whose last digits are 5e-7
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
        if "loss/objective" in ours:
            assert ours["loss/objective"] == pytest.approx(theirs["loss/objective"], rel=1e-6)
    folder = root / task / "runs" / name
    trained = consolidate(newest(folder / "checkpoints"))
    check_only_the_student_is_kept(folder, trained)


def check_only_the_student_is_kept(folder: Path, trained: dict[str, torch.Tensor]) -> None:
    """The student has two layers and the teacher four; both are called model.layers.N."""
    with safetensors.safe_open(folder / "export" / "model.safetensors", "pt") as export:
        exported = {name: list(export.get_slice(name).get_shape()) for name in export.keys()}  # noqa: SIM118
    assert exported
    assert {f"model.{name}" for name in exported} <= set(trained)
    assert all(name.startswith(("model.", "objective.")) for name in trained)
    layers = {int(part) for name in trained for part in name.split(".") if part.isdigit()}
    assert layers == {0, 1}
    num_trained = sum(tensor.numel() for tensor in trained.values())
    for path in (newest(folder / "checkpoints") / "zero").glob("*optim_states.pt"):
        state = torch.load(path, weights_only=False)["optimizer_state_dict"]
        kept = sum(tensor.numel() for tensor in tensors_of(state))
        assert kept <= 4 * num_trained, "master weights, two moments and padding, not the teacher"


def tensors_of(item: Any) -> list[torch.Tensor]:
    if isinstance(item, torch.Tensor):
        return [item]
    if isinstance(item, dict):
        return [tensor for value in item.values() for tensor in tensors_of(value)]
    return [tensor for value in item for tensor in tensors_of(value)] if isinstance(item, (list, tuple)) else []


HELD = """
import torch
from engine.config.run import TeacherSection
from engine.losses.head import keep_head_whole
from engine.meeting import meet
from engine.rendezvous import read_ranks
from engine.teacher.footprint import teacher_bytes
from engine.teacher.tensor_parallel import cut_layers
from engine.zero import init_distributed, shard_teacher
from tests import tiny
init_distributed(meet(read_ranks()), 60.0)
for tied in (True, False):
    for settings in ({"placement": "zero3"}, {"placement": "tensor_parallel", "tp_size": 2}):
        section = TeacherSection(kind="online", model="teacher", **settings)
        model = tiny.model("causal_lm", tie_word_embeddings=tied)
        foretold = teacher_bytes(model, section, 4, 2)
        keep_head_whole(model, torch.device("cpu"), torch.float32)
        if section.placement == "zero3":
            shard_teacher(model, torch.float32, offload=False)
            parts = [parameter.ds_tensor for parameter in model.parameters()]
        else:
            cut_layers(model, torch.distributed.group.WORLD)
            parts = list(model.parameters())
        held = sum(4 * part.numel() for part in [*parts, model.get_output_embeddings().weight])
        assert held == foretold.weights, (tied, settings, held, foretold)
torch.distributed.destroy_process_group()
"""

ONE_WITHOUT = """
import os, sys
from engine.config.run import TeacherSection
from engine.dist import Control
from engine.errors import ConfigError
from engine.meeting import meet
from engine.parts import _load_teacher
from engine.rendezvous import read_ranks
from engine.zero import init_distributed
ranks = read_ranks()
init_distributed(meet(ranks), 60.0)
folder = sys.argv[1] if ranks.rank == 0 else sys.argv[1] + "/nowhere"
section = TeacherSection(kind="online", model=folder, placement="zero3")
try:
    _load_teacher(section, "AutoModelForCausalLM", Control(ranks))
except ConfigError as problem:
    assert "nowhere" in str(problem), problem
    sys.exit(7)
"""


def test_a_rank_holds_the_bytes_that_were_foretold(tmp_path: Path) -> None:
    finish(Job(["-c", HELD], 2, tmp_path))


def test_a_teacher_that_one_rank_cannot_load_ends_all(root: Path, tmp_path: Path) -> None:
    folder = tiny.model_folder(tmp_path / "teacher", "causal_lm")
    job = Job(["-c", ONE_WITHOUT, str(folder)], 2, tmp_path)
    assert job.wait() == [7, 7], job.output()
