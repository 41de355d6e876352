"""Verifying, describing and resharding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools import build_shards, describe_shards, reshard, verify_shards
from engine.data.shards import ShardSet
from engine.errors import ConfigError, DataError
from tests.sharding import arguments, files_of, some_documents, write_text

ROOT = Path(__file__).parents[2]


@pytest.fixture
def built(decoder_tokenizer: Path, tmp_path: Path) -> Path:
    source = write_text(tmp_path / "a.txt", some_documents(200))
    build_shards.main(arguments(source, decoder_tokenizer, tmp_path / "out", "--shard-bytes", "30KB"))
    return tmp_path / "out" / "manifest.json"


def test_verify_finds_each_damage(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = built.parent
    check = [str(built), "--workers", "1"]
    assert verify_shards.main(check) == verify_shards.main([*check, "--quick"]) == 0
    shards = ShardSet.open(str(built))
    assert len(shards.manifest.shards) >= 4
    content = bytearray((folder / "shard-000000.tar").read_bytes())
    content[-1] ^= 1  # after the last record: no reader ever meets it
    (folder / "shard-000000.tar").write_bytes(content)
    content = bytearray((folder / "shard-000001.tar").read_bytes())
    content[512 * 3 + 200] ^= 1
    (folder / "shard-000001.tar").write_bytes(content)
    (folder / "shard-000002.tar").unlink()
    (folder / "shard-000003.index.npy").write_bytes(b"")
    capsys.readouterr()
    assert verify_shards.main(check) == 1
    told = capsys.readouterr().out
    for expected in (
        "shard-000000.tar: its sha256 is not the manifest's",
        "shard-000001.tar: its sha256 is not the manifest's",
        "shard-000001.tar, sample 000001-00000000 (number 0), at byte 0: flipped bits in its content",
        "shard-000002.tar: no such file",
        "shard-000003.index.npy: not the index that the manifest names",
        "token counts differ",
    ):
        assert expected in told
    assert verify_shards.main([*check, "--quick"]) == 1


def test_verify_compares_the_counts(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(built.read_text())
    content["shards"][1]["num_tokens"] += 1
    built.write_text(json.dumps(content))
    assert verify_shards.main([str(built), "--workers", "2"]) == 1
    assert "shard-000001.tar: " in capsys.readouterr().out


@pytest.mark.parametrize("size", [("--num-shards", "3"), ("--shard-bytes", "11KB"), ("--shard-bytes", "1GB")])
def test_resharding_keeps_every_sample(built: Path, tmp_path: Path, size: tuple[str, str]) -> None:
    assert reshard.main([str(built), "--output", str(tmp_path / "re"), *size]) == 0
    before, after = ShardSet.open(str(built)), ShardSet.open(str(tmp_path / "re" / "manifest.json"))
    if size[0] == "--num-shards":
        assert max(after.manifest.samples_per_shard) - min(after.manifest.samples_per_shard) <= 1
        assert len(after.manifest.shards) == 3

    def samples(shards: ShardSet) -> list[tuple[str, list[int], list[int]]]:
        read = [shards.read(s, i) for s, n in enumerate(shards.manifest.samples_per_shard) for i in range(n)]
        return [(sample.key, sample.token_ids.tolist(), sample.document_tokens.tolist()) for sample in read]

    assert samples(after) == samples(before)
    assert after.manifest.num_documents == before.manifest.num_documents
    assert after.token_counts().tolist() == before.token_counts().tolist()
    assert verify_shards.main([str(tmp_path / "re" / "manifest.json"), "--workers", "1"]) == 0


def test_resharding_goes_on_after_damage_is_mended(built: Path, tmp_path: Path) -> None:
    reshard.main([str(built), "--output", str(tmp_path / "whole"), "--num-shards", "6"])
    shard = built.parent / "shard-000012.tar"
    content = shard.read_bytes()
    shard.unlink()
    command = [str(built), "--output", str(tmp_path / "re"), "--num-shards", "6"]
    with pytest.raises(DataError, match=r"shard-000012\.tar: no such file"):
        reshard.main(command)
    assert (tmp_path / "re" / "shard-000001.tar").exists()
    shard.write_bytes(content)
    assert reshard.main(command) == 0
    assert files_of(tmp_path / "re") == files_of(tmp_path / "whole")


def test_resharding_never_overwrites_its_source(built: Path) -> None:
    before = files_of(built.parent)
    with pytest.raises(ConfigError, match="is the folder of the source"):
        reshard.main([str(built), "--output", str(built.parent), "--num-shards", "2", "--overwrite"])
    assert files_of(built.parent) == before


def test_describe_fits_80_columns(built: Path, decoder_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert describe_shards.main([str(built), "--tokenizer", str(decoder_tokenizer)]) == 0
    told = capsys.readouterr().out
    assert "documents   200" in told
    assert "16-31" in told
    assert "word" in told
    assert max(len(line) for line in told.splitlines()) <= 80


def test_describe_refuses_another_tokenizer(built: Path, encoder_tokenizer: Path) -> None:
    with pytest.raises(ConfigError, match="its fingerprint is"):
        describe_shards.main([str(built), "--tokenizer", str(encoder_tokenizer)])
