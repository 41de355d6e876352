from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.config.following import TrackingSection
from engine.errors import CheckpointError
from engine.log import logger
from engine.tracking import EVENTS, METRICS, Tracker, read_records, wandb_run
from engine.tracking.records import RecordFile


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What is logged meanwhile."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def make_tracker(folder: Path, first_step: int = 0, resolved: dict | None = None, **settings) -> Tracker:
    return Tracker(folder, TrackingSection(**settings), "demo", resolved or {}, first_step)


def steps_in(folder: Path, name: str = METRICS) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / name).read_text().splitlines()]


def test_killed_and_resumed_run_has_each_record_once(tmp_path):
    body = f"""
import os, signal
from pathlib import Path
from engine.config.following import TrackingSection
from engine.tracking import Tracker
tracker = Tracker(Path({str(tmp_path)!r}), TrackingSection(), "demo", {{}}, 0)
for step in range(10, 80, 10):
    tracker.record(step, {{"loss/objective": step / 10}})
    if step % 20 == 0:
        tracker.record(step, {{"eval/student_loss": step / 20}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", body], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert steps_in(tmp_path)[-1] == 70, "what was recorded before the kill is in the file"
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 80, "loss/obj')
    tracker = make_tracker(tmp_path, first_step=40)
    for step in range(50, 110, 10):
        tracker.record(step, {"loss/objective": -1.0})
        if step % 20 == 0:
            tracker.record(step, {"eval/student_loss": -1.0})
    tracker.close("completed")
    records = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    trained = {record["step"]: record["loss/objective"] for record in records if "loss/objective" in record}
    assert steps_in(tmp_path) == [10, 20, 20, 30, 40, 40, 50, 60, 60, 70, 80, 80, 90, 100, 100]
    assert [trained[step] for step in (10, 40, 50, 100)] == [1.0, 4.0, -1.0, -1.0]
    events = [(event["event"], event["step"], event.get("status")) for event in read_records(tmp_path / EVENTS)]
    assert events == [("started", 0, None), ("resumed", 40, None), ("closed", 100, "completed")]


def test_start_from_nothing_drops_all_of_a_run_killed_before_its_first_checkpoint(tmp_path):
    for _ in range(2):
        tracker = make_tracker(tmp_path)
        tracker.record(0, {"eval/student_loss": 9.0})
        tracker.record(10, {"loss/objective": 8.0})
    assert steps_in(tmp_path) == [0, 10]


def test_metrics_are_untouched_when_the_drop_fails(tmp_path, monkeypatch):
    tracker = make_tracker(tmp_path)
    tracker.record(10, {"a": 1.0})
    tracker.record(20, {"a": 1.0})
    before = (tmp_path / METRICS).read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match="No space left"):
        make_tracker(tmp_path, first_step=10)
    assert (tmp_path / METRICS).read_bytes() == before


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    tracker = make_tracker(tmp_path)
    tracker.record(1, {"loss/objective": float("nan"), "train/grad_norm": float("inf"), "data/epoch": 1})
    (line,) = (tmp_path / METRICS).read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss/objective": None,
        "train/grad_norm": None,
        "data/epoch": 1.0,
        "nonfinite": ["loss/objective", "train/grad_norm"],
    }


def test_full_disk_neither_stops_training_nor_tears_lines_nor_loses_records(tmp_path, messages):
    file = RecordFile(tmp_path / METRICS)
    file.append({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / METRICS).stat().st_size + 5, hard))
    try:
        file.append({"step": 2})
        file.append({"step": 3})
        assert (tmp_path / METRICS).read_text() == '{"step": 1}\n'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    file.append({"step": 4})
    file.close()
    assert steps_in(tmp_path) == [1, 2, 3, 4]
    assert [message for message in messages if "training goes on" in message] == messages[:1]


def test_run_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(CheckpointError, match=r"run/metrics\.jsonl"):
        make_tracker(tmp_path / "run")


def test_other_ranks_write_nothing(tmp_path):
    config = TrackingSection(wandb="offline", tensorboard=True)
    tracker = Tracker(tmp_path / "run", config, "demo", {}, first_step=0, enabled=False)
    tracker.record(1, {"a": 1.0})
    tracker.close("completed")
    assert not (tmp_path / "run").exists()


def test_wandb_is_imported_only_when_asked_for(tmp_path):
    body = (
        "import sys\nfrom pathlib import Path\nfrom engine.config.following import TrackingSection\n"
        f"from engine.tracking import Tracker\nTracker(Path({str(tmp_path)!r}), TrackingSection(), 'demo', {{}}, 0)\n"
        "print([name for name in ('wandb', 'tensorboard', 'torch') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout == "[]\n"


class FakeWandb(SimpleNamespace):
    """Stands in for the module: remembers what it is given; ``faults`` are what an action does instead."""

    def __init__(self, **faults) -> None:
        super().__init__(faults=faults, started=[], logged=[], exit_codes=[], url="somewhere", has_key=True)
        self.settings = SimpleNamespace(sync_dir="wandb/run-x")

    def _meet(self, action: str) -> None:
        if action in self.faults:
            self.faults[action]()

    def Settings(self, **settings) -> dict:
        return settings

    def login(self, prompt: bool) -> bool:
        assert not prompt, "a question would wait for an answer"
        self._meet("login")
        return self.has_key

    def init(self, **arguments) -> FakeWandb:
        self._meet("init")
        self.started.append(arguments)
        return self

    def teardown(self) -> None:
        pass

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        pass

    def log(self, record: dict) -> None:
        self._meet("log")
        self.logged.append(record)

    def finish(self, exit_code: int) -> None:
        self._meet("finish")
        self.exit_codes.append(exit_code)


@pytest.fixture
def use_wandb(monkeypatch):
    """Install a fake wandb."""

    def install(**faults) -> FakeWandb:
        fake = FakeWandb(**faults)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return install


def fail(kind: type[BaseException] = RuntimeError):
    def raise_it() -> None:
        raise kind("503 from the service")

    return raise_it


def test_wandb_run_goes_on_under_the_same_id_after_a_resume(tmp_path, use_wandb):
    fake = use_wandb()
    for first_step, status in ((0, "failed"), (20, "completed")):
        tracker = make_tracker(tmp_path, first_step, {"batch": {"x": 1}}, wandb="online", wandb_entity="team")
        tracker.record(first_step + 10, {"loss/objective": 1.5})
        tracker.close(status)
    first, second = fake.started
    assert first["id"] == second["id"] == (tmp_path / "wandb_id").read_text().strip()
    assert first["resume"] == second["resume"] == "allow"
    assert (first["project"], first["entity"], first["name"], first["mode"]) == ("stillhouse", "team", "demo", "online")
    assert first["config"] == {"batch": {"x": 1}}
    assert fake.logged == [{"step": 10, "loss/objective": 1.5}, {"step": 30, "loss/objective": 1.5}]
    assert fake.exit_codes == [1, 0]


@pytest.mark.parametrize("kind", [RuntimeError, SystemExit])
@pytest.mark.parametrize("action", ["login", "init", "log", "finish"])
def test_wandb_error_is_told_once_and_training_goes_on(action, kind, tmp_path, use_wandb, messages):
    use_wandb(**{action: fail(kind)})
    tracker = make_tracker(tmp_path, wandb="online")
    for step in range(1, 6):
        tracker.record(step, {"loss/objective": 1.0})
    tracker.close("completed")
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
    why = f"{kind.__name__}: 503 from the service"
    told = {
        "login": f"wandb: online was asked for, but {why}; training goes on and the run is kept offline. Afterwards: "
        f"wandb sync {Path.cwd()}/wandb/run-x",
        "init": f"wandb could not start ({why}); training goes on, metrics.jsonl is whole",
    }
    later = (
        f"wandb could not {action} ({why}); training goes on, metrics.jsonl is whole. What it did not get is kept; "
        f"afterwards: wandb sync {Path.cwd()}/wandb/run-x"
    )
    assert [message for message in messages if "503 from the service" in message] == [told.get(action, later)]


def test_wandb_recovers_after_an_outage(tmp_path, use_wandb):
    fake = use_wandb(log=fail())
    tracker = make_tracker(tmp_path, wandb="online")
    tracker.record(1, {"a": 1.0})
    sink = tracker._sinks[0]
    while sink._queue.qsize() or not sink._warned:
        threading.Event().wait(0.01)
    fake.faults.clear()
    tracker.record(2, {"a": 1.0})
    tracker.close("completed")
    assert fake.logged == [{"step": 2, "a": 1.0}]


@pytest.mark.parametrize("action", ["init", "log", "finish"])
def test_wandb_that_hangs_never_stalls_training(action, tmp_path, use_wandb, messages, monkeypatch):
    monkeypatch.setattr(wandb_run, "QUEUE_RECORDS", 3)
    monkeypatch.setattr(wandb_run, "CLOSE_SECONDS", 0.2)
    reached, release = threading.Event(), threading.Event()

    def hang() -> None:
        reached.set()
        release.wait()

    use_wandb(**{action: hang})
    tracker = make_tracker(tmp_path, wandb="online")
    tracker.record(1, {"a": 1.0})
    if action != "finish":
        assert reached.wait(10)
        for step in range(2, 20):
            tracker.record(step, {"a": 1.0})
    tracker.close("completed")  # returning is the test
    told = " ".join(messages)
    assert "wandb did not finish" in told
    assert ("wandb missed" in told) == (action != "finish")
    assert steps_in(tmp_path)[-1] == (1 if action == "finish" else 19)
    release.set()


def test_online_without_a_key_is_kept_offline_and_said(tmp_path, use_wandb, messages):
    fake = use_wandb()
    fake.has_key = False
    tracker = make_tracker(tmp_path, wandb="online")
    tracker.close("completed")
    assert fake.started[0]["mode"] == "offline"
    assert any("WANDB_API_KEY" in message for message in messages)


@pytest.fixture
def offline_run(tmp_path) -> Path:
    """The real wandb and TensorBoard, in a process of their own, without a network."""
    body = f"""
