"""Many jobs on one cache: kills, claims of the dead and the living, a full disk. What comes out is always the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.cache import claims
from engine.cache.claims import Claims, Owner
from engine.cache.folder import CacheFolder
from engine.capture import Capture
from engine.config.load import parse_config
from engine.data.manifest import Manifest, write_manifest
from engine.data.record import token_dtype
from engine.data.shard_writer import ShardWriter
from engine.dist import StopSignal
from engine.errors import CacheError
from engine.tasks.tokenizer import fingerprint
from tests import tiny
from tests.caching import cached_run, files_of, make_cache
from tests.full_disk import fill, small_disk
from tests.launching import FORKS, ROOT, Job, start_server, write_config

NUM_KILLS, NUM_JOBS = 20, 3
NUM_SHARDS = 48


def many_shards(folder: Path, num_samples: int = 10, sequence_tokens: int = 64) -> Path:
    """The samples of a tiny set in many small shards."""
    folder.mkdir(parents=True)
    rng, vocabulary = np.random.default_rng(4), tiny.tokenizer()
    counts, entries = np.zeros(len(vocabulary), np.int64), []
    for number in range(NUM_SHARDS):
        with ShardWriter(folder / f"shard-{number:06d}.tar", token_dtype(len(vocabulary))) as writer:
            for n in range(num_samples):
                ids = rng.integers(5, 96, sequence_tokens)
                counts += np.bincount(ids, minlength=len(counts))
                writer.add(f"{number:06d}-{n:08d}", ids, np.array([sequence_tokens]))
        assert writer.entry is not None
        entries.append(writer.entry)
    manifest = Manifest(
        "causal_lm", fingerprint(vocabulary), len(vocabulary), 0, sequence_tokens, 3, tuple(entries), "", "tests"
    )
    write_manifest(folder, manifest, counts)
    return folder / "manifest.json"


def heavy_run(root: Path, cache: str) -> dict[str, Any]:
    """A teacher that takes long enough to be killed at work."""
    if not (root / "teacher").exists():
        tiny.model_folder(root / "teacher", "causal_lm", hidden_size=192, num_hidden_layers=6, intermediate_size=512)
        many_shards(root / "train")
    return cached_run(root, teacher={"cache": cache}, student={"config": tiny.LLAMA, "init": None,
                                                                              "layers": None})  # fmt: skip


def run_job(config: dict[str, Any]) -> None:
    """One job, in a process of its own."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    make_cache(config, list(range(NUM_SHARDS)))


def start(config: dict[str, Any]) -> Any:
    start_server()
    job = FORKS.Process(target=run_job, args=(config,))
    job.start()
    return job


def done(folder: Path) -> int:
    return len(list(folder.glob("*.targets.tar")))


@pytest.mark.slow
def test_kills_of_racing_jobs_leave_the_cache_that_one_job_makes(tmp_path: Path) -> None:
    """Three jobs at a time; every so often one of them gets SIGKILL and another takes its place."""
    config, chance = heavy_run(tmp_path, "raced"), random.Random(7)
    folder = tmp_path / "train" / "raced"
    jobs = [start(config) for _ in range(NUM_JOBS)]
    kills, at_work, rounds = 0, 0, 0
    while kills < NUM_KILLS:
        time.sleep(chance.uniform(0.05, 0.6))
        victim = chance.randrange(NUM_JOBS)
        if jobs[victim].is_alive():
            at_work += bool(list(folder.glob(".*.partial")))
            os.kill(jobs[victim].pid, signal.SIGKILL)
            kills += 1
        jobs[victim].join()
        if done(folder) == NUM_SHARDS and kills < NUM_KILLS:  # faster than the kills: once more from half of it
            rounds += 1
            for path in sorted(folder.glob("*.targets.tar"))[::2]:
                path.unlink()
        jobs[victim] = start(config)
    for job in jobs:
        job.join()
        assert job.exitcode == 0
    assert at_work > NUM_KILLS // 2, "kills that hit nothing prove nothing"
    alone = heavy_run(tmp_path, "alone")
    job = start(alone)
    job.join()
    assert files_of(folder) == files_of(tmp_path / "train" / "alone")


