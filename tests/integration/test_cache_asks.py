"""A run that asks its teacher live for what the cache lacks, and writes the answers back."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Distiller
from engine.cache.folder import CacheFolder
from engine.cache.journal import Journal, fold
from engine.cache.sidecar import Sums
from engine.cache.sidecar_writer import SidecarWriter
from engine.data.shards import ShardSet
from engine.errors import CacheError, ConfigError, DataError
from engine.teacher.online import OnlineTeacher
from engine.trainer import Trainer
from tests.caching import cached_run, make_cache
from tests.full_disk import fill, small_disk
from tests.launching import distill, finish

EPOCH = {"num_steps": 12}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many labelled rows the live teacher answered, for each time it was asked in training."""
    answered: list[int] = []
    own = OnlineTeacher.targets_for

    def counting(self: OnlineTeacher, batch: Any, rows: torch.Tensor) -> Any:
        answered.append(rows.numel())
        return own(self, batch, rows)

    monkeypatch.setattr(OnlineTeacher, "targets_for", counting)
    return answered


def asking(root: Path, name: str, codec: str = "sampled", task: str = "causal_lm", **sections: Any) -> dict[str, Any]:
    """Without held-out text, so that the teacher is asked for nothing else."""
    teacher = {"on_missing": "ask"} | sections.pop("teacher", {})
    return cached_run(root, task, codec, teacher=teacher, run=EPOCH | {"name": name} | sections.pop("run", {}),
                      schedule={"kind": "constant"}, **sections)  # fmt: skip


def losses(root: Path, name: str) -> list[float]:
    lines = (root / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record["loss/forward_kl"] for record in map(json.loads, lines) if "loss/forward_kl" in record]


def sidecars(root: Path, cache: str) -> set[str]:
    return {path.name.removesuffix(".targets.tar") for path in (root / "train" / cache).glob("*.targets.tar")}


@pytest.mark.parametrize("codec", ["sampled", "top_k", "hidden"])
def test_what_is_missing_is_asked_once_and_kept(tmp_path: Path, codec: str, asked: list[int]) -> None:
    make_cache(cached_run(tmp_path, codec=codec, teacher={"cache": "whole"}))
    Distiller(cached_run(tmp_path, codec=codec, teacher={"cache": "whole"}, run=EPOCH | {"name": "whole"},
                         schedule={"kind": "constant"})).fit()  # fmt: skip
    make_cache(cached_run(tmp_path, codec=codec), [1])
    asked.clear()
    Distiller(asking(tmp_path, "asks", codec)).fit()
    assert 0 < len(asked) <= 48, "a batch that the cache has whole is not asked for"
    assert losses(tmp_path, "asks") == pytest.approx(losses(tmp_path, "whole"), rel=1e-4)
    assert sidecars(tmp_path, codec) == {"shard-000000", "shard-000001", "shard-000002"}
    assert not (tmp_path / "train" / codec / "journal").exists()
    asked.clear()
    Distiller(cached_run(tmp_path, codec=codec, run=EPOCH | {"name": "again"}, schedule={"kind": "constant"})).fit()
    assert not asked
    assert losses(tmp_path, "again") == pytest.approx(losses(tmp_path, "whole"), rel=1e-4)


def test_no_cache_at_all_is_one_that_lacks_everything(tmp_path: Path, asked: list[int]) -> None:
    config = asking(tmp_path, "first", "sampled", "masked_lm", run={"num_steps": 36})
    config["task"]["mask_rounds"] = 3
    Distiller(config).fit()
    assert sidecars(tmp_path, "sampled") == {"shard-000000", "shard-000001", "shard-000002"}
    assert CacheFolder.open(str(tmp_path / "train" / "sampled" / "cache.json")).manifest() is not None


def test_a_second_run_asks_only_for_the_rest(tmp_path: Path, asked: list[int]) -> None:
    Distiller(asking(tmp_path, "part", run={"num_steps": 5})).fit()
    assert len(asked) == 20
    assert sidecars(tmp_path, "sampled") == set()
    asked.clear()
    Distiller(asking(tmp_path, "rest", run={"num_steps": 12})).fit()
    assert len(asked) == 28, "the same seed meets the same samples first"
    assert len(sidecars(tmp_path, "sampled")) == 3


def test_a_journal_that_was_cut_short_loses_its_last_record(tmp_path: Path, asked: list[int]) -> None:
    Distiller(asking(tmp_path, "part", run={"num_steps": 5})).fit()
    (journal,) = (tmp_path / "train" / "sampled" / "journal").glob("*.journal")
    journal.write_bytes(journal.read_bytes()[:-3])
    folder = CacheFolder.open(str(tmp_path / "train" / "sampled" / "cache.json"))
    manifest = ShardSet.open(str(tmp_path / "train" / "manifest.json")).manifest
    assert len(Journal(folder, manifest)._places) == 39
    asked.clear()
    Distiller(asking(tmp_path, "rest", run={"num_steps": 12})).fit()
    assert len(asked) == 29
    assert len(sidecars(tmp_path, "sampled")) == 3


def test_what_runs_wrote_back_is_taken_by_a_caching_job(tmp_path: Path, asked: list[int]) -> None:
    Distiller(asking(tmp_path, "part", run={"num_steps": 12})).fit()
    for path in (tmp_path / "train" / "sampled").glob("manifest.json"):
        path.unlink()
    asked.clear()
    make_cache(cached_run(tmp_path))
    assert not asked
    assert (tmp_path / "train" / "sampled" / "manifest.json").exists()


