"""The demo from end to end with a handful of steps: every stage is a real process, two of them rank processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import pipeline

from engine.errors import ConfigError, TrainingError
from engine.report import Results
from launch import demo, demo_recipes

FEW_STEPS = {"teacher": 3, "control": 2, "student": 2}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of 150 documents, and recipes of a few steps on narrow models."""
    monkeypatch.setitem(demo_recipes._NUM_STEPS, "masked_lm", FEW_STEPS)
    narrow = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    monkeypatch.setitem(demo_recipes._MODELS, "masked_lm", demo_recipes._MODELS["masked_lm"] | narrow)
    monkeypatch.setattr(demo, "VOCABULARY_IDS", 400)
    monkeypatch.setattr(demo_recipes, "VOCABULARY_IDS", 400)
    made = tmp_path / "demo"
    made.mkdir()
    texts = [f"Document {n} says that {n * n} is the square of {n}, in so many words. " * 6 for n in range(150)]
    (made / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return made


@pytest.mark.slow
@pytest.mark.timeout(900)  # six processes that each load torch, transformers and deepspeed
def test_from_text_to_a_table_and_again_without_doing_anything_twice(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--task", "masked_lm", "--teacher", "cached", "--output", str(folder)]
    assert demo.main(words) == 0
    shown = capfd.readouterr()
    results = Results.load(folder / "student")
    assert results is not None
    assert {model.role for model in results.models} == {"teacher", "control", "student"}
    for model in results.models:
        assert f"{model.num_parameters:,}" in shown.out
        assert f"{model.perplexity:,.2f}" in shown.out
    assert "[7/8]" in shown.out
    assert f"report: {folder / 'student' / 'report.html'}" in shown.out
    assert "bytes a position" in (folder / "student" / "report.html").read_text()
    assert "[INFO]" not in shown.out + shown.err, "the launcher's chatter is kept in the logs"
    assert "[INFO]" in (folder / "logs" / "student.log").read_text()
    fill = pipeline("fill-mask", model=str(folder / "student" / "export"))
    assert len(fill("Document 3 says that 9 is the [MASK] of 3")) == 5
    capfd.readouterr()

    assert demo.main(words) == 0
    again = capfd.readouterr()
    assert again.out.count(": done before") == 8
    assert again.err == ""


def test_a_failing_stage_shows_the_end_of_its_log(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text('{"text": "so far so good"}\nnot JSON\n')
    (folder / "tokenizer").mkdir()
    with pytest.raises(TrainingError, match=r"(?s)failed with exit code 2; .*logs/shards.log ends with\n.*tokenizer"):
        demo.main(["--task", "masked_lm", "--output", str(folder)])


def test_a_folder_of_other_recipes_is_refused(folder: Path) -> None:
    demo.Demo("masked_lm", folder, False).write_recipes()
    with pytest.raises(ConfigError, match="made by another"):
        demo.Demo("causal_lm", folder, False).write_recipes()


def test_student_and_control_differ_in_nothing_but_the_teacher(folder: Path) -> None:
    for task in ("masked_lm", "causal_lm"):
        control, student = (demo_recipes.recipe(name, task, folder, folder / "zero.json") for name in demo.STAGES[1:])
        differing = {key for key in control.keys() | student.keys() if control.get(key) != student.get(key)}
        assert differing == {"run", "losses", "teacher", "evaluation"}
        assert control["run"] | {"name": ""} == student["run"] | {"name": ""}
        assert control["losses"] == [{"kind": "cross_entropy"}]
