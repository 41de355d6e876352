"""Every architecture promised, end to end: from the teacher's layers through training to an export that others open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel, modeling_utils

from engine import Distiller
from engine.checkpoint import newest
from engine.export import student_from_state
from engine.zero import consolidate
from tests import architectures, tiny

NAMES = ["bert", "roberta", "modernbert", "gpt2", "llama", "qwen3", "gemma2"]
STEPS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("architectures")
    for task in ("masked_lm", "causal_lm"):
        tiny.shards(root / task, task)
    return root


def settings(root: Path, model_type: str, checkpointing: bool) -> dict[str, Any]:
    """A logit term, the labels and hidden states: all that a model is asked for."""
    task = architectures.task_of(model_type)
    teacher = root / f"teacher_{model_type}"
    if not teacher.exists():
        architectures.model(model_type).save_pretrained(teacher)
        tiny.tokenizer().save_pretrained(teacher)
    return {
        "run": {
            "name": f"{model_type}_{'recomputed' if checkpointing else 'kept'}",
            "output": str(root / "runs"),
            "num_steps": STEPS,
            "precision": "fp32",
            "gradient_checkpointing": checkpointing,
        },
        "task": {"kind": task},
        "student": {"init": "teacher_layers", "layers": 2},
        "teacher": {"kind": "online", "model": str(teacher)},
        "data": {"manifest": str(root / task / "manifest.json"), "lanes": 4, "shuffle_samples": 8},
        "batch": {"global_sequences": 4, "micro_sequences": 2},
        "losses": [
            {"kind": "forward_kl", "temperature": 2.0},
            {"kind": "cross_entropy"},
            {"kind": "hidden_mse", "layers": "spread"},
        ],
        "tracking": {"every_steps": 1},
    }


def trained(config: dict[str, Any]) -> tuple[Path, list[float]]:
    distiller = Distiller(config)
    assert distiller.fit()
    records = [json.loads(line) for line in (distiller.folder / "metrics.jsonl").read_text().splitlines()]
    return distiller.folder, [record["loss/objective"] for record in records if "loss/objective" in record]


def loaded(folder: Path, task: str) -> PreTrainedModel:
    auto = transformers.AutoModelForMaskedLM if task == "masked_lm" else transformers.AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


@pytest.mark.parametrize("model_type", NAMES)
def test_from_the_teachers_layers_to_an_export(root: Path, model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = architectures.task_of(model_type)
    recomputed = []
    own = modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **k: recomputed.append(1) or own(*a, **k))
    folder, kept_losses = trained(settings(root, model_type, checkpointing=False))
    assert not recomputed
    other, recomputed_losses = trained(settings(root, model_type, checkpointing=True))
    assert len(recomputed) == STEPS * 2 * 2, "each of two layers in each of two micro-batches"
    assert len(kept_losses) == STEPS
    assert recomputed_losses == pytest.approx(kept_losses, rel=1e-6)

    weights = consolidate(newest(folder / "checkpoints"))
    student, export = student_from_state(weights, folder / "student", task), loaded(folder / "export", task)
    inputs = {"input_ids": torch.arange(5, 21).reshape(2, 8)}
    with torch.no_grad():
        logits = export(**inputs).logits
        torch.testing.assert_close(logits, student(**inputs).logits)
        untrained = loaded(root / f"teacher_{model_type}", task)(**inputs).logits
        torch.testing.assert_close(loaded(other / "export", task)(**inputs).logits, logits, rtol=1e-4, atol=1e-4)
    assert logits.shape == untrained.shape
    if task == "masked_lm":
        answer = transformers.pipeline("fill-mask", model=str(folder / "export"))("w1 w2 [MASK]")
    else:
        answer = transformers.pipeline("text-generation", model=str(folder / "export"))("w1 w2", max_new_tokens=4)
    assert answer
