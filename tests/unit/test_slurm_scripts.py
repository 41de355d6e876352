"""The batch scripts without a Slurm: their syntax, what the pipeline would submit, where a run stands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.launching import write_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "slurm"
SCRIPTS = sorted([*FOLDER.glob("*.sbatch"), *FOLDER.glob("*.sh")])
PIPELINE = FOLDER / "pipeline.sh"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(
        ["shellcheck", "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.sbatch")), ids=lambda path: path.name)
def test_a_batch_script_says_how_to_use_it_and_can_be_requeued(script: Path) -> None:
    content = script.read_text()
    assert f"launch/slurm/{script.name}" in content.split("#SBATCH")[0]
    assert "#SBATCH --requeue\n#SBATCH --open-mode=append\n" in content


def run_pipeline(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PIPELINE), *words], capture_output=True, text=True, timeout=20, env=os.environ | environment
    )


def test_a_dry_run_prints_every_job_with_what_it_waits_for(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.touch()
    shards = ["--task", "causal_lm", "--input", "corpus/*.txt", "--output", "my shards"]
    done = run_pipeline(
        "--dry-run", "--parts", "8", "--cache-jobs", "4", str(run), "run.seed=5", "--", *shards,
        DISTILL_SBATCH="--nodes=4 --gpus-per-node=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = "--dependency=afterok:JOB{} --kill-on-invalid-dep=yes "
    words = "--task causal_lm --input corpus/\\*.txt --output my\\ shards"
    assert [line.rstrip() for line in done.stdout.splitlines()] == [
        f"sbatch --parsable --array=1-8 --export=ALL\\,STILLHOUSE_MERGE=no {FOLDER}/build_shards.sbatch {words}",
        f"sbatch --parsable {after.format(1)}{FOLDER}/build_shards.sbatch {words} --merge 8",
        f"sbatch --parsable {after.format(2)}--array=1-4 {FOLDER}/cache_teacher.sbatch {run} run.seed=5",
        f"sbatch --parsable {after.format(3)}--nodes=4 --gpus-per-node=8 {FOLDER}/distill.sbatch {run} run.seed=5",
        f"sbatch --parsable {after.format(4)}{FOLDER}/export.sbatch {run} run.seed=5",
    ]


def test_stages_that_are_not_asked_for_are_left_out(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.touch()
    lines = run_pipeline("--dry-run", str(run)).stdout.splitlines()
    assert [Path(line.split(str(FOLDER))[1].split()[0]).name for line in lines] == ["distill.sbatch", "export.sbatch"]
    assert "--dependency" not in lines[0]


@pytest.mark.parametrize("words", [["--parts", "x", "run.yaml"], ["--what"], [], ["no.yaml"]])
def test_a_wrong_call_of_the_pipeline_submits_nothing(words: list[str], tmp_path: Path) -> None:
    done = run_pipeline(*words, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 2
    assert done.stderr


def test_where_a_run_stands(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", tiny.run_config(tmp_path))
    folder = tmp_path / "runs" / "run"

    def state() -> dict[str, str]:
        words = [sys.executable, "launch/run_state.py", "--config", str(config)]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        return dict(line.split("=", 1) for line in done.stdout.splitlines())

    assert state() == {"folder": str(folder), "step": "0", "finished": "no", "cached": "0"}
    for name, files in (("step_00000003", ["COMPLETE"]), ("step_00000006", [])):
        (folder / "checkpoints" / name).mkdir(parents=True)
        for file in files:
            (folder / "checkpoints" / name / file).touch()
    events = [{"event": "started", "step": 0}, {"event": "closed", "step": 6, "status": "completed"}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert state() == {"folder": str(folder), "step": "3", "finished": "yes", "cached": "0"}
    with (folder / "events.jsonl").open("a") as stream:
        stream.write(json.dumps({"event": "resumed", "step": 6}) + "\n")
    assert state()["finished"] == "no"


def test_a_task_ends_all_ranks_of_its_node_and_writes_down_the_verdict(tmp_path: Path) -> None:
    verdict = tmp_path / "verdict"
    program = 'if [ "$RANK" = 3 ]; then sleep 1; exit 2; fi; echo "$RANK $LOCAL_RANK $WORLD_SIZE"; exec sleep 60'
    environment = {"STILLHOUSE_RANKS_OF_TASK": "2", "SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "3"}
    done = subprocess.run(
        ["bash", str(FOLDER / "task.sh"), "sh", "-c", program],
        env=os.environ | environment | {"STILLHOUSE_VERDICT": str(verdict)}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == "2 0 6\n"
    assert verdict.read_text() == "2\n"
