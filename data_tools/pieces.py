"""Tokenised documents on their way from a part of a build to the merge: a table and the token ids, in one file."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.data.atomic import write_atomically

_ROW = np.dtype([("document", "<u8"), ("source", "<u4"), ("num_tokens", "<u4"), ("kind", "<u4")])


class Kind(IntEnum):
    TRAINING = 0
    HELDOUT = 1
    EMPTY = 2


class Place(NamedTuple):
    """Document number ``document`` of input number ``source``."""

    source: int
    document: int


class Tokenised(NamedTuple):
    place: Place
    kind: Kind
    ids: np.ndarray
    """[tokens]"""


class Piece(NamedTuple):
    """What the part's own file says about a piece."""

    name: str
    num_documents: int
    num_bytes: int
    crc32: int


def write_piece(path: Path, documents: list[Tokenised], dtype: np.dtype) -> Piece:
    """``dtype`` of the token ids. The file appears whole or not at all."""
    rows = [(place.document, place.source, len(ids), kind) for place, kind, ids in documents]
    table = np.array(rows, dtype=_ROW)
    content = table.tobytes() + np.concatenate([ids for _, _, ids in documents]).astype(dtype).tobytes()
    write_atomically(path, content)
    return Piece(path.name, len(rows), len(content), zlib.crc32(content))


def read_piece(folder: Path, piece: Piece, dtype: np.dtype) -> Iterator[Tokenised]:
    """The documents of a piece; the file is mapped, not loaded. Raises ValueError when its bytes are not what was
    written."""
    content = np.memmap(folder / piece.name, np.uint8, mode="r").data
    if len(content) != piece.num_bytes or zlib.crc32(content) != piece.crc32:
        raise ValueError("its bytes are not those that were written")
    table = np.frombuffer(content, _ROW, piece.num_documents)
    ids = np.frombuffer(content, dtype, offset=table.nbytes)
    start = 0
    for document, source, num_tokens, kind in table.tolist():
        yield Tokenised(Place(source, document), Kind(kind), ids[start : start + num_tokens])
        start += num_tokens
