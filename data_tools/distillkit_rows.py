"""The rows of DistillKit's parquet files as they lie there, a few at a time, and the samples they are cut into.

``input_ids`` are the tokens. ``attention_mask``, where its packing tool has added one, numbers the documents of a row.
``bytepacked_indices`` and ``compressed_logprobs`` are what data_tools/distillkit_format.py decodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from engine.errors import DataError

TOKENS, DOCUMENTS, TARGETS = "input_ids", "attention_mask", ("bytepacked_indices", "compressed_logprobs")
_BATCH_ROWS = {True: 16, False: 512}
"""Read at once, with and without the targets, which take some 50 times the bytes of the tokens."""


class Row(NamedTuple):
    """One sequence that the teacher was asked about."""

    place: str
    """file and number, from 1; for people"""
    token_ids: np.ndarray
    """[L] int64"""
    documents: np.ndarray
    """[L] int64: the number of each token's document"""
    targets: tuple[Sequence[np.ndarray] | np.ndarray, ...] = ()
    """the bytes of each position, of both columns of TARGETS"""


class Piece(NamedTuple):
    """What becomes one sample."""

    place: str
    first: int
    """where in the row it begins"""
    token_ids: np.ndarray
    """[T]"""
    document_tokens: np.ndarray
    """[D]"""


def find_files(source: Path) -> list[Path]:
    """The parquet file, or those of a folder by name. Raises DataError when there is none."""
    files = sorted(source.glob("*.parquet")) if source.is_dir() else [source] if source.is_file() else []
    if not files:
        raise DataError(f"--input {source}: no parquet file; give one, or a folder that holds some (data_0.parquet)")
    return files


def read_rows(files: Sequence[Path], *, with_targets: bool, first: int = 0) -> Iterator[Row]:
    """The rows of all files from number ``first`` of them. Raises DataError with the file, and the row where it can."""
    for path in files:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                total = file.metadata.num_rows
                if first < total:
                    yield from _rows_of(file, path, with_targets, first)
                first = max(0, first - total)
        except (pyarrow.ArrowException, OSError) as problem:
            raise DataError(f"{path}: cannot be read as parquet ({problem}); copy it again") from problem


def pieces_of(row: Row, sequence_tokens: int) -> list[Piece]:
    """A row as samples of at most ``sequence_tokens``; all of them but the last are full."""
    pieces = []
    for first in range(0, len(row.token_ids), sequence_tokens):
        tokens = row.token_ids[first : first + sequence_tokens]
        changes = np.flatnonzero(np.diff(row.documents[first : first + sequence_tokens])) + 1
        lengths = np.diff(np.concatenate([[0], changes, [len(tokens)]])).astype(np.uint32)
        is_whole = len(tokens) == len(row.token_ids)
        place = row.place if is_whole else f"{row.place}, tokens {first + 1} to {first + len(tokens)}"
        pieces.append(Piece(place, first, tokens, lengths))
    return pieces


def place_of_sample(files: Sequence[Path], number: int, sequence_tokens: int) -> tuple[int, int]:
    """The row that sample ``number`` is cut from, and which of its pieces it is; no targets are read."""
    if number == 0:
        return 0, 0
    for row_number, row in enumerate(read_rows(files, with_targets=False)):
        num_pieces = -(-len(row.token_ids) // sequence_tokens)
        if number < num_pieces:
            return row_number, number
        number -= num_pieces
    raise DataError(f"{files[-1]}: ends before the shards that were made of the input; --overwrite starts anew")


def _rows_of(file: pyarrow.parquet.ParquetFile, path: Path, with_targets: bool, first: int) -> Iterator[Row]:
    _check_columns(file.schema_arrow, path)
    columns = [TOKENS, *(TARGETS if with_targets else ())]
    columns += [DOCUMENTS] if DOCUMENTS in file.schema_arrow.names else []
    groups, start = [], 0  # a group of rows is skipped without being read
    for group in range(file.num_row_groups):
        end = start + file.metadata.row_group(group).num_rows
        if end > first:
            groups.append((group, start))
        start = end
    number = groups[0][1]
    chosen = [group for group, _ in groups]
    for batch in file.iter_batches(_BATCH_ROWS[with_targets], row_groups=chosen, columns=columns):
        for index in range(batch.num_rows):
            number += 1
            if number > first:
                yield _row(batch, index, f"{path}, row {number}", with_targets)


def _check_columns(schema: pyarrow.Schema, path: Path) -> None:
    for name in (TOKENS, *TARGETS):
        if name not in schema.names:
            legacy = "; packed_indices are of its legacy format, which is not supported"
            raise DataError(
                f"{path}: no column {name!r}; found {schema.names}, expected those of a DistillKit capture"
                + legacy * ("packed_indices" in schema.names)
            )
    for name in {TOKENS, DOCUMENTS, *TARGETS} & set(schema.names):
        kind = schema.field(name).type
        if not _is_list(kind) or _is_list(kind.value_type) != (name in TARGETS):
            expected = "a list of lists of bytes" if name in TARGETS else "a list of numbers"
            raise DataError(f"{path}: column {name!r} holds {kind}, expected {expected} in each row")


def _is_list(kind: pyarrow.DataType) -> bool:
    return bool(pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind))


def _row(batch: pyarrow.RecordBatch, index: int, place: str, with_targets: bool) -> Row:
    tokens = _numbers(batch, TOKENS, index, pyarrow.int64(), place)
    documents = np.ones(len(tokens), np.int64)
    if DOCUMENTS in batch.schema.names:
        documents = _numbers(batch, DOCUMENTS, index, pyarrow.int64(), place)
        if len(documents) != len(tokens) or (len(tokens) and documents.min() < 1):
            raise DataError(
                f"{place}: {DOCUMENTS} of {len(documents)} numbers from {documents.min(initial=0)}, expected the "
                f"number of its document, from 1, for each of the {len(tokens)} tokens: no padding"
            )
    targets = tuple(_positions(batch, name, index, place) for name in TARGETS) if with_targets else ()
    return Row(place, tokens, documents, targets)


def _positions(batch: pyarrow.RecordBatch, name: str, index: int, place: str) -> list[np.ndarray] | np.ndarray:
    """[P, bytes] uint8, or a list where positions differ in length: that is refused where the length is known."""
    positions = batch.column(name)[index].values
    if positions is None or positions.null_count:
        raise DataError(f"{place}: {name}: a value is missing (null); leave the row out, or capture it again")
    content = _as_numbers(positions.flatten(), pyarrow.uint8(), f"{place}: {name}")
    lengths = np.diff(positions.offsets.to_numpy())
    if len(lengths) and (lengths == lengths[0]).all():
        return content.reshape(len(lengths), -1)
    return np.split(content, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _numbers(batch: pyarrow.RecordBatch, name: str, index: int, kind: pyarrow.DataType, place: str) -> np.ndarray:
    return _as_numbers(batch.column(name)[index].values, kind, f"{place}: {name}")


def _as_numbers(values: pyarrow.Array | None, kind: pyarrow.DataType, place: str) -> np.ndarray:
    if values is None or values.null_count:
        raise DataError(f"{place}: a value is missing (null); leave the row out, or capture it again")
    try:
        return values.cast(kind).to_numpy(zero_copy_only=False)
    except pyarrow.ArrowException as problem:
        raise DataError(f"{place}: expected whole numbers that fit {kind}, found {problem}") from problem
