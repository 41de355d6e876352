"""Targets from a cache: records are read beside the samples, decoded off the training thread, and matched by hash."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.cache.codec import build_codec, read_codec
from engine.cache.folder import CacheFolder
from engine.cache.recording import hashes_and_lengths
from engine.cache.sidecar import Record, Sidecar
from engine.config.cache import SampledSection
from engine.data.address import OnceCache
from engine.data.collate import Labelled
from engine.data.manifest import Manifest
from engine.data.order import Location
from engine.errors import CacheError
from engine.schema import Batch, CachedStates, Sample, SparseTargets, Targets

_MAX_OPEN_SIDECARS = 256


class CachedTargets:
    """Both ends of a cache in training: the loader's, which reads, and the trainer's, which takes."""

    def __init__(self, folder: CacheFolder, data: Manifest, tail: str) -> None:
        """``tail`` is what becomes of the mass that top_k and top_p do not keep."""
        self._folder, self._data, self._tail = folder, data, tail
        self._section = read_codec(folder.identity.codec)
        self._codec = build_codec(self._section, folder.ranks())
        self._sidecars: OnceCache[int, Sidecar] = OnceCache(_MAX_OPEN_SIDECARS)

    def fetch(self, location: Location) -> Record:
        """The record of a sample in its round. Raises DataError when it is damaged, CacheError when its sidecar is
        missing or of something else."""
        sidecar = self._sidecars.get(location.shard, lambda: self._folder.sidecar(self._data.shards[location.shard]))
        rounds = self._folder.identity.num_rounds
        return sidecar.read(location.index * rounds + location.epoch % rounds)

    def targets(self, records: Sequence[Record | None], samples: Sequence[Sample], labelled: Labelled) -> SparseTargets:
        """The targets of a batch, for ``Batch.cached``; there is no record for a sample that is not sound.

        Raises CacheError when a record was not made for just this sample, with just these labels.
        """
        hashes, lengths = hashes_and_lengths(samples, labelled)
        for record, sample, hashed in zip(records, samples, hashes):
            if record is not None and record.input_hash != hashed:
                raise CacheError(
                    f"{self._folder.address}: its targets for {sample.name} are not for the ids, documents and masks "
                    "that the run gives to its models; make the cache anew with this version and these settings"
                )
        try:
            kept = self._codec.decode([record.content for record in records if record is not None])
        except ValueError as problem:
            names = ", ".join(sample.name for sample in samples)
            raise CacheError(f"{self._folder.address}: a record of {names} does not decode: {problem}") from problem
        ids, weights = kept.padded()
        counts = np.array(lengths)
        nll, entropy = (
            np.repeat(np.array([getattr(each, name, 0.0) for each in records]) / np.maximum(counts, 1), counts)
            for name in ("nll", "entropy")
        )
        assert len(ids) == counts.sum(), "records match their samples, by hash"
        sampled = isinstance(self._section, SampledSection)
        return SparseTargets(
            ids=torch.from_numpy(ids),
            weights=torch.from_numpy(weights),
            top_ids=torch.from_numpy(kept.top_ids.astype(np.int64)),
            nll=torch.from_numpy(nll.astype(np.float32)),
            entropy=torch.from_numpy(entropy.astype(np.float32)),
            temperature=self._folder.identity.temperature,
            tail=None if kept.tail is None else torch.from_numpy(kept.tail),
            handling=None if sampled else self._tail,
            importance=isinstance(self._section, SampledSection) and self._section.proposal_temperature != 1.0,
        )

    def targets_for(self, batch: Batch, rows: Tensor) -> Targets | None:
        """What the loader put beside the batch; None for held-out text, of which a cache knows nothing."""
        assert not isinstance(batch.cached, CachedStates)
        return batch.cached