def test_the_claim_of_a_dead_job_is_taken_at_once(tmp_path: Path) -> None:
    config = cached_run(tmp_path)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = Owner.here()
    claim(tmp_path / "train" / "sampled", Owner(here.host, ended.pid, here.namespace, "1"))
    assert make_cache(config).manifest() is not None


def test_the_claim_of_a_job_elsewhere_is_left_until_its_heart_stops(tmp_path: Path) -> None:
    config = cached_run(tmp_path)
    path = claim(tmp_path / "train" / "sampled", Owner("another-host", 1, "another boot", "1"))
    folder = make_cache(config)
    assert folder.manifest() is None
    assert [entry.name for entry in missing(folder, tmp_path)] == ["shard-000000.tar"]
    os.utime(path, (time.time() - 100, time.time() - 100))
    assert make_cache(config).manifest() is not None
    assert not (tmp_path / "train" / "sampled" / "claims").exists()


def test_a_claim_lives_as_long_as_its_job_touches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both seem to be elsewhere, so that nothing but the age of a claim tells whether its job lives."""
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(claims, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(Owner, "is_gone", lambda self: False)
    other = Claims(tmp_path)
    with Claims(tmp_path) as slow:
        assert slow.take("a")
        time.sleep(1.0)
        assert not other.take("a")
    with monkeypatch.context() as patch:
        patch.setattr(Claims, "_beat", lambda self: None)
        with Claims(tmp_path) as hung:
            assert hung.take("a")
            time.sleep(1.0)
            assert other.take("a")
        assert [claim.name for claim in other.all()] == ["a"], "what is another's now is left alone"


def test_the_claim_of_a_slow_job_is_its_own(tmp_path: Path) -> None:
    """It lives, so no other job makes its shard."""
    config = cached_run(tmp_path)
    with Claims(tmp_path / "train" / "sampled" / "claims") as slow:
        assert slow.take("shard-000001.targets.tar")
        folder = make_cache(config)
        assert [entry.name for entry in missing(folder, tmp_path)] == ["shard-000001.tar"]
        assert folder.claims() == [
            f"shard-000001.targets.tar is being made by process {os.getpid()} on {Owner.here().host}"
        ]


def test_two_jobs_that_make_the_same_shard_by_accident_leave_a_right_one(tmp_path: Path) -> None:
    """The claim of the first is stolen while it works; the second finishes before it."""
    config = cached_run(tmp_path)
    first = Capture(parse_config(config), torch.device("cpu"))
    made = []

    def steal(_: object) -> None:
        for path in (tmp_path / "train" / "sampled" / "claims").glob("*.claim"):
            os.utime(path, (1, 1))
        if not made:
            made.append(make_cache(config | {"cache": config["cache"]}))

    first.run(range(3), StopSignal(), steal)
    assert first.folder.manifest() is not None
    again = cached_run(tmp_path, teacher={"cache": "again"})
    make_cache(again)
    assert files_of(tmp_path / "train" / "sampled") == files_of(tmp_path / "train" / "again")


def test_a_signal_gives_up_the_shard_in_hand_and_its_claim(tmp_path: Path) -> None:
    capture = Capture(parse_config(cached_run(tmp_path)), torch.device("cpu"))
    stop = StopSignal()
    shown = []

    def show(_: object) -> None:
        shown.append(1)
        stop.received = "SIGTERM" if len(shown) == 14 else None

    capture.run(range(3), stop, show)
    folder = tmp_path / "train" / "sampled"
    assert [path.name for path in folder.glob("*.targets.tar")] == ["shard-000000.targets.tar"]
    assert not list(folder.glob(".*"))
    assert not list((folder / "claims").iterdir())


@pytest.mark.parametrize("room", [0, 3_000, 8_000])
def test_a_full_disk_keeps_whole_shards_and_names_the_next(tmp_path: Path, room: int) -> None:
    config = cached_run(tmp_path)
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        config["teacher"]["cache"] = str(disk / "cache")
        make_cache(config, [0])
        filler = fill(disk, room)
        with pytest.raises(CacheError, match=r"cannot be written \(No space left"):
            make_cache(config)
        found = {path.name for path in (disk / "cache").iterdir()}
        assert "shard-000000.targets.tar" in found
        assert not any("partial" in name for name in found), "nothing half is left, and its room is free again"
        filler.unlink()
        assert make_cache(config).manifest() is not None


def test_parts_of_the_shards_make_the_whole(tmp_path: Path) -> None:
    for numbers in ([2], [0, 1]):
        folder = make_cache(cached_run(tmp_path, teacher={"cache": "parts"}), numbers)
        assert (folder.manifest() is not None) == (numbers == [0, 1])
    make_cache(cached_run(tmp_path, teacher={"cache": "whole"}))
    assert files_of(tmp_path / "train" / "parts") == files_of(tmp_path / "train" / "whole")


def test_the_launcher_says_what_is_done_and_what_is_left(tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", cached_run(tmp_path))
    words = [str(ROOT / "launch" / "cache_teacher.py"), "--config", str(path)]
    for more, code, expected in (
        (["--shards", "1-2"], 0, "2 of 3 shards done"),
        ([], 0, "complete: 3 shards"),
        (["--shards", "5"], 2, "--shards 5: the data has shards 0 to 2"),
    ):
        job = Job([*words, *more], 1, tmp_path)
        assert job.wait() == [code]
        assert expected in job.output()


def test_a_job_killed_before_its_cache_had_a_name_is_no_hindrance(tmp_path: Path) -> None:
    """ranks.npy comes before cache.json, which has its hash."""
    folder = tmp_path / "train" / "sampled"
    make_cache(cached_run(tmp_path), [0])
    (folder / "cache.json").unlink()
    assert make_cache(cached_run(tmp_path)).manifest() is not None
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "ranks.npy").write_bytes(b"of a cache that was deleted")
    with pytest.raises(CacheError, match=r"ranks\.npy: is left of another cache; delete it"):
        make_cache(cached_run(tmp_path))


def test_a_cache_that_lost_a_sidecar_says_so_until_it_is_made_again(tmp_path: Path) -> None:
    """A copy made meanwhile must not be told by manifest.json that it is complete."""
    folder = make_cache(cached_run(tmp_path))
    whole = files_of(folder.path)
    (folder.path / "shard-000001.targets.tar").unlink()
    assert make_cache(cached_run(tmp_path), [0]).manifest() is None
    make_cache(cached_run(tmp_path))
    assert files_of(folder.path) == whole


def test_jobs_that_finish_at_once_write_one_manifest(tmp_path: Path) -> None:
    folder = make_cache(cached_run(tmp_path))
    whole, manifest = files_of(folder.path), data_of(tmp_path)
    for _ in range(10):
        (folder.path / "manifest.json").unlink()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: folder.write_manifest(manifest), range(4)))
        assert files_of(folder.path) == whole


def claim(cache: Path, owner: Owner) -> Path:
    """As a job of ``owner`` would have left it."""
    (cache / "claims").mkdir(parents=True)
    path = cache / "claims" / "shard-000000.targets.tar.claim"
    path.write_text(json.dumps({"name": "shard-000000.tar", "token": "x", "owner": vars(owner)}))
    return path


def data_of(root: Path) -> Manifest:
    manifest = root / "train" / "manifest.json"
    return Manifest.from_json(manifest.read_text(), str(manifest))


def missing(folder: CacheFolder, root: Path) -> list[Any]:
    return folder.missing(data_of(root))
