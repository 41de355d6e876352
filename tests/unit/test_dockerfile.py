"""The Dockerfile parses, and what it names exists. docker/try_steps.py runs its steps, which takes root and minutes."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KNOWN = {"ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "CMD"}


@pytest.fixture(scope="module")
def parsed() -> list[tuple[str, str]]:
    program = runpy.run_path(str(ROOT / "docker" / "try_steps.py"))
    return [(step["instruction"], step["value"]) for step in program["steps"](ROOT / "docker" / "Dockerfile")]


def test_the_base_is_an_argument_and_every_step_is_known(parsed: list[tuple[str, str]]) -> None:
    kinds = [kind for kind, _ in parsed]
    assert kinds[:2] == ["ARG", "FROM"]
    assert parsed[0][1].startswith("BASE=")
    assert parsed[1][1] == "${BASE}"
    assert set(kinds) == KNOWN


def test_the_shell_can_read_every_run(parsed: list[tuple[str, str]]) -> None:
    for command in (value for kind, value in parsed if kind == "RUN"):
        done = subprocess.run(["sh", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


def test_files_arguments_and_versions_exist(parsed: list[tuple[str, str]]) -> None:
    given = dict(value.partition("=")[::2] for kind, value in parsed if kind == "ARG")
    commands = " ".join(value for kind, value in parsed if kind == "RUN")
    assert set(re.findall(r"\$\{(\w+)\}", commands)) <= given.keys()
    for name in re.findall(r"[\w/]+\.(?:txt|py)\b", commands.replace("/tmp/constraints.txt", "")):
        assert (ROOT / name).is_file(), name
    assert given["TORCH"] in (ROOT / "constraints.txt").read_text().splitlines()
