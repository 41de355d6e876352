"""Shards: what is written is read back, by us and by webdataset alone, and every kind of damage is told."""

from __future__ import annotations

import io
import pickle
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.data.manifest import ShardEntry
from engine.data.record import DOCUMENTS, INDEX_DTYPE, TOKENS, _npy_headers, encode_array, read_array, token_dtype
from engine.data.shard_writer import ShardWriter
from engine.data.shards import ShardSet
from engine.errors import DataError
from tests.sharding import VOCAB, manifest_of, samples_of, write_set, write_shard


def test_samples_come_back_in_any_order(tmp_path: Path) -> None:
    shards = ShardSet.open(str(write_set(tmp_path)))
    written = {(shard, i): s for shard, count in enumerate((7, 5)) for i, s in enumerate(samples_of(shard, count))}
    for place in sorted(written, key=lambda place: (place[1] * 5 % 7, place[0])):
        key, ids, documents = written[place]
        sample = shards.read(*place)
        assert (sample.shard, sample.key, sample.sound) == (f"shard-{place[0]:06d}.tar", key, True)
        assert sample.token_ids.dtype == np.uint16
        np.testing.assert_array_equal(sample.token_ids, ids)
        np.testing.assert_array_equal(sample.document_tokens, documents)


def test_headers_are_read_again_where_another_thread_disturbs_the_parser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPython 3.11 counts the parser's depth for all threads together, and may raise SystemError in one of them."""
    whole = np.lib.format.read_array_header_1_0
    calls = []

    def disturbed(stream: io.BytesIO) -> Any:
        calls.append(stream)
        if len(calls) % 3:
            raise SystemError("AST constructor recursion depth mismatch (before=156, after=175)")
        return whole(stream)

    written = samples_of(0, 7)
    manifest = write_set(tmp_path)
    _npy_headers.clear()
    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", disturbed)
    shards = ShardSet.open(str(manifest))
    for i, (_, ids, _) in enumerate(written):
        np.testing.assert_array_equal(shards.read(0, i).token_ids, ids)
    assert len(calls) >= 3
    with (tmp_path / "shard-000000.index.npy").open("rb") as file:
        np.testing.assert_array_equal(read_array(file.read()), np.load(tmp_path / "shard-000000.index.npy"))


