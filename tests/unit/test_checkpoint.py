"""A checkpoint exists when its COMPLETE does; what fails leaves none, is told to all ranks, and costs no older one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import checkpoint
from engine.checkpoint import CheckpointStore, complete_checkpoints, newest, read_meta
from engine.digests import HashingFile, WrittenFile
from engine.dist import Control, Ranks
from engine.errors import CheckpointError
from engine.zero import SnapshotWriter, StudentEngine, snapshot
from tests.full_disk import fill, small_disk

SaveEngine = Callable[[Path], list[Future[WrittenFile]]]


class Meeting:
    """Where the threads that play ranks agree, as real ranks do over gloo."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=20)
        self.items: list[Any] = [None] * world_size


class ThreadControl(Control):
    def __init__(self, ranks: Ranks, meeting: Meeting) -> None:
        self.ranks, self._meeting = ranks, meeting

    def gather(self, item: Any) -> list[Any]:
        self._meeting.items[self.ranks.rank] = item
        self._meeting.barrier.wait()
        items = list(self._meeting.items)
        self._meeting.barrier.wait()
        return items

    def from_main(self, item: Any) -> Any:
        return self.gather(item)[0]

    def barrier(self) -> None:
        self._meeting.barrier.wait()


def on_ranks(world_size: int, work: Callable[[ThreadControl], Any]) -> list[Any]:
    """What ``work`` returns, or the CheckpointError it raises, on each rank."""
    meeting = Meeting(world_size)

    def run(rank: int) -> Any:
        try:
            return work(ThreadControl(Ranks(rank, world_size, rank), meeting))
        except CheckpointError as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


def writes(rank: int, content: bytes = b"weights") -> SaveEngine:
    """A well-behaved engine: one file, ready at once."""

    def save(folder: Path) -> list[Future[WrittenFile]]:
        (folder / f"part_{rank}").write_bytes(content)
        done: Future[WrittenFile] = Future()
        done.set_result(WrittenFile(folder / f"part_{rank}", len(content), hashlib.sha256(content).hexdigest()))
        return [done]

    return save


def fails(after: threading.Event | None) -> SaveEngine:
    """An engine whose file fails: at once, or later while others think all is well."""

    def save(folder: Path) -> list[Future[WrittenFile]]:
        failure = CheckpointError("part_1: could not be written (disk on fire); it needs 12.0 MB")
        future: Future[WrittenFile] = Future()
        if after is None:
            future.set_exception(failure)
        else:
            threading.Thread(target=lambda: (after.wait(5), future.set_exception(failure))).start()
        return [future]

    return save


