"""From nothing to a distilled student and its report, on the documentation that comes with every Python.

    python launch/demo.py --task masked_lm|causal_lm [--teacher online|cached]

Text becomes shards; a teacher learns from them; then one and the same student is trained twice, with the teacher and
without. With --teacher cached the teacher is asked once, for all of the data, and the student learns from what was
kept. Everything lies in runs/demo-TASK, or demo-TASK-cached. Run it again to go on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from engine.errors import ConfigError, TrainingError
from engine.log import run_main
from engine.report import Results, results_table
from engine.report.results import RESULTS
from launch.demo_process import run_shown, tail
from launch.demo_recipes import CACHE, HELDOUT_SHARE, SEQUENCE_TOKENS, STAGES, VOCABULARY_IDS, recipe
from launch.demo_tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
ZERO = ROOT / "ds_configs" / "cpu_zero2.json"
TAIL_LINES = 25


class Stage(NamedTuple):
    """A piece of work, and the file that is there once it is done."""

    title: str
    done: Path
    work: Callable[[], None]


class Demo:
    """The stages of one task below ``folder``."""

    def __init__(self, task: str, folder: Path, cached: bool) -> None:
        self.task, self.folder, self.cached = task, folder, cached
        devices = torch.cuda.device_count()
        self.num_ranks = min(2, devices) if devices else 2
        self.recipes = {stage: folder / "recipes" / f"{stage}.yaml" for stage in STAGES}

    def stages(self) -> list[Stage]:
        folder, ranks = self.folder, "1 rank" if self.num_ranks == 1 else f"{self.num_ranks} ranks"
        trained = {
            "teacher": f"training the teacher on {ranks}",
            "control": f"training the student without a teacher, as the control, on {ranks}",
            "student": f"distilling the student on {ranks}, then scoring all three",
        }
        stages = [
            Stage("reading this Python's documentation", folder / "corpus.jsonl", self.make_corpus),
            Stage("training a tokenizer on it", folder / "tokenizer", self.make_tokenizer),
            Stage("building shards, and held-out ones", folder / "shards" / "manifest.json", self.build_shards),
            *(Stage(trained[name], folder / name / RESULTS, partial(self.train, name)) for name in STAGES),
        ]
        if self.cached:
            asking = (
                "asking the teacher once, in 2 jobs, for all of the data" if ranks != "1 rank" else "asking the teacher"
            )
            stages[-1:-1] = [
                Stage(asking, folder / "shards" / CACHE / "manifest.json", self.ask),
                Stage("checking every record of the cache", folder / "logs" / "verified", self.verify),
            ]
        return stages

    def write_recipes(self) -> None:
        """Raises ConfigError when the folder was made by other recipes."""
        for stage, path in self.recipes.items():
            text = yaml.safe_dump(recipe(stage, self.task, self.folder, ZERO, self.cached), sort_keys=False)
            if path.is_file() and path.read_text() != text:
                raise ConfigError(
                    f"{path} is not this version's recipe, so {self.folder} was made by another: "
                    "remove that folder to start anew, or give another --output"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def make_corpus(self) -> None:
        script = str(ROOT / "data_tools" / "python_corpus.py")
        self._run("corpus", [sys.executable, script, "--output", str(self.folder / "corpus.jsonl")])

    def make_tokenizer(self) -> None:
        lines = (self.folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
        texts = (json.loads(line)["text"] for line in lines)
        train_tokenizer(texts, self.task, VOCABULARY_IDS, self.folder / "tokenizer")
        print(f"{VOCABULARY_IDS:,} ids")

    def build_shards(self) -> None:
        words = [sys.executable, str(ROOT / "data_tools" / "build_shards.py"), "--task", self.task]
        words += ["--input", str(self.folder / "corpus.jsonl"), "--tokenizer", str(self.folder / "tokenizer")]
        words += ["--sequence-tokens", str(SEQUENCE_TOKENS), "--shard-bytes", "2MB"]
        words += ["--split-heldout", str(HELDOUT_SHARE), "--output", str(self.folder / "shards")]
        self._run("shards", words)

    def train(self, stage: str) -> None:
        self._launch(stage, "distill.py", stage)

    def ask(self) -> None:
        self._launch("targets", "cache_teacher.py", "student")

    def verify(self) -> None:
        script = str(ROOT / "data_tools" / "verify_cache.py")
        self._run(
            "verify", [sys.executable, script, "--config", str(self.recipes["student"]), "--against-teacher", "64"]
        )
        (self.folder / "logs" / "verified").touch()

    def _launch(self, name: str, script: str, stage: str) -> None:
        """By the launcher's module, so that the command ``deepspeed`` need not be on PATH. Its stdout is chatter."""
        words = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(self.num_ranks)]
        words += ["--master_port", str(_free_port()), str(ROOT / "launch" / script)]
        self._run(name, [*words, "--config", str(self.recipes[stage])], show_stdout=False)

    def _run(self, name: str, words: list[str], show_stdout: bool = True) -> None:
        log = self.folder / "logs" / f"{name}.log"
        tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.num_ranks))
        code = run_shown(words, log, os.environ | {"PATH": tools, "OMP_NUM_THREADS": threads}, ROOT, show_stdout)
        if code != 0:
            raise TrainingError(
                f"this stage failed with exit code {code}; {log} ends with\n{tail(log, TAIL_LINES)}\n"
                "The same command goes on from here once the cause is mended."
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("masked_lm", "causal_lm"), default="masked_lm", help="default: masked_lm")
    parser.add_argument("--teacher", choices=("online", "cached"), default="online", help="default: online")
    parser.add_argument("--output", type=Path, help="default: runs/demo-TASK, or demo-TASK-cached")
    arguments = parser.parse_args(argv)
    cached = arguments.teacher == "cached"
    folder = ROOT / "runs" / f"demo-{arguments.task}{'-cached' if cached else ''}"
    demo = Demo(arguments.task, (arguments.output or folder).resolve(), cached)
    demo.write_recipes()
    started = time.monotonic()
    stages = demo.stages()
    for number, stage in enumerate(stages, 1):
        is_done = stage.done.exists()
        print(f"[{number}/{len(stages)}] {stage.title}{': done before' if is_done else ''}", flush=True)
        if not is_done:
            stage.work()
            if not stage.done.exists():
                raise TrainingError(f"stopped before {stage.done} was there; the same command goes on from here")
    show_results(demo.folder / "student")
    print(f"time:   {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


def show_results(student: Path) -> None:
    """The table of all three models, and whether the teacher was worth having."""
    results = Results.load(student)
    assert results is not None
    print("\n" + "\n".join(results_table(results)) + "\n")
    losses = {model.role: model.loss for model in results.models}
    if losses["student"] is None or losses["control"] is None or losses["student"] >= losses["control"]:
        print("The distilled student is NOT better than the control here: please report this with the files below.")
    print(f"report: {student / 'report.html'}\nmodel:  {student / 'export'}")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both ways to stop leave a checkpoint
    run_main(main)
