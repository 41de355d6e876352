"""A run in stages after its end: a stage done again, scored, exported, made a graph of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine import Distiller
from engine.staging import newest_stage
from tests import labelled
from tests.launching import ROOT


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("staged")
    return labelled.run_config(
        root,
        "sequence_classification",
        run={"name": "staged", "num_steps": 4},
        evaluation={"manifest": str(root / "shards" / "dev" / "manifest.json")},
        stages=[
            {"name": "logits", "losses": [{"kind": "logits_mse"}]},
            {"name": "labels", "teacher": {"kind": "none"}, "losses": [{"kind": "cross_entropy"}]},
        ],
    )


@pytest.fixture(scope="module")
def run(config: dict[str, Any]) -> Path:
    assert Distiller(config).fit()
    return Path(config["run"]["output"]) / "staged"


def call(*words: str | Path) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_stage_done_again_takes_the_place_of_the_first_try(run: Path, config: dict[str, Any]) -> None:
    """The same weights, since nothing changed; the first try is kept where no command takes it for a stage."""
    before = (run / "export" / "model.safetensors").read_bytes()
    assert Distiller(config, from_stage="labels").fit()
    assert (run / "export" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in (run / "stages").iterdir()) == ["01-logits", "02-labels"]
    assert [path.name for path in (run / "set_aside").iterdir()] == ["02-labels.1"]
    assert newest_stage(run).name == "02-labels"
    assert (run / "report.html").read_text().count(">02-labels</a>") == 1


def test_the_whole_is_scored_and_exported_as_one(run: Path, config: dict[str, Any], tmp_path: Path) -> None:
    (run / "report.html").unlink()
    table = call("launch/evaluate_student.py", "--run", run)
    assert "teacher" in table
    assert ">02-labels</a>" in (run / "report.html").read_text(), "the report is that of all stages"
    call("launch/export_hf.py", "--run", run, "--onnx")
    path = labelled.write_data(tmp_path / "input", "sequence_classification", 5, seed=4)
    words = ("data_tools/predict.py", "--model", run / "export", "--input", path, "--onnx")
    call(*words, "--output", tmp_path / "predicted.jsonl")
    assert len((tmp_path / "predicted.jsonl").read_text().splitlines()) == 5
    call("launch/export_hf.py", "--run", run)
    assert not (run / "export" / "model.onnx").exists(), "a graph of weights that may be others"


def test_a_stages_own_config_is_refused_as_a_run(run: Path, tmp_path: Path) -> None:
    kept = run / "stages" / "01-logits" / "config.yaml"
    assert yaml.safe_load(kept.read_text())["run"]["stage_of"] == "staged"
    done = subprocess.run([sys.executable, "launch/distill.py", "--config", str(kept)], cwd=ROOT, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert "--from-stage logits" in done.stderr
