"""One output of a build: a packer and the folder that it fills, and what identifies settings and input."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_tools.packing import Packed, Packer, Position, framing_of
from data_tools.parts import Inputs
from data_tools.shard_folder import ShardFolder
from engine.data.manifest import Manifest
from engine.data.stateless import fold
from engine.errors import DataError
from engine.redaction import redact_words
from engine.tasks.tokenizer import fingerprint, vocab_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START = Position(0, 0, 0)
HELDOUT = "heldout"


class Stream:
    """One of the two outputs: a packer and the folder that it fills."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, inputs: list[str], options: argparse.Namespace
    ) -> None:
        files = [entry for entry in stamped(inputs) if entry[1] is not None]
        self._framing = framing_of(tokenizer, options.task)
        self.folder = folder
        self._folder = ShardFolder(folder, wanted_manifest(tokenizer, options), files, overwrite=options.overwrite)
        self._max_shard_bytes = options.shard_bytes
        start = Position(*self._folder.position) if self._folder.position else START
        self._packer = Packer(self._framing, options.sequence_tokens, start, one_document=options.unpacked)
        self.num_tokens = 0
        """written by this process"""

    @property
    def is_complete(self) -> bool:
        return self._folder.manifest is not None

    @property
    def manifest(self) -> Manifest:
        assert self._folder.manifest is not None
        return self._folder.manifest

    def wants(self, document: int) -> bool:
        """Whether this document is not wholly in finished shards yet."""
        return not self.is_complete and document >= self._packer.position.document

    def feed(self, document: int, ids: np.ndarray) -> None:
        if len(ids):
            self._write(self._packer.add(document, ids))

    def finish(self) -> None:
        if self.is_complete:
            return
        self._write(self._packer.last())
        self._folder.cut(self._packer.position)
        if self._folder.num_shards == 0:
            raise DataError(f"no document for {self.folder}; give more input, or another --split-heldout")
        self._folder.finish(self._packer.position.num_documents)

    def __enter__(self) -> Stream:
        self._folder.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.__exit__(*error)  # type: ignore[arg-type]

    def _write(self, sequences: Iterable[Packed]) -> None:
        for token_ids, document_tokens, position in sequences:
            self._folder.add(token_ids, document_tokens)
            self.num_tokens += len(token_ids)
            if self._folder.shard_bytes >= self._max_shard_bytes:
                self._folder.cut(position)


def wanted_manifest(tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> Manifest:
    """The manifest without what the samples decide."""
    return Manifest(
        task=options.task,
        tokenizer=fingerprint(tokenizer),
        vocab_size=vocab_size(tokenizer),
        pad_id=next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
        sequence_tokens=options.sequence_tokens,
        num_documents=0,
        shards=(),
        token_counts_sha256="",
        command=_command(options),
    )


def is_heldout(text: str, options: argparse.Namespace) -> bool:
    """By a hash of the text: the same for ever, and copies of a document fall on the same side."""
    return bool(options.split_heldout) and fold("heldout", text) < options.split_heldout * 2**64


def stamped(inputs: list[str]) -> Inputs:
    """What tells whether an input is the one that it was."""
    return [(path, *size_and_time(path)) if Path(path).is_file() else (path, None, None) for path in inputs]


def refuse_newer(inputs: list[str], manifest: Path) -> None:
    """Raises DataError for shards that are complete while their input changed afterwards."""
    for path in inputs:
        if Path(path).is_file() and size_and_time(path)[1] > size_and_time(str(manifest))[1]:
            raise DataError(f"{path} changed after {manifest} was made from it; --overwrite builds the shards anew")


def _command(options: argparse.Namespace) -> str:
    """The command without what does not change the result: where it is written, and by how many processes."""
    words = ["python", "data_tools/build_shards.py", "--task", options.task, "--input", *options.input]
    words += ["--tokenizer", options.tokenizer, "--sequence-tokens", str(options.sequence_tokens)]
    words += ["--shard-bytes", str(options.shard_bytes), "--split-heldout", repr(options.split_heldout)]
    words += ["--text-column", options.text_column, *(["--one-per-line"] if options.one_per_line else [])]
    words += ["--unpacked"] if options.unpacked else []
    return shlex.join(redact_words(words))


def size_and_time(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns
