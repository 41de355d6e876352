"""The loader: the same global batches however the work is cut, from any step, with damage and errors in their place."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.data.address import read_bytes
from engine.data.collate import Labelled
from engine.data.loader import Loader
from engine.data.manifest import MANIFEST, Manifest, ShardEntry, write_manifest
from engine.data.order import DataOrder
from engine.data.shard_writer import ShardWriter
from engine.data.shards import ShardSet
from engine.errors import DataError, StoreError
from engine.schema import IGNORE, Batch, Sample, StepBatches
from tests.serving import Fault, Server, in_a_hurry

SHARDS = [40, 25, 33, 31]
SEQUENCE_TOKENS = 16
PATIENCE_SECONDS = 40.0


class MemoryShards:
    """What a ShardSet does, from nothing: every sample's tokens follow from its place. Counts its reads."""

    def __init__(self, damaged: set[tuple[int, int]] | None = None) -> None:
        self.reads: list[tuple[int, int]] = []
        self.damaged = damaged or set()
        entries = tuple(ShardEntry(f"{shard}.tar", size, 0, 0, "", "", "") for shard, size in enumerate(SHARDS))
        self.manifest = Manifest("causal_lm", "", 60_000, 0, SEQUENCE_TOKENS, 0, entries, "", "")

    def read(self, shard: int, index: int) -> Sample:
        self.reads.append((shard, index))
        if (shard, index) in self.damaged:
            raise DataError(f"{shard}.tar, sample {index}: flipped bit")
        first = 1 + index % 15
        token_ids = np.arange(SEQUENCE_TOKENS, dtype=np.uint16) + 1000 * shard + 10 * index
        return Sample(
            f"{shard}.tar", f"{index}", token_ids, np.array([first, SEQUENCE_TOKENS - first], dtype=np.uint32)
        )


def label(samples: Sequence[Sample], rounds: Sequence[int]) -> Labelled:
    """Labels that show the round."""
    token_ids = np.concatenate([sample.token_ids for sample in samples])
    return token_ids, np.repeat(np.array(rounds), [len(sample.token_ids) for sample in samples])


def make_loader(shards: MemoryShards | None = None, **settings: int) -> Loader:
    shards = shards or MemoryShards()
    order = DataOrder(SHARDS, seed=settings.pop("seed", 5), lanes=settings.pop("lanes", 8), shuffle_samples=6)
    settings = {"num_steps": 20, "global_sequences": 16, "micro_sequences": 4, **settings}
    return Loader(shards, order, label, **settings)


Rows = list[tuple[str, bytes]]


def rows_of(batches: tuple[Batch, ...]) -> Rows:
    """Name and all bytes of each sequence, in order."""
    rows = []
    for batch in batches:
        fields = (batch.input_ids, batch.labels, batch.segment_ids, batch.position_ids)
        for row, name in enumerate(batch.names):
            rows.append((name, b"".join(field[row].numpy().tobytes() for field in fields)))
    return rows


def global_batches(world_size: int, **settings: int) -> list[Rows]:
    """The sequences of each step, put together from all ranks: c is at place c div W of rank c mod W."""
    ranks = [list(make_loader(rank=rank, world_size=world_size, **settings).steps()) for rank in range(world_size)]
    steps = []
    for of_ranks in zip(*ranks, strict=True):
        assert len({step.step for step in of_ranks}) == 1
        of_each_rank = [rows_of(step.micro_batches) for step in of_ranks]
        steps.append([row for turn in zip(*of_each_rank, strict=True) for row in turn])
    return steps


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("reader_threads", [1, 3])
@pytest.mark.parametrize("micro_sequences", [1, 2, 4])
def test_global_batches_do_not_depend_on_how_they_are_cut(
    world_size: int, reader_threads: int, micro_sequences: int
) -> None:
    plain = global_batches(1, micro_sequences=16, reader_threads=1, prefetch_steps=1)
    assert global_batches(world_size, micro_sequences=micro_sequences, reader_threads=reader_threads) == plain


def test_micro_batches_have_their_size() -> None:
    step = next(make_loader(rank=1, world_size=2, micro_sequences=2).steps())
    assert [batch.input_ids.shape[0] for batch in step.micro_batches] == [2, 2, 2, 2]


@pytest.mark.parametrize("start_step", [1, 7, 19])
def test_starting_at_a_step_equals_skipping_to_it(start_step: int) -> None:
    skipped = [step for step in make_loader().steps() if step.step >= start_step]
    started = list(make_loader().steps(start_step))
    assert [step.step for step in started] == list(range(start_step, 20))
    for a, b in zip(skipped, started, strict=True):
        assert rows_of(a.micro_batches) == rows_of(b.micro_batches)
        assert a.epoch == b.epoch


