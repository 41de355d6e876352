"""Targets from a cache: records are read beside the samples, decoded off the training thread, and matched by hash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.cache.codec import Codec, build_codec, read_codec
from engine.cache.folder import CacheFolder
from engine.cache.journal import Journal
from engine.cache.kept import Kept
from engine.cache.recording import Asked, Recorder, hashes_and_lengths
from engine.cache.sidecar import Record, Sidecar
from engine.cache.states import StatesCodec
from engine.config.cache import HiddenSection, SampledSection
from engine.data.address import OnceCache
from engine.data.collate import Labelled
from engine.data.manifest import Manifest
from engine.data.order import Location
from engine.errors import CacheError, DataError, MissingError
from engine.schema import (
    Batch,
    CachedStates,
    DenseTargets,
    Head,
    Sample,
    SparseTargets,
    StepBatches,
    Targets,
    Unanswered,
    map_tensors,
)
from engine.teacher.online import OnlineTeacher

_MAX_OPEN_SIDECARS = 256


class Lacking(NamedTuple):
    """A record that the cache does not have."""

    shard: str
    number: int
    round_number: int


@dataclass(frozen=True)
class Live:
    """A teacher beside the cache, for samples that it lacks, and where its answers are kept."""

    teacher: OnlineTeacher
    recorder: Recorder
    journal: Journal


class CachedTargets:
    """Both ends of a cache in training: the loader's, which reads, and the trainer's, which takes."""

    def __init__(
        self, folder: CacheFolder, data: Manifest, tail: str, device: torch.device, live: Live | None = None
    ) -> None:
        """``tail`` is what becomes of the mass that top_k and top_p do not keep; ``live`` answers what is missing."""
        self._live, self._device = live, device
        self._folder, self._data, self._tail = folder, data, tail
        self._section = read_codec(folder.identity.codec)
        self._head: Head | None = None
        self._codec: Codec | None = None
        if isinstance(self._section, HiddenSection):
            self._head = map_tensors(folder.head(), lambda tensor: tensor.to(device))
            self._states = StatesCodec(self._section.dtype, self._head.weight.shape[1], len(self._section.layers))
        else:
            self._codec = build_codec(self._section, folder.ranks())
        self._sidecars: OnceCache[int, Sidecar] = OnceCache(_MAX_OPEN_SIDECARS)

    def fetch(self, location: Location) -> Record | Lacking:
        """The record of a sample in its round, or what must be asked. Raises DataError when it is damaged, CacheError
        when its sidecar is missing and nobody is there to be asked, or when it is of something else."""
        entry = self._data.shards[location.shard]
        rounds = self._folder.identity.num_rounds
        lacking = Lacking(entry.name, location.index * rounds + location.epoch % rounds, location.epoch % rounds)
        try:
            sidecar = self._sidecars.get(location.shard, lambda: self._folder.sidecar(entry))
        except MissingError as problem:
            if self._live is None:
                raise CacheError(f"{problem}; run launch/cache_teacher.py again") from problem
            return self._live.journal.find(lacking.shard, lacking.number) or lacking
        record = sidecar.read(lacking.number)
        if not record.content:
            raise DataError(
                f"{sidecar.address}, record {lacking.number} is empty: its sample was damaged when the teacher was "
                "asked. With the data mended, delete this file and run launch/cache_teacher.py again"
            )
        return record

    def targets(
        self, records: Sequence[Record | Lacking | None], samples: Sequence[Sample], labelled: Labelled, batch: Batch
    ) -> SparseTargets | CachedStates | Unanswered:
        """The targets of a batch, for ``Batch.cached``; there is no record for a sample that is not sound.

        Raises CacheError when a record was not made for just this sample, with just these labels.
        """
        if any(isinstance(record, Lacking) for record in records):
            return Unanswered(list(samples), labelled, list(records))
        return self._decoded(
            [record for record in records if not isinstance(record, Lacking)], samples, labelled, batch
        )

    def _decoded(
        self, records: Sequence[Record | None], samples: Sequence[Sample], labelled: Labelled, batch: Batch
    ) -> SparseTargets | CachedStates:
        hashes, lengths = hashes_and_lengths(samples, labelled)
        for record, sample, hashed in zip(records, samples, hashes):
            if record is not None and record.input_hash != hashed:
                raise CacheError(
                    f"{self._folder.address}: its targets for {sample.name} are not for the ids, documents and masks "
                    "that the run gives to its models; make the cache anew with this version and these settings"
                )
        contents = [record.content for record in records if record is not None]
        try:
            if self._codec is None:
                return self._cached_states(contents, batch)
            return self._sparse(self._codec.decode(contents), records, np.array(lengths))
        except Exception as problem:  # what NumPy and torch raise goes by the damage
            names = ", ".join(sample.name for sample in samples)
            raise CacheError(f"{self._folder.address}: a record of {names} does not decode: {problem}") from problem

    def _sparse(self, kept: Kept, records: Sequence[Record | None], lengths: np.ndarray) -> SparseTargets:
        assert kept.num_positions == lengths.sum(), "records match their samples, by hash"
        ids, weights = kept.padded()
        # what is known of a sample as a whole counts as the mean of its positions
        means = np.array([[each.nll, each.entropy] if each else [0.0, 0.0] for each in records])
        means /= np.maximum(lengths, 1)[:, None]
        nll, entropy = (torch.from_numpy(np.repeat(column, lengths).astype(np.float32)) for column in means.T)
        sampled = isinstance(self._section, SampledSection)
        return SparseTargets(
            ids=torch.from_numpy(ids),
            weights=torch.from_numpy(weights),
            top_ids=torch.from_numpy(kept.top_ids.astype(np.int64)),
            nll=nll,
            entropy=entropy,
            temperature=self._folder.identity.temperature,
            tail=None if kept.tail is None else torch.from_numpy(kept.tail),
            handling=None if sampled else self._tail,
            importance=isinstance(self._section, SampledSection) and self._section.proposal_temperature != 1.0,
        )

    def _cached_states(self, contents: Sequence[bytes], batch: Batch) -> CachedStates:
        """Layers that the cache lacks are empty: no term asks for them."""
        assert isinstance(self._section, HiddenSection)
        hidden, kept = self._states.decode(contents)
        layers = [hidden.new_empty(0)] * (max(self._section.layers, default=-1) + 1)
        for number, states in zip(self._section.layers, kept):
            whole = states.new_zeros(batch.labels.numel(), states.shape[1])
            whole[batch.token_rows.cpu()] = states
            layers[number] = whole.view(*batch.labels.shape, -1)
        return CachedStates(hidden, tuple(layers))

    def complete(self, step: StepBatches) -> StepBatches:
        """With answers to what the cache lacks, and those written down."""
        batches = [
            replace(batch, cached=self._asked(batch.cached, batch)) if isinstance(batch.cached, Unanswered) else batch
            for batch in step.micro_batches
        ]
        return replace(step, micro_batches=tuple(batches))

    def targets_for(self, batch: Batch, rows: Tensor) -> Targets | None:
        """What lies beside the batch, be it from the cache or from a live teacher, in the form the cache keeps.

        Of held-out text a cache knows nothing: None, unless there is a live teacher.
        """
        cached = batch.cached
        if cached is None:
            return None if self._live is None else self._live.teacher.targets_for(batch, rows)
        assert not isinstance(cached, Unanswered), "complete comes before"
        if not isinstance(cached, CachedStates):
            return cached
        assert self._head is not None
        return DenseTargets(cached.hidden.to(self._head.weight.dtype), self._head, cached.hidden_states)

    def _asked(self, question: Unanswered, batch: Batch) -> SparseTargets | CachedStates:
        """The whole batch goes to the teacher; the answers to samples that the cache lacks are written down."""
        assert self._live is not None
        batch = batch.to(self._device)
        rounds = [record.round_number if isinstance(record, Lacking) else 0 for record in question.records]
        asked = Asked(question.samples, rounds, question.labelled, batch)
        answer = self._live.teacher.states_for(batch, batch.label_rows)
        made = self._live.recorder.encode(self._live.recorder.select(asked, answer))
        records: list[Record | None] = []
        for known, (record, sums) in zip(question.records, made):
            if isinstance(known, Lacking):
                self._live.journal.add(known.shard, known.number, record, sums)
            records.append(record if isinstance(known, Lacking) else known)
        return self._decoded(records, question.samples, question.labelled, batch)
