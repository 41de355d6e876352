"""Shard servers that are slow, busy, cut replies short or are gone for a while: what is read is right, or an error."""

from __future__ import annotations

import logging
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engine.asking import read_batch
from engine.data import client
from engine.data.address import read_bytes
from engine.data.client import CLIENT
from engine.data.shards import ShardSet
from engine.errors import DataError, MissingError, StoreError
from engine.log import logger
from tests.serving import Fault, Server, as_s3, in_a_hurry
from tests.sharding import flip_a_bit, write_set

NUM_SAMPLES = 60


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    in_a_hurry(monkeypatch)
    (tmp_path / "shards").mkdir()
    write_set(tmp_path / "shards", (NUM_SAMPLES, 5))
    return Server(tmp_path)


@pytest.fixture(params=["http", "s3"])
def remote(request: pytest.FixtureRequest, server: Server, monkeypatch: pytest.MonkeyPatch) -> ShardSet:
    """The shards behind a web server and behind an S3 store, opened, with the first shard's index read."""
    if request.param == "s3":
        as_s3(server, monkeypatch)
    base = server.address if request.param == "http" else "s3:/"
    shards = ShardSet.open(f"{base}/shards/manifest.json")
    shards.check(0)
    CLIENT.take()
    return shards


@pytest.fixture
def messages() -> Iterator[list[str]]:
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def assert_right(remote: ShardSet, server: Server, index: int = 3) -> None:
    local = ShardSet.open(str(server.folder / "shards" / "manifest.json"))
    ours, theirs = remote.read(0, index), local.read(0, index)
    assert ours.key == theirs.key
    np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)


def asked(server: Server) -> list[str | None]:
    return [span for name, span in server.requests if name == "shard-000000.tar"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(503), Fault(500), Fault(502), Fault(429), Fault(408), Fault(503, retry_after="0"), Fault(keep_bytes=0),
        Fault(more_bytes=100), Fault(shift_bytes=512),
    ],
    ids=str,
)  # fmt: skip
def test_what_passes_is_asked_again(remote: ShardSet, server: Server, fault: Fault) -> None:
    server.faults.extend([fault, fault])
    if "s3" in remote.address and fault.shift_bytes:
        fault.shift_bytes, fault.status = 0, 503  # s3fs does not tell of the place
    assert_right(remote, server)
    traffic = CLIENT.take()
    assert (traffic.num_retries, len(server.faults)) == (2, 0)
    assert len(set(asked(server))) == 1, "nothing of such a reply can be used"


def test_only_what_is_missing_is_asked_again(remote: ShardSet, server: Server) -> None:
    num_bytes = remote.manifest.shards[0].num_bytes
    server.faults.extend([Fault(keep_bytes=5000), Fault(keep_bytes=7000)])
    assert_right(remote, server)
    starts = [int(str(span).removeprefix("bytes=").split("-")[0]) for span in asked(server)]
    assert starts == [0, 5000, 12000]
    assert CLIENT.take().num_bytes == num_bytes, "each byte came once"


def test_retry_after_is_honoured(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = ShardSet.open(f"{server.address}/shards/manifest.json")
    remote.check(0)
    paused: list[float] = []
    monkeypatch.setattr(client.time, "sleep", paused.append)
    server.faults.extend([Fault(503, retry_after="3"), Fault(503, retry_after="Thu, 01 Jan 1970 00:00:00 GMT")])
    assert_right(remote, server)
    waits = [pause for pause in paused if pause]
    assert 3.0 <= waits[0] <= 3.0 + client.FIRST_PAUSE_SECONDS
    assert waits[1] <= client.FIRST_PAUSE_SECONDS, "that date has passed"


def test_pauses_grow_with_jitter_up_to_a_limit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = ShardSet.open(f"{server.address}/shards/manifest.json")
    remote.check(0)
    most: list[float] = []
    monkeypatch.setattr(client.random, "uniform", lambda low, high: most.append(high) or 0.0)
    server.faults.extend([Fault(503)] * 6)
    assert_right(remote, server)
    assert most == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.2, 0.2])


