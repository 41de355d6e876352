"""A cache of targets out of DistillKit's rows, beside the shards that were made of their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_tools.distillkit_config import DistillKitConfig
from data_tools.distillkit_encoding import Answer, Question, encode_in_order
from data_tools.distillkit_identity import Teacher, cache_identity
from data_tools.distillkit_rows import TARGETS, Piece, Row, pieces_of, place_of_sample, read_rows
from engine.cache.folder import RANKS, CacheFolder, cache_address, ranks_of, unwritable
from engine.cache.recording import hashes_and_lengths
from engine.cache.sidecar import Record, Sums
from engine.cache.sidecar_writer import SidecarWriter
from engine.config.cache import TopKSection
from engine.data.manifest import ShardEntry
from engine.data.record import encode_array
from engine.data.shards import ShardSet
from engine.errors import DataError
from engine.log import Progress
from engine.schema import IGNORE
from engine.tasks.causal_lm import CausalLM

_SHOW_EVERY = 16
_CHANGED = "the input changed: give another --output, or --overwrite"


class _Asked(NamedTuple):
    """What is known of a sample before its record is made."""

    input_hash: int
    num_tokens: int
    num_positions: int


class CacheImport:
    """One cache being filled. Raises CacheError where another one, of something else, has its name."""

    def __init__(
        self, manifest: Path, name: str, config: DistillKitConfig, section: TopKSection, teacher: Teacher
    ) -> None:
        self._config, self._section = config, section
        self._shards = ShardSet.open(str(manifest))
        self._ranks = ranks_of(self._shards)
        content = encode_array(self._ranks)
        digest = hashlib.sha256(content).hexdigest()
        identity = cache_identity(self._shards.manifest, section, teacher, digest)
        self.folder = CacheFolder.create_or_join(cache_address(name, str(manifest)), identity, {RANKS: content})
        for leftover in self.folder.path.glob(".*.partial"):  # of an import that was killed: one runs at a time
            leftover.unlink()
        self.num_positions = self.num_above = 0
        """by this process; and of them, those whose probabilities were more than 1 in all"""

    @property
    def is_complete(self) -> bool:
        return self.folder.manifest() is not None and not self.folder.missing(self._shards.manifest)

    def fill(self, files: Sequence[Path], workers: int) -> None:
        """Make the sidecars that are missing, and then the manifest.

        Raises DataError for rows that hold what cannot be, CacheError when the disk is full.
        """
        data = self._shards.manifest
        names = {entry.name for entry in self.folder.missing(data)}
        missing = [number for number, entry in enumerate(data.shards) if entry.name in names]
        done = data.num_samples - sum(data.shards[number].num_samples for number in missing)
        questions = self._questions(files, missing)
        answers = encode_in_order(questions, self._config, self._ranks, self._section.max_error, workers)
        with closing(answers), Progress(data.num_samples, "samples", first_step=done) as progress:
            for number in missing:
                entry = data.shards[number]
                self._write(entry, islice(answers, entry.num_samples), done, progress)
                done += entry.num_samples
        self.folder.write_manifest(data)

    def _write(
        self, entry: ShardEntry, answers: Iterator[tuple[_Asked, Answer]], done: int, progress: Progress
    ) -> None:
        path = self.folder.path_of(entry)
        try:
            with SidecarWriter(path, entry.num_samples) as writer:
                for asked, answer in answers:
                    # -log p of a label that is not kept is not known, nor is the entropy: 0 says so of both
                    record = Record(answer.content, asked.input_hash, 0.0, 0.0)
                    writer.add(record, Sums(asked.num_tokens, asked.num_positions, answer.num_pairs, answer.kept_mass))
                    self.num_positions += asked.num_positions
                    self.num_above += answer.num_above
                    done += 1
                    if done % _SHOW_EVERY == 0:
                        progress.update(done)
                writer.finish(self.folder.identity.sha256, entry.name, entry.sha256, 1)
            if done % _SHOW_EVERY:
                progress.update(done)
        except OSError as problem:
            raise unwritable(path, problem) from problem

    def _questions(self, files: Sequence[Path], missing: Sequence[int]) -> Iterator[tuple[_Asked, Question]]:
        """Of the samples of the shards ``missing``, in order; one reading of the rows from the first of them on."""
        if not missing:
            return
        counts, sequence_tokens = self._shards.manifest.samples_per_shard, self._shards.manifest.sequence_tokens
        first_row, first_piece = place_of_sample(files, sum(counts[: missing[0]]), sequence_tokens)
        rows = read_rows(files, with_targets=True, first=first_row)
        pieces = islice(((row, piece) for row in rows for piece in pieces_of(row, sequence_tokens)), first_piece, None)
        for number in range(missing[0], missing[-1] + 1):
            for index in range(counts[number]):
                found = next(pieces, None)
                if found is None:
                    raise DataError(f"{files[-1]}: ends before the shards that were made of the input; {_CHANGED}")
                if number in missing:
                    yield self._question(number, index, *found)

    def _question(self, shard: int, index: int, row: Row, piece: Piece) -> tuple[_Asked, Question]:
        sample = self._shards.read(shard, index)
        num_tokens = len(row.token_ids)
        if not np.array_equal(sample.token_ids, piece.token_ids) or not np.array_equal(
            sample.document_tokens, piece.document_tokens
        ):
            raise DataError(f"{piece.place}: not the tokens of {sample.name}, which was made of this row; {_CHANGED}")
        for name, column in zip(TARGETS, row.targets):
            if len(column) not in (num_tokens - 1, num_tokens):
                raise DataError(
                    f"{row.place}: {name} of {len(column)} positions, expected {num_tokens - 1} or {num_tokens} for "
                    f"its {num_tokens} tokens; leave the row out, or capture it again"
                )
        labelled = CausalLM().label([sample], [0])
        (hashed,), (length,) = hashes_and_lengths([sample], labelled)
        positions = slice(piece.first, min(piece.first + len(piece.token_ids), num_tokens - 1))
        targets = tuple(column[positions] for column in row.targets)
        question = Question(piece.place, targets, np.flatnonzero(labelled[1] != IGNORE))
        return _Asked(hashed, len(sample.token_ids), length), question
