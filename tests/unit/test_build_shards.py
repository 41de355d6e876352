"""Building shards: the same bytes however they are made, and nothing lost when the build is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools import build_shards, tokenizing, verify_shards
from data_tools.shard_folder import PROGRESS
from data_tools.sizes import byte_count
from engine.errors import ConfigError, DataError
from tests.sharding import arguments, files_of, pieces_of, some_documents, write_text

ROOT = Path(__file__).parents[2]


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


def test_a_tokenizer_in_python_works_in_processes_too(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    source = write_text(tmp_path / "a.txt", some_documents(20))
    for workers in ("1", "2"):
        options = ("--workers", workers)
        build_shards.main(arguments(source, tmp_path / "bytes", tmp_path / workers, *options))
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_text_of_any_script_comes_back(tmp_path: Path) -> None:
    """Combining marks, right to left, no blanks between words, more than 16 bits: not one character is changed."""
    from transformers import ByT5Tokenizer

    texts = ["Жил-был пёс; ёлка, ещё — «да»", "東京は日本の首都です。猫𠮟る", "كان يا ما كان، قِطّة", "ไม่มีช่องว่างระหว่างคำ",
             "Fußgänger naïve cafe\u0301 Ελλάδα", "किताब पढ़ो 👩🏽‍🚀 end"]  # fmt: skip
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(tmp_path / "bytes")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8")
    build_shards.main(arguments(path, tmp_path / "bytes", tmp_path / "out"))
    stream = [token for piece in pieces_of(tmp_path / "out") for token in piece]
    assert [text for text in tokenizer.decode(stream).split("</s>") if text.strip()] == texts


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
    (output / "..progress.npz.0123abcd.partial").write_text("left by a kill in mid-write")
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
    with pytest.raises(DataError, match="a worker process died"):
        build_shards.main(arguments(source, decoder_tokenizer, tmp_path / "out", "--workers", "2"))


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
