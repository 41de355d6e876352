"""kill -9 at random moments, of a rank or of the launcher; each run is then resumed and must end as if undisturbed.

Two ranks under the deepspeed launcher train a small Llama on the standard library's help texts, with dropout, a
checkpoint every few steps. The weights and the loss of every step must equal those of a run nobody touched, bit
for bit. After a rank's death the launcher ends the others by itself. After the launcher's own death its ranks leave by
themselves within seconds; the benchmark does not wait for that, ends them, and counts them.

    python benchmarks/kill_resume.py --output benchmarks/results/kill_resume.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
import yaml
from measuring import ROOT, leave_nothing_behind, print_table, write_json
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from engine.checkpoint import newest
from engine.errors import CheckpointError
from engine.zero import consolidate

VICTIMS = ("rank 0", "rank 1", "launcher")
LLAMA = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "attention_dropout": 0.1,
}


def main() -> None:
    arguments = parse_arguments()
    chance = random.Random(arguments.seed)
    leave_nothing_behind()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        make_parts(folder)
        with Job(folder, "calm", arguments) as calm:
            calm.run_to_end()
        expected, trials = outcome(folder, "calm"), []
        for number in range(arguments.moments):
            trials.append(trial(folder, f"killed{number:02d}", chance, expected, arguments))
            print(f"{number + 1} of {arguments.moments}: {trials[-1]}", flush=True)
    show(trials)
    settings = {"steps": arguments.steps, "checkpoint_every_steps": arguments.checkpoint_every, "seed": arguments.seed}
    write_json(arguments.output, {"settings": settings, "trials": trials})
    if not all(one["identical"] for one in trials):
        raise SystemExit("some resumed runs differ from the undisturbed one")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--folder", help="put the runs there (default: the system's temporary folder)")
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--checkpoint-every", type=int, default=7)
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--port", type=int, default=29_500, help="of the rendezvous, the same for all jobs")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    parser.add_argument("--wait-seconds", type=float, default=180.0, help="no wait is longer than this")
    return parser.parse_args()


def make_parts(folder: Path) -> None:
    """A tokenizer, a teacher with random weights, and shards of the standard library's help texts."""
    text = folder / "topics.txt"
    text.write_text("\n\n".join(topics.values()))
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train(
        [str(text)], trainers.BpeTrainer(vocab_size=512, special_tokens=["<unk>", "<eos>"], show_progress=False)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", bos_token="<eos>", pad_token="<eos>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=1)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    words_of_build = ["--task", "causal_lm", "--input", text, "--tokenizer", folder / "teacher"]
    words_of_build += ["--sequence-tokens", "64", "--output", folder / "shards", "--workers", "1"]
    subprocess.run([sys.executable, ROOT / "data_tools" / "build_shards.py", *words_of_build], check=True)


def run_config(folder: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "run": {"name": name, "output": str(folder / "runs"), "seed": 3, "num_steps": arguments.steps},
        "task": {"kind": "causal_lm"},
        "student": {"init": "teacher_layers", "layers": 2},
        "teacher": {"kind": "online", "model": str(folder / "teacher")},
        "data": {"manifest": str(folder / "shards" / "manifest.json"), "lanes": 4, "shuffle_samples": 16},
        "batch": {"global_sequences": 8, "micro_sequences": 2},
        "losses": [{"kind": "forward_kl", "temperature": 2.0}, {"kind": "cross_entropy"}],
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"kind": "constant"},  # so that a run which ends elsewhere has the same steps
        "checkpoint": {"every_steps": arguments.checkpoint_every},
        "tracking": {"every_steps": 1},
        "cluster": {"timeout_seconds": getattr(arguments, "timeout_seconds", 120.0)},
        "zero": {"zero_optimization": {"stage": arguments.stage}},
    }


