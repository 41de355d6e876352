"""A tiny causal run on the hosts of a lab, under any launcher, slow enough to be hit in mid-run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import tiny
from tests.cluster.commands import Command
from tests.cluster.hosts import ROOT, Lab, wait_until
from tests.launching import write_config

PORT = 29500
START_SECONDS = 180.0
"""For the first step of a run: several interpreters import the libraries on whatever processors there are."""


class Training:
    """The run ``name`` below ``root``; starting it again resumes it. ``sections`` replace those of the tiny run.

    ``pace_seconds`` is a pause added to every step, ``save_seconds`` one before each checkpoint; without a pause a run
    trains as fast as it goes, with ``launch/distill.py`` itself.
    """

    def __init__(
        self,
        lab: Lab,
        root: Path,
        name: str = "run",
        *,
        pace_seconds: float = 0.0,
        save_seconds: float = 0.0,
        **sections: Any,
    ) -> None:
        self.lab = lab
        self.root = root
        run = {"name": name, **sections.pop("run", {})}
        config = tiny.run_config(root, run=run, **sections)
        self.folder = root / "runs" / name
        """The folder of the run."""
        self.work = root / f"work-{name}"
        """Where the launcher is started."""
        self.work.mkdir(exist_ok=True)
        self.config = write_config(self.work / "run.yaml", config)
        batch = config["batch"]
        self._num_sequences = batch["global_sequences"] // batch["micro_sequences"]
        self._pace_seconds, self._save_seconds = pace_seconds, save_seconds

    def script(self, world_size: int) -> tuple[list[str], dict[str, str]]:
        """The script with its arguments, and what its environment needs on every host."""
        arguments = ["--config", str(self.config)]
        if not self._pace_seconds:
            return [str(ROOT / "launch" / "distill.py"), *arguments], {}
        pause = self._pace_seconds * world_size / self._num_sequences  # a step is that many micro-batches
        pauses = {"PACE_SECONDS": f"{pause:.4f}", "SAVE_SECONDS": f"{self._save_seconds:.1f}"}
        return [str(ROOT / "tests" / "cluster" / "paced_distill.py"), *arguments], pauses

    def start(
        self, hosts: Sequence[str], *, slots: int = 1, launcher: str = "pdsh", launcher_args: str = "", words: str = ""
    ) -> Command:
        """``deepspeed --hostfile`` from the first of the hosts; its log is that of all ranks."""
        script, environment = self.script(len(hosts) * slots)
        (self.work / ".deepspeed_env").write_text("\n".join(f"{key}={value}" for key, value in environment.items()))
        arguments = ["--launcher", launcher, *([f"--launcher_args={launcher_args}"] if launcher_args else [])]
        hostfile = str(self.lab.hostfile(slots, hosts))
        line = ["deepspeed", "--hostfile", hostfile, *arguments, *script, *shlex.split(words)]
        log = self.work / "launcher.log"
        log.unlink(missing_ok=True)
        return self.lab.start(hosts[0], line, folder=self.work, env=environment, log=log)

    def records(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl, without a line that is still being written."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def losses(self) -> dict[int, float]:
        """The objective of each step that was recorded."""
        return {record["step"]: record["loss/objective"] for record in self.records() if "loss/objective" in record}

    def last_step(self) -> int:
        return max(self.losses(), default=0)

    def wait_for_step(self, step: int, command: Command, seconds: float = START_SECONDS) -> int:
        """Until metrics.jsonl has the step. Raises AssertionError when the launcher ends before."""

        def reached() -> int:
            ended = command.poll() is not None  # asked first: what it wrote at its end must count
            last = self.last_step()
            assert last >= step or not ended, f"ended at step {last}, before step {step}:\n{command.output()}"
            return last if last >= step else 0

        return int(wait_until(reached, seconds, f"step {step}; log: {command.log}"))

    def wait(self, command: Command, seconds: float = START_SECONDS) -> None:
        """Until the run is done. Raises AssertionError with its output when it fails."""
        code = command.wait(seconds)
        assert code == 0, f"exit code {code}\n{command.output()}"
