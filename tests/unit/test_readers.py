"""Inputs: every kind gives the same shards, and what is wrong with one is named with its line."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
import zstandard

from data_tools import build_shards
from engine.errors import DataError
from tests.sharding import arguments, shards_of, some_documents, write_text

ROOT = Path(__file__).parents[2]


def test_every_kind_of_input_gives_the_same_shards(decoder_tokenizer: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    documents = [*some_documents(30), 'word1 "word2" word3, word4', "word1 " * 30_000]
    lines = "\n".join(documents) + "\n"
    objects = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents))
    (tmp_path / "a.txt").write_text(lines)
    write_text(tmp_path / "b.txt", documents)
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    (tmp_path / "a.jsonl").write_text(objects)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(objects.encode()))
    (tmp_path / "a.jsonl.zst").write_bytes(
        zstandard.compress(objects[:99].encode()) + zstandard.compress(objects[99:].encode())
    )
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("id", "text"), *enumerate(documents)])
    (tmp_path / "a.tsv").write_text("id\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(documents)))
    pyarrow.parquet.write_table(pyarrow.table({"text": documents, "id": range(len(documents))}), tmp_path / "a.parquet")
    Dataset.from_dict({"text": documents}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(objects)
    sources = ["a.txt", "b.txt", "c.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.tsv", "a.parquet"]
    results = {}
    for name in [*sources, "saved", "folder:train", "a.parque?"]:
        more = ["--one-per-line"] if name in ("a.txt", "c.txt") else []
        build_shards.main(arguments(tmp_path / name, decoder_tokenizer, tmp_path / "out", *more, "--overwrite"))
        results[name] = shards_of(tmp_path / "out")
    for name, made in results.items():
        assert made == results["a.txt"], name


ZSTD = zstandard.compress(b"".join(b'{"text": "a%d"}\n' % i for i in range(999)))
BAD_INPUT = {
    "latin.txt": (b"fine\ncaf\xe9\n", r"latin\.txt:2: byte 0xe9 at column 4 is not UTF-8"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"broken\.jsonl:2: not JSON"),
    "list.jsonl": (b'["a"]\n', r"list\.jsonl:1: no column 'text'"),
    "other.jsonl": (b'{"text": "a"}\n\n{"body": "a"}\n', r"other\.jsonl:3: no column 'text'; found \['body'\]"),
    "number.jsonl": (b'{"text": 3}\n', r"number\.jsonl:1: 'text' is int, expected text"),
    "half.jsonl": (b'{"text": "a \\ud800"}\n', r"half\.jsonl:1: half of a surrogate pair at character 3"),
    "short.csv": (b"id,text\n1,a\n2\n", r"short\.csv:3: 1 columns, expected 2"),
    "open.csv": (b'id,text\n1,"a\n2,b\n', r"open\.csv:3: not a table"),
    "nocolumn.tsv": (b"id\tbody\n1\ta\n", r"nocolumn\.tsv:2: no column 'text'"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 999)[:-9], r"cut\.jsonl\.gz: cannot be read past line"),
    "cut.jsonl.zst": (ZSTD[:-5], r"cut\.jsonl\.zst: cannot be read past line .*ended before"),
    "bad.jsonl.zst": (ZSTD[:9] + b"\xff" + ZSTD[10:], r"bad\.jsonl\.zst: cannot be read past line"),
    "not.parquet": (b"hello", r"not\.parquet: cannot be read as parquet"),
    "picture.png": (b"x", r"picture\.png: unknown kind of file; expected \.txt"),
    "empty.txt": (b"\n\n", r"no document for"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named_with_its_line(name: str, decoder_tokenizer: Path, tmp_path: Path) -> None:
    content, message = BAD_INPUT[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_shards.main(arguments(tmp_path / name, decoder_tokenizer, tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_absent_input(decoder_tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt: no such file"):
        build_shards.main(arguments(tmp_path / "nothing.txt", decoder_tokenizer, tmp_path / "out"))
    with pytest.raises(DataError, match="no file fits this pattern"):
        build_shards.main(arguments(tmp_path / "*.jsonl", decoder_tokenizer, tmp_path / "out"))
