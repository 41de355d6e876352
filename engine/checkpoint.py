"""Checkpoints on disk: what makes one complete, which one is newest, which ones go.

    checkpoints/step_00001000/  zero/ (DeepSpeed's files)  state/rank_00000.pt  meta.json  COMPLETE

A save copies the state, then a thread on each rank writes and syncs its files and puts ``state/rank_N.done`` beside
them. When all ranks' marks are there, rank 0 renames the folder to its final name and writes COMPLETE, last. A
checkpoint without COMPLETE does not exist: it is never loaded and is removed at the next start. COMPLETE holds the
number of the launch that wrote it; one that a later launch has overtaken does not exist either.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from engine.digests import WrittenFile, write_hashed
from engine.dist import Control
from engine.errors import CheckpointError, ReplacedError, StillhouseError
from engine.incarnation import History, Incarnation

FORMAT_VERSION = 1
COMPLETE, META = "COMPLETE", "meta.json"
POLL_SECONDS = 0.02
PATIENCE_SECONDS = 1800.0
"""How long rank 0 waits for the files of the slowest rank."""


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below ``folder``, oldest first, without those that a later launch has overtaken."""
    history = History(folder.parent)
    found = sorted(path.parent for path in folder.glob(f"step_*/{COMPLETE}"))
    return [path for path in found if history.holds(step_of(path), int((path / COMPLETE).read_text() or "0"))]


def step_of(checkpoint: Path) -> int:
    """Steps done when it was written."""
    return int(checkpoint.name.removeprefix("step_"))


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """Raises CheckpointError for a folder that is no complete checkpoint, or one of a newer format."""
    if not (checkpoint / COMPLETE).is_file():
        raise CheckpointError(f"{checkpoint}: not a complete checkpoint (no {COMPLETE} file in it)")
    try:
        meta = json.loads((checkpoint / META).read_text())
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{checkpoint}: its {META} cannot be read ({problem}); resume from another") from problem
    if meta["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint}: format version {meta['format_version']} is newer than this Stillhouse reads "
            f"({FORMAT_VERSION}); update Stillhouse"
        )
    return meta


def newest(folder: Path) -> Path:
    """Raises CheckpointError when there is none."""
    found = complete_checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder}: holds no complete checkpoint")
    return found[-1]


def best(folder: Path) -> Path:
    """The checkpoint of the step that an early stop found best, else the newest. Raises CheckpointError."""
    last = newest(folder)
    step = read_meta(last)["state"].get("best_step")
    return next((path for path in complete_checkpoints(folder) if step_of(path) == step), last)