def test_a_server_that_hangs_is_given_up_and_a_slow_one_is_not(remote: ShardSet, server: Server) -> None:
    CLIENT.timeout_seconds = 0.3
    server.faults.append(Fault(hang_seconds=1.0))
    assert_right(remote, server)
    assert CLIENT.take().num_retries == 1
    remote._blocks.forget((remote.address_of("shard-000000.tar"), 0))
    server.faults.append(Fault(drip_seconds=0.005))
    begin = time.monotonic()
    assert_right(remote, server)
    assert CLIENT.take().num_retries == 0
    assert time.monotonic() - begin > CLIENT.timeout_seconds, "or the reply was not slow enough to tell"


def test_a_server_that_is_gone_for_a_while(remote: ShardSet, server: Server, messages, monkeypatch) -> None:
    monkeypatch.setattr(client, "OUTAGE_SECONDS", 0.3)
    server.stop()
    back = threading.Timer(1.5, server.start)
    back.start()
    assert_right(remote, server)
    back.join()
    assert CLIENT.take().waiting_milliseconds >= 1000
    assert ["has not answered" in text for text in messages] == [True, False], messages
    assert "answers again" in messages[1]


def test_patience_has_an_end(remote: ShardSet, server: Server) -> None:
    CLIENT.retry_seconds = 0.5
    server.failures = 10**6
    with pytest.raises(StoreError, match=r"shard-000000\.tar: cannot be read after \d+ tries .*data\.retry_seconds"):
        remote.read(0, 0)
    server.failures = 0
    assert_right(remote, server)  # a failure is not remembered


def test_patience_is_with_the_server_whatever_is_asked(server: Server) -> None:
    CLIENT.retry_seconds = 0.5
    server.failures = 10**6
    for name in ("a", "b", "c"):
        CLIENT.take()
        with pytest.raises(StoreError, match="cannot be read after"):
            read_bytes(f"{server.address}/{name}")
    assert CLIENT.take().num_requests == 1, "its time was up before"
    server.failures = 0
    assert read_bytes(f"{server.address}/shards/manifest.json")
    server.failures = 1
    assert read_bytes(f"{server.address}/shards/manifest.json"), "it answered in between: its time begins anew"


def test_one_file_that_stays_away_ends_though_others_come(server: Server) -> None:
    CLIENT.retry_seconds = 0.5
    server.absent.add("shard-000000.tar")
    with ThreadPoolExecutor(1) as others:
        asked = others.submit(pytest.raises, StoreError, read_bytes, f"{server.address}/shards/shard-000000.tar")
        for _ in range(2000):
            read_bytes(f"{server.address}/shards/manifest.json")
            if asked.done():
                break
        assert asked.done()
        assert "cannot be read after" in str(asked.result().value)


def test_endless_scraps_are_no_progress(remote: ShardSet, server: Server) -> None:
    CLIENT.retry_seconds = 0.5
    server.faults.extend([Fault(keep_bytes=1)] * 2000)
    with pytest.raises(StoreError, match="cannot be read after"):
        remote.read(0, 0)


@pytest.mark.parametrize("status", [400, 401, 403])
def test_a_refusal_is_an_error_at_once(remote: ShardSet, server: Server, status: int) -> None:
    server.faults.append(Fault(status))
    with pytest.raises(StoreError, match=rf"shard-000000\.tar: cannot be read.*{status}.*look at the keys"):
        remote.read(0, 0)
    assert CLIENT.take().num_retries == 0


