"""A build shared by several jobs: the same bytes as in one piece, and what is missing or foreign is named."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools import build_shards, dealing, parts, verify_shards
from data_tools.dealing import Share, deal, is_own
from engine.errors import DataError
from tests.full_disk import fill, small_disk
from tests.sharding import arguments, files_of, some_documents, write_text

ROOT = Path(__file__).parents[2]
OPTIONS = ("--shard-bytes", "20KB", "--split-heldout", "0.2")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and several pieces a part, on little text."""
    monkeypatch.setattr(dealing, "BLOCK_DOCUMENTS", 16)
    monkeypatch.setattr(parts, "PIECE_TOKENS", 700)


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """Files of each kind and very different sizes, one without documents, empty documents among the others."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "input"
    folder.mkdir()
    texts = some_documents(420)
    texts[50] = texts[260] = "  "
    write_text(folder / "a.txt", texts[:40])
    with gzip.open(folder / "b.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps({"text": text}) + "\n" for text in texts[40:220])
    (folder / "c.txt").write_text("")
    with (folder / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts[220:270])])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[270:380]}), folder / "e.parquet")
    datasets.Dataset.from_dict({"text": texts[380:]}).save_to_disk(str(folder / "saved"))
    return [*(str(path) for path in sorted(folder.glob("[a-e].*"))), str(folder / "saved")]


def words(inputs: list[str], tokenizer: Path, output: Path, *more: str, task: str = "causal_lm") -> list[str]:
    first, *rest = inputs
    made = arguments(first, tokenizer, output, *OPTIONS, *more, task=task)
    at = made.index("--input") + 2
    return [*made[:at], *rest, *made[at:]]


def build_parts(wanted: list[str], num_parts: int) -> None:
    for number in range(num_parts, 0, -1):
        assert build_shards.main([*wanted, "--part", f"{number}/{num_parts}"]) == 0


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_parts_merge_to_the_bytes_of_one_build(
    inputs: list[str], encoder_tokenizer: Path, decoder_tokenizer: Path, tmp_path: Path, task: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tokenizer = encoder_tokenizer if task == "masked_lm" else decoder_tokenizer
    build_shards.main(words(inputs, tokenizer, tmp_path / "whole", task=task))
    whole = files_of(tmp_path / "whole")
    assert "shard-000003.tar" in whole
    assert "heldout/shard-000000.tar" in whole
    said = capsys.readouterr().out
    for num_parts in (1, 2, 3, 5):
        output = tmp_path / f"of{num_parts}"
        wanted = words(inputs, tokenizer, output, task=task)
        build_parts(wanted, num_parts)
        assert len(list(output.glob("parts/*/*.piece"))) > num_parts
        assert not (output / "manifest.json").exists()
        capsys.readouterr()
        assert build_shards.main([*wanted, "--merge", str(num_parts)]) == 0
        assert files_of(output) == whole, f"{num_parts} parts"
        assert "2 empty documents skipped" in said
        assert "2 empty documents skipped" in capsys.readouterr().out
    assert verify_shards.main([str(output / "manifest.json"), "--workers", "1"]) == 0


def test_every_part_has_work_and_files_are_read_once() -> None:
    assert deal([10, 10, 10, 10, 10], 2) == [1, 2, 1, 2, 1]
    assert deal([50, 10, 10, 10, 10], 3) == [None, 1, 2, 3, 1], "larger than an even share"
    assert deal([None, 4, 4], 2) == [None, 1, 2], "a data set has no size"
    assert deal([7], 1) == [1]
    for owner in (None, 2):
        shares = [[is_own(owner, document, Share(n, 3)) for document in range(100)] for n in (1, 2, 3)]
        assert [sum(column) for column in zip(*shares)] == [1] * 100


def kill_after_pieces(command: list[str], folder: Path, num_pieces: int) -> None:
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder / f"{num_pieces - 1:06d}.piece").exists():
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the part ended before it could be killed: give it more to do"


def test_a_killed_part_goes_on_after_its_last_piece(
    decoder_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_text(tmp_path / "a.txt", some_documents(1500, longest=60))
    wanted = arguments(source, decoder_tokenizer, tmp_path / "out", *OPTIONS)
    program = (
        "import sys; from data_tools import build_shards, dealing, parts, tokenizing;"
        "dealing.BLOCK_DOCUMENTS, parts.PIECE_TOKENS, tokenizing._BATCH_CHARACTERS = 16, 700, 3000;"
        "build_shards.main(sys.argv[1:])"
    )
    folder = tmp_path / "out" / "parts" / "00001-of-00002"
    kill_after_pieces([sys.executable, "-c", program, *wanted, "--part", "1/2"], folder, 3)
    first = (folder / "000000.piece").stat().st_mtime_ns
    with pytest.raises(DataError, match=r"parts missing: 2/2; not finished, still being made or killed: 1/2\. Run"):
        build_shards.main([*wanted, "--merge", "2"])
    build_parts(wanted, 2)
    assert (folder / "000000.piece").stat().st_mtime_ns == first, "a finished piece is not written again"
    assert build_shards.main([*wanted, "--merge", "2"]) == 0
    build_shards.main(arguments(source, decoder_tokenizer, tmp_path / "whole", *OPTIONS))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_killed_merge_goes_on_after_its_last_shard(
    inputs: list[str], decoder_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = words(inputs, decoder_tokenizer, tmp_path / "out")
    build_parts(wanted, 2)
    cut, calls = build_shards.Stream._write, []

    def die_later(stream: build_shards.Stream, sequences: object) -> None:
        calls.append(1)
        if len(calls) == 250:
            raise KeyboardInterrupt
        cut(stream, sequences)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(build_shards.Stream, "_write", die_later)
        with pytest.raises(KeyboardInterrupt):
            build_shards.main([*wanted, "--merge", "2"])
    first = tmp_path / "out" / "shard-000000.tar"
    finished = first.stat().st_mtime_ns
    assert build_shards.main([*wanted, "--merge", "2"]) == 0
    assert first.stat().st_mtime_ns == finished
    build_shards.main(words(inputs, decoder_tokenizer, tmp_path / "whole"))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_missing_and_foreign_parts_are_named(inputs: list[str], decoder_tokenizer: Path, tmp_path: Path) -> None:
    wanted = words(inputs, decoder_tokenizer, tmp_path / "out")
    build_parts(wanted, 3)
    with pytest.raises(DataError, match=r"parts missing: 1/5, 2/5, .* \(there are some of a build in 3 parts\)"):
        build_shards.main([*wanted, "--merge", "5"])
    other = [*wanted, "--sequence-tokens", "64"]
    with pytest.raises(DataError, match=r"part 1/3: .*made with other settings: sequence_tokens there '32', here '64'"):
        build_shards.main([*other, "--merge", "3"])
    assert not (tmp_path / "out" / "manifest.json").exists()
    build_shards.main([*other, "--part", "2/3", "--overwrite"])
    with pytest.raises(DataError, match=r"part 2/3: .*made with other settings: sequence_tokens there '64', here '32'"):
        build_shards.main([*wanted, "--merge", "3"])
    with pytest.raises(DataError, match=r"part 2/3: .*made with other settings.*--overwrite"):
        build_shards.main([*wanted, "--part", "2/3"])
    build_shards.main([*wanted, "--part", "2/3", "--overwrite"])
    write_text(Path(inputs[0]), some_documents(41))
    with pytest.raises(DataError, match=r"part 1/3: .*the input changed since this part was begun \(.*a\.txt\)"):
        build_shards.main([*wanted, "--merge", "3"])


def test_a_damaged_piece_is_named(inputs: list[str], decoder_tokenizer: Path, tmp_path: Path) -> None:
    wanted = words(inputs, decoder_tokenizer, tmp_path / "out")
    build_parts(wanted, 2)
    piece = tmp_path / "out" / "parts" / "00002-of-00002" / "000001.piece"
    content = bytearray(piece.read_bytes())
    content[-3] ^= 4
    piece.write_bytes(content)
    with pytest.raises(DataError, match=r"part 2/2: .*000001\.piece: its bytes are not those that were written"):
        build_shards.main([*wanted, "--merge", "2"])
    piece.unlink()
    with pytest.raises(DataError, match=r"part 2/2: .*000001\.piece: finished earlier, now missing"):
        build_shards.main([*wanted, "--merge", "2"])
    assert build_shards.main([*wanted, "--part", "2/2", "--overwrite"]) == 0
    assert build_shards.main([*wanted, "--merge", "2"]) == 0


def test_merged_is_complete_and_overwrite_begins_anew(
    inputs: list[str], decoder_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = words(inputs, decoder_tokenizer, tmp_path / "out")
    build_parts(wanted, 2)
    build_shards.main([*wanted, "--merge", "2"])
    before = files_of(tmp_path / "out")
    capsys.readouterr()
    for again in (["--part", "1/2"], ["--merge", "2"]):
        assert build_shards.main([*wanted, *again]) == 0
        assert "complete already" in capsys.readouterr().out
    with pytest.raises(DataError, match="parts missing: 1/2, 2/2"):
        build_shards.main([*wanted, "--merge", "2", "--overwrite"])
    assert files_of(tmp_path / "out") == before, "nothing is deleted for parts that are not there"
    build_parts([*wanted, "--overwrite"], 2)
    assert build_shards.main([*wanted, "--merge", "2", "--overwrite"]) == 0
    assert files_of(tmp_path / "out") == before


def test_a_full_disk_says_where_and_the_part_goes_on_later(
    inputs: list[str], decoder_tokenizer: Path, tmp_path: Path
) -> None:
    build_shards.main(words(inputs, decoder_tokenizer, tmp_path / "whole"))
    with small_disk(tmp_path / "disk", 8 << 20) as disk:
        wanted = words(inputs, decoder_tokenizer, disk / "out")
        filler = fill(disk, leave_bytes=12 << 10)
        with pytest.raises(DataError, match=r"disk/out: .*No space left on device; run the same command again"):
            build_shards.main([*wanted, "--part", "1/1"])
        filler.unlink()
        build_shards.main([*wanted, "--part", "1/1"])
        build_shards.main([*wanted, "--merge", "1"])
        assert files_of(disk / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0"])
def test_no_part(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_shards.main([*arguments("a.txt", Path("t"), Path("o")), "--part", text])
    assert "expected I/N with I from 1 to N" in capsys.readouterr().err


def test_two_jobs_cannot_make_the_same_part(decoder_tokenizer: Path, tmp_path: Path) -> None:
    import fcntl

    folder = tmp_path / "out" / "parts" / "00001-of-00001"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        source = write_text(tmp_path / "a.txt", some_documents(9))
        with pytest.raises(DataError, match="another process is writing"):
            build_shards.main([*arguments(source, decoder_tokenizer, tmp_path / "out"), "--part", "1/1"])
    assert os.listdir(folder) == [".lock"]
