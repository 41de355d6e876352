"""Real rank processes for tests: started, watched, killed. Every exit code is looked at, every wait has an end.

Launchers are forked off a server that has imported the libraries once, which takes each of them seconds; other programs
get an interpreter of their own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
SET_ON_IMPORT = ("DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "THP_MEM_ALLOC_ENABLE")
"""What engine.zero sets when it is imported, which was before the fork. It also puts this interpreter's folder first on
PATH: another ninja would compile DeepSpeed's op anew."""
FORKS.set_forkserver_preload(["engine.distiller", "engine.capture", "tests.caching"])


class ForkedScript:
    """A script of the project in a process of its own, with the face of a Popen."""

    def __init__(self, words: list[str], environment: dict[str, str], log: Path) -> None:
        start_server()
        self._process = FORKS.Process(target=_run, args=(words, environment, log))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def start_server() -> None:
    """With the settings that libraries read when they are imported."""
    before = dict(os.environ)
    os.environ.update(OMP_NUM_THREADS="1", PYTORCH_NVML_BASED_CUDA_CHECK="1")
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _run(words: list[str], environment: dict[str, str], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    imported = {name: os.environ[name] for name in SET_ON_IMPORT if name in os.environ}
    os.environ.clear()
    os.environ.update(imported | environment)
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    os.umask(int(environment.get("TEST_UMASK", "0o022"), 8))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background of a shell has it ignored
    os.chdir(ROOT)
    sys.argv = words
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process leaves them out


class Job:
    """One process a rank, each running ``launch/distill.py`` or another script of the project."""

    def __init__(
        self, words: list[str], world_size: int, folder: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        self.logs = [folder / f"rank{rank}.log" for rank in range(world_size)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = port = free.getsockname()[1]
        self.ranks: list[ForkedScript | subprocess.Popen[bytes]] = []
        for rank, log in enumerate(self.logs):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                **(variables or {}),
            }
            if Path(words[0]).parent in (ROOT / "launch", ROOT / "tests" / "distributed", ROOT / "data_tools"):
                self.ranks.append(ForkedScript(words, environment, log))
                continue
            with log.open("wb") as output:
                self.ranks.append(
                    subprocess.Popen(
                        [sys.executable, *words], env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT
                    )
                )

    def wait(self, seconds: float = 120.0) -> list[int]:
        """Exit codes of all ranks; whoever has not ended by then is killed and the test fails."""
        deadline = time.monotonic() + seconds
        try:
            return [rank.wait(max(0.1, deadline - time.monotonic())) for rank in self.ranks]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.output()}") from None

    def kill(self, rank: int | None = None) -> None:
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def output(self) -> str:
        return "\n".join(f"--- rank {i}\n{log.read_text(errors='replace')[-4000:]}" for i, log in enumerate(self.logs))


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def distill(config: dict[str, Any], folder: Path, world_size: int = 1, words: tuple[str, ...] = ()) -> Job:
    """Start ``launch/distill.py`` with ``config`` on ``world_size`` ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    path = write_config(folder / "run.yaml", config)
    return Job([str(ROOT / "launch" / "distill.py"), "--config", str(path), *words], world_size, folder)


def finish(job: Job) -> None:
    codes = job.wait()
    assert codes == [0] * len(codes), f"exit codes {codes}\n{job.output()}"


def wait_for_step(folder: Path, step: int, job: Job) -> None:
    """Until metrics.jsonl holds ``step``."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        path = folder / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        assert any(rank.poll() is None for rank in job.ranks), job.output()
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached:\n{job.output()}")
