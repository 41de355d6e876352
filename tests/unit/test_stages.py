"""A run in stages as a list of whole runs, and what is said of stages that are none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config.load import load_config, load_stages, parse_stages
from engine.config.run import RunConfig
from engine.errors import ConfigError
from engine.staging import whole_folder

BASE: dict[str, Any] = {
    "run": {"name": "ner", "output": "out", "num_epochs": 2.0, "seed": 5},
    "task": {"kind": "token_classification"},
    "student": {"config": {"model_type": "bert"}, "attention": "sdpa"},
    "teacher": {"kind": "online", "model": "teacher"},
    "data": {"manifest": "transfer.json", "lanes": 4},
    "batch": {"global_sequences": 8, "micro_sequences": 4},
    "losses": [{"kind": "forward_kl"}],
    "optimizer": {"learning_rate": 0.001},
}


def stages(*given: dict[str, Any], **base: Any) -> list[RunConfig]:
    return parse_stages(copy.deepcopy(BASE) | base | {"stages": list(given)})


def test_a_stage_is_the_file_with_its_own_keys_over_it() -> None:
    first, second = stages(
        {"name": "hidden", "losses": [{"kind": "hidden_mse"}], "run": {"num_steps": 7}},
        {"name": "labels", "data": {"manifest": "train.json"}, "teacher": {"kind": "none"},
         "losses": [{"kind": "cross_entropy"}], "freeze": ["encoder"]},
    )  # fmt: skip
    assert (first.run.num_steps, first.run.num_epochs, first.run.seed) == (7, None, 5)
    assert first.losses[0].kind == "hidden_mse"
    assert (first.run.name, first.run.output) == ("01-hidden", str(Path("out/ner/stages")))
    assert (second.run.num_steps, second.run.num_epochs) == (None, 2.0)
    assert (second.data.manifest, second.data.lanes) == ("train.json", 4)
    assert second.teacher.model is None, "a section of another kind is not merged with the file's"
    assert second.freeze == ("encoder",)
    assert first.tracking.wandb_group == second.tracking.wandb_group == "ner"


def test_a_later_stage_begins_with_what_the_one_before_exported() -> None:
    first, second = stages({"name": "a"}, {"name": "b"})
    assert first.student.config == {"model_type": "bert"}
    assert second.student.model == str(Path("out/ner/stages/01-a/export"))
    assert (second.student.config, second.student.attention) == (None, "sdpa")


def test_unfreezing_is_a_stage_for_each_part() -> None:
    parts = ["head", "layers 1", "layers 0", "embeddings"]
    expanded = stages({"name": "thaw", "unfreeze": parts, "freeze": ["position_embeddings"], "run": {"num_steps": 3}})
    assert [each.run.name for each in expanded] == [f"0{n}-thaw-{n}" for n in (1, 2, 3, 4)]
    assert [each.freeze for each in expanded] == [("position_embeddings", *parts[n + 1 :]) for n in range(len(parts))]
    assert {each.run.num_steps for each in expanded} == {3}


def test_the_config_that_a_stage_keeps_is_not_run_alone() -> None:
    """It would take the place of the whole run."""
    first, _ = stages({"name": "a"}, {"name": "b"})
    kept = first.model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"config of stage 01-a of the run ner; .* --from-stage a"):
        parse_stages(kept)
    kept["run"] |= {"stage_of": None, "output": "stages"}
    (alone,) = parse_stages(kept)
    assert whole_folder([alone]) == Path("stages/01-a"), "a folder of that name makes no stage"
    assert whole_folder([first]) == Path("out/ner")


def test_a_run_without_stages_is_one() -> None:
    (only,) = parse_stages(BASE)
    assert only.run.name == "ner"


def test_overrides_reach_the_file_and_the_stages(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(BASE | {"stages": [{"name": "a"}, {"name": "b", "run": {"num_steps": 4}}]}))
    first, second = load_stages(str(path), ["optimizer.learning_rate=0.5", "stages.1.run.num_steps=9"])
    assert first.optimizer.learning_rate == second.optimizer.learning_rate == 0.5
    assert second.run.num_steps == 9
    with pytest.raises(ConfigError, match="this run has 2 stages, and one run is wanted here"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("stages: later", "run.yaml:1: stages: expected a list of sections"),
        ("stages: []", "expected a list of sections"),
        ("stages: [{losses: []}]", "stages.0.name: expected a name"),
        ("stages: [{name: a b}]", "stages.0.name: expected a name"),
        ("stages: [{name: a}, {name: a}]", "the name 'a' is given twice"),
        ("stages: [{name: a, task: {kind: masked_lm}}]", "stages.0.task: belongs to the whole run"),
        ("stages: [{name: a, run: {name: b}}]", "stages.0.run.name: give it once"),
        ("stages: [{name: a, unfreeze: head}]", "stages.0.unfreeze: expected a list of parts"),
        ("stages: [{name: a, losses: [{kind: forward_k}]}]", "unknown kind"),
        ("stages: [{name: a, freze: [head]}]", "did you mean `freeze`"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path: Path, given: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{given}\n{yaml.safe_dump(BASE)}")
    with pytest.raises(ConfigError) as caught:
        load_stages(str(path))
    assert words in str(caught.value)
    assert "run.yaml:1" in str(caught.value)
