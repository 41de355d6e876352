from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from engine import log
from engine.errors import CheckpointError


@pytest.fixture(autouse=True)
def _restore_logging(tmp_path):
    with warnings.catch_warnings():
        yield
    log.setup(0)  # closes a file in tmp_path


def run_program(body: str, rank: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    source = f"from engine.log import *\nfrom engine.errors import ConfigError\n{body}\nrun_main(main)\n"
    return subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "RANK": str(rank), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_rank_0_is_plain_and_others_only_warn_with_their_number(capsys):
    log.setup(0)
    log.logger.info("reading 3 shards")
    log.setup(3)
    log.logger.info("not shown")
    log.logger.warning("shard is late")
    assert capsys.readouterr().err == "reading 3 shards\n[rank 3] warning: shard is late\n"


def test_file_gets_everything_with_time_from_rank_0_only(tmp_path, capsys):
    log.setup(0)
    log.logger.info("before the run folder is known")
    log.setup(0, tmp_path / "run" / "log.txt")
    log.logger.debug("for the file")
    log.logger.info("for both")
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.split()[2:] for line in lines] == [["DEBUG", "for", "the", "file"], ["INFO", "for", "both"]]
    assert all(line[4] == "-" and line[13] == ":" for line in lines)
    assert capsys.readouterr().err.count("for both") == 1
    log.setup(1, tmp_path / "other" / "log.txt")
    assert not (tmp_path / "other").exists()


def test_log_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"log\.txt"):
        log.setup(0, tmp_path / "file" / "log.txt")


def test_libraries_keep_their_errors_whatever_level_they_set(caplog):
    log.setup(0)
    noisy = logging.getLogger("DeepSpeed")
    noisy.setLevel(logging.INFO)
    noisy.propagate = True
    with caplog.at_level(logging.DEBUG):
        noisy.info("chatter")
        noisy.error("broken")
    assert {record.message for record in caplog.records} == {"broken"}


@pytest.mark.parametrize(
    ("body", "code", "expected"),
    [
        ("def main(): return None", 0, ""),
        ("def main(): return 3", 3, ""),
        ("def main(): raise KeyboardInterrupt", 130, "interrupted\n"),
        ("def main(): raise ConfigError('run.yaml: bad\\n  do this')", 2, "error: run.yaml: bad\n  do this\n"),
    ],
)
def test_exit_code_and_message(body, code, expected):
    ended = run_program(body)
    assert (ended.returncode, ended.stderr) == (code, expected)


def test_our_own_fault_shows_a_traceback():
    ended = run_program("def main(): raise ValueError('x')")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert ended.stderr.endswith("ValueError: x\n")


def test_other_rank_speaks_after_rank_0_had_its_turn():
    ended = run_program("import engine.log\nengine.log.LEAD_SECONDS = 0\ndef main(): raise ConfigError('bad')", rank=2)
    assert (ended.returncode, ended.stderr) == (2, "[rank 2] error: bad\n")


def test_other_rank_is_ended_by_its_launcher_before_it_repeats_the_message():
    body = """
import engine.log, os, signal, threading
engine.log.LEAD_SECONDS = 60
signal.signal(signal.SIGTERM, lambda *_: None)
def main():
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    raise ConfigError('bad')
"""
    ended = run_program(body, rank=2)
    assert (ended.returncode, ended.stderr) == (-signal.SIGTERM, "")


def test_failing_rank_leaves_without_waiting_for_its_group(tmp_path: Path):
    """Cleaning up would run the exit handler; in a real job it would wait for ranks that are elsewhere."""
    body = f"""
import atexit
import torch.distributed as dist
def main():
    dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=0, world_size=1)
    atexit.register(print, "cleaned up")
    print("last words")
    raise ConfigError("bad")
"""
    ended = run_program(body)
    assert (ended.returncode, ended.stderr, ended.stdout) == (2, "error: bad\n", "last words\n")


def test_plain_progress_is_a_line_every_few_seconds(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    with log.Progress(40, "distil") as progress:
        now[0] += 100.0  # loading the models
        for step in range(21, 41):
            now[0] += 1.0
            progress.update(step, {"loss": f"{step}.0"})
    assert capsys.readouterr().err.splitlines() == [
        "distil 21/40  52%  loss 21.0  1:41",
        "distil 26/40  65%  loss 26.0  eta 0:14",
        "distil 31/40  77%  loss 31.0  eta 0:09",
        "distil 36/40  90%  loss 36.0  eta 0:04",
        "distil 40/40  100%  loss 40.0  2:00",
    ]


def test_close_shows_where_an_unfinished_run_ended_once(capsys, monkeypatch):
    monkeypatch.setattr(log.time, "monotonic", lambda: 100.0)
    progress = log.Progress(None, "documents")
    for step in (1, 2, 1500):
        progress.update(step)
    progress.close()
    progress.close()
    assert capsys.readouterr().err.splitlines() == ["documents 1  0:00", "documents 1,500  0:00"]


def test_other_ranks_show_no_progress(capsys):
    with log.Progress(2, "distil", enabled=False) as progress:
        progress.update(1)
        progress.update(2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("width", [40, 60, 100])
def test_bar_fits_the_terminal_and_keeps_the_first_fields(width, monkeypatch):
    monkeypatch.setattr(log.time, "monotonic", lambda: 100.0)
    progress = log.Progress(2000, "distil")
    progress.update(999)
    progress.update(1000, {"loss": "4.8317", "kl": "0.4413", "tokens/s": "123,456"})
    line = progress._line(width)
    assert len(line) <= width
    assert line.startswith("distil 1,000/2,000")
    assert line.endswith("eta 0:00")
    assert ("loss" in line, "kl" in line, "tokens/s" in line) == (width >= 60, width >= 100, width >= 100)


def test_bar_on_a_terminal_leaves_messages_whole(tmp_path):
    """Through a real pseudo-terminal of 60 columns: no line is wider, and a message stands on a line of its own."""
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    body = (
        "from engine.log import *\nsetup(0)\nbar = Progress(50, 'distil')\n"
        "for step in range(1, 51):\n"
        "    bar.update(step, {'loss': '4.83', 'tokens/s': '123,456', 'kl': '0.44'})\n"
        "    if step == 25: logger.warning('shard is late')\n"
        "bar.close()\n"
    )
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
        os.execv(sys.executable, [sys.executable, "-c", body])
    shown = b""
    while True:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.waitpid(child, 0)
    lines = [line.rstrip() for line in shown.decode().replace("\r", "\n").split("\n")]
    assert max(map(len, lines)) < 60
    assert "warning: shard is late" in lines
    assert any(line.startswith("distil 50/50 [##########] 100%  loss 4.83") for line in lines)
