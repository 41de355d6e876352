"""Hosts compared: what is refused, what is a warning, and that many hosts make few lines."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config.load import parse_config
from engine.config.run import RunConfig
from engine.errors import ConfigError, DataError
from engine.hosts.compare import differences, fold, problem_of
from engine.hosts.facts import HostFacts, ask, describe, source_version, withdraw
from tests import tiny
from tests.launching import ROOT

CPU = torch.device("cpu")
SECRET = "s3cret-value"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return parse_config(tiny.run_config(tmp_path_factory.mktemp("hosts")))


@pytest.fixture(scope="module")
def own(config: RunConfig) -> HostFacts:
    """What this machine says of itself, for tests to change."""
    question = ask(config)
    try:
        return describe(config, question, 0, CPU)
    finally:
        withdraw(question)


def named(facts: HostFacts, host: str, rank: int = 0, **changes: str) -> HostFacts:
    """The same facts on another host, with values replaced by the last word of their names."""
    changed = {key: changes.get(key[1].split()[0].replace(".", "_"), value) for key, value in facts.facts.items()}
    return replace(facts, host=host, rank=rank, facts=changed)


def texts(*hosts: HostFacts) -> str:
    return str(problem_of(differences(hosts)))


def test_hosts_that_are_alike_have_no_differences(own: HostFacts) -> None:
    hosts = [named(own, f"node{n}", n) for n in range(4)]
    assert differences(hosts) == []
    assert problem_of([]) is None
    assert len(pickle.dumps(own)) < 8192  # each rank receives those of all hosts


def test_a_host_with_another_version_is_named_beside_those_that_agree(own: HostFacts) -> None:
    ours = own.facts["package", "transformers"]
    hosts = [named(own, "node1"), named(own, "node2", 1), named(own, "node3", 2, transformers="5.20.1")]
    problem = problem_of(differences(hosts))
    assert isinstance(problem, ConfigError)
    assert f"  transformers: {ours} on node1, node2; 5.20.1 on node3\n" in str(problem)
    assert "constraints.txt" in str(problem)


def test_a_hundred_hosts_make_one_line(own: HostFacts) -> None:
    hosts = [named(own, f"node{n:03d}", n) for n in range(1, 101)]
    hosts[41] = named(own, "node042", 41, torch="2.0.0")
    lines = texts(*hosts).splitlines()
    assert lines[1] == (
        f"  torch: {own.facts['package', 'torch']} on 99 hosts, node[001-041,043-100]; 2.0.0 on node042"
    )
    assert len(lines) == 3


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["b", "a"], "b, a"),
        (["node1", "node2", "node3", "node7"], "node[1-3,7]"),
        (["gpu08", "gpu09", "gpu10"], "gpu[08-10]"),
        (["n1.x.org", "n2.x.org", "n3.x.org", "login"], "n[1-3].x.org, login"),
        ([f"{letter}x" for letter in "abcdefghij"], "ax, bx, cx, dx, ex, fx, gx, hx and 2 more"),
    ],
)
def test_names_are_folded_as_slurm_folds_them(names: list[str], expected: str) -> None:
    assert fold(names) == expected


@pytest.mark.parametrize(
    ("change", "refused", "kind"),
    [
        ({"torch": "2.0"}, True, ConfigError),
        ({"deepspeed": "0.1"}, True, ConfigError),
        ({"the": "abc"}, True, ConfigError),
        ({"batch:": "abc"}, True, ConfigError),
        ({"DS_ACCELERATOR": "xpu"}, True, ConfigError),
        ({"data_manifest": "abc"}, True, DataError),
        ({"teacher_model": "not there"}, True, DataError),
        ({"run_output": "rank 0's file is not seen"}, True, DataError),
        ({"webdataset": "0.1"}, False, None),
        ({"HF_HOME": "/elsewhere"}, False, None),
        ({"HF_TOKEN": "set"}, False, None),
        ({"machine": "another"}, False, None),
    ],
)
def test_what_would_spoil_a_run_is_refused_and_the_rest_is_told(
    own: HostFacts, change: dict[str, str], refused: bool, kind: type[Exception] | None
) -> None:
    found = differences([named(own, "node1"), named(own, "node2", 1, **change)])
    assert found
    assert all("node2" in difference.text for difference in found)
    assert {difference.refused for difference in found} == {refused}
    problem = problem_of(found)
    assert problem is None if kind is None else type(problem) is kind


def test_python_may_differ_in_its_last_number(own: HostFacts) -> None:
    facts = dict(own.facts) | {("detail", "python"): "3.11.99"}
    assert problem_of(differences([own, replace(own, host="b", facts=facts)])) is None
    facts = dict(own.facts) | {("python", "python"): "3.99"}
    assert problem_of(differences([own, replace(own, host="b", facts=facts)])) is not None


def test_hosts_of_one_name_are_told_apart_by_their_ranks(own: HostFacts) -> None:
    assert "2.0 on node (rank 8)" in texts(named(own, "node"), named(own, "node", 8, torch="2.0"))


def test_a_host_that_cannot_be_looked_at_is_named(config: RunConfig, own: HostFacts) -> None:
    question = ask(config)
    withdraw(question)
    failed = describe(config, question, 1, torch.device("cuda", 0))  # there is none
    assert "cannot be looked at: " in texts(named(own, "node1"), replace(failed, host="node2"))


def test_secrets_are_told_as_set_and_never_shown(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    question = ask(config)
    without = describe(config, question, 0, CPU)
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.setenv(name, SECRET)
    beside = describe(config, question, 1, CPU)
    withdraw(question)
    assert SECRET not in str(beside)
    found = differences([replace(beside, host="node1"), replace(without, host="node2")])
    assert [difference.text for difference in found if difference.kind == "credential"] == [
        f"{name}: set on node1; not set on node2" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN")
    ]
    assert problem_of(found) is None


def test_data_in_s3_needs_its_credentials_on_every_host(
    config: RunConfig, own: HostFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = config.model_copy(update={"data": config.data.model_copy(update={"manifest": "s3://bucket/m.json"})})
    question = ask(remote)
    without = describe(remote, question, 1, CPU)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRET)
    beside = describe(remote, question, 0, CPU)
    withdraw(question)
    problem = problem_of(differences([replace(beside, host="node1"), replace(without, host="node2")]))
    assert isinstance(problem, ConfigError)
    assert "AWS_ACCESS_KEY_ID: set on node1; not set on node2" in str(problem)


def test_a_folder_that_cannot_be_written_is_an_error_even_where_all_agree(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    moved = config.model_copy(update={"run": config.run.model_copy(update={"output": str(tmp_path / "file" / "runs")})})
    question = ask(moved)
    hosts = [replace(describe(moved, question, rank, CPU), host=f"node{rank}") for rank in range(2)]
    withdraw(question)
    assert "run.output: cannot be written (Not a directory) on all 2 hosts" in texts(*hosts)


def test_looking_leaves_no_trace(config: RunConfig, tmp_path: Path) -> None:
    output = tmp_path / "some" / "runs"
    moved = config.model_copy(update={"run": config.run.model_copy(update={"output": str(output)})})
    question = ask(moved)
    assert [path.name for path in output.iterdir()] == [Path(question.path).name]
    assert describe(moved, question, 0, CPU).facts["shared", "run.output"] == "shared"
    withdraw(question)
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_of_the_same_name_is_not_taken_for_ours(config: RunConfig) -> None:
    question = ask(config)
    Path(question.path).write_text("of another folder")
    assert describe(config, question, 0, CPU).facts["shared", "run.output"] == "another file"
    withdraw(question)


def test_large_files_are_told_apart_by_a_part_of_them(config: RunConfig, tmp_path: Path) -> None:
    """A manifest of 8 MiB, of which other data change every entry; weights of the same size."""
    content = os.urandom(8 << 20)
    prints = set()
    for change in (0, 1):
        (tmp_path / "manifest.json").write_bytes(bytes(byte ^ change for byte in content))
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "model.safetensors").write_bytes(bytes(byte ^ change for byte in content[: 1 << 20]))
        moved = config.model_copy(
            update={
                "data": config.data.model_copy(update={"manifest": str(tmp_path / "manifest.json")}),
                "teacher": config.teacher.model_copy(update={"model": str(tmp_path / "model")}),
            }
        )
        question = ask(moved)
        facts = describe(moved, question, 0, CPU).facts
        withdraw(question)
        prints |= {value for key, value in facts.items() if key[1].startswith(("data.manifest", "teacher.model"))}
    assert len(prints) == 4


def test_a_changed_line_of_the_source_is_another_checkout(tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(ROOT / "engine", engine, ignore=shutil.ignore_patterns("__pycache__"))
    same = source_version(engine).split()[0]
    assert same == source_version().split()[0]
    with (engine / "schedule.py").open("a") as file:
        file.write("# a change\n")
    assert source_version(engine).split()[0] != same
