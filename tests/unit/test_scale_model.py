"""The formulas of the simulation against what the code really writes and reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scale_model
from benchmarks.scale_model import Cluster, Work
from engine.data.order import DataOrder
from engine.data.shards import ShardSet
from tests.launching import ROOT
from tests.serving import Server, in_a_hurry
from tests.sharding import write_set

WORK = Work(1e9, 2e9, 1.0, 8, 4, 10240, 2, 500)
CLUSTER = Cluster(8, 50e9, 450e9, 100e9, 5e9, 25e-6, 0.6, 20.0)


def test_bytes_of_a_sequence(tmp_path: Path) -> None:
    from engine.data.shard_writer import ShardWriter

    with ShardWriter(tmp_path / "a.tar", np.dtype("<u2")) as writer:
        writer.add("000000-00000000", np.zeros(4096, np.int64), np.array([4000, 96]))
    assert np.load(tmp_path / "a.index.npy")["num_bytes"].tolist() == [WORK.record_bytes]


@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_shards_opened_in_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lanes: int) -> None:
    """One rank a lane, each with a set of open shards of its own, against the requests that a server counts."""
    in_a_hurry(monkeypatch)
    manifest = write_set(tmp_path, (9, 14, 11, 6, 8))
    server = Server(tmp_path)
    counts = ShardSet.open(str(manifest)).manifest.samples_per_shard
    for lane in range(lanes):
        shards = ShardSet.open(f"{server.address}/manifest.json")
        order = DataOrder(counts, seed=0, lanes=lanes, shuffle_samples=4)
        for sequence in range(lane, order.sequences_per_epoch, lanes):
            place = order.locate(sequence)
            shards.read(place.shard, place.index)
    opened = len([name for name, _ in server.requests if name.endswith((".tar", ".npy"))])
    most = scale_model.opens_of_epoch(len(counts), lanes)
    assert most - 2 * (lanes - 1) <= opened <= most, "a cut between lanes may fall between two shards"
    assert opened > 2 * (len(counts) - 1)


@pytest.mark.parametrize("num_lanes", [4, 64])
def test_a_rank_keeps_the_windows_of_its_own_lanes(num_lanes: int) -> None:
    order = DataOrder([1000] * 100, seed=0, lanes=num_lanes, shuffle_samples=16)
    for sequence in range(1, 60_000, 4):  # rank 1 of 4, through many windows
        order.locate(sequence)
    assert len(order._windows) == num_lanes // 4


@pytest.mark.parametrize(("stage", "factor"), [(1, 2), (2, 5), (3, 12)])
def test_messages_of_the_zero_paper(stage: int, factor: int) -> None:
    work = Work(1e9, 0, 1.0, 8, 4, 0, stage, 1)
    assert scale_model.messages(work, 1).total == 0
    assert scale_model.messages(work, 1000).total == pytest.approx(factor * 2e9, rel=2e-3), "4 micro-batches"


def test_times_grow_as_they_should() -> None:
    steps = [scale_model.step_seconds(WORK, CLUSTER, ranks) for ranks in (1, 8, 16, 4096)]
    assert steps == sorted(steps)
    assert steps[0] == WORK.step_seconds
    starts = [scale_model.start_seconds(WORK, CLUSTER, ranks, 1.0) for ranks in (8, 4096)]
    assert starts[1] > starts[0], "every node reads the weights"
    assert scale_model.write_seconds(WORK, CLUSTER, 8) > scale_model.write_seconds(WORK, CLUSTER, 64)


def test_growths_name_what_every_rank_reads_after_another_number_of_ranks() -> None:
    growth = scale_model.growths(WORK, CLUSTER, 4096)["a resume on another number of ranks, stage 3"]
    assert "12.0 GB on every rank and 49.2 TB in all, 492 s of the store" in growth


def test_the_simulation_runs(tmp_path: Path) -> None:
    """With fewer shards. Its seconds are the benchmark's own affair: they depend on what else the machine does."""
    output = tmp_path / "scale.json"
    words = ["benchmarks/simulate_scale.py", "--shards", "2000", "--output", str(output)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stderr.strip() in ("", "more than is allowed")
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith(("real", " "))) <= 100
    real = json.loads(output.read_text())["real_code"]
    assert real["first_step_places"] == 8 * 4096, "each rank has 8 sequences of its own"
    assert 0 < real["first_step_opens"] <= real["first_step_places"]
    assert real["peak_bytes"] <= 500 * 10**6


def test_the_peak_is_of_this_process_alone() -> None:
    """Not of the one that started it, whose pages it had until it became another program."""
    child = "from measuring import peak_process_bytes; print(peak_process_bytes())"
    parent = f"import subprocess, sys; big = b'x' * 400_000_000; subprocess.run([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", parent], cwd=ROOT / "benchmarks", capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")}, timeout=100)  # fmt: skip
    assert 0 < int(done.stdout) < 400_000_000, done.stderr
