"""Files are made with the user's umask: for nobody whom it shuts out, and for all whom it lets in."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

import engine.zero  # noqa: F401  - sets what ranks read from the environment
from tests import tiny
from tests.launching import ROOT, Job, finish, write_config


def modes(folder: Path) -> dict[str, int]:
    paths = [folder, *folder.rglob("*")]
    assert len(paths) > 1
    return {str(path.relative_to(folder.parent)): path.lstat().st_mode for path in paths if not path.is_symlink()}


def check(folder: Path, umask: int) -> None:
    for name, mode in modes(folder).items():
        full = 0o777 if stat.S_ISDIR(mode) else 0o666
        wanted = full & ~umask
        assert stat.S_IMODE(mode) & 0o7777 == wanted, f"{name}: {stat.S_IMODE(mode):o}, expected {wanted:o}"


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o027, 0o077, 0o002], ids=oct)
def test_what_is_written_has_the_modes_of_the_umask(run_root: Path, umask: int) -> None:
    root = run_root
    variables = {"TEST_UMASK": oct(umask)}
    (root / "text.txt").write_text("w1 w2 w3 w4 w5 w6\n\n" * 200)
    words = ["--task", "causal_lm", "--input", str(root / "text.txt"), "--tokenizer", str(root / "teacher")]
    words += ["--sequence-tokens", "32", "--output", str(root / "shards")]
    finish(Job([str(ROOT / "data_tools" / "build_shards.py"), *words], 1, root, variables))
    check(root / "shards", umask)

    cached = tiny.run_config(root, teacher={"kind": "cached", "cache": str(root / "cache")})
    path = write_config(root / "cache.yaml", cached)
    finish(Job([str(ROOT / "launch" / "cache_teacher.py"), "--config", str(path)], 1, root, variables))
    check(root / "cache", umask)

    config = tiny.run_config(
        root,
        evaluation={"manifest": f"{root}/heldout/manifest.json", "every_steps": 4},
        tracking={"every_steps": 1, "tensorboard": True},
        zero={"zero_optimization": {"stage": 2}},
    )
    path = write_config(root / "run.yaml", config)
    for ranks, steps in ((2, 4), (1, 6)):  # the second converts what the first wrote
        command = [str(ROOT / "launch" / "distill.py"), "--config", str(path), f"run.num_steps={steps}"]
        finish(Job(command, ranks, root, variables))
    assert (root / "runs" / "run" / "export" / "model.safetensors").is_file()
    check(root / "runs", umask)
