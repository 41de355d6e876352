"""A run that goes on with another number of ranks trains on the same batches to the same losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import newest
from engine.zero import UNIVERSAL, convert
from tests import tiny
from tests.launching import ROOT, Job, finish, wait_for_step, write_config

STEPS_AND_RANKS = ((4, 4), (8, 2), (12, 1), (16, 4))
"""until which step, on how many ranks"""
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("world_size")


def settings(root: Path, name: str, stage: int, **sections: Any) -> dict[str, Any]:
    """No dropout: its generators are a rank's own. The norms' weight decay differs from the matrices'."""
    return tiny.run_config(
        root,
        run={"name": name, "num_steps": 16, "precision": "fp32"} | sections.pop("run", {}),
        optimizer={"learning_rate": 0.003, "weight_decay": 0.3},
        schedule={"kind": "constant"},
        checkpoint={"every_steps": 4, "keep": 8},
        zero={"zero_optimization": {"stage": stage}},
        **sections,
    )


def start(
    config: dict[str, Any], root: Path, world_size: int, until: int | None = None, words: tuple[str, ...] = ()
) -> Job:
    folder = root / config["run"]["name"]
    folder.mkdir(parents=True, exist_ok=True)
    observed = folder / "batches"
    path = write_config(folder / "run.yaml", config)
    last = () if until is None else (f"run.num_steps={until}",)
    script = str(ROOT / "tests" / "distributed" / "observed_distill.py")
    return Job([script, "--config", str(path), *words, *last], world_size, folder, {"OBSERVED_FOLDER": str(observed)})


def losses(root: Path, name: str) -> dict[int, float]:
    lines = (root / "runs" / name / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss/objective"] for record in records if "loss/objective" in record}


def batches(root: Path, name: str, step: int, world_size: int) -> list[str]:
    """The sequences of a step, over exactly so many ranks."""
    parts = sorted((root / name / "batches").glob(f"{step}.*"))
    assert [path.suffix for path in parts] == [f".{rank}" for rank in range(world_size)]
    return sorted(line for path in parts for line in path.read_text().splitlines())


def run_in_turns(root: Path, name: str, stage: int) -> None:
    config = settings(root, name, stage)
    for until, world_size in STEPS_AND_RANKS:
        finish(start(config, root, world_size, until))


def compare(root: Path, name: str, calm: str) -> None:
    ours, theirs = losses(root, name), losses(root, calm)
    assert list(ours) == list(theirs) == list(range(1, 17))
    assert ours == pytest.approx(theirs, rel=TOLERANCE)
    first = 1
    for until, world_size in STEPS_AND_RANKS:
        for step in range(first, until + 1):
            assert batches(root, name, step, world_size) == batches(root, calm, step, 4)
        first = until + 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_four_two_one_four_ranks_are_as_four_undisturbed(root: Path, stage: int) -> None:
    calm, name = f"calm{stage}", f"turns{stage}"
    finish(start(settings(root, calm, stage), root, 4))
    run_in_turns(root, name, stage)
    compare(root, name, calm)
    folder = root / "runs" / name / "checkpoints"
    assert not list(folder.glob(f"*/{UNIVERSAL}*")), "what was converted still takes room"
    assert json.loads((newest(folder) / "meta.json").read_text())["world_size"] == 4


def half_converted(checkpoint: Path) -> None:
    """As a kill leaves it: some parameters put together, pieces of others, nothing renamed."""
    folder = checkpoint / f"{UNIVERSAL}.tmp" / UNIVERSAL
    for path in ("zero/model.norm.weight/fp32.pt", "tmp/model.norm.weight/0/fp32.00"):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_bytes(b"half")


@pytest.mark.slow
def test_half_a_conversion_is_done_again_a_whole_one_is_used_again_and_a_changed_file_is_refused(root: Path) -> None:
    name = "converted"
    config = settings(root, name, 2)
    finish(start(config, root, 2, 4))
    checkpoint = root / "runs" / name / "checkpoints" / "step_00000004"
    half_converted(checkpoint)
    part = checkpoint / "zero" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    good = part.read_bytes()
    part.write_bytes(good[:-9] + b"?" + good[-8:])
    job = start(config, root, 4)
    assert set(job.wait()) == {2}, job.output()
    assert f"{part}: refused, its sha256 is" in job.output()
    assert "there is no older one" in job.output()
    assert not (checkpoint / UNIVERSAL).exists()

    part.write_bytes(good)
    job = start(config | {"checkpoint": {"every_steps": 100}}, root, 4)
    wait_for_step(root / "runs" / name, 6, job)
    job.kill()
    assert [path.name for path in checkpoint.glob(f"{UNIVERSAL}*")] == [UNIVERSAL]
    made = {path: path.stat().st_mtime_ns for path in (checkpoint / UNIVERSAL).rglob("*") if path.is_file()}
    job = start(config | {"checkpoint": {"every_steps": 100}}, root, 1)
    wait_for_step(root / "runs" / name, 6, job)
    job.kill()
    assert {path: path.stat().st_mtime_ns for path in (checkpoint / UNIVERSAL).rglob("*") if path.is_file()} == made
    finish(start(config, root, 4))
    assert not list((root / "runs" / name / "checkpoints").glob(f"*/{UNIVERSAL}*"))
    assert list(losses(root, name)) == list(range(1, 17))


@pytest.mark.slow
def test_stages_0_and_1_go_on_as_well(root: Path) -> None:
    for stage in (0, 1):
        calm, name = f"calm{stage}", f"turns{stage}"
        finish(start(settings(root, calm, stage), root, 2, 8))
        finish(start(settings(root, name, stage), root, 2, 4))
        finish(start(settings(root, name, stage), root, 1, 8))
        assert losses(root, name) == pytest.approx(losses(root, calm), rel=TOLERANCE)


SMALL = {
    "model_type": "llama", "hidden_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "intermediate_size": 4, "vocab_size": 96, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
"""So small that on 4 ranks some hold nothing but padding of the norms."""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_that_hold_only_padding_go_on_and_none_fails_alone(root: Path, stage: int) -> None:
    def small(name: str) -> dict[str, Any]:
        return settings(root, name, stage) | {"student": {"config": SMALL}}

    calm, name = f"small_calm{stage}", f"small{stage}"
    finish(start(small(calm), root, 1, 12))
    finish(start(small(name), root, 2, 4))
    checkpoint = root / "runs" / name / "checkpoints" / "step_00000004"
    convert(checkpoint)
    (moment,) = checkpoint.glob(f"{UNIVERSAL}/zero/*model.norm.weight/exp_avg.pt")
    good = moment.read_bytes()
    moment.write_bytes(good[:-200])  # only the rank that holds this norm reads it
    job = start(small(name), root, 4, 8)
    assert job.wait() == [2] * 4, job.output()
    assert all(f"error: {checkpoint}: RuntimeError" in log.read_text() for log in job.logs), job.output()

    moment.write_bytes(good)
    finish(start(small(name), root, 4, 8))
    finish(start(small(name), root, 1, 12))
    assert losses(root, name) == pytest.approx(losses(root, calm), rel=TOLERANCE)
