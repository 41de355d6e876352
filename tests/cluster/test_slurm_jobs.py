"""The batch scripts under a real Slurm: stopped, requeued, resumed, given up, and chained."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.cluster.hosts import HEAD, ROOT, wait_until
from tests.cluster.slurm import ENDED, Slurm
from tests.cluster.training import START_SECONDS, Training
from tests.launching import write_config
from tests.sharding import some_documents, write_text

SCRIPTS = ROOT / "launch" / "slurm"


def checkout(folder: Path, distill: str | Path) -> Path:
    """A checkout whose launch/distill.py is another script, or has another text."""
    launch = folder / "launch"
    launch.mkdir(parents=True)
    for name in ("slurm", "run_state.py"):
        (launch / name).symlink_to(ROOT / "launch" / name)
    if isinstance(distill, Path):
        (launch / "distill.py").symlink_to(distill)
    else:
        (launch / "distill.py").write_text(distill)
    return folder


class DistillJob:
    """``sbatch launch/slurm/distill.sbatch`` of a tiny run on two nodes."""

    def __init__(self, slurm: Slurm, run: Training, home: Path, *words: str) -> None:
        self.slurm, self.run = slurm, run
        _, environment = run.script(2)
        environment |= {"STILLHOUSE_HOME": str(home)}
        script = str(SCRIPTS / "distill.sbatch")
        self.number = slurm.submit(["--nodes=2", *words, script, str(run.config)], run.work, environment)

    def output(self) -> str:
        path = self.run.work / f"distill-{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            state = self.slurm.state(self.number)
            assert state in ("PENDING", "RUNNING", "CONFIGURING"), f"{state}\n{self.output()}"
            return self.run.last_step() >= step

        wait_until(reached, START_SECONDS, f"step {step}; {self.output()}")

    def num_launches(self) -> int:
        path = self.run.folder / "restarts.log"
        return path.read_text().count(f"job {self.number} ") if path.exists() else 0

    def wait_for_launch(self, number: int) -> None:
        """Until the job was started for the ``number``-th time, without the two minutes that Slurm puts in between."""

        def reached() -> bool:
            state = self.slurm.state(self.number)
            assert state not in ENDED, f"{state}\n{self.output()}"
            if state == "PENDING":
                time.sleep(3)  # in the second of the requeue Slurm refuses the job's own credential
                self.slurm.run(f"scontrol update JobId={self.number} StartTime=now", check=False)
                time.sleep(3)
            return self.num_launches() >= number

        wait_until(reached, START_SECONDS, f"launch {number}; {self.output()}")

    def wait_for(self, state: str) -> None:
        try:
            self.slurm.wait_for_state(self.number, state, seconds=START_SECONDS)
        except AssertionError as problem:
            raise AssertionError(f"{problem}\n{self.output()}") from None

    def steps_of_checkpoints(self) -> list[int]:
        return sorted(int(path.parent.name[5:]) for path in self.run.folder.glob("checkpoints/step_*/COMPLETE"))

    def events(self) -> list[str]:
        lines = (self.run.folder / "events.jsonl").read_text().splitlines()
        return [json.loads(line)["event"] for line in lines]


def paced(slurm: Slurm, folder: Path, name: str, num_steps: int = 24) -> tuple[Training, Path]:
    sections: dict[str, Any] = {"checkpoint": {"every_steps": 1000}}
    run = Training(slurm.lab, folder, name, pace_seconds=0.3, run={"num_steps": num_steps}, **sections)
    return run, checkout(folder / "home", ROOT / "tests" / "cluster" / "paced_distill.py")


def test_asked_to_stop_it_is_safe_requeued_and_goes_on_to_the_end(slurm: Slurm, tmp_path: Path) -> None:
    run, home = paced(slurm, tmp_path, "run")
    job = DistillJob(slurm, run, home, "--gpus-per-node=1")
    job.wait_for_step(4)
    began = time.monotonic()
    slurm.cancel(job.number, "--signal=USR1", "--batch")
    wait_until(job.steps_of_checkpoints, START_SECONDS, "a checkpoint")
    print(f"USR1 to safe: {time.monotonic() - began:.1f} s")
    job.wait_for_launch(2)
    stopped_at = job.steps_of_checkpoints()[-1]
    assert "the ranks ended with code 0," in job.output()
    job.wait_for_step(stopped_at + 2)
    slurm.cancel(job.number, "--signal=TERM", "--batch")  # as preemption with a time of grace does
    job.wait_for_launch(3)
    assert job.steps_of_checkpoints()[-1] >= stopped_at + 2
    job.wait_for("COMPLETED")
    assert [record["step"] for record in run.records() if "loss/objective" in record] == list(range(1, 25))
    assert [event for event in job.events() if event in ("started", "resumed")] == ["started", "resumed", "resumed"]
    assert (run.folder / "export" / "model.safetensors").exists()
    assert f"done at step 24: {run.folder}/export" in job.output()


@pytest.mark.slow
def test_a_job_that_was_not_warned_of_its_time_limit_is_requeued(slurm: Slurm, tmp_path: Path) -> None:
    run = Training(slurm.lab, tmp_path, "run")
    waits = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); signal.pause()"
    job = DistillJob(slurm, run, checkout(tmp_path / "home", waits), "--time=1", "--signal=B:CONT@1")
    job.wait_for("RUNNING")
    # for a moment it counts as ended
    wait_until(lambda: slurm.state(job.number) == "PENDING", START_SECONDS, "a place in the queue")
    assert "TERM was received" in job.output()
    assert "requeued, to go on from what was saved last" in job.output()


def test_a_cancelled_job_saves_and_stays_away(slurm: Slurm, tmp_path: Path) -> None:
    run, home = paced(slurm, tmp_path, "run")
    job = DistillJob(slurm, run, home)
    job.wait_for_step(3)
    slurm.cancel(job.number)
    job.wait_for("CANCELLED")
    slurm.wait_for_nodes()
    assert job.steps_of_checkpoints()[-1] >= 3
    assert slurm.state(job.number) == "CANCELLED"


def test_it_gives_up_after_three_restarts_without_progress(slurm: Slurm, tmp_path: Path) -> None:
    run = Training(slurm.lab, tmp_path, "run")
    job = DistillJob(slurm, run, checkout(tmp_path / "home", "import sys; sys.exit(3)"))
    job.wait_for_launch(4)
    job.wait_for("FAILED")
    assert "no progress in 3 restarts running, each began and ended at step 0" in job.output()
    assert job.num_launches() == 4


def test_an_error_of_the_user_ends_the_job(slurm: Slurm, tmp_path: Path) -> None:
    run = Training(slurm.lab, tmp_path, "run")
    (tmp_path / "train" / "manifest.json").unlink()
    job = DistillJob(slurm, run, ROOT)
    job.wait_for("FAILED")
    assert "an error to mend, see above; not requeued" in job.output()
    assert slurm.field(job.number, "ExitCode") == "2:0"


def wait_for_end(slurm: Slurm, jobs: list[int], folder: Path, seconds: float) -> None:
    def output() -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.out")))

    def done() -> bool:
        shown = re.findall(r"^JobId=(\d+).* JobState=(\S+)", slurm.run("scontrol --oneliner show job"), re.MULTILINE)
        states = {state for number, state in shown if int(number) >= min(jobs)}
        assert not {"FAILED", "CANCELLED", "TIMEOUT"} & states, f"{states}\n{output()}"
        return not slurm.queue()

    wait_until(done, seconds, f"jobs {jobs} to end; {output()}")


def test_from_text_to_an_exported_student_as_a_chain_of_jobs(slurm: Slurm, tmp_path: Path) -> None:
    tiny.model_folder(tmp_path / "teacher", "causal_lm")
    texts = [re.sub("word", "w", text) for text in some_documents(300)]
    source = write_text(tmp_path / "corpus.txt", texts)
    root = tmp_path
    (root / "heldout").mkdir()
    losses = [{"kind": "forward_kl", "weight": 0.5}, {"kind": "cross_entropy", "weight": 0.5}]
    teacher = {"kind": "cached", "cache": "targets", "model": str(root / "teacher")}
    data = {"manifest": str(root / "shards" / "manifest.json")}
    run = {"num_steps": 6}
    config = write_config(root / "run.yaml", tiny.run_config(root, run=run, losses=losses, teacher=teacher, data=data))
    shards = ["--task", "causal_lm", "--input", str(source), "--tokenizer", str(root / "teacher")]
    shards += ["--sequence-tokens", "32", "--shard-bytes", "40KB", "--output", str(root / "shards")]
    environment = {"DISTILL_SBATCH": "--nodes=1", "STILLHOUSE_TASKS": "node", "STILLHOUSE_RANKS": "2"}
    words = [str(SCRIPTS / "pipeline.sh"), "--parts", "2", "--cache-jobs", "2", str(config), "--", *shards]
    said = slurm.lab.run(HEAD, words, folder=root, env=environment)
    jobs = [int(number) for number in re.findall(r"^job (\d+):", said, re.MULTILINE)]
    assert len(jobs) == 5
    wait_for_end(slurm, jobs, root, 240)
    assert not (root / "shards" / "parts").exists()
    num_shards = len(json.loads((root / "shards" / "manifest.json").read_text())["shards"])
    assert num_shards >= 3
    assert len(list((root / "shards" / "targets").glob("*.targets.tar"))) == num_shards
    assert (root / "shards" / "targets" / "manifest.json").exists()
    folder = root / "runs" / "run"
    assert (folder / "export" / "model.safetensors").exists()
    assert "exported" in (root / f"export-{jobs[-1]}.out").read_text()
    resolved = json.loads((folder / "checkpoints" / "step_00000006" / "meta.json").read_text())
    assert resolved["world_size"] == 2


def test_an_array_of_parts_submits_its_own_merge(slurm: Slurm, tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    source = write_text(tmp_path / "corpus.txt", some_documents(100))
    words = f"--task causal_lm --input {source} --tokenizer {tmp_path}/tokenizer --sequence-tokens 32 --output out"
    environment = {"STILLHOUSE_HOME": str(ROOT)}
    script = str(SCRIPTS / "build_shards.sbatch")
    job = slurm.submit(["--array=1-2", script, *shlex.split(words)], tmp_path, environment)
    wait_for_end(slurm, [job], tmp_path, 120)
    assert (tmp_path / "out" / "manifest.json").exists()
    assert sorted(os.listdir(tmp_path / "out"))[:2] == ["manifest.json", "restarts.log"]
