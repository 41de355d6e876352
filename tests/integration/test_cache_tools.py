"""verify_cache names every damage, describe_cache accounts for every byte."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools import cache_against_teacher, cache_bytes, describe_cache, verify_cache
from data_tools.cache_checks import CacheCheck
from data_tools.cache_records import RecordReader
from data_tools.sidecar_checks import check_sidecar
from engine.cache.claims import Claims
from engine.cache.folder import CacheFolder
from engine.cache.kept import Kept
from engine.cache.sidecar import HEAD_BYTES, Record, Sidecar, Sums
from engine.cache.sidecar_writer import SidecarWriter
from engine.config.load import parse_config
from engine.data.manifest import Manifest
from engine.data.shards import ShardSet
from engine.errors import CacheError, ConfigError
from tests import tiny
from tests.caching import CODECS, cached_run

NAMES = [f"shard-{number:06d}.targets.tar" for number in range(3)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of so small a model wait for each other ten times as long as they work, where others work too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def task(cached_task: str) -> str:
    return cached_task


@pytest.fixture(scope="module")
def root(cached_root: Path) -> Path:
    return cached_root


class Copy:
    """A cache of its own, to be spoilt, and what verify_cache says of it."""

    def __init__(self, root: Path, task: str, codec: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder / codec
        self.root, self.task, self.codec = root, task, codec
        self._origin, self._capsys = root / "train" / codec, capsys
        self.config = cached_run(root, task, codec, teacher={"cache": str(self.folder)})
        self.data: Manifest = ShardSet.open(self.config["data"]["manifest"]).manifest
        self.restore()

    def restore(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._origin, self.folder)

    @property
    def cache(self) -> CacheFolder:
        return CacheFolder.open(str(self.folder / "cache.json"))

    def sidecar(self, shard: int) -> Sidecar:
        return self.cache.sidecar(self.data.shards[shard])

    def verify(self, *options: str, workers: int = 1) -> tuple[int, str]:
        """The exit code, and what was printed."""
        path = self.folder.parent / "run.yaml"
        path.write_text(json.dumps(self.config))
        self._capsys.readouterr()
        code = verify_cache.main(["--config", str(path), "--workers", str(workers), *options])
        return code, self._capsys.readouterr().out

    def expect(self, *told: str, quick: bool = True) -> None:
        """These lines, and by --quick as well unless it looks at too little; then the cache is whole again."""
        for options in ([], ["--quick"]) if quick else ([],):
            code, out = self.verify(*options)
            assert code == 1, told
            for line in told:
                assert re.search(line, out), f"{line!r} not in:\n{out}"
            assert re.search(r"checked.*: \d+ problem", out.splitlines()[-1])
        self.restore()

    def rewrite(self, shard: int, change: Callable[[list[Record]], list[Record]], **more: int) -> None:
        """The sidecar of a shard with other records, or with ``more`` in its sums, whose every hash is right."""
        old = self.sidecar(shard)
        header = old.header
        records = change([old.read(number) for number in range(header.num_records)])
        path = Path(old.address)
        path.unlink()
        (self.folder / "manifest.json").unlink()
        sums = Sums(header.num_tokens * header.num_rounds, header.num_positions, header.num_pairs, header.kept_mass)
        with SidecarWriter(path, header.num_records) as writer:
            for number, record in enumerate(records):
                totals = {name: value + more.get(name, 0) for name, value in sums._asdict().items()}
                writer.add(record, Sums(**totals) if number == 0 else Sums(0, 0, 0, 0.0))
            writer.finish(header.cache, header.shard, header.shard_sha256, header.num_rounds)
        self.cache.write_manifest(self.data)


@pytest.fixture(params=list(CODECS))
def copy(
    root: Path, task: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Copy:
    return Copy(root, task, request.param, tmp_path, capsys)


def flip(path: Path, at: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_clean_cache_passes(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_against_teacher, "_BLOCK_ROWS", 5)  # positions are compared in blocks
    for options in ([], ["--quick"], ["--against-teacher", "6"]):
        code, out = copy.verify(*options)
        assert code == 0, out
        assert out.endswith(": no problem\n")
        if options == []:
            rounds = 3 if copy.task == "masked_lm" else 1
            assert f"3 shards, {96 * rounds} records with targets at " in out
    assert "as in the cache" in out
    assert "asked about 6 samples in fp32 on cpu" in out
    assert "byte-identical to a fresh capture: 6 of 6 records" in out


def test_processes_say_what_one_says(copy: Copy) -> None:
    if (copy.codec, copy.task) != ("sampled", "causal_lm"):
        pytest.skip("the same for all")
    flip(copy.folder / NAMES[1], HEAD_BYTES + 3)
    assert copy.verify(workers=2) == copy.verify(workers=1)


def test_damaged_bytes_are_named(copy: Copy) -> None:
    sidecar = copy.sidecar(1)
    path, record = copy.folder / NAMES[1], sidecar.read(3).content
    assert path.read_bytes().count(record) == 1
    at = path.read_bytes().index(record)
    flip(path, at + len(record) // 2, 64)
    copy.expect(
        rf"{NAMES[1]}, record 3 at byte {at:,}: flipped bits",
        rf"{NAMES[1]}: its sha256 is not that of manifest.json",
        quick=False,
    )
    flip(path, path.stat().st_size - 1)  # after the last record: no reader ever meets it
    copy.expect(rf"{NAMES[1]}: its sha256 is not that of manifest.json", quick=False)
    flip(path, HEAD_BYTES + sidecar.index.nbytes // 2)
    copy.expect(rf"{NAMES[1]}: its index is damaged")
    path.write_bytes(path.read_bytes()[:-700])
    copy.expect(rf"{NAMES[1]}: [\d,]+ bytes, expected [\d,]+ by its header; the file is cut short")
    path.write_bytes(b"")
    copy.expect(rf"{NAMES[1]}: not a sidecar of a cache, or cut short")
    path.unlink()
    copy.expect(rf"{NAMES[1]}: missing: no targets for the data shard shard-000001\.tar")


def test_no_flipped_bit_of_a_header_goes_unseen(copy: Copy) -> None:
    path = copy.folder / NAMES[2]
    length = len(json.dumps(asdict(copy.sidecar(2).header), indent=1))
    for turn, at in enumerate(np.linspace(512, 512 + length - 1, 25).astype(int).tolist()):
        flip(path, at, 1 << turn % 8)
        problems = check_sidecar(CacheCheck(parse_config(copy.config)), 2, quick=False).problems
        assert problems, at
        assert all(NAMES[2] in line for line in problems), at
        flip(path, at, 1 << turn % 8)
    assert copy.verify("--quick")[0] == 0


def test_files_of_something_else_are_named(copy: Copy, tmp_path: Path) -> None:
    shutil.copy(copy.folder / NAMES[0], copy.folder / NAMES[1])
    copy.expect(rf"{NAMES[1]}: was made for the shard shard-000000.tar, expected shard-000001.tar")
    edit(copy.folder / "cache.json", lambda content: content.update(seed=content["seed"] + 1))
    copy.expect(*(rf"{name}: is of another cache" for name in NAMES), "manifest.json: belongs to another cache")
    (copy.folder / "cache.json").write_text("{}")
    copy.expect(r"cache.json: damaged, or not of a cache")
    copy.config["data"] = copy.config["data"] | {"manifest": str(tiny.shards(tmp_path / "other", copy.task, seed=7))}
    for options in ([], ["--quick"]):
        code, out = copy.verify(*options)
        assert code == 1
        assert all(f"{name}: was made for other data: shard-" in out for name in NAMES)


def test_other_masks_are_named(copy: Copy) -> None:
    if copy.task == "causal_lm":
        pytest.skip("nothing is masked")
    for changes, told in (
        ({"mask_seed": 5}, "task mask_seed: the cache has 0, the run 5"),
        ({"mask_rounds": 2}, "num rounds: the cache has 3, the run 2"),
    ):
        copy.config["task"] = cached_run(copy.root, copy.task)["task"] | changes
        code, out = copy.verify()
        assert code == 1
        assert told in out
        assert ", record " not in out, "not a line for each record"


def test_the_caches_own_files_are_checked(copy: Copy) -> None:
    flip(copy.folder / "ranks.npy", 200)
    copy.expect(r"ranks\.npy: not the file that cache\.json names")
    (copy.folder / "ranks.npy").unlink()
    copy.expect(r"ranks\.npy: no such file")
    if copy.codec == "hidden":
        flip(copy.folder / "head.safetensors", 5000)
        copy.expect(r"head\.safetensors: not the file that cache\.json names")
    manifest = copy.folder / "manifest.json"
    edit(manifest, lambda content: content["sidecars"][0].update(sha256="0" * 64))
    copy.expect(rf"{NAMES[0]}: its sha256 is not that of manifest.json", quick=False)
    edit(manifest, lambda content: content["sidecars"][1].update(num_bytes=7))
    copy.expect(rf"{NAMES[1]}: [\d,]+ bytes, expected 7 by manifest.json")
    edit(manifest, lambda content: content["sidecars"][2]["header"].update(num_positions=1))
    copy.expect(rf"{NAMES[2]}: its header says num_positions \d+, manifest.json 1")
    edit(manifest, lambda content: content["sidecars"].pop(1))
    copy.expect(rf"manifest\.json: does not name {NAMES[1]}")
    manifest.write_text(manifest.read_text()[:-9])
    copy.expect(r"manifest\.json: damaged")
    manifest.unlink()
    copy.expect(r"manifest\.json: missing, although no sidecar is")


def test_what_was_left_behind_is_named(copy: Copy) -> None:
    with Claims(copy.folder / "claims") as claims:
        assert claims.take("shard-000001.targets.tar")
        content = (copy.folder / "claims" / "shard-000001.targets.tar.claim").read_text()
        code, out = copy.verify("--quick")
        assert code == 1
        assert re.search(r"a claim on shard-000001\.targets\.tar: process \d+ on .* is making it", out)
    gone = json.loads(content)
    gone["owner"]["started"] = "1"
    (copy.folder / "claims" / "shard-000001.targets.tar.claim").write_text(json.dumps(gone))
    copy.expect(r"a claim on shard-000001\.targets\.tar: left by process")
    (copy.folder / f".{NAMES[0]}.1234.partial").touch()
    copy.expect(rf"\.{NAMES[0]}\.1234\.partial: half written")
    shutil.copy(copy.folder / NAMES[0], copy.folder / "shard-000009.targets.tar")
    copy.expect(r"shard-000009\.targets\.tar: of no shard of the data")


def test_records_that_are_not_what_they_should_be_are_named(copy: Copy) -> None:
    """Every checksum is right."""

    def second(change: Callable[[Record], Record]) -> Callable[[list[Record]], list[Record]]:
        return lambda records: [records[0], change(records[1]), *records[2:]]

    place = rf"{NAMES[2]}, record 1 at byte [\d,]+, for shard-000002\.tar/000002-0000000[01], round [01]: "
    changes: list[tuple[Callable[[Record], Record], str]] = [
        (lambda record: record._replace(content=record.content[:-1]), r"does not decode \("),
        (lambda record: record._replace(content=b"\xff" * 9), r"does not decode \("),
        (lambda record: record._replace(input_hash=record.input_hash ^ 1), "is not for the key, ids, documents"),
        (lambda record: Record(b"", 0, 0.0, 0.0), "is empty: the sample was damaged"),
    ]
    for change, told in changes:
        copy.rewrite(2, second(change))
        copy.expect(place + told, quick=False)
    reader = RecordReader(copy.cache)
    kept = reader.sound(copy.sidecar(2), 1)
    if isinstance(kept, Kept):
        assert reader.codec is not None
        here = kept.positions < kept.num_positions - 1
        pairs = (each[here] for each in (kept.positions, kept.ids, kept.values))
        content = reader.codec.encode(Kept(*pairs, kept.top_ids[:-1], None if kept.tail is None else kept.tail[:-1]))
        copy.rewrite(2, second(lambda record: record._replace(content=content)))
        copy.expect(place + r"has targets at \d+ positions, expected \d+", quick=False)
    for name in ("num_tokens", "num_positions", "num_pairs"):
        copy.rewrite(0, lambda records: records, **{name: 3})
        copy.expect(rf"{NAMES[0]}: its header says {name} [\d,]+, its records [\d,]+", quick=False)


def test_another_teacher_is_found_out(copy: Copy, tmp_path: Path) -> None:
    """Under the same folder name, with other weights."""
    other = tiny.model_folder(tmp_path / "elsewhere" / "teacher", copy.task, seed=1)
    copy.config["teacher"] = copy.config["teacher"] | {"model": str(other)}
    assert copy.verify()[0] == 0, "the records are whole"
    code, out = copy.verify("--quick", "--against-teacher", "4")
    assert code == 1
    assert re.search(r"made of the teacher .* with fingerprint \w{12}, but teacher.model .* has \w{12}", out)
    assert "byte-identical to a fresh capture: 0 of 4 records" in out
    figures = {"hidden": "a state is"}.get(copy.codec, "-log p of its labels, or its entropy, is")
    assert re.search(rf"{NAMES[0]}, record 0 at byte [\d,]+: {figures}", out)


def test_a_damaged_record_is_no_reason_to_stop_asking(copy: Copy) -> None:
    flip(copy.folder / NAMES[0], Path(copy.sidecar(0).address).read_bytes().index(copy.sidecar(0).read(0).content))
    code, out = copy.verify("--against-teacher", "3")
    assert code == 1
    assert "asked about 2 samples" in out
    assert out.count(f"{NAMES[0]}, record 0 at byte") == 1, "it is told of once"


def described(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert describe_cache.main(list(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("survey", [1, 7, 10**6])
def test_every_byte_is_accounted_for(
    copy: Copy, survey: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache_bytes, "SURVEYED_RECORDS", survey)
    told = described(capsys, str(copy.folder))
    rows = [int(number.replace(",", "")) for number in re.findall(r"^  .{30} *([\d,]+) +[\d,.]+ +[\d.]+%$", told, re.M)]
    assert len(rows) >= 7
    assert sum(rows[:-1]) == rows[-1] == copy.cache.num_bytes()
    assert rows[-1] == sum(path.stat().st_size for path in copy.folder.iterdir())
    assert ("estimated" in told) == (survey < 10**6)
    assert max(len(line) for line in told.splitlines()) <= 80


def test_the_parts_of_a_record_are_all_of_it(copy: Copy) -> None:
    reader, sidecar = RecordReader(copy.cache), copy.sidecar(1)
    for number in range(sidecar.header.num_records):
        parts = reader.parts(sidecar, number)
        assert sum(parts.values()) == len(sidecar.read(number).content)
        assert min(parts.values()) >= 0
        assert parts.keys() <= cache_bytes.INSIDE.keys()


def test_positions_are_shown_as_text(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = copy.config["data"]["manifest"]
    told = described(capsys, str(copy.folder), "--manifest", manifest, "--positions", "5")
    assert told.count("\n  context  ") == told.count("\n  label    ") == told.count("\n  kept     ") == 5
    assert (">>" in told) == (copy.task == "masked_lm")
    assert max(len(line) for line in told.splitlines()) <= 80
    for probabilities in re.findall(r"  kept     (.*?)\n\n", told + "\n\n", re.S):
        shares = [float(each) for each in re.findall(r'" (0\.\d{3})', probabilities)]
        assert shares == sorted(shares, reverse=True)
        assert 0.0 < sum(shares) <= 1.001


def test_positions_of_other_data_are_refused(copy: Copy, root: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="was made for other data"):
        describe_cache.main([str(copy.folder), "--manifest", str(tiny.shards(tmp_path / "other", copy.task, seed=7))])
    tiny.tokenizer().save_pretrained(tmp_path / "t")
    words = json.loads((tmp_path / "t" / "tokenizer.json").read_text().replace('"w90"', '"other"'))
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ConfigError, match=r"--tokenizer .*fingerprint"):
        describe_cache.main([str(copy.folder), "--manifest", copy.config["data"]["manifest"], "--tokenizer",
                             str(tmp_path / "t")])  # fmt: skip


def test_a_cache_that_is_not_complete_is_described(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    (copy.folder / "manifest.json").unlink()
    (copy.folder / NAMES[0]).unlink()
    told = described(capsys, f"{copy.folder}/", "--manifest", copy.config["data"]["manifest"])
    assert re.search(r"shards +2, .* not complete", told)
    assert "shard-000001.tar/" in told
    for name in NAMES[1:]:
        (copy.folder / name).unlink()
    assert re.search(r"positions +0 ", described(capsys, str(copy.folder / "cache.json")))
