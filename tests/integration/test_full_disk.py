"""A disk that fills up: the last complete checkpoint stays, and the same command goes on when there is room again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Distiller
from engine.checkpoint import complete_checkpoints, newest
from engine.errors import CheckpointError
from engine.zero import consolidate
from tests import tiny
from tests.full_disk import fill, small_disk
from tests.launching import distill, finish

MODEL = tiny.LLAMA | {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}


def settings(root: Path, output: Path, num_steps: int) -> dict[str, Any]:
    """A constant rate: a longer run's first steps are those of a shorter one."""
    return tiny.run_config(
        root,
        run={"output": str(output), "num_steps": num_steps},
        student={"config": MODEL, "init": None, "layers": None},
        schedule={"kind": "constant"},
        checkpoint={"every_steps": 3},
    )


def largest_file(checkpoints: Path) -> int:
    return max(path.stat().st_size for path in checkpoints.glob("step_*/zero/*"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full")


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> dict[str, torch.Tensor]:
    Distiller(settings(root, root / "runs", 9)).fit()
    return consolidate(newest(root / "runs" / "run" / "checkpoints"))


@pytest.mark.parametrize("room", ["none", "for a file less than it takes"])
def test_a_full_disk_costs_no_checkpoint_and_the_run_goes_on_later(
    root: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor], room: str
) -> None:
    with small_disk(tmp_path / "disk", 24 << 20) as disk:
        Distiller(settings(root, disk, 3)).fit()
        folder = disk / "run" / "checkpoints"
        filler = fill(disk, leave_bytes=0 if room == "none" else largest_file(folder) + 65536)
        with pytest.raises(CheckpointError) as caught:
            Distiller(settings(root, disk, 9)).fit()
        if room == "none":
            assert str(disk / "run") in str(caught.value)
            assert "free some space" in str(caught.value)
        else:
            assert re.search(r"needs? [\d.,]+ MB", str(caught.value)), caught.value
            assert f"the last complete checkpoint is {folder / 'step_00000003'}" in str(caught.value)
        assert [path.name for path in complete_checkpoints(folder)] == ["step_00000003"]
        assert [path.name for path in folder.iterdir()] == ["step_00000003"], "the failed save still takes room"

        filler.unlink()
        assert Distiller(settings(root, disk, 9)).fit()
        assert newest(folder).name == "step_00000009"
        weights = consolidate(newest(folder))
    assert all(torch.equal(weights[name], undisturbed[name]) for name in undisturbed)


@pytest.mark.slow
def test_all_ranks_end_with_code_2_when_one_has_no_room(root: Path, tmp_path: Path) -> None:
    """The files of rank 0 fit, those of rank 1 no longer do, or the other way round: neither waits for the other."""
    with small_disk(tmp_path / "disk", 24 << 20) as disk:
        finish(distill(settings(root, disk, 3), tmp_path / "first", world_size=2))
        folder = disk / "run" / "checkpoints"
        fill(disk, leave_bytes=largest_file(folder) + 65536)
        job = distill(settings(root, disk, 9), tmp_path / "second", world_size=2)
        assert job.wait() == [2, 2], job.output()
        assert "MB" in job.output()
        assert job.output().count(f"the last complete checkpoint is {folder / 'step_00000003'}") == 2
        assert "Traceback" not in job.output()
        assert [path.name for path in folder.iterdir()] == ["step_00000003"]
