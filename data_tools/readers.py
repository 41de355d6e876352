"""Documents out of files and data sets, one at a time, with the place named when something is wrong with one."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from zstandard import ZstdError

from data_tools.zstd_file import open_zstd
from engine.errors import DataError

TEXT_ENDINGS = (".txt", ".text", ".tokens")
ENDINGS = (*TEXT_ENDINGS, ".jsonl", ".csv", ".tsv", ".parquet")
_GLOB_CHARACTERS = "*?["

Row = tuple[str, Any]
"""Where it is, and the record: a mapping where the data are sound"""


def find_inputs(inputs: list[str], any_ending: bool = False) -> list[str]:
    """Each input as a file, a folder of a data set, or a data set's name; globs become their files, sorted.

    Raises DataError for a file that is absent or of no known kind (unless ``any_ending``), and for a glob that finds
    nothing.
    """
    found: list[str] = []
    for entry in inputs:
        if Path(entry).is_file():
            found.append(entry)
        elif any(character in entry for character in _GLOB_CHARACTERS):
            files = sorted(path for path in glob.glob(entry, recursive=True) if Path(path).is_file())
            if not files:
                raise DataError(f"--input {entry}: no file fits this pattern")
            found += files
        elif any_ending or (not Path(entry.split(":")[0]).is_dir() and _kind(entry) is not None):
            raise DataError(f"--input {entry}: no such file")
        else:
            found.append(entry)
    for entry in found:
        if not any_ending and Path(entry).is_file() and _kind(entry) is None:
            raise DataError(f"--input {entry}: unknown kind of file; expected {', '.join(ENDINGS)} (also .gz, .zst)")
    return found


def read_documents(source: str, *, text_column: str, one_per_line: bool) -> Iterator[str]:
    """The documents of one of ``find_inputs``, in their order. Raises DataError with the file and the line."""
    if Path(source).is_file() and _kind(source) in TEXT_ENDINGS:
        yield from _read_text(source, one_per_line)
        return
    for where, row in read_rows(source, only=text_column):
        yield _text_of(row, text_column, where)


def read_rows(source: str, names: tuple[str, ...] | None = None, only: str | None = None) -> Iterator[Row]:
    """The rows of a table, of JSON lines or of a data set, each with its place. Raises DataError.

    ``names`` of the columns of a table without a header. ``only`` is a column that must be there; others may be left
    out.
    """
    kind = _kind(source) if Path(source).is_file() else "data set"
    if kind == "data set":
        return _read_dataset(source)
    if kind == ".parquet":
        return _read_parquet(source, only)
    if kind == ".jsonl":
        return _read_jsonl(source)
    return _read_table(source, names, tabs=kind == ".tsv")


def _kind(name: str) -> str | None:
    """The ending of a file name without that of its compression."""
    name = name.removesuffix(".gz").removesuffix(".zst")
    return next((ending for ending in ENDINGS if name.endswith(ending)), None)


def _open(path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.endswith(".zst"):
        return open_zstd(path)
    return open(path, "rb")


def lines_of(path: str) -> Iterator[str]:
    """The lines of a file, also of a compressed one, with their ends.

    Raises DataError for bytes that are not UTF-8 and for damaged compression.
    """
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as problem:
        raise DataError(
            f"{path}:{number}: byte {problem.object[problem.start]:#04x} at column {problem.start + 1} is not UTF-8; "
            "convert the file (for example with iconv)"
        ) from problem
    except (OSError, EOFError, zlib.error, ZstdError) as problem:
        raise DataError(f"{path}: cannot be read past line {number} ({problem}); copy or make it again") from problem


def _read_text(path: str, one_per_line: bool) -> Iterator[str]:
    """Documents are lines, or are separated by blank lines."""
    paragraph: list[str] = []
    for line in lines_of(path):
        text = line.rstrip("\r\n")
        if one_per_line:
            yield text
        elif text.strip():
            paragraph.append(text)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


def _read_jsonl(path: str) -> Iterator[Row]:
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except ValueError as problem:
            raise DataError(f"{path}:{number}: not JSON ({problem}); expected one object a line") from problem


def _read_table(path: str, names: tuple[str, ...] | None, *, tabs: bool) -> Iterator[Row]:
    """CSV with quotes; TSV without, as the public data sets have it."""
    csv.field_size_limit(sys.maxsize)
    lines = lines_of(path)
    if tabs:
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        rows = csv.reader(lines, strict=True)
    try:
        header = list(names) if names else next(rows, [])
        for row in rows:
            if row and len(row) != len(header):
                said = "by --columns" if names else "as in the first line"
                raise DataError(f"{path}:{rows.line_num}: {len(row)} columns, expected {len(header)} {said}")
            if row:
                yield f"{path}:{rows.line_num}", dict(zip(header, row))
    except csv.Error as problem:
        raise DataError(f"{path}:{rows.line_num}: not a table ({problem})") from problem


def _read_parquet(path: str, only: str | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        if only is not None and only not in table.schema_arrow.names:
            raise _no_column(only, table.schema_arrow.names, path)
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=None if only is None else [only]):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as problem:
        raise DataError(f"{path}: cannot be read as parquet ({problem})") from problem


def _read_dataset(source: str) -> Iterator[Row]:
    """``name``, ``name:split`` or ``name:config:split``; a name is a folder or a data set on the hub."""
    from datasets import DatasetDict, load_dataset, load_from_disk

    name, *rest = source.split(":")
    split = (rest[-1] if rest else "") or "train"
    config = rest[0] if len(rest) == 2 and rest[0] else None
    try:
        if any((Path(name) / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(name)
            rows: Any = saved[split] if isinstance(saved, DatasetDict) else saved
        else:
            rows = load_dataset(name, config, split=split, streaming=True)
        for number, record in enumerate(rows, 1):
            yield f"{source}, row {number}", record
    except Exception as problem:  # datasets raises its own, the hub's, pyarrow's and Python's errors
        raise DataError(
            f"--input {source}: no such file, and not a data set that loads as name, name:split or name:config:split "
            f"({type(problem).__name__}: {' '.join(str(problem).split())[:300]})"
        ) from problem


def _text_of(record: Any, text_column: str, where: str) -> str:
    """A missing value counts as an empty document, which the build skips and reports."""
    if not isinstance(record, dict) or text_column not in record:
        raise _no_column(text_column, list(record) if isinstance(record, dict) else [], where)
    text = record[text_column]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: {text_column!r} is {type(text).__name__}, expected text")
    try:
        (text or "").encode()
    except UnicodeEncodeError as problem:
        raise DataError(
            f"{where}: half of a surrogate pair at character {problem.start + 1}; repair the text"
        ) from problem
    return text or ""


def _no_column(text_column: str, names: list[str], where: str) -> DataError:
    return DataError(
        f"{where}: no column {text_column!r}; found {names}; name the column of the text with --text-column"
    )
