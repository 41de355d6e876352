"""Where shards lie: names and commands that are refused, http and s3."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.data import address
from engine.data.record import encode_array
from engine.data.shards import ShardSet
from engine.errors import DataError
from tests.serving import Server, as_s3, in_a_hurry
from tests.sharding import VOCAB, rewritten, samples_of, write_set


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


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    in_a_hurry(monkeypatch)
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
    as_s3(server, monkeypatch)
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