from pathlib import Path
from engine.config.following import TrackingSection
from engine.tracking import Tracker
for first_step in (0, 10):
    config = TrackingSection(wandb="offline", tensorboard=True)
    tracker = Tracker(Path({str(tmp_path)!r}), config, "demo", {{"run": {{"seed": 1}}}}, first_step)
    for step in (first_step + 10, first_step + 20):
        tracker.record(step, {{"loss/objective": 100.0 * (first_step > 0) + step, "bad": float("nan")}})
    tracker.close("completed")
"""
    ended = subprocess.run(
        [sys.executable, "-c", body],
        env={**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (ended.returncode, ended.stderr, ended.stdout) == (0, "", "")
    return tmp_path


def silent(folder: Path) -> None:
    """Listens and never answers."""
    listening = socket.create_server(("127.0.0.1", 0))
    with listening, contextlib.ExitStack() as kept:
        (folder / "port").write_text(str(listening.getsockname()[1]))
        while True:
            kept.enter_context(listening.accept()[0])


class Service(BaseHTTPRequestHandler):
    """As much of the service as a run needs to start; how many questions it answers is a class variable."""

    num_answers = 10**6

    def do_POST(self) -> None:
        question = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = question.decode(errors="replace") if self.path == "/graphql" else ""
        if query:
            Service.num_answers -= 1
        if Service.num_answers < 0:
            time.sleep(1000)
        project = {"id": "p", "name": "stillhouse", "entity": {"id": "e", "name": "team"}}
        name = json.loads(question)["variables"].get("name") if "upsertBucket" in query else None
        bucket = {
            "id": "x",
            "name": name,
            "displayName": "d",
            "config": "{}",
            "historyLineCount": 0,
            "project": project,
        }
        viewer = {"id": "u", "entity": "team", "username": "me", "flags": "{}", "teams": {"edges": []}}
        data = {"upsertBucket": {"bucket": bucket, "inserted": True}} if "upsertBucket" in query else {"model": None}
        content = json.dumps({"data": {"viewer": viewer} if "viewer {" in query else data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def serving(folder: Path, num_answers: int) -> None:
    Service.num_answers = num_answers
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    (folder / "port").write_text(str(server.server_port))
    server.serve_forever()


AWAY = """
import os, signal, sys
from pathlib import Path
from engine.config.following import TrackingSection
from engine.log import setup
from engine.tracking import Tracker, wandb_run
wandb_run.START_SECONDS, wandb_run.CLOSE_SECONDS = 5.0, 10.0
folder, server = Path(sys.argv[1]), int(sys.argv[2])
setup(0)
tracker = Tracker(folder, TrackingSection(wandb="online"), "demo", {}, 0)
for step in range(1, 4):
    tracker.record(step, {"loss/objective": float(step)})
    if step == 1 and server:
        while tracker._sinks[0]._queue.qsize():  # until the run is there and has taken the record
            pass
        os.kill(server, signal.SIGKILL)
