"""Shards and manifests that are damaged, unsafe or of something else: told with shard, sample and byte, never run."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import Distiller
from engine.data.manifest import Manifest
from engine.errors import ConfigError, DataError
from tests import tiny
from tests.launching import distill
from tests.refusals import Settings, fail, parts_of, refused
from tests.sharding import flip_a_bit


@pytest.fixture
def root(run_root: Path) -> Path:
    return run_root


def edit_manifest(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = root / "train" / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("damage", ["missing", "truncated", "index missing"])
def test_a_shard_that_is_not_whole(root: Path, damage: str) -> None:
    shard = root / "train" / "shard-000001.tar"
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-2000])
    else:
        (shard if damage == "missing" else shard.with_suffix(".index.npy")).unlink()
    words = {"missing": "no such file", "truncated": "cut short", "index missing": "no such file"}[damage]
    fail(tiny.run_config(root), DataError, str(shard.with_suffix("")), words)


def test_a_flipped_bit_names_shard_sample_and_byte(root: Path) -> None:
    flip_a_bit(root / "train" / "shard-000000.tar")
    config = tiny.run_config(root, run={"num_steps": 12})
    told = fail(config, DataError, "flipped bits", "data.max_bad_samples is 0", "verify_shards.py")
    assert re.search(r"shard-000000\.tar, sample 000000-00000020 \(number 20\), at byte [\d,]+:", told), told


def test_damage_that_is_allowed_is_counted_and_the_run_goes_on(root: Path) -> None:
    flip_a_bit(root / "train" / "shard-000000.tar")
    config = tiny.run_config(root, run={"num_steps": 14}, data={"max_bad_samples": 4})
    assert Distiller(config).fit()
    lines = (root / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    counts = [record["data/bad_samples"] for record in map(json.loads, lines) if "data/bad_samples" in record]
    assert counts == sorted(counts)
    assert 1 <= counts[-1] <= 2  # 112 sequences of a set of 96: met once, or again in the second epoch
    assert "flipped bits" in (root / "runs" / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer": "0" * 64}, ("tokenizer fingerprint is 0000", "build the shards again")),
        ({"task": "masked_lm"}, ("was built for masked_lm, but task.kind is causal_lm",)),
        ({"format_version": 99}, ("format version 99 is newer than this Stillhouse reads (1)", "update Stillhouse")),
    ],
)
def test_a_manifest_of_something_else(root: Path, change: Settings, words: tuple[str, ...]) -> None:
    edit_manifest(root, lambda content: content.update(change))
    error = ConfigError if "task" in change else DataError
    refused(tiny.run_config(root), error, *words)


def test_a_shard_with_a_pickle_is_refused_unopened(root: Path) -> None:
    """A record named .pkl, with index and hashes that fit: it is known by its name, and its bytes are never run."""
    shard, index = root / "train" / "shard-000000.tar", root / "train" / "shard-000000.index.npy"
    content = shard.read_bytes().replace(b"documents.npy", b"documents.pkl")
    entries = np.load(index)
    for entry in entries:
        entry["crc32"] = zlib.crc32(content[entry["offset"] : entry["offset"] + entry["num_bytes"]])
    shard.write_bytes(content)
    np.save(index, entries)

    def fit(manifest: dict[str, Any]) -> None:
        manifest["shards"][0]["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()

    edit_manifest(root, fit)
    fail(tiny.run_config(root), DataError, ".documents.pkl': a sample holds plain .npy", "nothing is unpickled")


def test_a_manifest_cannot_run_a_command(root: Path) -> None:
    witness = root / "ran"
    edit_manifest(root, lambda content: content["shards"][0].update(name=f"pipe:touch {witness}"))
    refused(tiny.run_config(root), DataError, "pipe: addresses run shell commands", "data.allow_pipe: true")
    assert not witness.exists()


def test_missing_manifests(root: Path) -> None:
    gone = {"manifest": str(root / "nowhere" / "manifest.json")}
    refused(tiny.run_config(root, data=gone), DataError, "nowhere/manifest.json: no such file")
    fail(tiny.run_config(root, evaluation=gone), DataError, "nowhere/manifest.json: no such file")
    assert not (root / "runs").exists()


def test_manifest_helpers_write_what_is_read(root: Path) -> None:
    """The spoilt manifests above are refused for what was spoilt: an untouched one passes the same way."""
    edit_manifest(root, lambda content: None)
    text = (root / "train" / "manifest.json").read_text()
    assert Manifest.from_json(text, "here").num_samples == 96
    assert parts_of(tiny.run_config(root)).shards.manifest.task == "causal_lm"


@pytest.mark.slow
def test_damage_that_one_rank_meets_ends_both(root: Path) -> None:
    """Whichever rank reads the record first says what is wrong with it, the other that it stops for that."""
    flip_a_bit(root / "train" / "shard-000000.tar")
    job = distill(tiny.run_config(root, run={"num_steps": 40}), root / "job", world_size=2)
    assert job.wait() == [2, 2], job.output()
    texts = [log.read_text() for log in job.logs]
    assert all("shard-000000.tar, sample 000000-00000020" in text for text in texts), job.output()
    assert sum("stopped with the others; rank" in text for text in texts) == 1, job.output()
    assert not any("Traceback" in text for text in texts), job.output()
