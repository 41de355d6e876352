"""Shards behind a real nginx: slow, busy at random, asked too often, without ranges, gone and back."""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.data.client import CLIENT
from engine.data.shards import ShardSet
from engine.errors import DataError
from tests.serving import in_a_hurry
from tests.sharding import write_set

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed"),
]

CONFIG = """
user {user};
worker_processes 1;
pid {run}/nginx.pid;
error_log {run}/error.log notice;
daemon off;
events {{ worker_connections 64; }}
http {{
  access_log off;
  sendfile on;
  client_body_temp_path {run}/body; proxy_temp_path {run}/proxy; fastcgi_temp_path {run}/f;
  uwsgi_temp_path {run}/u; scgi_temp_path {run}/s;
  split_clients "$request_id" $flaky {{ 25% 1; * 0; }}
  limit_req_zone $binary_remote_addr zone=few:1m rate=20r/s;
  server {{
    listen 127.0.0.1:{port};
    location / {{ root {root}; }}
    location /slow/ {{ alias {root}/; limit_rate 100k; }}
    location /norange/ {{ alias {root}/; max_ranges 0; }}
    location /flaky/ {{ if ($flaky) {{ return 503; }} alias {root}/; }}
    location /limited/ {{ limit_req zone=few burst=2 nodelay; limit_req_status 429; alias {root}/; }}
    location /private/ {{ return 403; }}
  }}
}}
"""


class Nginx:
    def __init__(self, run: Path, root: Path) -> None:
        self.run = run
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        (run / "nginx.conf").write_text(CONFIG.format(user=getpass.getuser(), run=run, root=root, port=self.port))
        self.start()

    def start(self) -> None:
        words = ["nginx", "-c", str(self.run / "nginx.conf"), "-e", str(self.run / "error.log"), "-p", str(self.run)]
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(500):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            threading.Event().wait(0.02)
        raise AssertionError((self.run / "error.log").read_text())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
def nginx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nginx]:
    in_a_hurry(monkeypatch, retry_seconds=20.0)
    monkeypatch.setattr("engine.data.address.BLOCK_BYTES", 16384)
    for name in ("www", "run"):
        (tmp_path / name).mkdir()
    write_set(tmp_path / "www", (200, 50))
    server = Nginx(tmp_path / "run", tmp_path / "www")
    try:
        yield server
    finally:
        server.stop()


def keys(shards: ShardSet) -> list[tuple[str, int]]:
    found = []
    for shard, count in enumerate(shards.manifest.samples_per_shard):
        for index in np.random.default_rng(shard).permutation(count).tolist():
            sample = shards.read(shard, index)
            found.append((sample.key, int(sample.token_ids.sum())))
    return found


@pytest.mark.parametrize("place", ["", "slow/", "flaky/", "limited/"])
def test_the_same_samples_as_from_disk(nginx: Nginx, tmp_path: Path, place: str) -> None:
    expected = keys(ShardSet.open(str(tmp_path / "www" / "manifest.json")))
    CLIENT.take()
    assert keys(ShardSet.open(f"{nginx.address}/{place}manifest.json")) == expected
    assert (CLIENT.take().num_retries > 0) == (place in ("flaky/", "limited/"))


def test_gone_and_back(nginx: Nginx, tmp_path: Path) -> None:
    expected = keys(ShardSet.open(str(tmp_path / "www" / "manifest.json")))
    remote = ShardSet.open(f"{nginx.address}/manifest.json")
    remote.check(0)
    CLIENT.take()
    nginx.stop()
    back = threading.Timer(2.0, nginx.start)
    back.start()
    assert keys(remote) == expected
    back.join()
    assert CLIENT.take().num_retries > 0


def test_without_ranges_and_without_leave(nginx: Nginx) -> None:
    with pytest.raises(DataError, match="must answer range requests"):
        ShardSet.open(f"{nginx.address}/norange/manifest.json").read(0, 100)
    with pytest.raises(DataError, match=r"private/manifest\.json: cannot be read.*403"):
        ShardSet.open(f"{nginx.address}/private/manifest.json")
