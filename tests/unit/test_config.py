"""Parsing a run YAML: what is right comes through unchanged, what is wrong is told with its place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine.config.document import document
from engine.config.load import load_config, load_stages, parse_config
from engine.config.run import RunConfig
from engine.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
GOOD = """\
run:
  name: demo
  num_steps: 40
task: {kind: causal_lm}
student: {model: student}
teacher: {kind: online, model: teacher}
data:
  manifest: shards/manifest.json
batch: {global_sequences: 8, micro_sequences: 2}
losses:
  - kind: forward_kl
    weight: 0.5
  - {kind: cross_entropy}
optimizer: {learning_rate: 5e-4}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(str(path), overrides)


def told(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """Lines of the error, with the folder left out."""
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text, *overrides)
    return str(error.value).replace(f"{tmp_path}/", "").splitlines()


def test_a_good_file_comes_through_with_its_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config.run.num_steps == 40
    assert config.optimizer.learning_rate == 5e-4  # YAML 1.1 would call this a text
    assert config.losses[0].weight == 0.5
    assert config.data.lanes == 64


def test_a_saved_config_parses_to_the_same_run(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD, "losses.0.weight={start: 1, end: 0, to_step: 9}", "student={init: teacher_layers}",
                  "student.layers=[0, 3]")  # fmt: skip
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))) == config


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("    weight: 0.5", "    wieght: 0.5", "run.yaml:12: losses.0.wieght: unknown key; did you mean `weight`?"),
        ("  num_steps: 40", "  num_stepz: 40", "run.yaml:3: run.num_stepz: unknown key; did you mean `num_steps`?"),
        ("optimizer:", "optimiser:", "run.yaml:14: optimiser: unknown key; did you mean `optimizer`?"),
        ("optimizer:", "num_steps: 4\noptimizer:", "run.yaml:14: num_steps: unknown key here; did you mean `run.num_"),
        ("kind: forward_kl", "kind: forward_k1", 'run.yaml:11: losses.0.kind: unknown kind "forward_k1"; did you mean'),
        ("  num_steps: 40", "  num_steps: 40.5", "run.yaml:3: run.num_steps: expected a whole number, found 40.5"),
        ("  num_steps: 40", "  num_steps: '40'", 'run.yaml:3: run.num_steps: expected a whole number, found "40"'),
        ("  num_steps: 40", "  num_steps: 0", "run.yaml:3: run.num_steps: expected a value greater than or equal to 1"),
        ("  num_steps: 40", "  num_steps: yes", "run.yaml:3: run.num_steps: expected a whole number, found true"),
        ("  name: demo", "  name: 2026", "run.yaml:2: run.name: expected text, found 2026; put it in quotes"),
        ("  name: demo", "  name: a/b", "run.yaml:2: run.name: expected text that matches"),
        ("  name: demo\n", "", "run.yaml:1: run.name: missing; Name of the run's folder"),
        ("  num_steps: 40\n", "", "run.yaml:1: run: give exactly one of run.num_steps and run.num_epochs"),
        ("weight: 0.5", "weight: heavy", "run.yaml:12: losses.0.weight: expected a number or a section, found"),
        ("weight: 0.5", "weight: {start: 1}", "run.yaml:12: losses.0.weight.end: missing"),
        ("weight: 0.5", "weight: -1", "run.yaml:11: losses.0: weight is -1.0 at its lowest"),
        (
            "weight: 0.5",
            "temperature: 0",
            "run.yaml:11: losses.0: temperature is 0.0 at its lowest; it must be",
        ),
        ("weight: 0.5", "weight: .nan", "run.yaml:12: losses.0.weight: expected a finite number"),
        ("5e-4", ".inf", "run.yaml:14: optimizer.learning_rate: expected a finite number"),
        ("causal_lm", "causal", "run.yaml:4: task.kind: expected one of masked_lm, causal_lm, token_classification, "),
        ("{model: student}", "{}", "run.yaml:5: student: give exactly one of student.model, student.config and"),
        ("task:", "<<: {a: 1}\ntask:", "run.yaml:4: <<: a key must be plain text"),
        ("task:", "1: 2\ntask:", "run.yaml:4: 1: a key must be plain text"),
        ("{kind: causal_lm}", "{kind: causal_lm", "run.yaml:5: not valid YAML"),
        ("demo", "!!python/object:os.system x", "run.yaml:2: not valid YAML: could not determine a constructor"),
        ("  name: demo", "  name: demo\n  name: other", "run.yaml:3: run.name: given twice, first on line 2"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    lines = told(tmp_path, GOOD.replace(old, new, 1))
    assert any(line.startswith(expected) for line in lines), lines


def test_all_mistakes_are_told_at_once_and_none_twice(tmp_path: Path) -> None:
    text = (
        GOOD.replace("weight: 0.5", "wieght: 0.5")
        .replace("num_steps: 40", "num_steps: x")
        .replace("model: teacher", "")
    )
    lines = told(tmp_path, text)
    assert [line.split(": ")[1] for line in lines] == ["run.num_steps", "teacher", "losses.0.wieght"]


def test_a_mistake_in_a_term_names_its_kind_and_no_tag_of_pydantic(tmp_path: Path) -> None:
    (line,) = told(tmp_path, GOOD.replace("weight: 0.5", "layers: last"))
    assert line.endswith("(a forward_kl term)")
    assert "losses.0.layers" in line


def test_an_unknown_kind_lists_all_kinds(tmp_path: Path) -> None:
    (line,) = told(tmp_path, GOOD.replace("kind: cross_entropy", "kind: zzz"))
    assert all(kind in line for kind in ("forward_kl", "js", "hidden_cosine", "hidden_mse", "logits_mse"))


def test_duplicates_are_all_told(tmp_path: Path) -> None:
    lines = told(tmp_path, GOOD + "task: {kind: masked_lm}\nbatch: {micro_sequences: 1, micro_sequences: 2}\n")
    assert [line.split(": ")[1] for line in lines] == ["task", "batch"]


def test_overrides(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD, "losses.0.weight=2", "evaluation.manifest=held.json", "run.num_steps=null",
                  "run.num_epochs=1.5", "losses.1={kind: reverse_kl, temperature: 4}")  # fmt: skip
    assert config.losses[0].weight == 2.0
    assert config.evaluation.manifest == "held.json"
    assert (config.run.num_steps, config.run.num_epochs) == (None, 1.5)
    assert config.losses[1].kind == "reverse_kl"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("losses.0.wieght=2", "override `losses.0.wieght=2`: losses.0.wieght: unknown key; did you mean `weight`?"),
        ("run.num_steps=x", "override `run.num_steps=x`: run.num_steps: expected a whole number"),
        ("losses.7.weight=2", "override `losses.7.weight=2`: losses is a list of 2; give an index from 0 to 1"),
        ("losses.kind.weight=2", "override `losses.kind.weight=2`: losses is a list of 2"),
        ("run.name.first=2", "override `run.name.first=2`: run.name is 'demo', not a section"),
        ("run.num_steps", "override `run.num_steps`: expected key.path=value"),
        ("run..num_steps=3", "override `run..num_steps=3`: expected key.path=value"),
        ("losses=[", "override `losses=[`: the value is not YAML"),
        ("new.section.key=1", "override `new.section.key=1`: new: unknown key"),
    ],
)
def test_the_error_of_an_override_names_it(tmp_path: Path, override: str, expected: str) -> None:
    assert told(tmp_path, GOOD, override)[0].startswith(expected)


