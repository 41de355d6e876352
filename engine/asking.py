"""The teacher and its data, checked against each other: it answers batches of samples with records."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch

from engine.cache.fitness import num_rounds
from engine.cache.folder import ranks_of
from engine.cache.recording import Asked, build_recorder
from engine.cache.sidecar import Record, Sums
from engine.config.cache import HiddenSection
from engine.config.checks import check_cache
from engine.config.resolve import read_deepspeed_json, resolve
from engine.config.run import RunConfig
from engine.data.client import CLIENT
from engine.data.collate import collate
from engine.data.loader import reader_pool
from engine.data.shards import ShardSet
from engine.errors import DataError, StoreError
from engine.models import MODEL_CLASSES
from engine.parts import accelerator_of, check_model, shared_tokenizer
from engine.schema import Sample
from engine.tasks.task import Task, build_task
from engine.tasks.tokenizer import vocab_size
from engine.teacher.online import OnlineTeacher
from engine.teacher.opening import check_layers
from engine.teacher.placing import described_precision, load_teacher, place_alone

log = logging.getLogger("stillhouse")

_AHEAD = 2
"""Batches read while the teacher works, and batches of answers that wait to be encoded."""

Answer = list[tuple[Record, Sums]]
NoteDamage = Callable[[DataError, int, int], None]
"""Is told what is wrong with which sample of which shard."""


class Asker:
    """Raises ConfigError or DataError where the run's teacher, task and data do not fit together."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        check_cache(config)
        self._config, self._device = config, device
        CLIENT.set_patience(config.data.retry_seconds, config.data.server_timeout_seconds)
        self.shards = ShardSet.open(config.data.manifest, allow_pipe=config.data.allow_pipe)
        manifest = self.shards.manifest
        content, name = read_deepspeed_json(config.zero)
        self.precision = resolve(
            config,
            world_size=1,
            accelerator=accelerator_of(device),
            data=manifest.facts,
            deepspeed_json=content,
            deepspeed_name=name,
        ).teacher_precision
        tokenizer = shared_tokenizer(config)
        self._task = build_task(config.task, tokenizer, manifest, self.shards.token_counts())
        model = load_teacher(config.teacher, MODEL_CLASSES[self._task.kind])
        check_model(model, self._task, "teacher", vocab_size(tokenizer), manifest)
        count = f"{model.num_parameters():,}"
        self.described_precision = described_precision(config.teacher, self.precision)
        log.info("teacher: %s, %s parameters, %s", type(model).__name__, count, self.described_precision)
        codec = config.cache.codec
        keeps_layers = isinstance(codec, HiddenSection) and bool(codec.layers)
        place_alone(model, config.teacher, self.precision, device)
        self.teacher = OnlineTeacher(model, self._task, hidden_states=keeps_layers)
        check_layers(config, self.teacher.head, model.config)
        self._recorder = build_recorder(config.cache, ranks_of(self.shards), self.teacher.head, manifest.vocab_size)
        self.num_rounds = num_rounds(config.task)
        self._bad: set[tuple[int, int]] = set()

    def answers(self, batches: Iterable[tuple[int, range]]) -> Generator[Answer, None, None]:
        """The answers to batches, each of some records of a shard, in order.

        Reading and encoding go on beside the teacher's work. Raises DataError for one damaged sample too many.
        """
        reading: deque[Future[Asked]] = deque()
        encoding: deque[Future[Answer]] = deque()
        parts = iter(batches)
        device = self._device if self._device.type == "cuda" else None
        with ThreadPoolExecutor(1) as encoder, reader_pool(1, device) as reader:
            while True:
                for part in islice(parts, 1 + _AHEAD - len(reading)):
                    reading.append(reader.submit(self._read, *part))
                if not reading:
                    break
                asked = reading.popleft().result()
                answer = self.teacher.states_for(asked.batch, asked.batch.label_rows)
                encoding.append(encoder.submit(self._recorder.encode, self._recorder.select(asked, answer)))
                if len(encoding) > _AHEAD:
                    yield encoding.popleft().result()
            for future in encoding:
                yield future.result()

    def num_batches(self, shard: int) -> int:
        """All records of a shard are in so many batches."""
        return -(-self._num_records(shard) // self._config.cache.micro_sequences)

    def batch(self, shard: int, number: int) -> tuple[int, range]:
        """Batch ``number`` of a shard, cut as every job cuts it: the last digit of an answer depends on its batch."""
        size = self._config.cache.micro_sequences
        return shard, range(number * size, min((number + 1) * size, self._num_records(shard)))

    def _num_records(self, shard: int) -> int:
        return self.shards.manifest.shards[shard].num_samples * self.num_rounds

    def _read(self, number: int, records: range) -> Asked:
        """The batch of records ``records`` of shard ``number``, on the device. Raises DataError for too much damage."""
        return read_batch(self.shards, self._task, number, self.num_rounds, records, self._note_damage).to(self._device)

    def _note_damage(self, damage: DataError, shard: int, number: int) -> None:
        """A damaged sample gets an empty record: training skips it just so."""
        self._bad.add((shard, number))
        if len(self._bad) > self._config.data.max_bad_samples:
            raise DataError(
                f"{damage}\nThis is damaged record number {len(self._bad)} of this job, and data.max_bad_samples is "
                f"{self._config.data.max_bad_samples}: restore the shard, or raise it"
            ) from damage
        log.warning("no targets for a damaged record: %s", damage)


def read_batch(
    shards: ShardSet, task: Task, shard: int, num_rounds: int, records: range, note_damage: NoteDamage
) -> Asked:
    """Some records of a shard, as a batch on the host; number sample * num_rounds + round is a sample in a round.

    A sample that cannot be read is told to ``note_damage``, which may raise, and stands as a damaged one.
    """
    numbers, rounds = [record // num_rounds for record in records], [record % num_rounds for record in records]
    samples: dict[int, Sample] = {}
    for number in dict.fromkeys(numbers):
        try:
            samples[number] = shards.read(shard, number)
        except StoreError:
            raise  # no record is damaged: to leave some out would cost targets
        except DataError as damage:
            note_damage(damage, shard, number)
            samples[number] = Sample.damaged(shards.manifest.shards[shard].name, number)
    asked = [samples[number] for number in numbers]
    labelled = task.label(asked, rounds)
    manifest = shards.manifest
    batch = collate(asked, labelled, pad_id=manifest.pad_id, sequence_tokens=manifest.sequence_tokens)
    return Asked(asked, rounds, labelled, batch)