class CheckpointStore:
    """The checkpoints of one run. All methods but ``settle`` are collective."""

    def __init__(self, folder: Path, control: Control, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.incarnation = Incarnation(folder.parent, 0)
        self.last_bytes = 0
        self.best_step: int | None = None
        """whose checkpoint is kept"""
        self._control = control
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-finisher")
        self._unfinished: Future[int] | None = None
        self._temporary: Path | None = None

    def remove_incomplete(self) -> None:
        """Clear away what a killed run left half written."""
        if self._control.is_main and self.folder.is_dir():
            for path in self.folder.glob("step_*"):
                if not (path / COMPLETE).is_file():
                    shutil.rmtree(path, ignore_errors=True)  # a launch that was replaced may still write there
        self._control.barrier()

    def begin_history(self, step: int) -> None:
        """This launch has loaded what it goes on from, and does the steps after ``step``. Collective."""
        problem: Exception | None = None
        try:
            if self._control.is_main:
                self.incarnation.check()
                if self.incarnation.number:
                    self.incarnation.took_over_after(step)
        except (OSError, StillhouseError) as error:
            problem = error
        self._raise_together(problem)

    def save(
        self,
        step: int,
        save_engine: Callable[[Path], list[Future[WrittenFile]]],
        rank_state: dict[str, Any],
        meta: dict[str, Any],
    ) -> None:
        """Copy the state after ``step`` steps and write it in the background.

        Raises CheckpointError, on all ranks, when this save cannot begin or the one before it failed on any rank;
        ReplacedError when a later launch has taken over.
        """
        self.finish_writing()
        final = self.folder / f"step_{step:08d}"
        if self._control.from_main(self._control.is_main and final in complete_checkpoints(self.folder)):
            return
        # a launch that was replaced must not write among the files of the one that goes on
        self._temporary = temporary = self.folder / f"{final.name}.tmp{self.incarnation.number}"
        problem: Exception | None = None
        try:
            if self._control.is_main:
                self.incarnation.check()
                shutil.rmtree(temporary, ignore_errors=True)
                (temporary / "state").mkdir(parents=True)
        except StillhouseError as error:
            problem = error
        except OSError as error:
            problem = CheckpointError(f"{temporary}: cannot be made ({error})")
        self._raise_together(problem)
        files = save_engine(temporary)
        refused = [file.exception() for file in files if file.done() and file.exception()]
        self._raise_together(refused[0] if refused else None)
        meta = {**meta, "format_version": FORMAT_VERSION, "step": step, "world_size": self._control.ranks.world_size}
        self._unfinished = self._thread.submit(self._finish, temporary, final, files, rank_state, meta)

    def finish_writing(self) -> None:
        """Wait until the last save is complete. Raises CheckpointError, on all ranks, if it failed on any."""
        problem: Exception | None = None
        if self._unfinished is not None:
            try:
                self.last_bytes = self._unfinished.result()
            except (StillhouseError, OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
                problem = error
            self._unfinished = None
        self._raise_together(problem)

    def settle(self) -> None:
        """Let a save in hand come to its end when all ranks leave for another reason. Not collective, never raises."""
        if self._unfinished is not None:
            wait([self._unfinished])

    def _raise_together(self, problem: BaseException | None) -> None:
        told = [
            one for one in self._control.gather(problem and (str(problem), isinstance(problem, ReplacedError))) if one
        ]
        if not told:
            return
        if self._control.is_main and self._temporary is not None:  # give back the space that the failed one took
            shutil.rmtree(self._temporary, ignore_errors=True)
        if replaced := [text for text, is_replaced in told if is_replaced]:
            raise ReplacedError(replaced[0])
        left = complete_checkpoints(self.folder)
        rest = f"the last complete checkpoint is {left[-1]}" if left else "no complete checkpoint exists yet"
        raise CheckpointError("; ".join(sorted({text for text, _ in told})) + f"; {rest}")

    def _finish(
        self,
        temporary: Path,
        final: Path,
        files: list[Future[WrittenFile]],
        rank_state: dict[str, Any],
        meta: dict[str, Any],
    ) -> int:
        rank = self._control.ranks.rank
        mark = temporary / "state" / f"rank_{rank:05d}"
        try:
            written = [file.result() for file in files]
            num_bytes = sum(file.num_bytes for file in written)
            written.append(write_hashed(mark.with_suffix(".pt"), lambda file: torch.save(rank_state, file)))
            _write_text(mark.with_suffix(".done"), json.dumps(_part(written, num_bytes, temporary)))
        except Exception:
            mark.with_suffix(".failed").touch()  # takes no room: rank 0 must not wait for a rank with a full disk
            raise
        if self._control.is_main:
            parts = self._await_ranks(temporary / "state")
            num_bytes = sum(part["num_bytes"] for part in parts)
            digests = {name: digest for part in parts for name, digest in part["sha256"].items()}
            for done in (temporary / "state").glob("*.done"):
                done.unlink()
            _write_text(temporary / META, json.dumps({**meta, "num_bytes": num_bytes, "sha256": digests}, indent=1))
            self.incarnation.check()
            shutil.rmtree(final, ignore_errors=True)  # a checkpoint of this step that this launch has overtaken
            os.rename(temporary, final)
            _sync(final.parent)
            _write_text(final / COMPLETE, str(self.incarnation.number))
            self.incarnation.check()
            self._prune()
        return num_bytes

    def _await_ranks(self, marks: Path) -> list[dict[str, Any]]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            done = list(marks.glob("rank_*.done"))
            if len(done) == self._control.ranks.world_size:
                return [json.loads(path.read_text()) for path in sorted(done)]
            if failed := sorted(path.stem for path in marks.glob("rank_*.failed")):
                raise CheckpointError(
                    f"{marks.parent}: not completed, since {', '.join(failed)} could not write its part"
                )
            if time.monotonic() > deadline:
                raise CheckpointError(f"{marks.parent}: {len(done)} ranks were done after {PATIENCE_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS * (1 + self._control.ranks.world_size / 64))  # each look lists as many names

    def _prune(self) -> None:
        whole = complete_checkpoints(self.folder)
        overtaken = {path.parent for path in self.folder.glob(f"step_*/{COMPLETE}")} - set(whole)
        old = [path for path in whole[: -self.keep] if step_of(path) != self.best_step]
        for path in [*overtaken, *old]:
            (path / COMPLETE).unlink()  # first, so that a kill half-way leaves no checkpoint that only looks whole
            shutil.rmtree(path, ignore_errors=True)
        for path in complete_checkpoints(self.folder)[:-1]:
            remove_converted(path)


def remove_converted(checkpoint: Path) -> None:
    """What a resume on another number of ranks left there, once a newer checkpoint takes its place."""
    for path in checkpoint.glob("universal*"):
        shutil.rmtree(path, ignore_errors=True)


def _part(written: list[WrittenFile], num_bytes: int, checkpoint: Path) -> dict[str, Any]:
    """What one rank tells rank 0 of its files."""
    return {
        "num_bytes": num_bytes,
        "sha256": {file.path.relative_to(checkpoint).as_posix(): file.sha256 for file in written},
    }


def _write_text(path: Path, text: str) -> None:
    """Appears whole or not at all, and stays after a power loss."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.rename(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
