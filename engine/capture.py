"""Asking the teacher once: whole shards are claimed and answered, by any number of jobs at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from engine.asking import Asker
from engine.cache.claims import Claims
from engine.cache.folder import CLAIMS, sidecar_name, unwritable
from engine.cache.journal import fold
from engine.cache.sidecar import INDEX_DTYPE
from engine.cache.sidecar_writer import SidecarWriter
from engine.config.run import RunConfig
from engine.data.manifest import ShardEntry
from engine.data.spread import spread
from engine.dist import StopSignal
from engine.teacher.opening import join_cache


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


Show = Callable[[Callable[[], Standing]], None]
"""Is given a way to look, since looking at all shards and claims takes a while on a shared disk."""


class Capture:
    """One job: a teacher and the cache that it fills.

    Raises ConfigError, DataError or CacheError.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._asker = Asker(config, device)
        self.shards = self._asker.shards
        self.folder = join_cache(config, self.shards, self._asker.teacher.head, self._asker.described_precision)
        self._num_tokens = self._positions = self._bytes = 0
        self._started = time.perf_counter()

    def run(self, wanted: Sequence[int], stop: StopSignal, show: Show) -> None:
        """Make the missing sidecars of the shards ``wanted`` that no other job is making; then the manifest.

        ``show`` is called after each batch. A signal ends it between two batches. Raises CacheError when the disk is
        full, DataError for damaged samples.
        """
        self._started = time.perf_counter()
        try:
            self._run(wanted, stop, show)
        except OSError as problem:  # a claim or the manifest
            raise unwritable(self.folder.path, problem) from problem

    def _run(self, wanted: Sequence[int], stop: StopSignal, show: Show) -> None:
        manifest = self.shards.manifest
        fold(self.folder, manifest)
        if self.folder.missing(manifest):
            self.folder.withdraw_manifest()
        with Claims(self.folder.path / CLAIMS) as claims:
            while not stop.received:
                missing = {entry.name for entry in self.folder.missing(manifest)}
                turn = [number for number in wanted if manifest.shards[number].name in missing]
                made = 0
                for number in turn:
                    entry = manifest.shards[number]
                    claim = sidecar_name(entry.name)
                    if stop.received or self.folder.path_of(entry).exists() or not claims.take(claim):
                        continue
                    try:
                        if not self.folder.path_of(entry).exists():  # it may have come between the look and the claim
                            made += self._make(number, entry, stop, lambda: show(self.standing))
                    finally:
                        claims.release(claim)
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
            tokens_left=sum(entry.num_tokens for entry in missing) * self._asker.num_rounds,
        )

    def _make(self, number: int, entry: ShardEntry, stop: StopSignal, shown: Callable[[], None]) -> bool:
        """The sidecar of one shard; False when a signal came first. Raises CacheError when the disk is full."""
        path = self.folder.path_of(entry)
        try:
            with SidecarWriter(path, entry.num_samples * self._asker.num_rounds) as writer:
                batches = (self._asker.batch(number, each) for each in range(self._asker.num_batches(number)))
                with closing(self._asker.answers(batches)) as answers:
                    for answer in answers:
                        for record, sums in answer:
                            writer.add(record, sums)
                            self._num_tokens += sums.num_tokens
                            self._positions += sums.num_positions
                            self._bytes += len(record.content)
                        shown()
                        if stop.received:
                            return False
                writer.finish(self.folder.identity.sha256, entry.name, entry.sha256, self._asker.num_rounds)
        except OSError as problem:
            raise unwritable(path, problem) from problem
        return True


@dataclass(frozen=True)
class Trial:
    """What a cache would be, from the answers to a few samples."""

    num_records: int
    """samples asked for, each round for itself"""
    bytes_a_position: float
    """with the index"""
    positions_a_token: float
    tokens_a_second: float
    num_tokens: int
    """of all samples in all rounds"""

    @property
    def cache_bytes(self) -> float:
        return self.num_tokens * self.positions_a_token * self.bytes_a_position

    @property
    def hours(self) -> float:
        """For one job on this machine."""
        return self.num_tokens / self.tokens_a_second / 3600.0


def try_capture(config: RunConfig, device: torch.device, num_samples: int) -> Trial:
    """Ask for about ``num_samples`` samples, in batches spread over the shards, the first of them twice: once untimed.

    Writes nothing. Raises what Asker does.
    """
    asker = Asker(config, device)
    num_batches = [asker.num_batches(shard) for shard in range(len(asker.shards.manifest.shards))]
    wanted = [asker.batch(*place) for place in spread(num_batches, max(1, num_samples // config.cache.micro_sequences))]
    list(asker.answers(wanted[:1]))
    began = time.perf_counter()
    made = [each for answer in asker.answers(wanted) for each in answer]
    seconds = time.perf_counter() - began
    num_tokens, num_positions = (
        sum(getattr(sums, name) for _, sums in made) for name in ("num_tokens", "num_positions")
    )
    num_bytes = sum(len(record.content) + INDEX_DTYPE.itemsize for record, _ in made)
    return Trial(
        num_records=len(made),
        bytes_a_position=num_bytes / max(1, num_positions),
        positions_a_token=num_positions / max(1, num_tokens),
        tokens_a_second=num_tokens / seconds,
        num_tokens=asker.shards.manifest.num_tokens * asker.num_rounds,
    )
