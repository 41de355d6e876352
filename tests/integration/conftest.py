"""A small run that works, for tests to spoil."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny


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