def test_webdataset_alone_reads_the_shards(tmp_path: Path) -> None:
    import webdataset

    write_set(tmp_path)
    read = list(webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in read] == [key for key, _, _ in samples_of(0, 7)]
    for sample, (_, ids, documents) in zip(read, samples_of(0, 7), strict=True):
        np.testing.assert_array_equal(sample[TOKENS], ids)
        np.testing.assert_array_equal(sample[DOCUMENTS], documents)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    entries = [write_shard(tmp_path / name / "shard-000000.tar", samples_of(0, 9)) for name in "ab"]
    assert entries[0] == entries[1]
    for name in ("shard-000000.tar", "shard-000000.index.npy"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_index_covers_the_records_of_the_tar_file(tmp_path: Path) -> None:
    entry = write_shard(tmp_path / "shard-000000.tar", samples_of(0, 9))
    index = np.load(tmp_path / entry.index)
    assert index.dtype == INDEX_DTYPE
    with tarfile.open(tmp_path / entry.name) as tar:
        firsts = [member.offset for member in tar.getmembers()][::2]
    assert index["offset"].tolist() == firsts
    assert index["offset"][1:].tolist() == (index["offset"] + index["num_bytes"])[:-1].tolist()


def test_a_shard_that_failed_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path / "shard-000000.tar", token_dtype(VOCAB)) as writer:
            writer.add(*samples_of(0, 1)[0])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("vocab_size", "expected"), [(256, "u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_smallest_type_for_ids(vocab_size: int, expected: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(expected)


def test_many_threads_read_the_same(tmp_path: Path) -> None:
    shards = ShardSet.open(str(write_set(tmp_path, (40, 40))))
    wrong: list[object] = []

    def read_all(offset: int) -> None:
        for place in range(80):
            shard, index = divmod((place + offset) % 80, 40)
            if shards.read(shard, index).key != f"{shard:06d}-{index:08d}":
                wrong.append((shard, index))

    threads = [threading.Thread(target=read_all, args=(13 * i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# damage


def test_every_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    manifest = write_set(tmp_path)
    path = tmp_path / "shard-000000.tar"
    whole = path.read_bytes()
    index = np.load(tmp_path / "shard-000000.index.npy")
    start, num_bytes = int(index["offset"][3]), int(index["num_bytes"][3])
    messages = set()
    for place in range(start, start + num_bytes, 61):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        shards = ShardSet.open(str(manifest))
        with pytest.raises(DataError, match=rf"shard-000000\.tar, sample .*number 3.*at byte {start:,}: ") as caught:
            shards.read(0, 3)
        messages.add(str(caught.value).split(": ", 1)[1])
        assert shards.read(0, 2).key == "000000-00000002", "its neighbours still read"
    told = " ".join(messages)
    assert "wrong checksum" in told
    assert "flipped bits" in told


def test_missing_shard(tmp_path: Path) -> None:
    shards = ShardSet.open(str(write_set(tmp_path)))
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar: no such file; .*copy or build"):
        shards.read(1, 0)
    assert shards.read(0, 0).key == "000000-00000000"


def test_truncated_shard(tmp_path: Path) -> None:
    shards = ShardSet.open(str(write_set(tmp_path)))
    path = tmp_path / "shard-000000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-512])
    with pytest.raises(DataError, match=rf"shard-000000\.tar: {len(whole) - 512:,} bytes, expected {len(whole):,}"):
        shards.read(0, 0)


def test_shard_cut_short_while_open(tmp_path: Path) -> None:
    shards = ShardSet.open(str(write_set(tmp_path)))
    shards.read(0, 0)
    with (tmp_path / "shard-000000.tar").open("r+b") as stream:
        stream.truncate(600)
    with pytest.raises(DataError, match=r"shard-000000\.tar, sample .*number 6"):
        shards.read(0, 6)


def test_index_of_another_shard(tmp_path: Path) -> None:
    shards = ShardSet.open(str(write_set(tmp_path)))
    (tmp_path / "shard-000000.index.npy").write_bytes((tmp_path / "shard-000001.index.npy").read_bytes())
    with pytest.raises(DataError, match=r"shard-000000\.index\.npy: not the index that the manifest names"):
        shards.read(0, 0)


def test_token_id_outside_the_vocabulary(tmp_path: Path) -> None:
    entry = write_shard(tmp_path / "shard-000000.tar", [("k", np.array([5, 298, 7]), np.array([3]))])
    manifest = manifest_of(tmp_path, [entry], vocab_size=298)
    with pytest.raises(DataError, match=r"sample k .*token id 298, expected below 298"):
        ShardSet.open(str(manifest)).read(0, 0)


@pytest.mark.parametrize("documents", [[2], [2, 2], [3, 0]])
def test_documents_that_do_not_add_up(tmp_path: Path, documents: list[int]) -> None:
    entry = write_shard(tmp_path / "shard-000000.tar", [("k", np.array([5, 6, 7]), np.array(documents))])
    with pytest.raises(DataError, match=r"sample k .*do not add up to its 3 tokens"):
        ShardSet.open(str(manifest_of(tmp_path, [entry]))).read(0, 0)


def test_sequence_longer_than_the_manifest_says(tmp_path: Path) -> None:
    entry = write_shard(tmp_path / "shard-000000.tar", [("k", np.arange(33), np.array([33]))])
    with pytest.raises(DataError, match=r"sample k .*33 tokens, expected 1 to 32"):
        ShardSet.open(str(manifest_of(tmp_path, [entry]))).read(0, 0)


class Bomb:
    """Unpickling one leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def foreign_shard(folder: Path, members: dict[str, bytes]) -> Path:
    """A set whose only record is made of ``members``, with an index and hashes that are right."""
    import hashlib
    import zlib

    record = b""
    for name, content in members.items():
        info = tarfile.TarInfo(name)
        info.size = len(content)
        padding = bytes(-len(content) % 512)
        record += info.tobuf(tarfile.USTAR_FORMAT) + content + padding
    index = encode_array(np.array([(0, len(record), zlib.crc32(record), 1)], INDEX_DTYPE))
    (folder / "shard-000000.index.npy").write_bytes(index)
    whole = record + bytes(1024)
    (folder / "shard-000000.tar").write_bytes(whole)
    entry = ShardEntry(
        "shard-000000.tar", 1, 3, len(whole), hashlib.sha256(whole).hexdigest(), "shard-000000.index.npy",
        hashlib.sha256(index).hexdigest(),
    )  # fmt: skip
    return manifest_of(folder, [entry])


@pytest.mark.parametrize("ending", ["pkl", "tokens.pyd", "pth", "tokens"])
def test_pickles_are_refused_unopened(tmp_path: Path, ending: str) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    manifest = foreign_shard(tmp_path, {f"k.{ending}": bomb})
    with pytest.raises(DataError, match=rf"sample k .*refused the member 'k\.{ending}'"):
        ShardSet.open(str(manifest)).read(0, 0)
    assert not (tmp_path / "exploded").exists()


def test_object_arrays_are_refused_unopened(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.array([Bomb(tmp_path / "exploded")] * 3, dtype=object), allow_pickle=True)
    documents = encode_array(np.array([3], np.uint32))
    manifest = foreign_shard(tmp_path, {f"k.{DOCUMENTS}": documents, f"k.{TOKENS}": content.getvalue()})
    with pytest.raises(DataError, match=r"sample k .*tokens\.npy is object of shape \(3,\), expected .*uint"):
        ShardSet.open(str(manifest)).read(0, 0)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "tokens", [np.arange(3, dtype=np.int64), np.arange(3, dtype=np.float32), np.zeros((1, 3), np.uint16)]
)
def test_other_arrays_are_refused(tmp_path: Path, tokens: np.ndarray) -> None:
    documents = encode_array(np.array([3], np.uint32))
    manifest = foreign_shard(tmp_path, {f"k.{DOCUMENTS}": documents, f"k.{TOKENS}": encode_array(tokens)})
    with pytest.raises(DataError, match=r"sample k .*expected one dimension of uint8, uint16 or uint32"):
        ShardSet.open(str(manifest)).read(0, 0)


def test_links_are_refused(tmp_path: Path) -> None:
    manifest = foreign_shard(tmp_path, {})
    link = tarfile.TarInfo("k.tokens.npy")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    record = link.tobuf(tarfile.USTAR_FORMAT)
    from engine.data.record import DamagedRecord, decode

    with pytest.raises(DamagedRecord, match="refused the member"):
        decode(record)
    with pytest.raises(DataError, match="expected members"):
        ShardSet.open(str(manifest)).read(0, 0)
