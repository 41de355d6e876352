"""A checkpoint that was converted for another number of ranks goes on on a GPU: weights, moments, steps, loss scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import Distiller
from engine.checkpoint import newest
from tests import tiny


def settings(root: Path, name: str, num_steps: int, precision: str, stage: int) -> dict[str, Any]:
    return tiny.run_config(
        root,
        run={"name": name, "num_steps": num_steps, "precision": precision},
        optimizer={"learning_rate": 0.003, "weight_decay": 0.3},
        schedule={"kind": "constant"},
    ) | {"zero": {"zero_optimization": {"stage": stage}}}


def records(root: Path, name: str) -> dict[int, tuple[float, float]]:
    lines = [json.loads(line) for line in (root / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: (line["loss/objective"], line["train/loss_scale"]) for line in lines if "loss/objective" in line
    }


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_converted_checkpoint_goes_on(tmp_path: Path, precision: str, stage: int) -> None:
    """One rank's checkpoint that says it is of two is converted, and for one rank nothing else changes."""
    Distiller(settings(tmp_path, "calm", 12, precision, stage)).fit()
    Distiller(settings(tmp_path, "turned", 6, precision, stage)).fit()
    meta = newest(tmp_path / "runs" / "turned" / "checkpoints") / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"world_size": 2}))
    Distiller(settings(tmp_path, "turned", 12, precision, stage)).fit()
    ours, theirs = records(tmp_path, "turned"), records(tmp_path, "calm")
    assert list(ours) == list(theirs) == list(range(1, 13))
    for step in theirs:
        assert ours[step] == pytest.approx(theirs[step], rel=1e-5), step
