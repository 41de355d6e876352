"""Labelled data in this process: each task learns, the best student is kept, and what cannot be is refused."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine import Callback, Distiller
from engine.errors import ConfigError, DataError, TrainingError
from engine.report import Results
from tests import labelled
from tests.refusals import refused

TASKS = ("token_classification", "sequence_classification", "question_answering")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("labelled")


def settings(root: Path, task: str, name: str, **sections: Any) -> dict[str, Any]:
    folder = root / task
    folder.mkdir(exist_ok=True)
    run = {"name": name} | sections.pop("run", {})
    evaluation = {"manifest": str(folder / "shards" / "dev" / "manifest.json")} | sections.pop("evaluation", {})
    return labelled.run_config(folder, task, run=run, evaluation=evaluation, **sections)


def measured(root: Path, task: str, name: str) -> Results:
    results = Results.load(root / task / "runs" / name)
    assert results is not None
    return results


LABELS_ALONE = {"teacher": {"kind": "none", "model": None}, "losses": [{"kind": "cross_entropy"}],
                "student": {"config": labelled.BERT}, "checkpoint": {"every_steps": 500}}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_each_task_learns_from_labels_and_its_export_answers(root: Path, task: str) -> None:
    optimizer, schedule = {"learning_rate": 0.005}, {"warmup_steps": 10}
    length = 120 if task == "sequence_classification" else 300
    config = settings(
        root, task, "labels", run={"num_steps": length}, optimizer=optimizer, schedule=schedule, **LABELS_ALONE
    )
    assert Distiller(config).fit()
    student = measured(root, task, "labels").model("student")
    assert student is not None
    assert student.scores is not None
    first, value = student.scores.main
    assert first == {"sequence_classification": "accuracy"}.get(task, "f1")
    assert value > (0.9 if task == "sequence_classification" else 0.5)
    export = str(root / task / "runs" / "labels" / "export")
    if task == "token_classification":
        found = transformers.pipeline("token-classification", model=export)("word1 word5 word2")
        assert [each["entity"] for each in found if each["entity"] != "O"] == ["B-A"]
        assert {row.label for row in student.scores.by_label} == {"A", "B"}
        assert "By label" in (root / task / "runs" / "labels" / "report.html").read_text()
    elif task == "sequence_classification":
        answer = transformers.pipeline("text-classification", model=export)
        assert [each["label"] for each in answer(["word3 word2", "word4 word1"])] == ["yes", "no"]


def test_the_best_student_is_kept_and_the_run_ends_early(root: Path) -> None:
    task = "token_classification"
    config = settings(
        root, task, "early",
        run={"num_steps": 400}, evaluation={"every_steps": 5}, early_stop={"patience": 2},
        optimizer={"learning_rate": 0.02}, schedule={"kind": "constant"}, **LABELS_ALONE,
    )  # fmt: skip
    assert Distiller(config).fit()
    folder = root / task / "runs" / "early"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scored = {line["step"]: line["eval/student_f1"] for line in lines if "eval/student_f1" in line}
    best = max(scored.values())
    best_step = min(step for step, value in scored.items() if value == best)
    assert max(scored) == best_step + 10 < 400
    student = measured(root, task, "early").model("student")
    assert student is not None
    assert student.quality == pytest.approx(best, abs=1e-9)
    assert Distiller(config).fit(), "a run that has ended early stays ended"
    again = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in again) == max(scored)


def test_callbacks_hear_of_the_run_and_can_end_it(root: Path) -> None:
    heard: list[tuple[str, int]] = []

    class Listener(Callback):
        def on_record(self, step: int, record: Any) -> bool:
            heard.append(("record", step))
            assert "loss/objective" in record
            return step == 5

        def on_evaluation(self, step: int, record: Any) -> None:
            heard.append(("evaluation", step))

        def on_checkpoint(self, step: int) -> None:
            heard.append(("checkpoint", step))

    config = settings(root, "token_classification", "heard", evaluation={"every_steps": 2})
    assert not Distiller(config, callbacks=[Listener()]).fit()
    assert [step for what, step in heard if what == "record"] == [1, 2, 3, 4, 5, 6]
    assert [step for what, step in heard if what == "checkpoint"] == [3, 6]
    assert ("evaluation", 4) in heard


def test_a_callback_that_fails_ends_the_run_with_its_name(root: Path) -> None:
    class Careless(Callback):
        def on_record(self, step: int, record: Any) -> None:
            raise KeyError("los")

    config = settings(root, "token_classification", "careless")
    with pytest.raises(TrainingError, match=r"Careless\.on_record failed after step 1: KeyError: 'los'"):
        Distiller(config, callbacks=[Careless()]).fit()


def test_what_does_not_go_with_labelled_data(root: Path) -> None:
    task = "token_classification"
    plain = settings(root, task, "refused")
    everywhere = settings(root, task, "refused", losses=[{"kind": "forward_kl", "restrict_to": "all"}])
    refused(everywhere, ConfigError, "losses.0.restrict_to: all is for tasks over the vocabulary")
    refused(plain | {"early_stop": {"measure": "bleu"}}, ConfigError, "measured by f1, precision")
    cached = plain["teacher"] | {"kind": "cached", "cache": "targets"}
    refused(plain | {"teacher": cached}, ConfigError, "teacher.kind: cached keeps answers over the vocabulary")
    heads = [{"kind": "attention_kl"}]
    student = {"config": labelled.BERT | {"num_attention_heads": 2}}
    config = settings(root, task, "heads", losses=heads, student=student)
    with pytest.raises(ConfigError, match="the student has 2 heads, the teacher 4"):
        Distiller(config).fit()
    with pytest.raises(ConfigError, match="layers 7: the student's layers are 0 to 0"):
        Distiller(settings(root, task, "frozen", freeze=["layers 7"])).fit()


def test_data_without_labels_teach_what_the_teacher_says_alone(root: Path) -> None:
    task = "token_classification"
    settings(root, task, "unlabelled")
    manifest = labelled.shards(root / task, task, "transfer", 40, seed=2, labelled=False)
    data = {"manifest": str(manifest)}
    refused(settings(root, task, "unlabelled", data=data), ConfigError, "has no labels, but losses.1 (cross_entropy)")
    losses = [{"kind": "logits_mse"}, {"kind": "hidden_cosine", "layers": [[1, 2]]}]
    assert Distiller(settings(root, task, "unlabelled", data=data, losses=losses)).fit()
    lines = (root / task / "runs" / "unlabelled" / "metrics.jsonl").read_text().splitlines()
    trained = [json.loads(line) for line in lines if "loss/objective" in line]
    assert trained[-1]["loss/objective"] < trained[0]["loss/objective"]
    assert not any(key.startswith(("student/", "teacher/")) for key in trained[0]), "no label, no loss on labels"
    scored = {"manifest": str(manifest)}
    with pytest.raises(DataError, match="has no labels, so nothing can be scored"):
        Distiller(settings(root, task, "unscored", evaluation=scored)).fit()


def test_heldout_labels_in_another_order_are_refused(root: Path) -> None:
    task = "token_classification"
    config = settings(root, task, "order")
    other = root / "order"
    other.mkdir()
    shutil.copytree(root / task / "tokenizer", other / "tokenizer")
    manifest = labelled.shards(other, task, "dev", 9, seed=1)
    content = json.loads(manifest.read_text())
    content["labels"] = content["labels"][::-1]
    manifest.write_text(json.dumps(content))
    for key in ("manifest", "test_manifest"):
        evaluation = config["evaluation"] | {key: str(manifest)}
        with pytest.raises(DataError, match="its labels is"):
            Distiller(config | {"evaluation": evaluation}).fit()
    assert not (root / task / "runs" / "order" / "metrics.jsonl").exists(), "told before the first step"


def test_a_teacher_of_other_labels_and_a_stage_without_data(root: Path) -> None:
    task = "token_classification"
    config = settings(root, task, "other")
    other = labelled.model_folder(root / "other", task)
    content = json.loads((other / "config.json").read_text())
    content["id2label"]["1"], content["label2id"] = "B-X", {}
    (other / "config.json").write_text(json.dumps(content))
    refused(config | {"teacher": {"kind": "online", "model": str(other)}}, ConfigError, "B-X", "in this order")
    stages = [{"name": "first"}, {"name": "second", "data": {"manifest": str(root / "nothing" / "manifest.json")}}]
    with pytest.raises(DataError, match=r"stage 02-second: .*nothing/manifest\.json"):
        Distiller(config | {"stages": stages}).fit()
    stages = [{"name": "first"}, {"name": "second", "freeze": ["pooler"]}]
    with pytest.raises(ConfigError, match="stage 02-second: freeze: there is no part 'pooler'"):
        Distiller(config | {"stages": stages}).fit()
    assert not (root / task / "runs" / "other").exists(), "all stages are looked at before the first begins"


def held_bytes() -> int:
    gc.collect()
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor) and each.device.type == "cpu"]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


@pytest.mark.parametrize("stage", [2, 3])
def test_stages_leave_no_weights_in_memory(root: Path, stage: int) -> None:
    student = {"config": labelled.BERT | {"hidden_size": 64, "intermediate_size": 256}}
    name = f"memory{stage}"
    config = settings(
        root, "token_classification", name, run={"num_steps": 2}, student=student,
        zero={"zero_optimization": {"stage": stage}}, stages=[{"name": name} for name in ("a", "b", "c")],
    )  # fmt: skip
    before = held_bytes()
    assert Distiller(config).fit()
    weights = (root / "token_classification" / "runs" / name / "export" / "model.safetensors").stat().st_size
    assert weights > 300_000
    assert held_bytes() - before < weights / 4, "three stages, each with weights, gradients and two moments"