def save_steps(folder: Path, steps: list[int], *, keep: int = 2, world_size: int = 1) -> None:
    def work(control: ThreadControl) -> None:
        store = CheckpointStore(folder, control, keep)
        for step in steps:
            store.save(step, writes(control.ranks.rank), {"rng": torch.zeros(2)}, {"state": {"step": step}})
        store.finish_writing()

    assert on_ranks(world_size, work) == [None] * world_size


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_checkpoint_holds_every_ranks_part_and_says_what_it_is(tmp_path: Path, world_size: int) -> None:
    save_steps(tmp_path, [7], world_size=world_size)
    (path,) = complete_checkpoints(tmp_path)
    assert path.name == "step_00000007"
    parts = [f"part_{rank}" for rank in range(world_size)]
    assert names(path) == sorted(["COMPLETE", "meta.json", "state", *parts])
    assert names(path / "state") == [f"rank_{rank:05d}.pt" for rank in range(world_size)]
    meta = read_meta(path)
    assert (meta["step"], meta["world_size"], meta["num_bytes"]) == (7, world_size, 7 * world_size)
    assert meta["state"] == {"step": 7}
    files = [file for file in path.rglob("*") if file.is_file() and file.name not in ("COMPLETE", "meta.json")]
    assert meta["sha256"] == {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def test_complete_is_written_last_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every moment before, there is no checkpoint for anybody who looks."""
    order: list[str] = []
    own_rename, own_write = os.rename, checkpoint._write_text

    def rename(source: Path, target: Path) -> None:
        if ".tmp" in Path(source).name and Path(source).is_dir():
            assert not complete_checkpoints(tmp_path)
            assert {"part_0", "meta.json", "state"} <= set(names(Path(source)))
            order.append("rename")
        own_rename(source, target)

    def write(path: Path, text: str) -> None:
        assert not complete_checkpoints(tmp_path)
        order.append(path.name)
        own_write(path, text)

    monkeypatch.setattr(checkpoint.os, "rename", rename)
    monkeypatch.setattr(checkpoint, "_write_text", write)
    save_steps(tmp_path, [1])
    assert order == ["rank_00000.done", "meta.json", "rename", "COMPLETE"]


def test_the_newest_are_kept_and_never_fewer_than_two(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2, 3, 10, 9])
    assert names(tmp_path) == ["step_00000009", "step_00000010"]
    save_steps(tmp_path, [11, 12], keep=4)
    assert len(names(tmp_path)) == 4


def test_what_was_converted_goes_when_a_newer_one_is_complete(tmp_path: Path) -> None:
    """Until then a resume may need it again."""
    save_steps(tmp_path, [1])
    (tmp_path / "step_00000001" / "universal" / "zero").mkdir(parents=True)
    save_steps(tmp_path, [1])
    assert (tmp_path / "step_00000001" / "universal").is_dir()
    save_steps(tmp_path, [2])
    assert not (tmp_path / "step_00000001" / "universal").exists()
    assert len(complete_checkpoints(tmp_path)) == 2


def test_an_older_one_goes_only_when_the_newer_is_complete(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2])
    control = ThreadControl(Ranks(0, 1, 0), Meeting(1))
    store = CheckpointStore(tmp_path, control, keep=2)
    failing = threading.Event()
    store.save(3, fails(failing), {}, {})
    failing.set()
    with pytest.raises(CheckpointError):
        store.finish_writing()
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_a_step_that_is_complete_is_not_written_again(tmp_path: Path) -> None:
    """A run that resumes at its last step saves it once more; overwriting would put the good one at risk."""
    save_steps(tmp_path, [4])
    before = (tmp_path / "step_00000004" / "part_0").stat().st_mtime_ns
    save_steps(tmp_path, [4])
    assert (tmp_path / "step_00000004" / "part_0").stat().st_mtime_ns == before


@pytest.mark.parametrize("failing_rank", [0, 1])
@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_failed_rank_leaves_no_checkpoint_and_every_rank_hears_the_same(
    tmp_path: Path, failing_rank: int, when: str
) -> None:
    save_steps(tmp_path, [1], world_size=2)
    later = threading.Event()

    def work(control: ThreadControl) -> None:
        store = CheckpointStore(tmp_path, control, 2)
        rank = control.ranks.rank
        engine = fails(None if when == "at once" else later) if rank == failing_rank else writes(rank)
        store.save(2, engine, {}, {})
        later.set()
        store.finish_writing()

    errors = on_ranks(2, work)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert str(errors[0]) == str(errors[1])
    for words in ("disk on fire", "needs 12.0 MB", "the last complete checkpoint is", "step_00000001"):
        assert words in str(errors[0])
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000001"]
    assert names(tmp_path) == ["step_00000001"], "the failed one still takes room"


@pytest.mark.parametrize("broken", [".pt", ".done"])
def test_a_rank_that_cannot_write_its_state_does_not_keep_rank_0_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    own_save, own_write = torch.save, checkpoint._write_text

    def save(item: Any, path: HashingFile) -> None:
        if broken == ".pt" and path.name.endswith("rank_00001.pt"):
            raise RuntimeError("PytorchStreamWriter failed writing file")
        own_save(item, path)

    def write(path: Path, text: str) -> None:
        if broken == ".done" and path.name == "rank_00001.done":
            raise OSError(28, "No space left on device")
        own_write(path, text)

    monkeypatch.setattr(checkpoint.torch, "save", save)
    monkeypatch.setattr(checkpoint, "_write_text", write)

    def work(control: ThreadControl) -> None:
        store = CheckpointStore(tmp_path, control, 2)
        store.save(2, writes(control.ranks.rank), {"rng": torch.zeros(2)}, {})
        store.finish_writing()

    errors = on_ranks(2, work)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert str(errors[0]) == str(errors[1])
    assert "rank_00001 could not write its part" in str(errors[0])
    assert "no complete checkpoint exists yet" in str(errors[0])


def test_a_folder_that_cannot_be_made_is_told_to_all(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    def work(control: ThreadControl) -> None:
        store = CheckpointStore(tmp_path / "file" / "checkpoints", control, 2)
        store.save(1, writes(control.ranks.rank), {}, {})

    errors = on_ranks(2, work)
    assert all("cannot be made" in str(error) for error in errors)


def test_what_is_not_complete_is_not_found_and_is_cleared_away(tmp_path: Path) -> None:
    save_steps(tmp_path, [1, 2])
    (tmp_path / "step_00000003.tmp" / "state").mkdir(parents=True)
    (tmp_path / "step_00000002" / "COMPLETE").unlink()
    assert newest(tmp_path).name == "step_00000001"
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        read_meta(tmp_path / "step_00000002")
    CheckpointStore(tmp_path, ThreadControl(Ranks(0, 1, 0), Meeting(1)), 2).remove_incomplete()
    assert names(tmp_path) == ["step_00000001"]


def test_no_checkpoint_a_newer_format_and_a_damaged_meta_are_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        newest(tmp_path)
    save_steps(tmp_path, [1])
    meta = tmp_path / "step_00000001" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format_version": 99}))
    with pytest.raises(CheckpointError, match=r"format version 99 is newer than this Stillhouse reads \(1\)"):
        read_meta(meta.parent)
    meta.write_text("{")
    with pytest.raises(CheckpointError, match=r"meta.json cannot be read"):
        read_meta(meta.parent)


def test_training_on_does_not_change_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is held up until the weights have moved: the file has them as they were."""
    may_write = threading.Event()
    own = snapshot._write

    def held(snapshot: Any, path: str, num_bytes: int) -> WrittenFile:
        assert may_write.wait(10)
        return own(snapshot, path, num_bytes)

    monkeypatch.setattr(snapshot, "_write", held)
    whole = torch.arange(12.0)
    state = {"flat": whole, "view": whole[3:6], "twice": [whole, whole], "step": 3, "empty": torch.empty(0)}
    writer = SnapshotWriter()
    writer.save(state, str(tmp_path / "file.pt"))
    whole.fill_(-1.0)
    state["step"] = 4
    may_write.set()
    (future,) = writer.pending
    assert future.result(10).num_bytes == (tmp_path / "file.pt").stat().st_size
    read = writer.load(str(tmp_path / "file.pt"))
    assert torch.equal(read["flat"], torch.arange(12.0))
    assert torch.equal(read["view"], torch.arange(3.0, 6.0))
    assert torch.equal(read["twice"][1], torch.arange(12.0))
    assert read["step"] == 3


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    writer = SnapshotWriter()
    writer.save({"weights": torch.zeros(1_000_000)}, str(tmp_path / "file.pt"))
    (future,) = writer.pending
    with pytest.raises(CheckpointError, match=r"needs 4.0 MB, the disk has 1.0 MB free; free some space"):
        future.result()
    assert names(tmp_path) == []


def test_a_disk_that_cannot_be_looked_at_is_told_through_the_future(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(snapshot.shutil, "disk_usage", stale)
    writer = SnapshotWriter()
    writer.save({"weights": torch.zeros(10)}, str(tmp_path / "file.pt"))
    (future,) = writer.pending
    with pytest.raises(CheckpointError, match=r"file\.pt: could not be written .*[Ss]tale.*same command again"):
        future.result()


def test_a_disk_that_fills_up_while_writing_is_an_error_and_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else took the room between the look and the write."""
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
        fill(disk, leave_bytes=1 << 20)
        writer = SnapshotWriter()
        writer.save({"weights": torch.zeros(1_000_000)}, str(disk / "file.pt"))
        (future,) = writer.pending
        with pytest.raises(CheckpointError, match=r"file.pt: could not be written .*it needs 4.0 MB"):
            future.result(10)


@pytest.mark.parametrize(
    ("problem", "raised"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:40112"), RuntimeError),
        (torch.distributed.DistNetworkError("no answer"), torch.distributed.DistNetworkError),
        (RuntimeError("size mismatch for lm_head.weight"), CheckpointError),
    ],
)
def test_a_peer_lost_while_loading_is_no_bad_checkpoint(
    tmp_path: Path, problem: Exception, raised: type[Exception]
) -> None:
    def load_checkpoint(folder: str, tag: str) -> None:
        raise problem

    engine = StudentEngine.__new__(StudentEngine)
    engine._engine = SimpleNamespace(load_checkpoint=load_checkpoint)
    with pytest.raises(raised) as caught:
        engine._load(tmp_path, "zero")
    assert type(caught.value) is raised