def test_a_refusal_is_not_kept_as_an_empty_record(remote: ShardSet, server: Server) -> None:
    damage: list[DataError] = []
    server.faults.append(Fault(403))
    with pytest.raises(StoreError):
        read_batch(remote, None, 0, 1, range(1), lambda error, *_: damage.append(error))  # type: ignore[arg-type]
    assert not damage


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_wrong_certificate_is_an_error_at_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=me"]
    subprocess.run(["openssl", *words, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.server.socket = context.wrap_socket(server.server.socket, server_side=True)
    server.address = server.address.replace("http:", "https:")
    if scheme == "s3":
        as_s3(server, monkeypatch)
    base = server.address if scheme == "http" else "s3:/"
    with pytest.raises(StoreError, match=r"manifest\.json: cannot be read.*[Cc]ertificate"):
        ShardSet.open(f"{base}/shards/manifest.json")
    assert CLIENT.take().num_retries == 0


def test_missing_keys_are_an_error_at_once(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_s3(server, monkeypatch)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    for name in ("SHARED_CREDENTIALS_FILE", "CONFIG_FILE"):
        monkeypatch.setenv(f"AWS_{name}", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreError, match=r"manifest\.json: cannot be read.*credentials.*look at the keys"):
        ShardSet.open("s3://shards/manifest.json")
    assert CLIENT.take().num_retries == 0


def test_a_missing_file_is_an_error_at_once(remote: ShardSet, server: Server) -> None:
    (server.folder / "shards" / "shard-000001.tar").unlink()
    with pytest.raises(MissingError, match=r"shard-000001\.tar: no such file"):
        remote.read(1, 0)
    assert CLIENT.take().num_retries == 0


def test_a_damaged_copy_on_the_way_is_fetched_anew(remote: ShardSet, server: Server) -> None:
    server.faults.append(Fault(flip=True))
    assert_right(remote, server, index=0)
    if remote.address.startswith("http"):
        assert [head.get("Cache-Control") for head in server.headers[-2:]] == [None, "no-cache"]
    server.faults.append(Fault(flip=True))
    np.testing.assert_array_equal(remote.token_counts(), np.zeros(remote.manifest.vocab_size))
    server.faults.append(Fault(flip=True))
    remote.check(1)
    assert not server.faults


def test_damage_at_the_source_is_an_error(server: Server) -> None:
    flip_a_bit(server.folder / "shards" / "shard-000000.tar")
    remote = ShardSet.open(f"{server.address}/shards/manifest.json")
    for _ in range(2):
        before = len(asked(server))
        with pytest.raises(DataError, match=r"sample 000000-00000020 .*flipped bits"):
            remote.read(0, 20)
        assert len(asked(server)) - before <= 2
    assert_right(remote, server, index=21)


@pytest.mark.parametrize("change", ["content", "length"])
def test_a_replaced_file_is_an_error(remote: ShardSet, server: Server, change: str) -> None:
    path = server.folder / "shards" / "shard-000000.tar"
    content = path.read_bytes()
    path.write_bytes(content[:-512] if change == "length" else bytes(reversed(content)))
    with pytest.raises(StoreError, match=r"shard-000000\.tar: the file was replaced .*before.*now"):
        remote.read(0, 0)


def test_a_file_replaced_between_two_halves(remote: ShardSet, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    path = server.folder / "shards" / "shard-000000.tar"
    server.faults.append(Fault(keep_bytes=5000))
    monkeypatch.setattr(client.time, "sleep", lambda _: path.write_bytes(path.read_bytes()))
    with pytest.raises(StoreError, match="was replaced"):
        remote.read(0, 0)


def test_small_files_of_servers_without_ranges(server: Server) -> None:
    server.ranges = False
    server.faults.extend([Fault(keep_bytes=200), Fault(), Fault(keep_bytes=100)])
    assert_right(ShardSet.open(f"{server.address}/shards/manifest.json"), server)


def test_replies_that_end_ever_at_the_same_place_are_no_progress(server: Server) -> None:
    """Of a server without ranges, each of them longer than what else counts as progress."""
    CLIENT.retry_seconds, server.ranges = 0.5, False
    (server.folder / "long").write_bytes(bytes(4 * client.PROGRESS_BYTES))
    server.faults.extend([Fault(keep_bytes=2 * client.PROGRESS_BYTES)] * 200)
    with pytest.raises(StoreError, match="cannot be read after"):
        read_bytes(f"{server.address}/long")
    assert server.faults, "it was asked until the server mended"


@pytest.mark.parametrize("status", [405, 501, 505])
def test_a_server_that_does_not_know_head_is_asked_for_the_first_byte(server: Server, status: int) -> None:
    server.head_status = status
    assert_right(ShardSet.open(f"{server.address}/shards/manifest.json"), server)
    assert CLIENT.take().num_retries == 0


def test_names_that_do_not_resolve_are_tried_again(server: Server) -> None:
    CLIENT.retry_seconds = 0.2
    with pytest.raises(StoreError, match=r"http://no-such-host\.invalid/m\.json: cannot be read after [2-9]"):
        ShardSet.open("http://no-such-host.invalid/m.json")
