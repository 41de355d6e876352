"""Shards of the tokens of DistillKit's rows: a row is a sample, or some where rows are cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_tools.distillkit_rows import Row, pieces_of, read_rows
from data_tools.shard_folder import ShardFolder
from engine.data.manifest import Manifest
from engine.errors import DataError
from engine.log import Progress

_SHOW_EVERY = 256


def longest_row(files: Sequence[Path]) -> int:
    """Tokens of the longest row."""
    longest = 1
    with Progress(None, "rows measured") as progress:
        for number, row in enumerate(read_rows(files, with_targets=False), 1):
            longest = max(longest, len(row.token_ids))
            if number % _SHOW_EVERY == 0:
                progress.update(number)
    return longest


def write_shards(
    folder: ShardFolder, wanted: Manifest, files: Sequence[Path], *, shard_samples: int, cut: bool
) -> None:
    """All shards that are missing, and the manifest of the folder.

    Raises DataError for a row that does not fit the manifest ``wanted``, and when there is none.
    """
    done, num_samples, num_documents = folder.position[0] if folder.position else 0, 0, 0
    with Progress(None, "rows read") as progress:
        for number, row in enumerate(read_rows(files, with_targets=False), 1):
            _check(row, wanted, cut)
            for piece in pieces_of(row, wanted.sequence_tokens):
                num_samples += 1
                if num_samples > done:
                    folder.add(piece.token_ids, piece.document_tokens)
                    if num_samples % shard_samples == 0:
                        folder.cut([num_samples])
            num_documents += 1 + int(np.count_nonzero(np.diff(row.documents)))
            if number % _SHOW_EVERY == 0:
                progress.update(number)
    if num_samples == 0:
        raise DataError(f"{files[0]}: holds no rows; give the files of a capture")
    folder.cut([num_samples])
    folder.finish(num_documents)


def _check(row: Row, wanted: Manifest, cut: bool) -> None:
    num_tokens = len(row.token_ids)
    if num_tokens == 0:
        raise DataError(f"{row.place}: no tokens; leave the row out")
    if num_tokens > wanted.sequence_tokens and not cut:
        raise DataError(
            f"{row.place}: {num_tokens} tokens, more than --sequence-tokens {wanted.sequence_tokens}; raise it, or cut "
            "such rows into several samples with --cut"
        )
    lowest, highest = int(row.token_ids.min()), int(row.token_ids.max())
    if lowest < 0 or highest >= wanted.vocab_size:
        raise DataError(
            f"{row.place}: token id {highest if lowest >= 0 else lowest}, expected 0 to {wanted.vocab_size - 1}; give "
            "the tokenizer of the captured teacher"
        )
