"""Whole runs over a shard server with faults: the same losses as from disk, and the counts in the metrics."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from benchmarks.scale_model import checkpoint_bytes, checkpoint_files
from engine.checkpoint import newest
from engine.data.client import CLIENT
from engine.distiller import Distiller
from engine.zero import consolidate
from tests import tiny
from tests.launching import distill, finish
from tests.serving import Server

GONE_SECONDS = 6.0


def records(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss/objective" in record]


def losses(folder: Path) -> list[float]:
    return [record["loss/objective"] for record in records(folder)]


def total(folder: Path, name: str) -> float:
    return sum(record[name] for record in records(folder))


def over(server: Server, here: Path, there: Path) -> dict[str, object]:
    """The run of ``here`` with its data on ``server``, in the folder ``there``."""
    return tiny.run_config(
        here, data={"manifest": f"{server.address}/manifest.json"}, run={"output": str(there / "runs")}
    )


def test_a_server_gone_in_mid_run_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.address.BLOCK_BYTES", 2048)  # else all of it is read at the start
    finish(distill(tiny.run_config(tmp_path), tmp_path / "job"))
    assert "data/retries" not in records(tmp_path)[0], "there is no server"
    server = Server(tmp_path / "train")
    server.busy_share = 0.2
    config = over(server, tmp_path, tmp_path / "there")
    told = threading.Event()

    def vanish() -> None:
        while len(server.requests) < 60:
            told.wait(0.01)
        server.stop()
        told.wait(GONE_SECONDS)
        server.start()

    outage = threading.Thread(target=vanish)
    outage.start()
    CLIENT.take()
    Distiller(config).fit()
    outage.join()
    there = tmp_path / "there"
    assert losses(there) == losses(tmp_path)
    assert total(there, "data/retries") >= server.num_refused + 1, "each refusal and the outage"
    assert total(there, "data/seconds_waiting_for_server") >= GONE_SECONDS / 2
    assert total(there, "data/bytes_read") > 0
    log = (there / "runs" / "run" / "log.txt").read_text()
    assert log.count("has not answered for") == log.count("answers again, after") <= 1, "not a line a retry"


def test_one_rank_reads_the_manifests_for_all(tmp_path: Path) -> None:
    tiny.run_config(tmp_path)
    server, heldout = Server(tmp_path / "train"), Server(tmp_path / "heldout")
    server.failures = 3
    config = over(server, tmp_path, tmp_path / "there")
    config["evaluation"] = {"manifest": f"{heldout.address}/manifest.json", "every_steps": 4, "max_sequences": 8}
    finish(distill(config, tmp_path / "job", world_size=2))
    for each, expected in ((server, {"manifest.json": 1, "token_counts.npy": 1}), (heldout, {"manifest.json": 2})):
        found = {name: [asked for asked, _ in each.requests].count(name) for name in expected}
        assert found == expected, "the held-out manifest once more by rank 0 alone, at the end"
    there = tmp_path / "there"
    assert total(there, "data/retries") >= 3, "those of all ranks"
    indexes = [name for name, _ in server.requests if name.endswith(".index.npy")]
    assert len(indexes) <= 2 * 3, "each rank opens a shard once"
    finish(distill(tiny.run_config(tmp_path, run={"output": str(tmp_path / "runs")}), tmp_path / "disk", world_size=2))
    assert losses(there) == losses(tmp_path)
    checkpoint = newest(there / "runs" / "run" / "checkpoints")
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert len(files) == checkpoint_files(2, zero_stage=2), files
    num_parameters = sum(tensor.numel() for name, tensor in consolidate(checkpoint).items() if "lm_head" not in name)
    num_bytes = sum(path.stat().st_size for path in files)
    expected = checkpoint_bytes(num_parameters, zero_stage=2, value_bytes=4)
    assert expected <= num_bytes <= expected + 2 * 50_000, "besides names and shapes, some kilobytes a file"


def test_a_server_that_stays_away_ends_all_ranks(tmp_path: Path) -> None:
    tiny.run_config(tmp_path)
    server = Server(tmp_path / "train")
    config = over(server, tmp_path, tmp_path / "there")
    config["data"]["retry_seconds"] = 1.0  # type: ignore[index]
    config["data"]["max_bad_samples"] = 1000  # type: ignore[index]
    for path in (tmp_path / "train").glob("*.tar"):
        server.absent.add(path.name)
    job = distill(config, tmp_path / "job", world_size=2)
    assert job.wait() == [2, 2], job.output()
    assert "cannot be read after" in job.output()
    assert "data.retry_seconds" in job.output()
