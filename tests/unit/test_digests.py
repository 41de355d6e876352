"""A file is read only if it is the one that was written, and nothing in it runs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.zero  # noqa: F401  - registers what DeepSpeed's files may hold
from engine.digests import Digests, write_hashed
from engine.errors import CheckpointError
from engine.zero import SnapshotWriter
from engine.zero.loading import weights_only


class Payload:
    """Unpickled freely, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_the_hash_made_while_writing_is_the_files(tmp_path: Path) -> None:
    item = {"weights": torch.arange(300_000.0), "name": "x" * 1000, "step": 3}
    written = write_hashed(tmp_path / "file.pt", lambda file: torch.save(item, file))
    assert written.sha256 == hashlib.sha256((tmp_path / "file.pt").read_bytes()).hexdigest()
    assert written.num_bytes == (tmp_path / "file.pt").stat().st_size
    assert torch.equal(torch.load(tmp_path / "file.pt")["weights"], item["weights"])


@pytest.mark.parametrize("damage", ["changed", "cut short", "not named", "gone"])
def test_another_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "zero" / "file.pt"
    path.parent.mkdir()
    written = write_hashed(path, lambda file: torch.save(torch.arange(9), file))
    recorded = {"zero/file.pt": written.sha256}
    Digests(tmp_path, recorded).check_all([path])
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut short":
        path.write_bytes(content[:-1])
    elif damage == "gone":
        path.unlink()
    else:
        recorded = {}
    expected = {
        "changed": rf"file.pt: refused, its sha256 is \w{{64}} and meta.json says {written.sha256}",
        "cut short": "its sha256 is",
        "not named": "meta.json has no sha256 of it",
        "gone": "cannot be read",
    }
    with pytest.raises(CheckpointError, match=expected[damage]):
        Digests(tmp_path, recorded).check_all([path])
    writer = SnapshotWriter()
    writer.digests = Digests(tmp_path, recorded)
    with pytest.raises(CheckpointError, match=expected[damage]):
        writer.load(str(path))


def test_no_code_of_a_file_runs_even_where_deepspeed_would_let_it(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2), "more": Payload(tmp_path / "made")}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"refused, since it asks for posix.mkdir"):
        SnapshotWriter().load(str(tmp_path / "file.pt"))
    with pytest.raises(CheckpointError, match="refused"), weights_only():
        torch.load(tmp_path / "file.pt", weights_only=False)  # as DeepSpeed asks for it
    assert not (tmp_path / "made").exists()
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "made").exists(), "the file does nothing, and the test shows nothing"


def test_the_variable_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    with weights_only(), weights_only():
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