wandb_run.CLOSE_SECONDS = 60.0
tracker.close("completed")
"""


@pytest.mark.parametrize("case", ["refuses", "hangs", "answers_once", "dies"])
def test_real_wandb_without_its_service(case, tmp_path):
    """Training goes on, and the files that the log names hold every record."""
    ways = {
        "hangs": (silent, (tmp_path,)),
        "answers_once": (serving, (tmp_path, 1)),
        "dies": (serving, (tmp_path, 10**6)),
    }
    server = None
    address = "http://127.0.0.1:9"
    if case in ways:
        way, arguments = ways[case]
        server = multiprocessing.get_context("fork").Process(target=way, args=arguments, daemon=True)
        server.start()
        while not (tmp_path / "port").exists() or not (tmp_path / "port").read_text():
            threading.Event().wait(0.02)
        address = f"http://127.0.0.1:{(tmp_path / 'port').read_text()}"
    dies = str(server.pid) if server is not None and case == "dies" else "0"
    ended = subprocess.run(
        [sys.executable, "-c", AWAY, str(tmp_path / "run"), dies],
        env={**os.environ, "WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40},
        capture_output=True,
        text=True,
        timeout=100,
    )
    if server is not None:
        server.kill()
    told = ended.stdout + ended.stderr
    assert ended.returncode == 0, told
    assert steps_in(tmp_path / "run") == [1, 2, 3]
    (path,) = set(re.findall(r"wandb sync (\S+)", " ".join(told.split())))
    assert path.startswith(str(tmp_path / "run" / "wandb")), told
    (kept,) = Path(path).glob("run-*.wandb")
    assert kept.read_bytes().count(b"loss/objective") >= 3, "every record is in the file"


def test_real_wandb_offline_and_tensorboard(offline_run):
    run_id = (offline_run / "wandb_id").read_text().strip()
    kept = sorted(path.name for path in offline_run.glob("wandb/offline-run-*/run-*.wandb"))
    assert kept == [f"run-{run_id}.wandb"] * 2
    assert all(path.stat().st_size > 0 for path in offline_run.glob("wandb/offline-run-*/run-*.wandb"))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(offline_run / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/objective")] == [(10, 10), (20, 120), (30, 130)]
