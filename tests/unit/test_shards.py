"""Shards: what is written is read back, by us and by webdataset alone, and every kind of damage is told."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from engine.data import address
from engine.data.manifest import Manifest, ShardEntry, write_manifest
from engine.data.record import DOCUMENTS, INDEX_DTYPE, TOKENS, encode_array, token_dtype
from engine.data.shards import ShardSet, ShardWriter
from engine.errors import DataError

VOCAB = 300
SEQUENCE = 32


def samples_of(shard: int, count: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(shard)
    samples = []
    for number in range(count):
        documents = rng.integers(1, 12, size=rng.integers(1, 3)).astype(np.uint32)
        ids = rng.integers(0, VOCAB, size=int(documents.sum())).astype(np.uint32)
        samples.append((f"{shard:06d}-{number:08d}", ids, documents))
    return samples


def write_shard(path: Path, samples: list[tuple[str, np.ndarray, np.ndarray]]) -> ShardEntry:
    with ShardWriter(path, token_dtype(VOCAB)) as writer:
        for sample in samples:
            writer.add(*sample)
    assert writer.entry is not None
    return writer.entry


def write_set(folder: Path, counts: tuple[int, ...] = (7, 5)) -> Path:
    entries = [write_shard(folder / f"shard-{i:06d}.tar", samples_of(i, count)) for i, count in enumerate(counts)]
    return manifest_of(folder, entries)


def manifest_of(folder: Path, entries: list[ShardEntry], vocab_size: int = VOCAB) -> Path:
    counts = np.zeros(vocab_size, np.int64)
    manifest = Manifest(
        task="causal_lm", tokenizer="f", vocab_size=vocab_size, pad_id=0, sequence_tokens=SEQUENCE, num_documents=1,
        shards=tuple(entries), token_counts_sha256="", command="test",
    )  # fmt: skip
    write_manifest(folder, manifest, counts)
    return folder / "manifest.json"


def rewritten(manifest: Path, change: dict[str, object]) -> Path:
    """The manifest with the first shard's entry changed."""
    content = json.loads(manifest.read_text())
    content["shards"][0].update(change)
    manifest.write_text(json.dumps(content))
    return manifest


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
    index = encode_array(np.array([(0, len(record), zlib.crc32(record))], INDEX_DTYPE))
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


# addresses


