"""Building shards: the same bytes however they are made, and nothing lost when the build is killed."""

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

import numpy as np
import pytest
import zstandard

from data_tools import build_shards, describe_shards, reshard, tokenizing, verify_shards
from data_tools.packing import MIN_PIECE_TOKENS, Framing, Packer, Position
from data_tools.shard_folder import PROGRESS
from data_tools.sizes import byte_count
from engine.data.shards import ShardSet
from engine.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
WORDS = [f"word{number}" for number in range(40)]


def save_tokenizer(folder: Path, *, masked: bool) -> Path:
    """One token a word: an encoder's tokenizer with [CLS] and [SEP], or a decoder's with an end-of-text token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] if masked else ["<unk>", "<eos>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token=special[masked]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if masked:
        inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        names["mask_token"] = "[MASK]"
    else:
        names = {"unk_token": "<unk>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def encoder_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("encoder"), masked=True)


@pytest.fixture(scope="session")
def decoder_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("decoder"), masked=False)


def some_documents(count: int, longest: int = 60) -> list[str]:
    rng = np.random.default_rng(count)
    return [" ".join(rng.choice(WORDS, size=rng.integers(1, longest))) for _ in range(count)]


def write_text(path: Path, documents: list[str]) -> Path:
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return path


def arguments(source: object, tokenizer: Path, output: Path, *more: str, task: str = "causal_lm") -> list[str]:
    fixed = ["--tokenizer", str(tokenizer), "--sequence-tokens", "32", "--output", str(output), "--workers", "1"]
    return ["--task", task, "--input", str(source), *fixed, *more]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def shards_of(folder: Path) -> dict[str, bytes]:
    """Without the manifest, which holds the command."""
    return {name: content for name, content in files_of(folder).items() if "manifest" not in name}


def pieces_of(folder: Path) -> list[list[int]]:
    """The pieces of documents in all samples, in order."""
    shards = ShardSet.open(str(folder / "manifest.json"))
    pieces = []
    for shard, count in enumerate(shards.manifest.samples_per_shard):
        for index in range(count):
            sample = shards.read(shard, index)
            pieces += [p.tolist() for p in np.split(sample.token_ids, np.cumsum(sample.document_tokens)[:-1])]
    return pieces


# packing


def test_causal_documents_end_with_eos_and_nothing_is_lost(decoder_tokenizer: Path, tmp_path: Path) -> None:
    documents = some_documents(50)
    build_shards.main(arguments(write_text(tmp_path / "a.txt", documents), decoder_tokenizer, tmp_path / "out"))
    stream = [token for piece in pieces_of(tmp_path / "out") for token in piece]
    expected = [token for text in documents for token in [*(2 + int(w[4:]) for w in text.split()), 1]]
    assert stream == expected
    shards = ShardSet.open(str(tmp_path / "out" / "manifest.json"))
    assert shards.manifest.num_documents == 50
    assert shards.token_counts().tolist() == np.bincount(expected, minlength=42).tolist()
    lengths = [len(shards.read(0, i).token_ids) for i in range(shards.manifest.num_samples)]
    assert all(32 - MIN_PIECE_TOKENS < length <= 32 for length in lengths[:-1])


def test_masked_pieces_are_framed_each(encoder_tokenizer: Path, tmp_path: Path) -> None:
    documents = some_documents(50)
    source = write_text(tmp_path / "a.txt", documents)
    build_shards.main(arguments(source, encoder_tokenizer, tmp_path / "out", task="masked_lm"))
    pieces = pieces_of(tmp_path / "out")
    assert all(piece[0] == 2 and piece[-1] == 3 and len(piece) > 2 for piece in pieces)
    stream = [token for piece in pieces for token in piece[1:-1]]
    assert stream == [5 + int(word[4:]) for text in documents for word in text.split()]


def test_a_gap_too_small_for_a_piece_stays_open() -> None:
    packer = Packer(Framing((), (9,), each_piece=False), 32, Position(0, 0, 0))
    assert list(packer.add(0, np.full(27, 5, np.uint32))) == []
    packed = list(packer.add(1, np.full(40, 6, np.uint32)))
    assert [len(sequence.token_ids) for sequence in packed] == [28, 32]
    assert packed[0].position == Position(1, 0, 1)
    assert packed[1].position == Position(1, 32, 1)
    assert [sequence.token_ids.tolist() for sequence in packer.last()] == [[6] * 8 + [9]]


@pytest.mark.parametrize("each_piece", [True, False])
def test_packing_goes_on_from_any_position(each_piece: bool) -> None:
    framing = Framing((7,), (9,), each_piece)
    rng = np.random.default_rng(3)
    documents = [rng.integers(10, 99, size=rng.integers(1, 90)).astype(np.uint32) for _ in range(40)]

    def pack(start: Position) -> list[tuple[list[int], list[int], Position]]:
        packer = Packer(framing, 32, start)
        sequences = [s for i, ids in enumerate(documents) if i >= start.document for s in packer.add(i, ids)]
        return [(s.token_ids.tolist(), s.document_tokens.tolist(), s.position) for s in [*sequences, *packer.last()]]

    whole = pack(Position(0, 0, 0))
    assert whole[-1][2] == Position(40, 0, 40)
    for done in range(1, len(whole)):
        assert pack(whole[done - 1][2]) == whole[done:]


# the same bytes


def test_workers_do_not_change_a_byte(decoder_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", 500)
    source = write_text(tmp_path / "a.txt", some_documents(300))
    options = ("--shard-bytes", "20KB", "--split-heldout", "0.2")
    for workers in ("1", "3"):
        build_shards.main(arguments(source, decoder_tokenizer, tmp_path / workers, *options, "--workers", workers))
    one, three = files_of(tmp_path / "1"), files_of(tmp_path / "3")
    assert one == three
    assert "shard-000001.tar" in one
    assert verify_shards.main([str(tmp_path / "3" / "manifest.json"), "--workers", "1"]) == 0
    assert verify_shards.main([str(tmp_path / "3" / "heldout" / "manifest.json"), "--workers", "1"]) == 0


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


def test_a_tokenizer_in_python_works_in_processes_too(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    source = write_text(tmp_path / "a.txt", some_documents(20))
    for workers in ("1", "2"):
        options = ("--workers", workers)
        build_shards.main(arguments(source, tmp_path / "bytes", tmp_path / workers, *options))
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_heldout_is_disjoint_and_stable(decoder_tokenizer: Path, tmp_path: Path) -> None:
    documents = list(dict.fromkeys(some_documents(200)))

    def sides(order: list[str], output: Path) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
        source = write_text(output.with_suffix(".txt"), order)
        build_shards.main(arguments(source, decoder_tokenizer, output, "--split-heldout", "0.3"))
        return tuple(  # type: ignore[return-value]
            {tuple(d) for d in documents_in(folder)} for folder in (output, output / "heldout")
        )

    def documents_in(folder: Path) -> list[list[int]]:
        stream = [token for piece in pieces_of(folder) for token in piece]
        ends = [i for i, token in enumerate(stream) if token == 1]
        return [stream[start:end] for start, end in zip([0, *(e + 1 for e in ends)], ends)]

    training, heldout = sides(documents, tmp_path / "a")
    assert not training & heldout
    assert len(training) + len(heldout) == len(documents)
    assert 0.2 < len(heldout) / len(documents) < 0.4
    assert sides(documents[::-1], tmp_path / "b") == (training, heldout)


# killed, started again


def kill_after_shards(command: list[str], folder: Path, num_shards: int) -> None:
    """Start a build, kill it with SIGKILL once it has finished some shards, and see its processes leave as well."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder / f"shard-{num_shards:06d}.tar").exists():
        time.sleep(0.005)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the build ended before it could be killed: give it more to do"
    assert len(workers) >= 2
    for worker in workers:
        while is_running(worker):
            time.sleep(0.01)  # a worker that stays runs into the test's time-out


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bytes(decoder_tokenizer: Path, tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.txt", some_documents(800, longest=200))
    options = ("--shard-bytes", "50KB", "--split-heldout", "0.1")
    build_shards.main(arguments(source, decoder_tokenizer, tmp_path / "whole", *options))
    output = tmp_path / "killed"
    wanted = arguments(source, decoder_tokenizer, output, *options)
    for num_shards in (2, 9):
        command = [sys.executable, "data_tools/build_shards.py", *wanted, "--workers", "2"]
        kill_after_shards(command, output, num_shards)
        assert (output / PROGRESS).exists()
        assert not (output / "manifest.json").exists()
    first = output / "shard-000000.tar"
    finished = first.stat().st_mtime_ns
    assert build_shards.main(wanted) == 0
    assert first.stat().st_mtime_ns == finished, "a finished shard is not written again"
    assert files_of(output) == files_of(tmp_path / "whole")


def test_a_complete_build_is_left_alone(
    decoder_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_text(tmp_path / "a.txt", some_documents(20))
    wanted = arguments(source, decoder_tokenizer, tmp_path / "out")
    build_shards.main(wanted)
    before = files_of(tmp_path / "out")
    assert build_shards.main(wanted) == 0
    assert "complete already" in capsys.readouterr().out
    assert files_of(tmp_path / "out") == before
    os.utime(source, ns=(time.time_ns() + 10**9,) * 2)
    with pytest.raises(DataError, match=r"a\.txt changed after .*--overwrite"):
        build_shards.main(wanted)


def test_other_settings_are_refused_with_the_difference(decoder_tokenizer: Path, tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.txt", some_documents(20))
    build_shards.main(arguments(source, decoder_tokenizer, tmp_path / "out"))
    before = files_of(tmp_path / "out")
    other = arguments(source, decoder_tokenizer, tmp_path / "out", "--shard-bytes", "1MB")
    with pytest.raises(DataError, match=r"other settings: command there 'shard-bytes 256000000', here 'shard-b"):
        build_shards.main(other)
    assert files_of(tmp_path / "out") == before
    assert build_shards.main([*other, "--overwrite"]) == 0


def test_unfinished_build_of_other_input_is_refused(decoder_tokenizer: Path, tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.txt", [*some_documents(100), "\ud800"[:0]])
    with source.open("ab") as stream:
        stream.write(b"\n\n\xff\n")
    wanted = arguments(source, decoder_tokenizer, tmp_path / "out", "--shard-bytes", "5KB")
    with pytest.raises(DataError, match="not UTF-8"):
        build_shards.main(wanted)
    write_text(source, some_documents(99))
    with pytest.raises(DataError, match="the input changed since these shards were begun"):
        build_shards.main(wanted)
    assert build_shards.main([*wanted, "--overwrite"]) == 0


def test_shards_of_somebody_else_are_not_touched(decoder_tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard-000000.tar").write_text("precious")
    wanted = arguments(write_text(tmp_path / "a.txt", some_documents(9)), decoder_tokenizer, tmp_path / "out")
    with pytest.raises(DataError, match="holds shards that no manifest describes"):
        build_shards.main(wanted)
    assert (tmp_path / "out" / "shard-000000.tar").read_text() == "precious"


def test_two_builds_in_one_folder_are_refused(decoder_tokenizer: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is writing shards there"):
            build_shards.main(
                arguments(write_text(tmp_path / "a.txt", some_documents(9)), decoder_tokenizer, tmp_path / "out")
            )


def test_overwriting_without_a_split_removes_the_old_heldout(decoder_tokenizer: Path, tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.txt", some_documents(90))
    build_shards.main(arguments(source, decoder_tokenizer, tmp_path / "out", "--split-heldout", "0.3"))
    build_shards.main(arguments(source, decoder_tokenizer, tmp_path / "out", "--overwrite"))
    assert not list((tmp_path / "out" / "heldout").iterdir())


def _die(*_: object) -> None:
    os._exit(9)


def test_a_dead_process_is_an_error_and_no_hang(
    decoder_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing, "_make_encoder", _die)
    source = write_text(tmp_path / "a.txt", some_documents(9))
    with pytest.raises(DataError, match="a tokenizer process died"):
        build_shards.main(arguments(source, decoder_tokenizer, tmp_path / "out", "--workers", "2"))


# bad input

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


def test_tokenizer_unfit_for_the_task(encoder_tokenizer: Path, decoder_tokenizer: Path, tmp_path: Path) -> None:
    source = write_text(tmp_path / "a.txt", some_documents(9))
    with pytest.raises(ConfigError, match="has no mask token"):
        build_shards.main(arguments(source, decoder_tokenizer, tmp_path / "out", task="masked_lm"))
    with pytest.raises(ConfigError, match="has no end-of-text token"):
        build_shards.main(arguments(source, encoder_tokenizer, tmp_path / "out"))
    with pytest.raises(ConfigError, match="cannot load a tokenizer from"):
        build_shards.main(arguments(source, tmp_path / "none", tmp_path / "out"))


def test_the_user_sees_one_line_and_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "data_tools/build_shards.py", *arguments(tmp_path / "no.txt", tmp_path, tmp_path / "o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == f"error: --input {tmp_path}/no.txt: no such file"


@pytest.mark.parametrize(("text", "num_bytes"), [("256MB", 256_000_000), ("1.5GiB", 3 << 29), ("7", 7), ("2kb", 2000)])
def test_sizes(text: str, num_bytes: int) -> None:
    assert byte_count(text) == num_bytes


# the other tools


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
