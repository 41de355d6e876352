"""A build cut into parts: each job tokenises its share into a folder of its own, and a merge packs them all in order.

OUTPUT/parts/00002-of-00005/  part.json (whose it is, how far it is)  000000.piece, 000001.piece, ...
"""

from __future__ import annotations

import heapq
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from data_tools.dealing import Share
from data_tools.folder_lock import FolderLock
from data_tools.pieces import Piece, Place, Tokenised, read_piece, write_piece
from data_tools.shard_folder import refuse_other_settings
from engine.data.atomic import write_atomically
from engine.data.manifest import Manifest, refuse_newer
from engine.data.record import token_dtype
from engine.errors import DataError

FORMAT_VERSION = 1
PARTS = "parts"
STATE = "part.json"
PIECE_TOKENS = 1 << 24
"""What a killed part loses at most."""

Inputs = list[tuple[str, int | None, int | None]]
"""Path, bytes and time of change of each input, without the two for a data set"""


class PartFolder:
    """One part being written. Killed and opened again, it goes on after its last piece.

    Raises DataError when it was begun with other settings or another input, or another process writes it.
    ``overwrite`` begins anew. Use as a context manager.
    """

    def __init__(self, output: Path, share: Share, wanted: Manifest, inputs: Inputs, *, overwrite: bool) -> None:
        self.folder = output / PARTS / share.folder_name
        self.is_complete = False
        self.next = Place(0, 0)
        """the first document that is in no piece yet"""
        self.num_documents = self.num_tokens = 0
        """added by this process"""
        self._share, self._wanted, self._inputs = share, wanted, inputs
        self._pieces: list[Piece] = []
        self._waiting: list[Tokenised] = []
        self._waiting_tokens = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.folder)
        try:
            for path in self.folder.glob(".*.partial"):  # what a kill left of an atomic write
                path.unlink()
            if overwrite:
                (self.folder / STATE).unlink(missing_ok=True)  # first: what is left then is no part
                for path in self.folder.glob("*.piece"):
                    path.unlink()
            elif (self.folder / STATE).exists():
                self._resume()
        except BaseException:
            self._lock.release()
            raise

    def add(self, tokenised: Tokenised) -> None:
        self._waiting.append(tokenised)
        self._waiting_tokens += len(tokenised.ids)
        self.num_documents += 1
        self.num_tokens += len(tokenised.ids)
        if self._waiting_tokens >= PIECE_TOKENS:
            self._cut()

    def finish(self) -> None:
        """Say that every document of this part is there."""
        if self._waiting:
            self._cut()
        self.is_complete = True
        self._save()

    def __enter__(self) -> PartFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.release()

    def _cut(self) -> None:
        path = self.folder / f"{len(self._pieces):06d}.piece"
        self._pieces.append(write_piece(path, self._waiting, token_dtype(self._wanted.vocab_size)))
        last = self._waiting[-1].place
        self.next = Place(last.source, last.document + 1)
        self._waiting, self._waiting_tokens = [], 0
        self._save()

    def _save(self) -> None:
        state = {
            "format_version": FORMAT_VERSION,
            "wanted": self._wanted.to_json(),
            "inputs": self._inputs,
            "pieces": self._pieces,
            "next": self.next,
            "complete": self.is_complete,
        }
        write_atomically(self.folder / STATE, json.dumps(state).encode())

    def _resume(self) -> None:
        state = _read_state(self.folder, self._share, self._wanted, self._inputs)
        self._pieces = [Piece(*piece) for piece in state["pieces"]]
        self.next, self.is_complete = Place(*state["next"]), state["complete"]
        for piece in self._pieces:
            _check_size(self.folder, self._share, piece)