def test_every_sample_once_an_epoch_and_the_round_is_the_epoch() -> None:
    """129 samples in 8 lanes: 128 an epoch, 8 steps of 16."""
    steps = list(make_loader(num_steps=24).steps())
    for epoch in range(3):
        of_epoch = steps[8 * epoch : 8 * epoch + 8]
        names = Counter(name for step in of_epoch for batch in step.micro_batches for name in batch.names)
        assert len(names) == 128
        assert set(names.values()) == {1}
        assert {int(batch.labels[0, 0]) for step in of_epoch for batch in step.micro_batches} == {epoch}
        assert [step.epoch for step in of_epoch] == [epoch + i / 8 for i in range(8)]


def test_seed_and_lanes_change_the_order() -> None:
    orders = [rows_of(next(make_loader(**change).steps()).micro_batches) for change in ({}, {"seed": 6}, {"lanes": 4})]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_resuming_late_in_an_epoch_reads_only_what_it_needs() -> None:
    shards = MemoryShards()
    steps = make_loader(shards, num_steps=10_000, prefetch_steps=2).steps(7_999)
    next(steps)
    steps.close()
    needed = Counter(located(c) for c in range(7_999 * 16, 8_002 * 16))
    assert len(shards.reads) >= 16
    assert Counter(shards.reads) <= needed


def test_reads_ahead_no_more_than_it_was_told() -> None:
    shards = MemoryShards()
    steps = make_loader(shards, num_steps=20, prefetch_steps=2).steps()
    for taken in range(1, 11):
        next(steps)
        assert len(shards.reads) <= (taken + 2) * 16
    steps.close()


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_closing_the_iterator_ends_its_threads() -> None:
    steps = make_loader(reader_threads=3).steps()
    next(steps)
    assert reader_threads()
    steps.close()
    assert not reader_threads()


def located(sequence: int) -> tuple[int, int]:
    where = DataOrder(SHARDS, seed=5, lanes=8, shuffle_samples=6).locate(sequence)
    return where.shard, where.index


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What our logger is told, whether or not a run was set up in this process before (which ends propagation)."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("stillhouse").addHandler(handler)
    yield told
    logging.getLogger("stillhouse").removeHandler(handler)


def test_damaged_record_is_replaced_counted_and_logged(messages: list[str]) -> None:
    first, second = located(16 * 3 + 5), located(16 * 6 + 1)
    whole = list(make_loader().steps())
    steps = list(make_loader(MemoryShards({first, second}), num_steps=8, max_bad_samples=2, reader_threads=3).steps())
    assert [step.num_bad_samples for step in steps] == [0, 0, 0, 1, 1, 1, 2, 2]
    batch = steps[3].micro_batches[1]
    assert batch.names[1] == f"{first[0]}.tar/record {first[1]}"
    assert batch.labels[1].eq(IGNORE).all()
    assert set(batch.token_rows.tolist()) == set(range(4 * SEQUENCE_TOKENS)) - set(
        range(SEQUENCE_TOKENS, 2 * SEQUENCE_TOKENS)
    )
    assert torch.equal(batch.input_ids[[0, 2, 3]], whole[3].micro_batches[1].input_ids[[0, 2, 3]])
    assert len(messages) == 2
    assert f"{first[0]}.tar, sample {first[1]}: flipped bit" in messages[0]


def taken_until_error(steps: Iterator[StepBatches]) -> tuple[list[int], str]:
    taken = []
    with pytest.raises(DataError) as caught:  # noqa: PT012 - where it is raised is the point
        for step in steps:
            taken.append(step.step)
    return taken, str(caught.value)


def test_one_damaged_record_too_many_is_raised_at_its_step() -> None:
    damaged = {located(16 * 3 + 5), located(16 * 6 + 1)}
    taken, message = taken_until_error(make_loader(MemoryShards(damaged), reader_threads=3, max_bad_samples=1).steps())
    assert taken == [0, 1, 2, 3, 4, 5]
    shard, index = located(16 * 6 + 1)
    assert f"{shard}.tar, sample {index}: flipped bit" in message
    assert "data.max_bad_samples is 1" in message
    assert not reader_threads()


def test_a_server_that_refuses_is_no_damage(tmp_path: Path) -> None:
    write_real_shards(tmp_path)
    server = Server(tmp_path)
    shards = ShardSet.open(f"{server.address}/{MANIFEST}")
    server.faults.extend([Fault(403)] * 100)
    order = DataOrder(SHARDS, seed=5, lanes=8, shuffle_samples=6)
    settings = {"num_steps": 8, "global_sequences": 16, "micro_sequences": 4, "max_bad_samples": 1000}
    with pytest.raises(StoreError, match="403"):
        next(Loader(shards, order, label, **settings).steps())


