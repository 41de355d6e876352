"""Of several launches of a run only the newest counts, whatever the others still write."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from engine.checkpoint import CheckpointStore, complete_checkpoints
from engine.dist import Control, Ranks
from engine.errors import CheckpointError, ReplacedError
from engine.incarnation import FOLDER, Incarnation, last_number
from engine.tracking.records import RecordFile, metrics_record, read_records


def store_of(run: Path, incarnation: Incarnation, keep: int = 2) -> CheckpointStore:
    store = CheckpointStore(run / "checkpoints", Control(Ranks(0, 1, 0)), keep)
    store.incarnation = incarnation
    return store


def save(store: CheckpointStore, step: int) -> None:
    store.save(step, lambda folder: [], {"rank": step}, {"state": {}})
    store.finish_writing()


def names(run: Path) -> list[str]:
    return [path.name for path in complete_checkpoints(run / "checkpoints")]


def launch(run: Path, step: int = 0) -> CheckpointStore:
    incarnation = Incarnation.take(run)
    incarnation.took_over_after(step)
    return store_of(run, incarnation)


def test_of_many_that_start_at_once_each_has_a_number_of_its_own(tmp_path: Path) -> None:
    taken: list[int] = []
    barrier = threading.Barrier(16)

    def start() -> None:
        barrier.wait()
        taken.append(Incarnation.take(tmp_path).number)

    threads = [threading.Thread(target=start) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 17))
    assert last_number(tmp_path) == 16


def test_a_replaced_launch_says_by_whom(tmp_path: Path) -> None:
    old = Incarnation.take(tmp_path)
    old.check()
    new = Incarnation.take(tmp_path)
    new.check()
    host = json.loads((tmp_path / FOLDER / "000002.json").read_text())["host"]
    with pytest.raises(ReplacedError, match=f"number 1.*replaced by another, number 2, started on {host}"):
        old.check()


def test_a_replaced_launch_completes_and_removes_nothing(tmp_path: Path) -> None:
    old = launch(tmp_path)
    for step in (1, 2, 3):
        save(old, step)
    new = launch(tmp_path, step=3)
    with pytest.raises(ReplacedError, match="has been replaced by another, number 2"):
        save(old, 4)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    save(new, 4)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]


def test_replaced_between_the_copy_and_the_end_of_a_save(tmp_path: Path) -> None:
    old = launch(tmp_path)
    save(old, 1)
    going = threading.Event()

    def held(folder: Path) -> list[object]:
        launch(tmp_path, step=1)  # takes over while this save is under way
        going.set()
        return []

    old.save(2, held, {}, {"state": {}})  # type: ignore[arg-type]
    with pytest.raises(ReplacedError, match="has been replaced"):
        old.finish_writing()
    assert going.is_set()
    assert names(tmp_path) == ["step_00000001"]


def test_what_an_overtaken_launch_completed_in_the_last_moment_does_not_count(tmp_path: Path) -> None:
    """No lock closes the moment between the last look and the rename on a shared disk; the history does."""
    old = launch(tmp_path)
    save(old, 5)
    old.incarnation = Incarnation(tmp_path, 99)  # looks, and sees nobody later
    new = launch(tmp_path, step=5)
    old_number = Incarnation(tmp_path, 1)
    save(old, 10)
    (tmp_path / "checkpoints" / "step_00000010" / "COMPLETE").write_text(str(old_number.number))
    assert names(tmp_path) == ["step_00000005"]
    save(new, 10)
    assert names(tmp_path) == ["step_00000005", "step_00000010"]
    assert (tmp_path / "checkpoints" / "step_00000010" / "COMPLETE").read_text() == "2"


def test_going_back_to_an_older_checkpoint_voids_the_later_ones(tmp_path: Path) -> None:
    first = launch(tmp_path)
    save(first, 5)
    save(first, 10)
    back = launch(tmp_path, step=5)
    assert names(tmp_path) == ["step_00000005"]
    save(back, 6)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000005", "step_00000006"]


def test_a_launch_that_fails_while_it_loads_voids_nothing(tmp_path: Path) -> None:
    first = launch(tmp_path)
    save(first, 5)
    save(first, 10)
    Incarnation.take(tmp_path)  # was to go back to step 5, and died before it had loaded that
    assert names(tmp_path) == ["step_00000005", "step_00000010"]


def test_a_folder_that_does_not_answer_replaces_nobody(tmp_path: Path) -> None:
    incarnation = Incarnation.take(tmp_path)
    (tmp_path / FOLDER).rename(tmp_path / "elsewhere")
    (tmp_path / FOLDER).write_text("no folder any more")
    with pytest.raises(CheckpointError, match="cannot be looked for"):
        incarnation.check()


def test_a_run_set_aside_does_not_let_its_old_launch_into_the_new_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    old = launch(run)
    number = last_number(run)
    run.rename(tmp_path / "run.1")
    Incarnation.take(run, after=number)
    with pytest.raises(ReplacedError):
        old.incarnation.check()


def test_records_of_a_replaced_launch_go_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    old = RecordFile(path)
    old.append(metrics_record(1, {"loss": 1.0}))
    new = RecordFile(path)
    old.append(metrics_record(2, {"loss": 9.0}))
    new.append(metrics_record(2, {"loss": 2.0}))
    assert [record["loss"] for record in read_records(path)] == [1.0, 2.0]
