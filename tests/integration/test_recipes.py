"""Each recipe of examples/ as it is, but for models, data and length: it trains, exports and reports."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from engine import Distiller
from engine.report import Results
from tests import labelled, tiny
from tests.launching import ROOT

TEXT = {"universal": "masked_lm", "general": "masked_lm", "bert_distillation": "masked_lm", "distil_bert": "masked_lm",
        "distil_gpt2": "causal_lm"}  # fmt: skip
LABELLED = {"squad": "question_answering", "text_classes": "sequence_classification",
            "token_classes": "token_classification"}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def recipe(name: str, root: Path, train: Path, heldout: Path) -> dict[str, Any]:
    """The file with tiny data; what it learns from, and how, stays."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text())
    content["run"] = {"name": name, "output": str(root / "runs"), "num_steps": 3, "precision": "fp32"}
    content["data"] |= {"manifest": str(train), "lanes": 4}
    content["batch"] = {"global_sequences": 8, "micro_sequences": 4}
    content["zero"] = {"zero_optimization": {"stage": 2}}
    content["evaluation"] = {"manifest": str(heldout), "every_steps": 2}
    content["tracking"] = {"every_steps": 1}
    content["schedule"].pop("warmup_steps", None)
    return content


def results(root: Path, name: str) -> Results:
    found = Results.load(root / "runs" / name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", TEXT)
def test_a_recipe_for_text(name: str, root: Path) -> None:
    task = TEXT[name]
    folder = root / task
    if not folder.exists():
        changes = {"num_hidden_layers": 12}
        tiny.model_folder(folder / "teacher", task, **changes)
        tiny.shards(folder / "train", task)
        tiny.shards(folder / "heldout", task, num_samples=24, seed=1)
    content = recipe(name, root, folder / "train" / "manifest.json", folder / "heldout" / "manifest.json")
    content["teacher"]["model"] = str(folder / "teacher")
    assert Distiller(content).fit()
    roles = {model.role: model for model in results(root, name).models}
    assert roles.keys() == {"teacher", "student"}
    assert roles["student"].num_parameters < roles["teacher"].num_parameters
    export = root / "runs" / name / "export"
    if name in ("distil_bert", "bert_distillation"):
        student = transformers.DistilBertForMaskedLM.from_pretrained(export)
        assert student.config.n_layers == 6
    if task == "masked_lm":
        answers = transformers.pipeline("fill-mask", model=str(export))("w1 [MASK] w3")
        assert len(answers) == 5


def test_one_command_from_raw_text_and_the_lines_that_load_its_state_dict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `make distill` would do, done; a second time, nothing is built again. Then docs/coming_from.md's lines."""
    teacher = tiny.model_folder(tmp_path / "teacher", "masked_lm", num_hidden_layers=6)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"w{n % 40} w{n * 7 % 40} w{n * 3 % 40}\n" for n in range(400)))
    settings = "run.num_epochs=null run.num_steps=2 batch.global_sequences=8 batch.micro_sequences=4 data.lanes=4 "
    settings += f"schedule.warmup_steps=0 run.precision=fp32 run.output={tmp_path}/runs"
    make = [
        "make",
        "-n",
        "distill",
        "RECIPE=general",
        f"TEXT={text}",
        f"MODEL={teacher}",
        "TOKENS=32",
        f"SET={settings}",
    ]
    planned = subprocess.run([*make, "-o", ".venv/demo.ready"], cwd=ROOT, capture_output=True, text=True, check=True)
    commands = planned.stdout.replace("\\\n", " ").replace("runs/general-shards", f"{tmp_path}/shards")
    run = [line for line in commands.splitlines() if line.startswith(".venv/bin/python")]
    assert len(run) == 2
    for command in (*run, run[0]):
        words = [sys.executable, *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "complete already" in done.stdout
    words = [sys.executable, "launch/export_hf.py", "--run", str(tmp_path / "runs" / "general"), "--pth"]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)
    page = (ROOT / "docs" / "coming_from.md").read_text()
    (lines,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "checkpoint.pth" in block)
    names: dict[str, Any] = {"torch": torch} | vars(transformers)
    names |= {name: getattr(transformers, name) for name in ("AutoConfig", "AutoModelForMaskedLM")}
    monkeypatch.chdir(tmp_path)
    exec(lines.replace("NAME", "general"), names)
    loaded, saved = names["student"], transformers.AutoModelForMaskedLM.from_pretrained("runs/general/export")
    assert all(torch.equal(ours, saved.state_dict()[name]) for name, ours in loaded.state_dict().items())


@pytest.mark.parametrize("name", LABELLED)
def test_a_recipe_for_labelled_data(name: str, root: Path) -> None:
    task = LABELLED[name]
    folder = root / task
    folder.mkdir(exist_ok=True)
    made = labelled.run_config(folder, task)
    heldout = folder / "shards" / "dev" / "manifest.json"
    content = recipe(name, root, Path(made["data"]["manifest"]), heldout)
    content["student"] = {"model": str(labelled.model_folder(root / f"student-{name}", task, num_hidden_layers=1))}
    if content.get("teacher"):
        content["teacher"]["model"] = made["teacher"]["model"]
    assert Distiller(content).fit()
    student = results(root, name).model("student")
    assert student is not None
    assert student.scores is not None


def test_the_stages_of_named_entities(root: Path) -> None:
    task, name = "token_classification", "xtreme_distil"
    folder = root / "stages"
    folder.mkdir()
    labelled.run_config(folder, task)
    labelled.model_folder(folder / "teacher", task, num_hidden_layers=12)
    transfer = labelled.shards(folder, task, "transfer", 40, seed=2, labelled=False)
    shards = folder / "shards"
    content = recipe(name, root, transfer, shards / "dev" / "manifest.json")
    content["evaluation"]["test_manifest"] = str(labelled.shards(folder, task, "test", 15, seed=3))
    content["teacher"]["model"] = str(folder / "teacher")
    content["student"]["config"] = labelled.BERT | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6}
    content["task"]["tokenizer"] = str(folder / "tokenizer")
    for stage in content["stages"]:
        stage.pop("run", None)
        if "data" in stage:
            stage["data"]["manifest"] = str(shards / "train" / "manifest.json")
    assert Distiller(content).fit()
    found = results(root, name)
    assert {model.role for model in found.models} == {"teacher", "student"}, "the last stage asks no teacher"
    assert found.num_heldout_tokens is not None
    stages = sorted(path.name for path in (root / "runs" / name / "stages").iterdir())
    assert stages[0] == "01-states"
    assert stages[-1] == "08-labels"
    assert len(stages) == 8
