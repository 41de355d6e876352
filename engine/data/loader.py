"""From the data order to the micro-batches of this rank, read ahead by threads. The whole state is the step number."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from engine.data.client import read_until
from engine.data.collate import Labelled, collate
from engine.data.manifest import Manifest
from engine.data.order import Location
from engine.errors import DataError, StoreError
from engine.schema import Batch, CachedStates, Sample, SparseTargets, StepBatches, Unanswered

log = logging.getLogger("stillhouse")


class Order(Protocol):
    """What the loader asks of a DataOrder."""

    @property
    def sequences_per_epoch(self) -> int: ...

    def locate(self, sequence: int) -> Location | None:
        """None for a place that holds no sample: a row of padding that counts nowhere."""


class Shards(Protocol):
    """What the loader asks of a ShardSet."""

    @property
    def manifest(self) -> Manifest: ...

    def read(self, shard: int, index: int) -> Sample:
        """Raises DataError for a damaged record."""


RecordOf = TypeVar("RecordOf")


class TargetReader(Protocol[RecordOf]):
    """What the loader asks of a cache of the teacher's targets."""

    def fetch(self, location: Location) -> RecordOf:
        """Raises DataError for a damaged record; the sample is then left out as if it were damaged itself."""

    def targets(
        self, records: Sequence[RecordOf | None], samples: Sequence[Sample], labelled: Labelled, batch: Batch
    ) -> SparseTargets | CachedStates | Unanswered:
        """For ``Batch.cached``; there is no record for a sample that is not sound."""


class _Collated(NamedTuple):
    batch: Batch
    damage: tuple[DataError, ...]
    """one for each damaged record, in the order of the sequences"""


class Loader:
    """The micro-batches of ``rank``, the same for any number of threads; over the ranks, for any ``world_size``.

    Step t holds sequences [t * global_sequences, (t + 1) * global_sequences) of ``order``; a rank takes those whose
    number is ``rank`` modulo ``world_size``. ``label`` is a task's, its rounds are the epochs. ``cached`` puts the
    teacher's targets beside each batch. With ``one_width`` all batches are padded to the shards' sequence_tokens.
    """

    def __init__(
        self,
        shards: Shards,
        order: Order,
        label: Callable[[Sequence[Sample], Sequence[int]], Labelled],
        *,
        num_steps: int,
        global_sequences: int,
        micro_sequences: int,
        rank: int = 0,
        world_size: int = 1,
        reader_threads: int = 1,
        prefetch_steps: int = 2,
        max_bad_samples: int = 0,
        num_bad_samples: int = 0,
        pin_memory: bool = False,
        one_width: bool = False,
        cached: TargetReader[Any] | None = None,
    ) -> None:
        assert global_sequences % (micro_sequences * world_size) == 0
        self._shards, self._order, self._label = shards, order, label
        self._num_steps, self._global_sequences, self._micro_sequences = num_steps, global_sequences, micro_sequences
        self._rank, self._world_size = rank, world_size
        self._reader_threads, self._prefetch_steps = reader_threads, prefetch_steps
        self._max_bad_samples, self._num_bad_samples = max_bad_samples, num_bad_samples
        self._pin_memory, self._one_width, self._cached = pin_memory, one_width, cached
        # Two threads in NumPy at once take the interpreter from each other at every call, and cost more than one.
        self._turn = threading.Lock()

    def steps(self, start_step: int = 0) -> Generator[StepBatches, None, None]:
        """Steps ``start_step`` to ``num_steps - 1``. Closing the iterator ends its threads, also those that wait for a
        server that fails.

        Raises, at the step that it belongs to and without waiting for the rest of it, whatever reading or labelling
        raised: DataError for the damaged record that is one too many for ``max_bad_samples``.
        """
        num_bad_samples = self._num_bad_samples
        ahead: deque[list[Future[_Collated]]] = deque()
        upcoming = iter(range(start_step, self._num_steps))
        with reader_pool(self._reader_threads, torch.cuda.current_device() if self._pin_memory else None) as pool:
            for step in range(start_step, self._num_steps):
                for next_step in upcoming:
                    ahead.append([pool.submit(self._collate, micro) for micro in self._micro_batches(next_step)])
                    if len(ahead) > self._prefetch_steps:
                        break
                futures = ahead.popleft()
                # wakes this thread once, where result() of each would interrupt the readers every time
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                collated = [future.result() for future in futures if future in done]
                for error in (error for micro in collated for error in micro.damage):
                    num_bad_samples += 1
                    self._accept(error, num_bad_samples)
                epoch = step * self._global_sequences / self._order.sequences_per_epoch
                yield StepBatches(step, epoch, tuple(micro.batch for micro in collated), num_bad_samples)

    def _micro_batches(self, step: int) -> Iterator[list[Location | None]]:
        """Locations of each micro-batch. They are found here, by one thread, since the order keeps a cache."""
        first = step * self._global_sequences
        mine = range(first + self._rank, first + self._global_sequences, self._world_size)
        for start in range(0, len(mine), self._micro_sequences):
            yield [self._order.locate(sequence) for sequence in mine[start : start + self._micro_sequences]]

    def _collate(self, locations: list[Location | None]) -> _Collated:
        samples: list[Sample] = []
        records: list[Any] = []
        damage: list[DataError] = []
        for location in locations:
            record = None
            if location is None:
                samples.append(Sample.damaged("nowhere", 0))
                records.append(None)
                continue
            try:
                sample = self._shards.read(location.shard, location.index)
                record = self._cached.fetch(location) if self._cached else None
            except StoreError:
                raise  # no record is damaged: to leave some out would cost data
            except DataError as error:
                damage.append(error)
                shard = self._shards.manifest.shards[location.shard].name
                sample = Sample.damaged(shard, location.index)
            samples.append(sample)
            records.append(record)
        manifest = self._shards.manifest
        with self._turn:
            labelled = self._label(samples, [location.epoch if location else 0 for location in locations])
            batch = collate(samples, labelled, pad_id=manifest.pad_id, sequence_tokens=manifest.sequence_tokens,
                            one_width=self._one_width)  # fmt: skip
            if self._cached is not None:
                batch = replace(batch, cached=self._cached.targets(records, samples, labelled, batch))
        return _Collated(batch.pinned() if self._pin_memory else batch, tuple(damage))

    def _accept(self, error: DataError, num_bad_samples: int) -> None:
        if num_bad_samples > self._max_bad_samples:
            raise DataError(
                f"{error}\nThis is damaged record number {num_bad_samples} of this rank, and data.max_bad_samples is "
                f"{self._max_bad_samples}: restore the shard (data_tools/verify_shards.py finds damage), or raise it"
            ) from error
        log.warning("damaged record %d (data.max_bad_samples %d): %s", num_bad_samples, self._max_bad_samples, error)


@contextmanager
def reader_pool(num_threads: int, cuda_device: torch.device | int | None) -> Iterator[ThreadPoolExecutor]:
    """On the way out, drops what has not begun and waits for what has, but not for servers that fail."""
    closing = threading.Event()

    def begin() -> None:
        read_until(closing)
        if cuda_device is not None:  # a new thread would make a context on device 0, whichever device the rank has
            torch.cuda.set_device(cuda_device)

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reader", initializer=begin)
    try:
        yield pool
    finally:
        closing.set()
        pool.shutdown(wait=True, cancel_futures=True)
