"""Two real ranks, the second dressed as another host: what it has otherwise ends both at once, and it is named."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests import tiny
from tests.launching import ROOT, ForkedScript, write_config

HERE = socket.gethostname()


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hosts")
    tiny.run_config(root)
    return root


def disguised(path: Path, script: str, at: Path, packages: Path | None = None, clock_seconds: float = 0.0) -> Path:
    """A program that is ``script`` on a host called node2, whose working folder is ``at``."""
    path.write_text(
        f"""
import os, runpy, socket, sys, time
true_time = time.time
time.time = lambda: true_time() + {clock_seconds}
socket.gethostname = lambda: "node2"
sys.path.insert(0, {str(packages)!r})
os.chdir({str(at)!r})
runpy.run_path({str(ROOT / "launch" / script)!r}, run_name="__main__")
"""
    )
    return path


def two_hosts(programs: list[Path], words: list[str], folder: Path, **variables: str) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of two ranks, or of the first alone, each the first of its host. ``variables`` are the
    second one's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fixed = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    ranks = []
    for rank, (program, log) in enumerate(zip(programs, logs)):
        own = os.environ | fixed | {"RANK": str(rank)} | (variables if rank else {})
        ranks.append(ForkedScript([str(program), *words], own, log))
    try:
        codes = [rank.wait(90) for rank in ranks]
    except subprocess.TimeoutExpired:
        raise AssertionError("\n".join(log.read_text() for log in logs)) from None
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(9)
    return codes, [log.read_text() for log in logs[: len(ranks)]]


def relative(folder: Path) -> Path:
    """A run whose paths lead to whatever lies in the working folder of each host."""
    config = tiny.run_config(folder)
    config["run"]["output"] = "runs"
    config["data"]["manifest"] = "train/manifest.json"
    config["teacher"]["model"] = "teacher"
    return write_config(folder / "run.yaml", config)


def test_another_version_and_another_variable_end_both_ranks_at_once(origin: Path, tmp_path: Path) -> None:
    other = tmp_path / "packages" / "transformers-5.20.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.20.1\n")
    node2 = disguised(tmp_path / "node2.py", "distill.py", ROOT, other.parent)
    config = tiny.run_config(origin)
    words = ["--config", str(write_config(tmp_path / "run.yaml", config))]
    codes, outputs = two_hosts([ROOT / "launch" / "distill.py", node2], words, tmp_path, NCCL_ALGO="Ring")
    assert codes == [2, 2], outputs
    for words_of_it in (
        "the hosts of this run are not alike:",
        "; 5.20.1 on node2",
        f"NCCL_ALGO: not set on {HERE}; Ring on node2",
    ):
        assert words_of_it in outputs[0]
    assert "teacher: " not in outputs[0], "a model has been loaded"
    assert "Traceback" not in "".join(outputs)
    assert not (origin / "runs").exists()


def test_other_data_and_a_folder_that_is_not_shared(origin: Path, tmp_path: Path) -> None:
    for node in ("node1", "node2"):
        shutil.copytree(origin / "train", tmp_path / node / "train")
        shutil.copytree(origin / "teacher", tmp_path / node / "teacher")
    config = relative(tmp_path / "node1")
    tiny.shards(tmp_path / "node2" / "train", "causal_lm", seed=5)
    (tmp_path / "node2" / "teacher" / "model.safetensors").unlink()
    programs = [disguised(tmp_path / f"{node}.py", "distill.py", tmp_path / node) for node in ("node1", "node2")]
    codes, outputs = two_hosts(programs, ["--config", str(config)], tmp_path)
    assert codes == [2, 2], outputs
    lines = outputs[0].splitlines()
    assert any("run.output: shared on node2 (rank 0); rank 0's file is not seen on node2 (rank 1)" in x for x in lines)
    assert any("data.manifest train/manifest.json: " in line for line in lines)
    assert any("teacher.model teacher: " in line for line in lines)
    assert not (tmp_path / "node1" / "runs").exists()


def test_preflight_shows_two_hosts_and_says_yes(origin: Path, tmp_path: Path) -> None:
    words = ["--config", str(write_config(tmp_path / "run.yaml", tiny.run_config(origin))), "--cluster"]
    node2 = disguised(tmp_path / "node2.py", "preflight.py", ROOT)
    codes, outputs = two_hosts([ROOT / "launch" / "preflight.py", node2], words, tmp_path)
    assert codes == [0, 0], outputs
    lines = outputs[0].splitlines()
    assert "Verdict     YES, the hosts are ready for this run" in lines
    assert any(line.startswith("Cluster     2 hosts, 2 ranks, cpu over gloo") and "node2" in line for line in lines)
    assert [line.split()[0] for line in lines[lines.index("") + 2 :][:2]] == [HERE, "node2"]
    assert any(line.startswith("All-reduce  1.0 MB in ") for line in lines)
    assert max(map(len, lines)) <= 80
    assert "Verdict" not in outputs[1]


def test_preflight_says_no_and_names_the_host_that_differs(origin: Path, tmp_path: Path) -> None:
    """Its clock is wrong by a minute as well, and the run's batch does not fit the ranks."""
    config = tiny.run_config(origin, data={"lanes": 3})
    words = ["--config", str(write_config(tmp_path / "run.yaml", config)), "--cluster"]
    node2 = disguised(tmp_path / "node2.py", "preflight.py", ROOT, clock_seconds=60.0)
    codes, outputs = two_hosts([ROOT / "launch" / "preflight.py", node2], words, tmp_path, DS_ACCELERATOR="xpu")
    assert codes == [1, 1], outputs
    assert "Verdict     NO, 3 to mend:" in outputs[0]
    assert f"DS_ACCELERATOR: cpu on {HERE}; xpu on node2" in outputs[0]
    assert "node2: its clock is +60.0 s off rank 0's" in outputs[0]
    assert "data.lanes = 3 cannot be shared evenly by 2 ranks" in outputs[0]


def test_preflight_names_the_host_that_does_not_come(origin: Path, tmp_path: Path) -> None:
    words = ["--config", str(write_config(tmp_path / "run.yaml", tiny.run_config(origin))), "--cluster"]
    (tmp_path / "hosts").write_text(f"{HERE} slots=1\nnode2 slots=1\n")
    words += ["--hostfile", str(tmp_path / "hosts"), "--join-seconds", "1"]
    codes, outputs = two_hosts([ROOT / "launch" / "preflight.py"], words, tmp_path)
    assert codes == [1], outputs
    assert "Verdict     NO: 1 of 2 ranks did not come within 1 s: rank 1 of node2;" in outputs[0]