@pytest.mark.parametrize(
    "name",
    [
        "../shard-000000.tar", "a/../../x.tar", "/etc/passwd", "http://elsewhere/x.tar", "s3://b/x.tar", "file:///x",
        "a\\..\\x.tar", "~/x.tar", "", ".", "a//b.tar", "%2e%2e/x.tar", "x.tar?a=b", "-", "x.tar\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("field", ["name", "index"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str, field: str) -> None:
    manifest = rewritten(write_set(tmp_path), {field: name})
    with pytest.raises(DataError, match="refused the file name"):
        ShardSet.open(str(manifest))


def test_a_manifest_cannot_run_a_command(tmp_path: Path) -> None:
    manifest = rewritten(write_set(tmp_path), {"name": f"pipe:touch {tmp_path}/ran; cat {tmp_path}/shard-000000.tar"})
    with pytest.raises(DataError, match=r"refused 'pipe:.*data\.allow_pipe: true"):
        ShardSet.open(str(manifest))
    with pytest.raises(DataError, match="refused 'pipe:"):
        ShardSet.open(f"pipe:cat {manifest}")
    assert not (tmp_path / "ran").exists()


def test_commands_that_the_user_allows(tmp_path: Path) -> None:
    manifest = rewritten(
        write_set(tmp_path),
        {"name": f"pipe:cat {tmp_path}/shard-000000.tar", "index": f"pipe:cat {tmp_path}/shard-000000.index.npy"},
    )
    shards = ShardSet.open(str(manifest), allow_pipe=True)
    for index, (key, ids, _) in enumerate(samples_of(0, 7)):
        sample = shards.read(0, index)
        assert sample.key == key
        np.testing.assert_array_equal(sample.token_ids, ids)


def test_a_command_that_fails(tmp_path: Path) -> None:
    manifest = rewritten(write_set(tmp_path), {"name": "pipe:exit 3"})
    with pytest.raises(DataError, match="pipe:exit 3: the command failed"):
        ShardSet.open(str(manifest), allow_pipe=True).read(0, 0)


def test_other_schemes_are_refused() -> None:
    with pytest.raises(DataError, match="cannot read ftp:// addresses"):
        ShardSet.open("ftp://host/manifest.json")


def test_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: no such file"):
        ShardSet.open(str(tmp_path / "manifest.json"))


@pytest.mark.parametrize("change", [{"num_samples": "7"}, {"num_bytes": -1}, {"name": None}, {"extra": 1}])
def test_manifest_with_wrong_types(tmp_path: Path, change: dict[str, object]) -> None:
    manifest = rewritten(write_set(tmp_path), change)
    with pytest.raises(DataError, match="not a Stillhouse manifest"):
        ShardSet.open(str(manifest))


def test_token_counts_are_those_of_the_manifest(tmp_path: Path) -> None:
    manifest = write_set(tmp_path)
    assert ShardSet.open(str(manifest)).token_counts().shape == (VOCAB,)
    (tmp_path / "token_counts.npy").write_bytes(encode_array(np.ones(VOCAB, np.int64)))
    with pytest.raises(DataError, match=r"token_counts\.npy: not the file that the manifest names"):
        ShardSet.open(str(manifest)).token_counts()


# over http


class Server:
    """Serves a folder, with range requests unless told otherwise; ``failures`` answers of 503 come first."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.failures, self.ranges = folder, 0, True
        self.requests: list[tuple[str, str | None]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"


class Handler(BaseHTTPRequestHandler):
    def __init__(self, owner: Server, *arguments: object) -> None:
        self.owner = owner
        super().__init__(*arguments)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = self.owner.folder / self.path.lstrip("/")
        if self.owner.failures > 0:
            self.owner.failures -= 1
            self.answer(503, b"")
        elif not path.is_file():
            self.answer(404, b"")
        else:
            content, wanted = path.read_bytes(), self.headers.get("Range")
            if self.command == "GET":
                self.owner.requests.append((path.name, wanted))
            if wanted and self.owner.ranges:
                start, end = wanted.removeprefix("bytes=").split("-")
                self.answer(206, content[int(start) : int(end) + 1])
            else:
                self.answer(200, content)

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if self.owner.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(address, "_RETRY_SECONDS", (0.01, 0.01))
    monkeypatch.setattr("engine.data.address.BLOCK_BYTES", 4096)
    (tmp_path / "shards").mkdir()
    write_set(tmp_path / "shards", (60, 5))
    return Server(tmp_path)


def test_remote_equals_local_in_few_requests(server: Server, tmp_path: Path) -> None:
    remote = ShardSet.open(f"{server.address}/shards/manifest.json")
    local = ShardSet.open(str(tmp_path / "shards" / "manifest.json"))
    for index in np.random.default_rng(0).permutation(60).tolist():
        ours, theirs = local.read(0, index), remote.read(0, index)
        assert (ours.key, ours.shard) == (theirs.key, theirs.shard)
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
    asked = [wanted for name, wanted in server.requests if name == "shard-000000.tar"]
    num_bytes = local.manifest.shards[0].num_bytes
    assert len(asked) == len(set(asked)) <= -(-num_bytes // 4096), "each block is asked for once"
    np.testing.assert_array_equal(local.token_counts(), remote.token_counts())


def test_s3_equals_local(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers as an S3 store does to reads, at least of the fields that s3fs looks at."""
    for name, value in (("ENDPOINT_URL", server.address), ("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x")):
        monkeypatch.setenv(f"AWS_{name}", value)
    remote = ShardSet.open("s3://shards/manifest.json")
    local = ShardSet.open(str(tmp_path / "shards" / "manifest.json"))
    for index in (59, 0, 31):
        np.testing.assert_array_equal(local.read(0, index).token_ids, remote.read(0, index).token_ids)
    assert server.requests[-1][1] is not None, "by range"
    (tmp_path / "shards" / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"s3://shards/shard-000001\.tar: no such file"):
        remote.read(1, 0)


def test_a_small_cache_still_reads_right(server: Server) -> None:
    remote = ShardSet.open(f"{server.address}/shards/manifest.json", cache_bytes=1)
    keys = [remote.read(0, index).key for index in (0, 59, 1, 58)]
    assert keys == [f"000000-{index:08d}" for index in (0, 59, 1, 58)]


def test_a_failing_server_is_asked_again(server: Server) -> None:
    remote = ShardSet.open(f"{server.address}/shards/manifest.json")
    server.failures = 2
    assert remote.read(1, 4).key == "000001-00000004"
    server.failures = 100
    with pytest.raises(DataError, match=r"http://127.*shard-000000\.tar: cannot be read after 3 tries"):
        remote.read(0, 0)
    server.failures = 0
    assert remote.read(0, 0).key == "000000-00000000", "a failure is not remembered"


def test_missing_remote_shard(server: Server, tmp_path: Path) -> None:
    remote = ShardSet.open(f"{server.address}/shards/manifest.json")
    (tmp_path / "shards" / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"http://127.*shard-000001\.tar: no such file"):
        remote.read(1, 0)


def test_a_server_without_ranges_is_told(server: Server) -> None:
    server.ranges = False
    remote = ShardSet.open(f"{server.address}/shards/manifest.json")
    with pytest.raises(DataError, match="must answer range requests"):
        remote.read(0, 30)


def test_the_query_of_an_address_is_kept() -> None:
    assert address.beside("https://host/a/manifest.json?key=1", "s/x.tar") == "https://host/a/s/x.tar?key=1"
    assert address.beside("s3://bucket/a/manifest.json", "x.tar") == "s3://bucket/a/x.tar"
