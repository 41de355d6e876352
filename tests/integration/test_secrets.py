"""No file of a run, no line that it prints, holds a secret."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import engine.zero  # noqa: F401  - sets what ranks read from the environment
from tests import tiny
from tests.launching import ROOT, Job, write_config
from tests.serving import Server

VARIABLES = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_NeverToBeSeenInAnyFile1234",
    "AWS_ACCESS_KEY_ID": "AKIANEVERTOBESEENXYZ",
    "AWS_SECRET_ACCESS_KEY": "never/to+be/seen/in+any/file/of/the/run0",
    "AWS_SESSION_TOKEN": "neverToBeSeenSessionToken",
}
PASSWORD, SIGNATURE = "neverToBeSeenPassword", "0a1b2c3dneversignature"
SECRETS = [*VARIABLES.values(), PASSWORD, SIGNATURE]


@pytest.fixture
def root(run_root: Path) -> Path:
    return run_root


def address(server: Server) -> str:
    return server.address.replace("http://", f"http://somebody:{PASSWORD}@") + "/train/manifest.json"


def settings(root: Path, server: Server, **sections: Any) -> dict[str, Any]:
    return tiny.run_config(
        root,
        data={"manifest": address(server), "lanes": 4, "shuffle_samples": 8},
        tracking={"every_steps": 1, "wandb": "offline", "tensorboard": True},
        evaluation={"manifest": address(server).replace("train", "heldout"), "every_steps": 2, "max_sequences": 8},
        **sections,
    )


def start(script: str, config: dict[str, Any], root: Path, *words: str) -> Job:
    path = write_config(root / "run.yaml", copy.deepcopy(config))
    return Job([str(ROOT / "launch" / script), "--config", str(path), *words], 1, root, VARIABLES)


def seen(folder: Path) -> list[str]:
    """Where a secret stands."""
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return [f"{path}: {secret}" for path, content in files.items() for secret in SECRETS if secret.encode() in content]


@pytest.mark.slow
def test_a_run_keeps_no_secret_and_can_go_on_without_it(root: Path) -> None:
    """The override is one more place: a command line goes to environment.json, and to wandb."""
    server = Server(root)
    config = settings(root, server)
    override = f"data.manifest={address(server)}?X-Amz-Signature={SIGNATURE}"
    for steps in (4, 6):
        job = start("distill.py", config, root, override, f"run.num_steps={steps}")
        assert job.wait() == [0], job.output()
        assert [secret for secret in SECRETS if secret in job.logs[0].read_text()] == []
    folder = root / "runs" / "run"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss/objective" in record] == [1, 2, 3, 4, 5, 6]
    assert '"resumed"' in (folder / "events.jsonl").read_text()
    assert list((folder / "wandb").rglob("*.wandb"))
    assert (folder / "report.html").is_file()
    assert "***@127.0.0.1" in (folder / "config.yaml").read_text(), "the test looks at a run without secrets"
    assert "***@127.0.0.1" in (folder / "environment.json").read_text()
    assert seen(folder) == []
    job = start("evaluate_student.py", config, root)  # no such option: the usage names what it got
    assert job.wait() != [0]
    job = Job([str(ROOT / "launch" / "evaluate_student.py"), "--run", str(folder)], 1, root, VARIABLES)
    assert job.wait() == [2]
    assert "data.manifest, evaluation.manifest held a secret, which is not kept; give it again" in job.output()


@pytest.mark.slow
def test_a_capture_and_an_error_show_no_secret(root: Path) -> None:
    server = Server(root)
    teacher = {"kind": "cached", "model": str(root / "teacher"), "cache": str(root / "cache")}
    config = settings(root, server, teacher=teacher)
    job = start("cache_teacher.py", config, root)
    assert job.wait() == [0], job.output()
    assert (root / "cache" / "manifest.json").is_file()
    assert seen(root / "cache") == []
    assert [secret for secret in SECRETS if secret in job.logs[0].read_text()] == []
    lost = config | {"data": config["data"] | {"manifest": address(server).replace("train", "nowhere")}}
    job = start("cache_teacher.py", lost, root)
    assert job.wait() == [2]
    assert "/nowhere/manifest.json: no such file" in job.output()
    assert "***@127.0.0.1" in job.output()
    assert [secret for secret in SECRETS if secret in job.output()] == []