class Job:
    """``deepspeed --num_gpus 2 launch/distill.py`` in a session of its own, so that all of it can be found."""

    def __init__(self, folder: Path, name: str, arguments: argparse.Namespace) -> None:
        self.run_folder = folder / "runs" / name
        self._patience = arguments.wait_seconds
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(run_config(folder, name, arguments)))
        words = [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--num_gpus",
            "2",
            "--master_port",
            str(arguments.port),
        ]
        words += ["--master_port", str(arguments.port), str(ROOT / "launch" / "distill.py"), "--config", str(config)]
        self._log = folder / f"{name}.log"
        self.began = time.time()
        with self._log.open("ab") as log:
            self.launcher = subprocess.Popen(
                words,
                env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self.launcher.wait()

    def processes(self) -> dict[int, int | None]:
        """Rank of each living process of the job by its id; None for the launcher's own two."""
        found: dict[int, int | None] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # it ended while we looked
                continue
            if int(session) == self.launcher.pid and state != "Z":
                ranks = [int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK=")]
                found[int(entry.name)] = ranks[0] if ranks else None
        return found

    def wait_until(self, done: Callable[[], bool], what: str, poll_seconds: float = 0.1) -> float:
        """Seconds it took."""
        begin = time.perf_counter()
        while not done():
            if time.perf_counter() - begin > self._patience:
                raise SystemExit(f"waited {self._patience} s for {what}:\n{self._log.read_text()[-3000:]}")
            time.sleep(poll_seconds)
        return time.perf_counter() - begin

    def kill(self, victim: str, number: int = signal.SIGKILL) -> None:
        """``victim`` is ``launcher`` or as ``rank 0``; the guard beside a rank lives as long as it."""
        rank = int(victim.removeprefix("rank ")) if victim.startswith("rank") else None
        for process, its_rank in self.processes().items():
            if process == self.launcher.pid if rank is None else its_rank == rank and not _is_guard(process):
                os.kill(process, number)

    def terminate(self) -> None:
        """As a scheduler asks: all ranks, none of the launcher's own processes."""
        for process, rank in self.processes().items():
            if rank is not None:
                os.kill(process, signal.SIGTERM)

    def end(self) -> int:
        """Kill what is left of the job. Returns the number of processes that were."""
        left = self.processes()
        for process in left:
            os.kill(process, signal.SIGKILL)
        while self.processes():
            time.sleep(0.02)
        return len(left)

    def last_step(self) -> int:
        """Of the last whole line of metrics.jsonl; -1 where there is none."""
        path = self.run_folder / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else -1

    def reached(self, step: int) -> bool:
        return self.last_step() >= step or (step == 0 and self.run_folder.exists())

    def run_to_end(self) -> None:
        self.wait_until(lambda: not self.processes(), "the end of the run")
        if self.launcher.wait() != 0:
            raise SystemExit(f"exit code {self.launcher.returncode}:\n{self._log.read_text()[-3000:]}")


def trial(
    folder: Path, name: str, chance: random.Random, expected: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
    victim, step, delay = chance.choice(VICTIMS), chance.randrange(arguments.steps), chance.uniform(0.0, 0.1)
    with Job(folder, name, arguments) as job:
        job.wait_until(lambda: job.reached(step), f"step {step}", poll_seconds=0.02)
        time.sleep(delay)
        job.kill(victim)
        reached = job.last_step()
        seconds = None
        if victim != "launcher":
            seconds = round(job.wait_until(lambda: not job.processes(), "the launcher to end the job"), 2)
        orphans = job.end()
    resumed_from = newest_step(job.run_folder)
    with Job(folder, name, arguments) as again:
        again.run_to_end()
    return {
        "victim": victim,
        "killed_after_step": max(reached, 0),
        "delay_seconds": round(delay, 3),
        "job_gone_seconds": seconds,
        "orphans_to_end": orphans,
        "resumed_from_step": resumed_from,
        "identical": same(outcome(folder, name), expected),
    }


def _is_guard(process: int) -> bool:
    return b"guard.py" in Path(f"/proc/{process}/cmdline").read_bytes()


def newest_step(run_folder: Path) -> int:
    """Of the newest complete checkpoint, 0 without one."""
    try:
        return int(newest(run_folder / "checkpoints").name.removeprefix("step_"))
    except CheckpointError:
        return 0


def outcome(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[int, float]]:
    """The final weights, and the loss of each step."""
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss/objective" in record]
    losses = {record["step"]: record["loss/objective"] for record in records}
    return consolidate(newest(folder / "runs" / name / "checkpoints")), losses


def same(ours: Any, theirs: Any) -> bool:
    return ours[1] == theirs[1] and all(torch.equal(ours[0][name], tensor) for name, tensor in theirs[0].items())


def show(trials: list[dict[str, Any]]) -> None:
    header = ["victim", "after step", "job gone, s", "orphans", "resumed from", "identical"]
    keys = ["victim", "killed_after_step", "job_gone_seconds", "orphans_to_end", "resumed_from_step", "identical"]
    print_table(header, [["-" if one[key] is None else one[key] for key in keys] for one in trials])
    gone = [one["job_gone_seconds"] for one in trials if one["job_gone_seconds"] is not None]
    print(f"identical: {sum(one['identical'] for one in trials)} of {len(trials)}")
    if gone:
        print(f"from a rank's death to the end of the job: median {statistics.median(gone):.1f} s")


if __name__ == "__main__":
    main()
