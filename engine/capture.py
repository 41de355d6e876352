"""Asking the teacher once: whole shards are claimed and answered, by any number of jobs at once."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from engine.cache.claims import Claims
from engine.cache.folder import CLAIMS, unwritable
from engine.cache.journal import fold
from engine.cache.recording import Asked, build_recorder
from engine.cache.sidecar import Record, SidecarWriter, Sums
from engine.config.cache import HiddenSection
from engine.config.checks import check_cache
from engine.config.resolve import DataFacts, read_deepspeed_json, resolve
from engine.config.run import RunConfig
from engine.data.collate import collate
from engine.data.manifest import ShardEntry
from engine.data.shards import ShardSet
from engine.dist import StopSignal
from engine.errors import DataError
from engine.models import DTYPES, cast, load_model, move
from engine.parts import accelerator_of, check_model, shared_tokenizer
from engine.schema import Sample
from engine.tasks.task import build_task
from engine.tasks.tokenizer import vocab_size
from engine.teacher.online import OnlineTeacher
from engine.teacher.opening import join_cache

log = logging.getLogger("stillhouse")

_AHEAD = 2
"""Batches read while the teacher works, and batches of answers that wait to be encoded."""


@dataclass(frozen=True)
class Standing:
    """How far the cache is, and what this job has done."""

    num_shards: int
    num_done: int
    num_claimed: int
    """by any job, this one too"""
    num_tokens: int
    """by this job"""
    seconds: float
    """since this job began"""
    bytes_a_position: float
    tokens_left: int

    @property
    def tokens_a_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds else 0.0


class Capture:
    """The teacher, the data and the cache of one job, checked against each other.

    Raises ConfigError, DataError or CacheError.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        check_cache(config)
        assert config.teacher.cache is not None
        self._config, self._device = config, device
        self.shards = ShardSet.open(config.data.manifest, allow_pipe=config.data.allow_pipe)
        manifest = self.shards.manifest
        content, name = read_deepspeed_json(config.zero)
        run = resolve(
            config,
            world_size=1,
            accelerator=accelerator_of(device),
            data=DataFacts(manifest.num_samples, manifest.sequence_tokens, manifest.vocab_size, manifest.task),
            deepspeed_json=content,
            deepspeed_name=name,
        )
        tokenizer = shared_tokenizer(config)
        self._task = build_task(config.task, tokenizer, manifest, self.shards.token_counts())
        model = load_model(config.teacher, self._task.model_class_name, torch.float32, "teacher")
        check_model(model, self._task, "teacher", vocab_size(tokenizer), manifest.sequence_tokens)
        log.info(
            "teacher: %s, %s parameters, %s", type(model).__name__, f"{model.num_parameters():,}", run.teacher_precision
        )
        codec = config.cache.codec
        self._teacher = OnlineTeacher(
            move(cast(model, DTYPES[run.teacher_precision]), device),
            self._task.model_inputs,
            hidden_states=isinstance(codec, HiddenSection) and bool(codec.layers),
        )
        self.folder = join_cache(config, self.shards, self._teacher.head, run.teacher_precision)
        self._recorder = build_recorder(config.cache, self.folder.ranks(), self._teacher.head, manifest.vocab_size)
        self._num_rounds = self.folder.identity.num_rounds
        self._num_bad = self._num_tokens = self._positions = self._bytes = 0
        self._started = time.perf_counter()

    def run(self, wanted: Sequence[int], stop: StopSignal, show: Callable[[Standing], None]) -> None:
        """Make the missing sidecars of the shards ``wanted`` that no other job is making; then the manifest.

        A signal ends it between two batches. Raises CacheError when the disk is full, DataError for damaged samples.
        """
        self._started = time.perf_counter()
        try:
            self._run(wanted, stop, show)
        except OSError as problem:  # a claim or the manifest
            raise unwritable(self.folder.path, problem) from problem

    def _run(self, wanted: Sequence[int], stop: StopSignal, show: Callable[[Standing], None]) -> None:
        manifest = self.shards.manifest
        fold(self.folder, manifest)
        with Claims(self.folder.path / CLAIMS) as claims:
            while not stop.received:
                missing = {entry.name for entry in self.folder.missing(manifest)}
                turn = [number for number in wanted if manifest.shards[number].name in missing]
                made = 0
                for number in turn:
                    entry = manifest.shards[number]
                    if stop.received or self.folder.path_of(entry).exists() or not claims.take(entry.name):
                        continue
                    try:
                        if not self.folder.path_of(entry).exists():  # it may have come between the look and the claim
                            made += self._make(number, entry, stop, lambda: show(self.standing()))
                    finally:
                        claims.release(entry.name)
                if made == 0:
                    break
        if not self.folder.missing(manifest):
            self.folder.write_manifest(manifest)

    def standing(self) -> Standing:
        manifest = self.shards.manifest
        missing = self.folder.missing(manifest)
        return Standing(
            num_shards=len(manifest.shards),
            num_done=len(manifest.shards) - len(missing),
            num_claimed=len(self.folder.claims()),
            num_tokens=self._num_tokens,
            seconds=time.perf_counter() - self._started,
            bytes_a_position=self._bytes / max(1, self._positions),
            tokens_left=sum(entry.num_tokens for entry in missing) * self._num_rounds,
        )

    def _make(self, number: int, entry: ShardEntry, stop: StopSignal, shown: Callable[[], None]) -> bool:
        """The sidecar of one shard; False when a signal came first. Raises CacheError when the disk is full."""
        path = self.folder.path_of(entry)
        try:
            with SidecarWriter(path, entry.num_samples * self._num_rounds) as writer:
                with closing(self._answers(number, entry)) as answers:
                    for answer in answers:
                        for record, sums in answer:
                            writer.add(record, sums)
                            self._positions += sums.num_positions
                            self._bytes += len(record.content)
                        shown()
                        if stop.received:
                            return False
                writer.finish(self.folder.identity.sha256, entry.name, entry.sha256, self._num_rounds)
        except OSError as problem:
            raise unwritable(path, problem) from problem
        return True

    def _answers(self, number: int, entry: ShardEntry) -> Generator[list[tuple[Record, Sums]], None, None]:
        """The records of the shard's batches, in order; reading and encoding go on beside the teacher's work."""
        reading: deque[Future[Asked]] = deque()
        encoding: deque[Future[list[tuple[Record, Sums]]]] = deque()
        parts = self._parts(entry)
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as encoder:
            while True:
                for part in islice(parts, 1 + _AHEAD - len(reading)):
                    reading.append(reader.submit(self._read, number, part))
                if not reading:
                    break
                asked = reading.popleft().result()
                answer = self._teacher.targets_for(asked.batch, asked.batch.label_rows)
                encoding.append(encoder.submit(self._recorder.encode, self._recorder.select(asked, answer)))
                self._num_tokens += asked.batch.num_tokens
                if len(encoding) > _AHEAD:
                    yield encoding.popleft().result()
            for future in encoding:
                yield future.result()

    def _parts(self, entry: ShardEntry) -> Iterator[range]:
        total, size = entry.num_samples * self._num_rounds, self._config.cache.micro_sequences
        return (range(start, min(start + size, total)) for start in range(0, total, size))

    def _read(self, number: int, records: range) -> Asked:
        """The batch of records ``records`` of shard ``number``, on the device. Raises DataError for too much damage."""
        samples, rounds = [], [record % self._num_rounds for record in records]
        for record in records:
            try:
                samples.append(self.shards.read(number, record // self._num_rounds))
            except DataError as damage:
                samples.append(self._stand_in(damage, number, record))
        labelled = self._task.label(samples, rounds)
        manifest = self.shards.manifest
        batch = collate(samples, labelled, pad_id=manifest.pad_id, sequence_tokens=manifest.sequence_tokens)
        return Asked(samples, rounds, labelled, batch.to(self._device))

    def _stand_in(self, damage: DataError, number: int, record: int) -> Sample:
        """For a damaged sample, which gets an empty record: training skips it just so."""
        self._num_bad += record % self._num_rounds == 0
        if self._num_bad > self._config.data.max_bad_samples:
            raise DataError(
                f"{damage}\nThis is damaged record number {self._num_bad} of this job, and data.max_bad_samples is "
                f"{self._config.data.max_bad_samples}: restore the shard, or raise it"
            ) from damage
        log.warning("no targets for a damaged record: %s", damage)
        nothing = np.empty(0, np.uint8)
        return Sample(self.shards.manifest.shards[number].name, f"record {record}", nothing, nothing, sound=False)