class Parts:
    """All parts of a build, complete and fitting each other. Raises DataError that names those that are not."""

    def __init__(self, output: Path, num_parts: int, wanted: Manifest, inputs: Inputs) -> None:
        self._dtype = token_dtype(wanted.vocab_size)
        self._folders: list[tuple[Share, Path, list[Piece]]] = []
        absent, unfinished = [], []
        for number in range(1, num_parts + 1):
            share = Share(number, num_parts)
            folder = output / PARTS / share.folder_name
            if not (folder / STATE).exists():
                absent.append(str(share))
                continue
            state = _read_state(folder, share, wanted, inputs)
            if not state["complete"]:
                unfinished.append(str(share))
            pieces = [Piece(*piece) for piece in state["pieces"]]
            for piece in pieces:
                _check_size(folder, share, piece)
            self._folders.append((share, folder, pieces))
        _refuse_incomplete(output, num_parts, absent, unfinished)

    def documents(self) -> Iterator[Tokenised]:
        """Every document of the input, in the order of a build in one piece. Raises DataError for a damaged piece."""
        expected = Place(0, 0)
        streams = [self._read(*each) for each in self._folders]
        for tokenised in heapq.merge(*streams, key=lambda each: each.place):
            place = tokenised.place
            if place != expected and not (place.source > expected.source and place.document == 0):
                raise DataError(
                    f"input {expected.source + 1}: the parts lack document {expected.document}, and one has document "
                    f"{place.document} of input {place.source + 1}; the input gave each part something else. Run all "
                    "parts again with --overwrite"
                )
            yield tokenised
            expected = Place(place.source, place.document + 1)

    def _read(self, share: Share, folder: Path, pieces: list[Piece]) -> Iterator[Tokenised]:
        for piece in pieces:
            try:
                yield from read_piece(folder, piece, self._dtype)
            except ValueError as problem:
                raise DataError(
                    f"part {share}: {folder / piece.name}: {problem}; run this part again with --overwrite"
                ) from problem


def remove_parts(output: Path, num_parts: int) -> None:
    """Delete the parts of a build that is merged."""
    for number in range(1, num_parts + 1):
        shutil.rmtree(output / PARTS / Share(number, num_parts).folder_name, ignore_errors=True)
    if (output / PARTS).is_dir() and not any((output / PARTS).iterdir()):
        (output / PARTS).rmdir()


def _read_state(folder: Path, share: Share, wanted: Manifest, inputs: Inputs) -> dict[str, Any]:
    path = folder / STATE
    try:
        state: dict[str, Any] = json.loads(path.read_text())
        refuse_newer(state["format_version"], FORMAT_VERSION, str(path))
        found = Manifest.from_json(state["wanted"], str(path))
        there = [(name, size, changed) for name, size, changed in state["inputs"]]
    except (ValueError, KeyError, TypeError) as problem:
        raise DataError(
            f"part {share}: {path}: not a part's file ({problem!r}); run this part again with --overwrite"
        ) from problem
    try:
        refuse_other_settings(path, found, wanted)
    except DataError as problem:
        raise DataError(f"part {share}: {problem}") from problem
    if there != inputs:
        changed = sorted({str(name) for name, *_ in set(there) ^ set(inputs)}) or ["their order"]
        raise DataError(
            f"part {share}: {path}: the input changed since this part was begun ({', '.join(changed[:3])}"
            f"{' and others' if len(changed) > 3 else ''}); run this part again with --overwrite"
        )
    return state


def _check_size(folder: Path, share: Share, piece: Piece) -> None:
    path = folder / piece.name
    if not path.exists() or path.stat().st_size != piece.num_bytes:
        raise DataError(
            f"part {share}: {path}: finished earlier, now missing or of another size; run this part again with "
            "--overwrite"
        )


def _refuse_incomplete(output: Path, num_parts: int, absent: list[str], unfinished: list[str]) -> None:
    problems = []
    if absent:
        there = {path.name.rpartition("-")[2].lstrip("0") for path in (output / PARTS).glob("*-of-*")}
        others = sorted(there - {str(num_parts)})
        hint = f" (there are some of a build in {' or '.join(others)} parts)" if others else ""
        problems.append(f"missing: {_some(absent)}{hint}")
    if unfinished:
        problems.append(f"not finished, still being made or killed: {_some(unfinished)}")
    if problems:
        raise DataError(
            f"{output / PARTS}: parts {'; '.join(problems)}. Run each with the same options and --part I/N, then merge"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
