"""A folder being filled with shards: killed and started again, it goes on after the last finished one."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_tools.folder_lock import FolderLock
from engine.data.atomic import write_atomically
from engine.data.manifest import MANIFEST, TOKEN_COUNTS, Manifest, ShardEntry, write_manifest
from engine.data.record import token_dtype
from engine.data.shard_writer import ShardWriter
from engine.errors import DataError
from engine.schema import Annotation

PROGRESS = ".progress.npz"
_OURS = re.compile(r"\.?shard-\d{6}\.(tar|index\.npy)(\.partial)?")
_UNFINISHED = re.compile(
    r"\.(\.progress\.npz|manifest\.json|token_counts\.npy|shard-\d{6}\.index\.npy)\.\w{8}\.partial"
)
_SETTINGS = ("task", "tokenizer", "vocab_size", "pad_id", "sequence_tokens", "labels", "command")


class ShardFolder:
    """Shards, their manifest at the end, and until then a small file that says how far the writing is.

    ``wanted`` is the manifest without what the samples decide. ``source`` identifies the input's content: a folder
    begun with another is refused, as is one of other settings, one that another process fills, and one with shards
    that nothing describes (DataError). ``overwrite`` clears the folder of shards first. Use as a context manager.
    """

    def __init__(self, folder: Path, wanted: Manifest, source: Any, *, overwrite: bool = False) -> None:
        self.folder = folder
        self.position: list[int] | None = None
        """what the caller gave with the last finished shard"""
        self.manifest: Manifest | None = None
        """of a folder that is complete"""
        self._wanted = wanted
        self._source = json.loads(json.dumps(source))
        self._entries: list[ShardEntry] = []
        self._token_counts = np.zeros(wanted.vocab_size, np.int64)
        self._dtype = token_dtype(wanted.vocab_size)
        self._writer: ShardWriter | None = None
        self._writing = ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(folder)
        try:
            for path in folder.glob(".*.partial"):  # what a kill left of an atomic write
                if _UNFINISHED.fullmatch(path.name):
                    path.unlink()
            if overwrite:
                clear(folder)
            self._resume()
        except BaseException:
            self._lock.release()
            raise

    @property
    def shard_bytes(self) -> int:
        """Bytes of samples in the shard being written."""
        return self._writer.num_bytes if self._writer else 0

    @property
    def num_shards(self) -> int:
        return len(self._entries) + (self._writer is not None)

    def add(
        self,
        token_ids: np.ndarray,
        document_tokens: np.ndarray,
        key: str | None = None,
        annotation: Annotation | None = None,
    ) -> None:
        """Append a sample: ids [T], tokens of each document [D]. Its key tells where it was first written."""
        number = len(self._entries)
        if self._writer is None:
            path = self.folder / f"shard-{number:06d}.tar"
            self._writer = self._writing.enter_context(ShardWriter(path, self._dtype))
        key = key or f"{number:06d}-{self._writer.num_samples:08d}"
        self._writer.add(key, token_ids, document_tokens, annotation)
        np.add.at(self._token_counts, token_ids, 1)

    def cut(self, position: Sequence[int]) -> None:
        """Finish the shard in hand, if any; after a restart the caller goes on from ``position``."""
        if self._writer is None:
            return
        self._writing.close()
        assert self._writer.entry is not None
        self._entries.append(self._writer.entry)
        self._writer = None
        self.position = list(position)
        self._save_progress()

    def finish(self, num_documents: int) -> Manifest:
        """Write the manifest. Every shard has been cut."""
        assert self._writer is None
        manifest = replace(self._wanted, shards=tuple(self._entries), num_documents=num_documents)
        self.manifest = write_manifest(self.folder, manifest, self._token_counts)
        (self.folder / PROGRESS).unlink()
        return self.manifest

    def __enter__(self) -> ShardFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self._writing.__exit__(kind, error, at)
        finally:
            self._lock.release()

    def _resume(self) -> None:
        manifest_path, progress_path = self.folder / MANIFEST, self.folder / PROGRESS
        if manifest_path.exists():
            found = Manifest.from_json(manifest_path.read_text(), str(manifest_path))
            refuse_other_settings(manifest_path, found, self._wanted)
            progress_path.unlink(missing_ok=True)
            self.manifest = found
        elif progress_path.exists():
            self._load_progress(progress_path)
        elif _shard_files(self.folder):
            raise DataError(
                f"{self.folder}: holds shards that no manifest describes; give another --output, or --overwrite to "
                "delete them"
            )
        else:
            self._save_progress()

    def _save_progress(self) -> None:
        state = {
            "wanted": replace(self._wanted, shards=tuple(self._entries)).to_json(),
            "source": self._source,
            "position": self.position,
        }
        content = io.BytesIO()
        np.savez(content, state=np.array(json.dumps(state)), token_counts=self._token_counts)
        write_atomically(self.folder / PROGRESS, content.getvalue())

    def _load_progress(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as saved:
            state = json.loads(str(saved["state"]))
            self._token_counts = saved["token_counts"]
        begun = Manifest.from_json(state["wanted"], str(path))
        refuse_other_settings(path, begun, self._wanted)
        if state["source"] != self._source:
            raise DataError(f"{self.folder}: the input changed since these shards were begun; --overwrite starts anew")
        self._entries, self.position = list(begun.shards), state["position"]
        for entry in self._entries:
            shard = self.folder / entry.name
            if not shard.exists() or shard.stat().st_size != entry.num_bytes:
                raise DataError(f"{shard}: finished earlier, now missing or of another size; --overwrite starts anew")


def refuse_other_settings(path: Path, found: Manifest, wanted: Manifest) -> None:
    """Raises DataError with every difference when what ``path`` describes was made with other settings."""
    differences = []
    for name in _SETTINGS:
        there, here = str(getattr(found, name)), str(getattr(wanted, name))
        if there != here:
            differences.append(f"{name} there {_beyond(there, here)!r}, here {_beyond(here, there)!r}")
    if differences:
        raise DataError(
            f"{path}: made with other settings: {'; '.join(differences)}; give another --output, or --overwrite "
            "to replace it"
        )


def _beyond(setting: str, other: str) -> str:
    """What a setting has that the other has not; of commands only those options."""
    known = other.split(" --")
    return " --".join(option for option in setting.split(" --") if option not in known)


def clear(folder: Path) -> None:
    """Delete the shards of a folder and what describes them; nothing else. A folder that is absent stays so."""
    for name in (MANIFEST, TOKEN_COUNTS, PROGRESS):  # the manifest goes first: none is ever there without its shards
        (folder / name).unlink(missing_ok=True)
    for path in _shard_files(folder):
        path.unlink()


def _shard_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if _OURS.fullmatch(path.name)]
