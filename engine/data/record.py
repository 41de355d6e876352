"""One sample as tar records, decoded by hand: nothing is ever unpickled, and a record costs a few microseconds.

A record is the bytes of a sample's members one after another: for each a 512-byte ustar header, the content, and
zeros up to a multiple of 512. Members are ``<key>.documents.npy`` and ``<key>.tokens.npy``; samples of labelled tasks
have ``<key>.labels.npy`` and ``<key>.pieces.npy`` as well, and ``<key>.example.json`` where scoring needs it.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from engine.schema import Annotation

BLOCK = 512
TOKENS = "tokens.npy"
DOCUMENTS = "documents.npy"
LABELS = "labels.npy"
PIECES = "pieces.npy"
EXAMPLE = "example.json"
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("num_bytes", "<u4"), ("crc32", "<u4"), ("num_tokens", "<u4")])
INDEX_DTYPES = (INDEX_DTYPE, np.dtype(INDEX_DTYPE.descr[:3]))
"""What is written, and what was written before"""

_UNSIGNED = (np.dtype("u1"), np.dtype("<u2"), np.dtype("<u4"))
_MAX_CACHED_HEADERS = 4096
_PARSER_ATTEMPTS = 8

Parsed = TypeVar("Parsed")
_npy_headers: dict[bytes, tuple[np.dtype, int]] = {}


class DamagedRecord(Exception):
    """What is wrong with a record, with its key where that much can be read; the reader adds where it lies."""

    def __init__(self, problem: str, key: str = "unknown") -> None:
        super().__init__(problem)
        self.key = key


class Decoded(NamedTuple):
    """The content of a record."""

    key: str
    token_ids: np.ndarray
    """[T]"""
    document_tokens: np.ndarray
    """[D]"""
    annotation: Annotation | None


class Member(NamedTuple):
    """A file of a record: its content is ``record[start:end]``."""

    key: str
    name: str
    start: int
    end: int


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id below ``vocab_size``."""
    return next(dtype for dtype in _UNSIGNED if vocab_size - 1 <= np.iinfo(dtype).max)


def encode_array(array: np.ndarray) -> bytes:
    """A .npy file, in C order."""
    return _npy_header(array.dtype, array.shape) + array.tobytes()


@lru_cache(maxsize=4096)
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    description = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def decode(record: bytes) -> Decoded:
    """The content of a record. Raises DamagedRecord."""
    key = None
    arrays = {}
    example = b""
    for member in members(record):
        if key is None:
            key = member.key
        elif member.key != key:
            raise DamagedRecord(f"holds members of two samples, {key} and {member.key}", key)
        if member.name.endswith(".npy"):
            arrays[member.name] = decode_array(record, member)
        elif member.name == EXAMPLE:
            example = record[member.start : member.end]
    if key is None or TOKENS not in arrays or DOCUMENTS not in arrays:
        raise DamagedRecord(f"expected members {DOCUMENTS} and {TOKENS}, found {sorted(arrays)}", key or "unknown")
    if (LABELS in arrays) != (PIECES in arrays):
        raise DamagedRecord(f"expected both of {LABELS} and {PIECES} or neither, found {sorted(arrays)}", key)
    annotation = Annotation(arrays[LABELS], arrays[PIECES], example) if LABELS in arrays else None
    return Decoded(key, arrays[TOKENS], arrays[DOCUMENTS], annotation)


def members(record: bytes) -> Iterator[Member]:
    """The members of a record in order. Checksums are not looked at: the CRC of the whole record is."""
    start = 0
    while start < len(record):
        header = record[start : start + BLOCK]
        name = header[:100].rstrip(b"\0").decode("ascii", "replace")
        key, _, ending = name.partition(".")
        try:
            num_bytes = int(header[124:135], 8)
        except ValueError:
            raise DamagedRecord(f"no tar header at its byte {start}") from None
        if header[156:157] != b"0" or not ending.endswith((".npy", ".json")):
            raise DamagedRecord(
                f"refused the member {name!r}: a sample holds plain .npy and .json files, and nothing is unpickled", key
            )
        start += BLOCK
        if num_bytes < 0 or start + num_bytes > len(record):
            raise DamagedRecord(f"member {name!r} claims {num_bytes:,} bytes, more than the record holds", key)
        yield Member(key, ending, start, start + num_bytes)
        start += -(-num_bytes // BLOCK) * BLOCK


def decode_array(record: bytes, member: Member) -> np.ndarray:
    """The one-dimensional array of unsigned integers in a .npy member: a read-only view of the record."""
    _, name, start, end = member
    content = start + 10 + int.from_bytes(record[start + 8 : start + 10], "little")
    header = record[start:content]
    known = _npy_headers.get(header) or _read_npy_header(header, member)
    dtype, length = known
    if end - content != length * dtype.itemsize:
        raise DamagedRecord(
            f"{name} announces {length} items of {dtype}, but {end - content:,} bytes follow", member.key
        )
    return np.frombuffer(record, dtype, length, content)


def read_array(content: bytes) -> np.ndarray:
    """A whole .npy file. Raises whatever NumPy does for a damaged one."""
    return _parsed(lambda: np.lib.format.read_array(io.BytesIO(content), allow_pickle=False))


def _parsed(read: Callable[[], Parsed]) -> Parsed:
    """NumPy reads headers with Python's parser, which may fail in a thread while another is in it: SystemError, "AST
    constructor recursion depth mismatch" (CPython 3.11)."""
    for _ in range(_PARSER_ATTEMPTS):
        try:
            return read()
        except SystemError:
            time.sleep(0.001)
    return read()


def _header_of(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"format version {version}, expected (1, 0)")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return shape, dtype


def _read_npy_header(header: bytes, member: Member) -> tuple[np.dtype, int]:
    try:
        shape, dtype = _parsed(lambda: _header_of(header))
    except Exception as problem:  # NumPy raises ValueError, SyntaxError, TypeError or UnicodeError by the damage
        raise DamagedRecord(f"{member.name} does not decode ({problem})", member.key) from problem
    if dtype not in _UNSIGNED or len(shape) != 1:
        raise DamagedRecord(
            f"{member.name} is {dtype} of shape {shape}, expected one dimension of uint8, uint16 or uint32", member.key
        )
    if len(_npy_headers) < _MAX_CACHED_HEADERS:
        _npy_headers[header] = dtype, shape[0]
    return dtype, shape[0]


def diagnose(record: bytes) -> DamagedRecord:
    """Why a record with a wrong CRC is wrong, as exactly as its bytes tell."""
    try:
        for member in members(record):
            header = record[member.start - BLOCK : member.start]
            blanked = sum(header) - sum(header[148:156]) + 8 * ord(" ")
            if header[148:154] != b"%06o" % blanked:
                return DamagedRecord("tar header with a wrong checksum", member.key)
        key = decode(record).key
    except DamagedRecord as damage:
        return damage
    return DamagedRecord("flipped bits in its content", key)