class RemoteShards(MemoryShards):
    """Each sample is a request."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        (server.folder / "sample").write_bytes(b"x")

    def read(self, shard: int, index: int) -> Sample:
        read_bytes(f"{self.server.address}/sample")
        return super().read(shard, index)


@pytest.mark.parametrize("reader_threads", [1, 3])
def test_an_error_does_not_wait_for_a_server_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader_threads: int
) -> None:
    in_a_hurry(monkeypatch, retry_seconds=PATIENCE_SECONDS)
    server = Server(tmp_path)
    server.faults.extend([Fault(403), *[Fault(503, retry_after="600")] * 100])
    begin = time.monotonic()
    with pytest.raises(StoreError, match="403"):
        next(make_loader(RemoteShards(server), reader_threads=reader_threads).steps())
    assert time.monotonic() - begin < PATIENCE_SECONDS / 2


def test_closing_does_not_wait_for_a_server_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_hurry(monkeypatch, retry_seconds=PATIENCE_SECONDS)
    server = Server(tmp_path)
    server.faults.extend([*[Fault()] * 16, *[Fault(503, retry_after="600")] * 100])
    steps = make_loader(RemoteShards(server)).steps()
    assert next(steps).step == 0
    begin = time.monotonic()
    while len(server.faults) == 100 and time.monotonic() - begin < PATIENCE_SECONDS:
        time.sleep(0.01)
    steps.close()
    assert time.monotonic() - begin < PATIENCE_SECONDS / 2
    assert not reader_threads()


def test_bad_samples_of_before_a_resume_count() -> None:
    damaged = {located(16 * 6 + 1)}
    steps = list(make_loader(MemoryShards(damaged), num_steps=8, max_bad_samples=4, num_bad_samples=3).steps(5))
    assert [step.num_bad_samples for step in steps] == [3, 4, 4]
    taken, _ = taken_until_error(make_loader(MemoryShards(damaged), max_bad_samples=3, num_bad_samples=3).steps(5))
    assert taken == [5]


def test_other_errors_surface_at_their_step_too() -> None:
    shards = MemoryShards()
    target = located(16 * 2)

    def failing(samples: Sequence[Sample], rounds: Sequence[int]) -> Labelled:
        if f"{target[0]}.tar/{target[1]}" in {sample.name for sample in samples}:
            raise ZeroDivisionError("in the label function")
        return label(samples, rounds)

    order = DataOrder(SHARDS, seed=5, lanes=8, shuffle_samples=6)
    steps = Loader(
        shards, order, failing, num_steps=9, global_sequences=16, micro_sequences=8, max_bad_samples=9
    ).steps()
    assert [next(steps).step, next(steps).step] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(steps)
    assert not reader_threads()


def write_real_shards(folder: Path) -> ShardSet:
    """The samples of MemoryShards on disk."""
    memory, entries = MemoryShards(), []
    for shard, size in enumerate(SHARDS):
        with ShardWriter(folder / f"{shard}.tar", np.dtype("<u2")) as writer:
            for index in range(size):
                sample = memory.read(shard, index)
                writer.add(sample.key, sample.token_ids, sample.document_tokens)
        entries.append(writer.entry)
    write_manifest(folder, replace(memory.manifest, shards=tuple(entries)), np.zeros(60_000, dtype=np.int64))
    return ShardSet.open(str(folder / MANIFEST))


def test_shards_on_disk_give_the_same_and_a_flipped_bit_is_one_bad_sample(tmp_path: Path) -> None:
    order = DataOrder(SHARDS, seed=5, lanes=8, shuffle_samples=6)
    settings = {"num_steps": 8, "global_sequences": 16, "micro_sequences": 4, "max_bad_samples": 1}
    in_memory = [rows_of(step.micro_batches) for step in make_loader(num_steps=8).steps()]
    steps = list(Loader(write_real_shards(tmp_path), order, label, **settings).steps())
    assert [rows_of(step.micro_batches) for step in steps] == in_memory
    shard, index = located(16 * 2 + 3)
    content = bytearray((tmp_path / f"{shard}.tar").read_bytes())
    start = content.index(f"{index}.tokens.npy\0".encode())
    content[start + 512 + 128] ^= 1
    (tmp_path / f"{shard}.tar").write_bytes(content)
    steps = list(Loader(ShardSet.open(str(tmp_path / MANIFEST)), order, label, **settings).steps())
    assert [step.num_bad_samples for step in steps] == [0, 0, 1, 1, 1, 1, 1, 1]
    differing = [
        (step.step, place)
        for step, expected in zip(steps, in_memory, strict=True)
        for place, (row, other) in enumerate(zip(rows_of(step.micro_batches), expected, strict=True))
        if row != other
    ]
    assert differing == [(2, 3)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_batches_are_the_same_batches() -> None:
    for plain, pinned in zip(make_loader().steps(), make_loader(pin_memory=True).steps(), strict=True):
        assert all(batch.input_ids.is_pinned() and batch.label_rows.is_pinned() for batch in pinned.micro_batches)
        assert rows_of(plain.micro_batches) == rows_of(pinned.micro_batches)
