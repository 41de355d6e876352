"""Runs on one GPU: all precisions under ZeRO-2 and ZeRO-3, the loss scaler, resuming, a host that does not wait."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine import Distiller
from engine.checkpoint import newest
from engine.losses.objective import StepContext
from engine.schema import StepBatches
from engine.trainer import Trainer
from engine.zero import consolidate
from tests import tiny

STEPS = 20
WAITS_OF_OTHERS = ("/deepspeed/", "/transformers/masking_utils.py")
"""DeepSpeed reads the gradient norm of every step. transformers asks a decoder's position ids, once a forward, whether
documents are packed."""


@pytest.fixture(scope="module", params=["masked_lm", "causal_lm"])
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, task: str) -> Path:
    return tmp_path_factory.mktemp(task)


def settings(root: Path, task: str, name: str, num_steps: int, precision: str, zero: dict[str, Any]) -> dict[str, Any]:
    dropout = "attention_dropout" if task == "causal_lm" else "attention_probs_dropout_prob"
    return tiny.run_config(
        root,
        task,
        run={"name": name, "num_steps": num_steps, "precision": precision},
        student={"config": tiny.CONFIGS[task] | {"num_hidden_layers": 2, dropout: 0.1}, "init": None, "layers": None},
        losses=[
            {"kind": "forward_kl", "temperature": 2.0},
            {"kind": "cross_entropy"},
            {"kind": "hidden_cosine", "layers": "spread"},
        ],
        optimizer={"learning_rate": 0.003},
        schedule={"kind": "constant"},
        evaluation={"manifest": str(root / "heldout" / "manifest.json")},
    ) | {"zero": zero}


def stage(number: int, **sections: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": number}} | sections


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss/objective" in record]


@pytest.mark.parametrize("number", [0, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_loss_falls_and_the_export_opens(root: Path, task: str, precision: str, number: int) -> None:
    if number == 0 and precision != "fp32":
        pytest.skip("DeepSpeed trains 16 bits under ZeRO here")
    distiller = Distiller(settings(root, task, f"{precision}_{number}", STEPS, precision, stage(number)))
    assert distiller.fit()
    losses = [record["loss/objective"] for record in records(distiller.folder)]
    assert all(loss is not None for loss in losses)
    assert sum(losses[-5:]) < sum(losses[:5])
    auto = transformers.AutoModelForMaskedLM if task == "masked_lm" else transformers.AutoModelForCausalLM
    export = auto.from_pretrained(distiller.folder / "export")
    assert all(weight.isfinite().all() for weight in export.state_dict().values())
    assert (distiller.folder / "report.html").exists()


def test_the_loss_scale_falls_until_it_fits_and_skipped_steps_are_counted(root: Path, task: str) -> None:
    """2^30 overflows fp16 at once: each overflow halves the scale and leaves the step out."""
    scaler = {"enabled": True, "loss_scale": 0, "initial_scale_power": 30, "hysteresis": 1, "loss_scale_window": 100}
    config = settings(root, task, "scaled", 2 * STEPS, "fp16", stage(2, fp16=scaler))
    distiller = Distiller(config)
    assert distiller.fit()
    found = records(distiller.folder)
    scales = [record["train/loss_scale"] for record in found]
    skipped = [record["train/skipped_steps"] for record in found]
    assert scales[-1] < 2.0**30
    assert skipped[-1] > 0
    assert skipped == sorted(skipped)
    assert scales[-1] == 2.0 ** (30 - skipped[-1])
    assert found[-1]["loss/objective"] < found[0]["loss/objective"]


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resumed_is_uninterrupted(root: Path, task: str, precision: str, number: int) -> None:
    """With dropout, so that the device's generator must come back as well."""
    name = f"resumed_{precision}_{number}"
    calm = Distiller(settings(root, task, f"calm_{precision}_{number}", 8, precision, stage(number)))
    calm.fit()
    for num_steps in (4, 8):
        resumed = Distiller(settings(root, task, name, num_steps, precision, stage(number)))
        resumed.fit()
    one, other = (consolidate(newest(each.folder / "checkpoints")) for each in (calm, resumed))
    for weight in one:
        assert torch.equal(one[weight], other[weight]), weight
    losses = [[record["loss/objective"] for record in records(each.folder)] for each in (calm, resumed)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("number", [2, 3])
def test_the_host_does_not_wait_within_a_step(
    root: Path, task: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two records, no line of ours, of torch or of the model makes the host wait for the device."""
    waits: list[str] = []
    own = Trainer._step

    def watched(self: Trainer, fetched: StepBatches, context: StepContext) -> None:
        if self.state.step < 3 or context.with_metrics:  # the first steps allocate and compile
            return own(self, fetched, context)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                own(self, fetched, context)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.extend(f"{each.filename}:{each.lineno}" for each in caught if "synchronizing" in str(each.message))
        return None

    monkeypatch.setattr(Trainer, "_step", watched)
    config = settings(root, task, f"waits_{number}", 8, "bf16", stage(number))
    config["tracking"] = {"every_steps": 8}
    config["checkpoint"] = {"every_steps": 100}
    Distiller(config).fit()
    ours = sorted({place for place in waits if not any(known in place for known in WAITS_OF_OTHERS)})
    assert not ours, ours


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_teacher_one_micro_batch_ahead_changes_no_loss(root: Path, task: str, number: int, offload: str) -> None:
    """Each step has four micro-batches, so that targets of one are given back while others are in use."""
    losses, weights = [], []
    for overlap in (False, True):
        config = settings(root, task, f"ahead_{number}_{offload}_{overlap}", STEPS, "bf16", stage(number))
        config["teacher"] |= {"overlap": overlap, "offload": offload}
        distiller = Distiller(config)
        distiller.fit()
        losses.append([record["loss/objective"] for record in records(distiller.folder)])
        weights.append(consolidate(newest(distiller.folder / "checkpoints")))
    assert losses[0] == losses[1]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


def test_batches_come_pinned(root: Path, task: str) -> None:
    """A copy from pageable memory makes the host wait, whatever non_blocking says."""
    seen: list[bool] = []
    own = Trainer._step

    def watched(self: Trainer, fetched: StepBatches, context: StepContext) -> None:
        seen.extend(batch.input_ids.is_pinned() for batch in fetched.micro_batches)
        own(self, fetched, context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", watched)
        Distiller(settings(root, task, "pinned", 2, "bf16", stage(2))).fit()
    assert seen
    assert all(seen)
