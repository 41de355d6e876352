"""The notebook's API: a run in this process, several of them one after another."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import engine
from engine import Distiller, RunConfig
from engine.checkpoint import newest
from engine.config.load import parse_config
from engine.errors import ConfigError, TrainingError
from engine.zero import consolidate
from tests import tiny
from tests.launching import write_config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notebook")


def settings(root: Path, name: str, num_steps: int = 4, **sections: Any) -> dict[str, Any]:
    run = {"name": name, "output": str(root / "runs"), "seed": 3, "num_steps": num_steps, "precision": "fp32"}
    return tiny.run_config(root, **({"run": run, "schedule": {"kind": "constant"}} | sections))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return consolidate(newest(folder / "checkpoints"))


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss/objective"] for record in records if "loss/objective" in record]


def test_a_dozen_lines_run_the_whole_thing(root: Path) -> None:
    config = settings(root, "whole", 12, evaluation={"manifest": str(root / "heldout" / "manifest.json")})
    distiller = Distiller(parse_config(config))
    assert isinstance(distiller.config, RunConfig)
    assert distiller.fit() is True
    assert distiller.folder == root / "runs" / "whole"
    found = {path.name for path in distiller.folder.iterdir()}
    assert found >= {"config.yaml", "ds_config.json", "environment.json", "metrics.jsonl", "log.txt", "report.html",
                     "checkpoints", "export", "student"}  # fmt: skip
    transformers.AutoModelForCausalLM.from_pretrained(distiller.folder / "export")
    falling = losses(distiller.folder)
    assert falling[-1] < falling[0]


def test_the_same_run_twice_in_one_process_gives_the_same_weights(root: Path) -> None:
    """And a mapping, a config and a YAML with overrides are the same run."""
    first = settings(root, "first")
    path = write_config(root / "third.yaml", settings(root, "first") | {"student": {"init": "teacher_layers",
                                                                                     "layers": 3}})  # fmt: skip
    Distiller(first).fit()
    Distiller(parse_config(settings(root, "second"))).fit()
    Distiller(path, ["run.name=third", "student.layers=2"]).fit()
    one, *others = (weights(root / "runs" / name) for name in ("first", "second", "third"))
    for other in others:
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_fresh_projections_are_those_of_the_seed(root: Path) -> None:
    """A student from a folder, narrower than the teacher: nothing else draws from the seed before the projections."""
    tiny.model_folder(root / "narrow", "causal_lm", hidden_size=16, num_hidden_layers=2)
    for name in ("once", "again"):
        torch.manual_seed(hash(name) % 1000)  # what a notebook did before
        config = settings(root, name, 1, losses=[{"kind": "hidden_mse"}])
        Distiller(config | {"student": {"model": str(root / "narrow")}}).fit()
    one, other = (weights(root / "runs" / name) for name in ("once", "again"))
    assert "objective.projections.0_0.weight" in one
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_longer_run_goes_on_from_the_checkpoint(root: Path) -> None:
    Distiller(settings(root, "calm", 6)).fit()
    Distiller(settings(root, "grown", 4)).fit()
    Distiller(settings(root, "grown", 6)).fit()
    one, other = weights(root / "runs" / "calm"), weights(root / "runs" / "grown")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(root / "runs" / "calm") == losses(root / "runs" / "grown")


def test_a_finished_run_is_finished_again_without_a_step(root: Path) -> None:
    Distiller(settings(root, "done")).fit()
    before = weights(root / "runs" / "done")
    assert Distiller(settings(root, "done")).fit() is True
    assert Distiller(settings(root, "done", 2)).fit() is True, "fewer steps than were done: nothing is left to do"
    after = weights(root / "runs" / "done")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(losses(root / "runs" / "done")) == 4


def test_never_starts_anew_and_keeps_the_old_folder(root: Path) -> None:
    Distiller(settings(root, "anew")).fit()
    old = losses(root / "runs" / "anew")
    Distiller(settings(root, "anew", optimizer={"learning_rate": 0.02}), resume="never").fit()
    assert losses(root / "runs" / "anew.1") == old
    assert losses(root / "runs" / "anew") != old


def test_a_failed_run_leaves_the_process_fit_for_the_next(root: Path) -> None:
    """A notebook's user mends the config and runs the cell again, under the same name."""
    with pytest.raises(ConfigError, match=r"losses.0.layers: the student has no layer 9"):
        Distiller(settings(root, "mended", losses=[{"kind": "hidden_mse", "layers": [[9, 1]]}])).fit()
    with pytest.raises(TrainingError):
        Distiller(settings(root, "exploded", optimizer={"learning_rate": 1e30, "max_grad_norm": 0.0})).fit()
    Distiller(settings(root, "mended")).fit()


def test_signals_are_given_back(root: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    Distiller(settings(root, "signals", 1)).fit()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_the_public_names() -> None:
    assert engine.__all__ == ["Callback", "Distiller", "RunConfig"]
    with pytest.raises(AttributeError):
        _ = engine.Nothing
