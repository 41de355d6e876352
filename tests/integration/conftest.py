"""A small run that works, for tests to spoil."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.caching import CODECS, cached_run, make_cache


@pytest.fixture(scope="session")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that works; its shards and models are copied, never changed."""
    root = tmp_path_factory.mktemp("origin")
    tiny.run_config(root)
    return root


@pytest.fixture
def run_root(origin: Path, tmp_path: Path) -> Path:
    """The same run in a folder of its own, to be spoilt."""
    for name in ("teacher", "train", "heldout"):
        (tmp_path / name).mkdir()
        for path in (origin / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture(scope="module", params=["causal_lm", "masked_lm"])
def cached_task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def cached_root(tmp_path_factory: pytest.TempPathFactory, cached_task: str) -> Path:
    """A run of the task with a cache of each codec; they are copied, never changed."""
    folder = tmp_path_factory.mktemp(cached_task)
    for codec in CODECS:
        make_cache(cached_run(folder, cached_task, codec))
    return folder