def test_a_section_broken_by_an_override_names_it(tmp_path: Path) -> None:
    (line,) = told(tmp_path, GOOD, "run.num_epochs=2")
    assert line == (
        "run.yaml:1: run: give exactly one of run.num_steps and run.num_epochs (after override `run.num_epochs=2`)"
    )


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "expected sections such as run:" in told(tmp_path, text)[0]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the run YAML: No such file"):
        load_config(str(tmp_path / "none.yaml"))


def test_an_alias_that_holds_itself_ends(tmp_path: Path) -> None:
    assert "an alias that holds itself" in told(tmp_path, "run: &a {x: *a}\n")[0]


def test_parsing_and_resolving_import_no_torch() -> None:
    code = "import sys, engine.config.load, engine.config.resolve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_parse(path: Path) -> None:
    for config in load_stages(str(path)):
        assert isinstance(config.zero, dict) or (ROOT / config.zero).is_file()


def test_there_are_examples() -> None:
    assert len(list((ROOT / "examples").glob("*.yaml"))) >= 4


def test_docs_config_is_fresh() -> None:
    text = (ROOT / "docs" / "config.md").read_text()
    assert text == document(), "stale: run python -m engine.config.document > docs/config.md"


def test_every_field_is_documented() -> None:
    assert "|  |" not in document()
