"""The teacher and its data, checked against each other: it answers batches of samples with records."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice

import torch

from engine.cache.fitness import num_rounds
from engine.cache.folder import ranks_of
from engine.cache.recording import Asked, build_recorder
from engine.cache.sidecar import Record, Sums
from engine.config.cache import HiddenSection
from engine.config.checks import check_cache
from engine.config.resolve import DataFacts, read_deepspeed_json, resolve
from engine.config.run import RunConfig
from engine.data.collate import collate
from engine.data.shards import ShardSet
from engine.errors import DataError
from engine.models import DTYPES, cast, load_model, move
from engine.parts import accelerator_of, check_model, shared_tokenizer
from engine.schema import Sample
from engine.tasks.task import build_task
from engine.tasks.tokenizer import vocab_size
from engine.teacher.online import OnlineTeacher

log = logging.getLogger("stillhouse")

_AHEAD = 2
"""Batches read while the teacher works, and batches of answers that wait to be encoded."""

Answer = list[tuple[Record, Sums]]


class Asker:
    """Raises ConfigError or DataError where the run's teacher, task and data do not fit together."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        check_cache(config)
        self._config, self._device = config, device
        self.shards = ShardSet.open(config.data.manifest, allow_pipe=config.data.allow_pipe)
        manifest = self.shards.manifest
        content, name = read_deepspeed_json(config.zero)
        self.precision = resolve(
            config,
            world_size=1,
            accelerator=accelerator_of(device),
            data=DataFacts(manifest.num_samples, manifest.sequence_tokens, manifest.vocab_size, manifest.task),
            deepspeed_json=content,
            deepspeed_name=name,
        ).teacher_precision
        tokenizer = shared_tokenizer(config)
        self._task = build_task(config.task, tokenizer, manifest, self.shards.token_counts())
        model = load_model(config.teacher, self._task.model_class_name, torch.float32, "teacher")
        check_model(model, self._task, "teacher", vocab_size(tokenizer), manifest.sequence_tokens)
        count = f"{model.num_parameters():,}"
        log.info("teacher: %s, %s parameters, %s", type(model).__name__, count, self.precision)
        codec = config.cache.codec
        self.teacher = OnlineTeacher(
            move(cast(model, DTYPES[self.precision]), device),
            self._task.model_inputs,
            hidden_states=isinstance(codec, HiddenSection) and bool(codec.layers),
        )
        self._recorder = build_recorder(config.cache, ranks_of(self.shards), self.teacher.head, manifest.vocab_size)
        self.num_rounds = num_rounds(config.task)
        self._bad: set[tuple[int, int]] = set()

    def answers(self, shard: int, records: Iterable[range]) -> Generator[Answer, None, None]:
        """The answers to batches of records of a shard, in order.

        Record sample * num_rounds + round is a sample in a round. Reading and encoding go on beside the teacher's
        work. Raises DataError for one damaged sample too many.
        """
        reading: deque[Future[Asked]] = deque()
        encoding: deque[Future[Answer]] = deque()
        parts = iter(records)
        bind = None
        if self._device.type == "cuda":  # a new thread would make a context on device 0
            bind = partial(torch.cuda.set_device, self._device)
        with ThreadPoolExecutor(1, initializer=bind) as reader, ThreadPoolExecutor(1) as encoder:
            while True:
                for part in islice(parts, 1 + _AHEAD - len(reading)):
                    reading.append(reader.submit(self._read, shard, part))
                if not reading:
                    break
                asked = reading.popleft().result()
                answer = self.teacher.targets_for(asked.batch, asked.batch.label_rows)
                encoding.append(encoder.submit(self._recorder.encode, self._recorder.select(asked, answer)))
                if len(encoding) > _AHEAD:
                    yield encoding.popleft().result()
            for future in encoding:
                yield future.result()

    def batches(self, shard: int) -> Iterator[range]:
        """All records of a shard, cut as every job cuts them: the last digit of an answer depends on its batch."""
        total = self.shards.manifest.shards[shard].num_samples * self.num_rounds
        size = self._config.cache.micro_sequences
        return (range(start, min(start + size, total)) for start in range(0, total, size))

    def _read(self, number: int, records: range) -> Asked:
        """The batch of records ``records`` of shard ``number``, on the device. Raises DataError for too much damage."""
        samples, rounds = [], [record % self.num_rounds for record in records]
        for record in records:
            try:
                samples.append(self.shards.read(number, record // self.num_rounds))
            except DataError as damage:
                samples.append(self._stand_in(damage, number, record))
        labelled = self._task.label(samples, rounds)
        manifest = self.shards.manifest
        batch = collate(samples, labelled, pad_id=manifest.pad_id, sequence_tokens=manifest.sequence_tokens)
        return Asked(samples, rounds, labelled, batch.to(self._device))

    def _stand_in(self, damage: DataError, number: int, record: int) -> Sample:
        """For a damaged sample, which gets an empty record: training skips it just so."""
        self._bad.add((number, record // self.num_rounds))
        if len(self._bad) > self._config.data.max_bad_samples:
            raise DataError(
                f"{damage}\nThis is damaged record number {len(self._bad)} of this job, and data.max_bad_samples is "
                f"{self._config.data.max_bad_samples}: restore the shard, or raise it"
            ) from damage
        log.warning("no targets for a damaged record: %s", damage)
        return Sample.damaged(self.shards.manifest.shards[number].name, record // self.num_rounds)