def test_processes_that_fold_at_once_make_the_sidecars_once(tmp_path: Path) -> None:
    make_cache(cached_run(tmp_path, teacher={"cache": "whole"}))
    data = ShardSet.open(str(tmp_path / "train" / "manifest.json")).manifest
    folder = make_cache(cached_run(tmp_path), [])
    whole = CacheFolder.open(str(tmp_path / "train" / "whole" / "cache.json"))
    for _ in range(5):
        journals = [Journal(folder, data), Journal(folder, data)]
        for entry in data.shards:
            sidecar = whole.sidecar(entry)
            for number in range(sidecar.header.num_records):
                record = sidecar.read(number)
                journals[number % 2].add(entry.name, number, record, Sums(32, 28, 1, 0.5))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: fold(folder, data), range(4)))
        assert folder.missing(data) == []
        assert not (folder.path / "journal").exists()
        for entry in data.shards:
            made, wanted = folder.sidecar(entry), whole.sidecar(entry)
            for number in range(made.header.num_records):
                assert made.read(number) == wanted.read(number)
            folder.path_of(entry).unlink()


def test_a_journal_begun_anew_while_it_is_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process has read where the records are; another folds them, and a live run goes on under the same name."""
    make_cache(cached_run(tmp_path, teacher={"cache": "whole"}))
    data = ShardSet.open(str(tmp_path / "train" / "manifest.json")).manifest
    folder = make_cache(cached_run(tmp_path), [])
    whole = CacheFolder.open(str(tmp_path / "train" / "whole" / "cache.json"))
    live = Journal(folder, data)

    def add(number: int) -> None:
        sidecar = whole.sidecar(data.shards[number])
        for record in range(sidecar.header.num_records):
            live.add(data.shards[number].name, record, sidecar.read(record), Sums(32, 28, 1, 0.5))

    add(0)
    own, met = SidecarWriter.__enter__, []

    def enter(self: SidecarWriter) -> SidecarWriter:
        if not met:
            met.append(self)
            fold(folder, data)
            add(1)
        return own(self)

    monkeypatch.setattr(SidecarWriter, "__enter__", enter)
    fold(folder, data)
    assert met
    assert sidecars(tmp_path, "sampled") == {"shard-000000"}
    fold(folder, data)
    assert sidecars(tmp_path, "sampled") == {"shard-000000", "shard-000001"}


def test_what_a_live_teacher_cannot_answer_ends_the_step_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While ranks can still agree on it: in the middle of a step the others would wait for this one."""
    own, agreed = OnlineTeacher.targets_for, []
    agree = Trainer._agree

    def poisoned(self: OnlineTeacher, batch: Any, rows: torch.Tensor) -> Any:
        targets = own(self, batch, rows)
        return replace(targets, hidden=targets.hidden * float("nan"))

    def agreeing(self: Trainer, fetched: Any) -> Any:
        agreed.append(type(fetched))
        return agree(self, fetched)

    monkeypatch.setattr(OnlineTeacher, "targets_for", poisoned)
    monkeypatch.setattr(Trainer, "_agree", agreeing)
    with pytest.raises(DataError, match="NaN or Inf for one of shard-"):
        Distiller(asking(tmp_path, "poisoned")).fit()
    assert agreed == [DataError]


def test_layers_that_a_live_teacher_does_not_have(tmp_path: Path) -> None:
    codec = {"codec": {"kind": "hidden", "layers": [9]}}
    with pytest.raises(ConfigError, match=r"cache\.codec\.layers: there is no layer 9; the teacher has 4"):
        Distiller(asking(tmp_path, "beyond", "hidden", cache=codec)).fit()
    assert not (tmp_path / "train" / "hidden").exists()


def test_a_full_disk_ends_the_writing_and_not_the_run(tmp_path: Path) -> None:
    make_cache(cached_run(tmp_path, teacher={"cache": "whole"}))
    Distiller(cached_run(tmp_path, teacher={"cache": "whole"}, run=EPOCH | {"name": "whole"},
                         schedule={"kind": "constant"})).fit()  # fmt: skip
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        config = asking(tmp_path, "full", teacher={"cache": str(disk / "cache")})
        make_cache(config, [])
        fill(disk, 12_000)
        Distiller(config).fit()
        assert losses(tmp_path, "full") == pytest.approx(losses(tmp_path, "whole"), rel=1e-4)
        told = (tmp_path / "runs" / "full" / "log.txt").read_text()
        assert told.count("answers are not kept any more (") == 1
        assert not list((disk / "cache").glob("*.targets.tar"))


def test_ranks_ask_for_their_own(tmp_path: Path) -> None:
    config = asking(tmp_path, "two")
    finish(distill(config, tmp_path / "logs", 2))
    assert len(sidecars(tmp_path, "sampled")) == 3
    make_cache(cached_run(tmp_path, teacher={"cache": "whole"}))
    Distiller(cached_run(tmp_path, teacher={"cache": "whole"}, run=EPOCH | {"name": "one"},
                         schedule={"kind": "constant"})).fit()  # fmt: skip
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), rel=1e-3)


def test_another_codec_than_the_caches_is_refused(tmp_path: Path) -> None:
    make_cache(cached_run(tmp_path), [0])
    with pytest.raises(CacheError, match="this cache holds other targets; codec num_draws: it has 20, this job 21"):
        Distiller(asking(tmp_path, "other", cache={"codec": {"kind": "sampled", "num_draws": 21}})).fit()
