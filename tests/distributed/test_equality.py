"""However a step is cut and whichever way ZeRO shards it, the same training comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from engine.checkpoint import newest
from engine.config.load import parse_config
from engine.data.loader import Loader
from engine.data.order import DataOrder
from engine.data.shards import ShardSet
from engine.models import MODEL_CLASSES, load_model
from engine.schedule import learning_rate_factor
from engine.student.build import build_student
from engine.tasks.task import build_task
from engine.zero import consolidate
from tests import tiny
from tests.launching import distill, finish

STEPS = 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("equality")


def settings(root: Path, name: str, **sections: Any) -> dict[str, Any]:
    return tiny.run_config(root, **({"run": {"name": name, "num_steps": STEPS}} | sections))


def trained(root: Path, name: str, world_size: int, micro: int, stage: int) -> dict[str, torch.Tensor]:
    config = settings(root, name, batch={"micro_sequences": micro}, zero={"zero_optimization": {"stage": stage}})
    config["run"]["num_steps"] = STEPS
    finish(distill(config, root / name, world_size))
    return consolidate(newest(root / "runs" / name / "checkpoints"))


@pytest.fixture(scope="module")
def plain(root: Path) -> dict[str, torch.Tensor]:
    """The same training in bare PyTorch: whole logits, one micro-batch a step, torch's own losses."""
    config = parse_config(settings(root, "plain"))
    shards = ShardSet.open(config.data.manifest)
    task = build_task(config.task, tiny.tokenizer(), shards.manifest, shards.token_counts())
    teacher = load_model(config.teacher, MODEL_CLASSES[task.kind], torch.float32, "teacher")
    student = build_student(config.student, MODEL_CLASSES[task.kind], config.run.seed, teacher).model.train()
    order = DataOrder(shards.manifest.samples_per_shard, seed=3, lanes=4, shuffle_samples=8)
    loader = Loader(shards, order, task.label, num_steps=STEPS, global_sequences=8, micro_sequences=8)
    section = config.optimizer
    matrices, rest = ([p for p in student.parameters() if (p.ndim >= 2) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=section.betas, eps=section.eps)
    for step in loader.steps():
        (batch,) = step.micro_batches
        keep = batch.labels.flatten() != -100
        student_logits = student(**task.model_inputs(batch, student)).logits.flatten(0, 1)[keep]
        with torch.no_grad():
            teacher_logits = teacher(**task.model_inputs(batch, teacher)).logits.flatten(0, 1)[keep]
        log_q, log_p = F.log_softmax(student_logits / 2, -1), F.log_softmax(teacher_logits / 2, -1)
        kl = 4 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        loss = 0.5 * kl + 0.5 * F.cross_entropy(student_logits, batch.labels.flatten()[keep])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), section.max_grad_norm)
        factor = learning_rate_factor(
            "cosine", step.step, STEPS, warmup_steps=0, final_fraction=0.0, decay_steps=None, milestones=(), factor=0.1
        )
        for group in optimizer.param_groups:
            group["lr"] = section.learning_rate * factor
        optimizer.step()
    return {f"model.{name}": tensor.detach() for name, tensor in student.named_parameters()}


@pytest.mark.parametrize(
    ("world_size", "micro", "stage"), [(1, 2, 2), (2, 2, 2), (2, 4, 3), (1, 8, 0)], ids=lambda value: str(value)
)
def test_every_cut_of_a_step_is_plain_training(
    root: Path, plain: dict[str, torch.Tensor], world_size: int, micro: int, stage: int
) -> None:
    """1 rank x 4 accumulation = 2 ranks x 2 = ZeRO-3 = no ZeRO = a bare loop, after several AdamW steps."""
    weights = trained(root, f"w{world_size}m{micro}z{stage}", world_size, micro, stage)
    for name, tensor in plain.items():
        torch.testing.assert_close(weights[name], tensor, rtol=2e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")
