"""From the teacher's states to the records of a batch's samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.cache.codec import Codec, build_codec
from engine.cache.distribution import Exponentiator
from engine.cache.kept import Kept, joined
from engine.cache.sidecar import Record, Sums, input_hash
from engine.cache.states import StatesCodec
from engine.config.cache import CacheSection, HiddenSection
from engine.data.collate import Labelled
from engine.data.stateless import fold, random_bits
from engine.errors import DataError
from engine.losses.fused import CHUNK_BYTES
from engine.losses.head import head_logits
from engine.losses.hidden import select_rows
from engine.schema import IGNORE, Batch, DenseTargets, Head, Sample

NOTHING = Record(b"", 0, 0.0, 0.0), Sums(0, 0, 0, 0.0)
"""Stands for a damaged sample."""


class Asked(NamedTuple):
    """A batch on the device, and what it was made of."""

    samples: list[Sample]
    rounds: list[int]
    """below the cache's ``num_rounds``"""
    labelled: Labelled
    batch: Batch

    def to(self, device: torch.device) -> Asked:
        return self._replace(batch=self.batch.to(device))


class Selected(NamedTuple):
    """What to keep of a batch, on the host."""

    asked: Asked
    hashes: list[int]
    """of each sample"""
    lengths: list[int]
    """positions of each sample"""
    kept: Kept | DenseTargets
    nll: np.ndarray
    """[N] float64: -log p of the label"""
    entropy: np.ndarray
    """[N] float64"""
    mass: np.ndarray
    """[N] float64: of the kept ids"""


class Recorder(Protocol):
    """Turns the teacher's answer to a batch into records."""

    def select(self, asked: Asked, answer: DenseTargets) -> Selected:
        """What to keep of the batch; the work for the device."""

    def encode(self, selected: Selected) -> list[tuple[Record, Sums]]:
        """A record for each sample, in order; an empty one where it is not sound. Any thread may do it."""


def _not_finite(asked: Asked) -> DataError:
    names = ", ".join(sample.name for sample in asked.samples)
    return DataError(
        f"the teacher's numbers are NaN or Inf for one of {names}; if it was trained in bf16, ask it in "
        "teacher.precision: bf16 or fp32, else look at these samples"
    )


class DistributionRecorder:
    """For the codecs that keep a part of the distribution.

    The records of a sample depend on nothing but the teacher's numbers, ``seed``, its key and its round, so any job
    makes the same.
    """

    def __init__(self, codec: Codec, head: Head, num_ids: int, *, temperature: float, seed: int) -> None:
        self._codec, self._head, self._num_ids = codec, head, num_ids
        self._temperature, self._seed = temperature, seed
        device = head.weight.device
        self._chunk_rows = max(16, CHUNK_BYTES[device.type] // (4 * num_ids))
        self._logits = torch.empty(self._chunk_rows, num_ids, device=device)
        self._exponentiate = Exponentiator(self._chunk_rows, num_ids, device)

    def select(self, asked: Asked, answer: DenseTargets) -> Selected:
        hashes, lengths = hashes_and_lengths(asked.samples, asked.labelled)
        return Selected(asked, hashes, lengths, *self._keep(asked, answer.hidden, self._offsets(asked, lengths)))

    def encode(self, selected: Selected) -> list[tuple[Record, Sums]]:
        assert isinstance(selected.kept, Kept)
        made, end = [], 0
        parts = selected.kept.cut(selected.lengths)
        for sample, hashed, part in zip(selected.asked.samples, selected.hashes, parts):
            rows = slice(end, end + part.num_positions)
            end = rows.stop
            nll, entropy, mass = (float(figure[rows].sum()) for figure in selected[-3:])
            if sample.sound:
                sums = Sums(len(sample.token_ids), part.num_positions, len(part.ids), mass)
                made.append((Record(self._codec.encode(part), hashed, nll, entropy), sums))
            else:
                made.append(NOTHING)
        return made

    def _offsets(self, asked: Asked, lengths: Sequence[int]) -> Tensor:
        """[N] float64 in [0, 1), a pure function of the seed, the sample, the round and the position."""
        streams = [
            random_bits(fold("draw", self._seed, sample.key, number), length)
            for sample, number, length in zip(asked.samples, asked.rounds, lengths)
        ]
        bits = np.concatenate([np.empty(0, np.uint64), *streams])
        return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).to(self._logits.device)

    @torch.inference_mode()
    def _keep(self, asked: Asked, hidden: Tensor, offsets: Tensor) -> tuple[Kept, np.ndarray, np.ndarray, np.ndarray]:
        """What to keep of all rows, and for each row, [N] float64: -log p of the label, entropy, mass of the kept."""
        labels = asked.batch.labels.flatten()[asked.batch.label_rows]
        kept, figures = [], []
        for start in range(0, hidden.shape[0], self._chunk_rows):
            rows = slice(start, start + self._chunk_rows)
            states = hidden[rows]
            logits = head_logits(states, self._head, self._num_ids, out=self._logits[: states.shape[0]])
            label = labels[rows].unsqueeze(1)
            nll = None
            if self._temperature != 1.0:  # the perplexity people know is that at temperature 1
                nll = logits.logsumexp(dim=1) - logits.gather(1, label).squeeze(1)
                logits /= self._temperature
            teacher = self._exponentiate(logits, label.squeeze(1))
            if not teacher.entropy.isfinite().all():
                raise _not_finite(asked)
            part = self._codec.select(teacher, offsets[rows])
            kept.append(part)
            positions, ids = (torch.from_numpy(each).to(logits.device) for each in (part.positions, part.ids))
            mass = torch.zeros_like(teacher.total).index_add_(0, positions, teacher.mass[positions, ids].double())
            figures.append(torch.stack([teacher.nll if nll is None else nll, teacher.entropy, mass / teacher.total]))
        nothing = torch.zeros(3, 0, dtype=torch.float64)
        nll_all, entropy, mass_all = torch.cat([nothing, *(each.double().cpu() for each in figures)], dim=1).numpy()
        empty = np.empty(0, np.int64)
        return joined(kept or [Kept(empty, empty, np.empty(0, np.float32), empty)]), nll_all, entropy, mass_all


class StatesRecorder:
    """For the ``hidden`` codec. The head is not needed, so neither -log p nor entropy is known: they are 0."""

    def __init__(self, codec: StatesCodec, layers: Sequence[int]) -> None:
        self._codec, self._layers = codec, layers

    def select(self, asked: Asked, answer: DenseTargets) -> Selected:
        hashes, lengths = hashes_and_lengths(asked.samples, asked.labelled)
        layers = tuple(select_rows(answer.hidden_states[layer], asked.batch.token_rows) for layer in self._layers)
        if not all(kept.isfinite().all() for kept in (answer.hidden, *layers)):
            raise _not_finite(asked)
        states = DenseTargets(answer.hidden.cpu(), answer.head, tuple(layer.cpu() for layer in layers))
        nothing = np.zeros(0)
        return Selected(asked, hashes, lengths, states, nothing, nothing, nothing)

    def encode(self, selected: Selected) -> list[tuple[Record, Sums]]:
        states = selected.kept
        assert isinstance(states, DenseTargets)
        num_tokens = [len(sample.token_ids) for sample in selected.asked.samples]
        rows = states.hidden.split(selected.lengths)
        layers = [layer.split(num_tokens) for layer in states.hidden_states]
        made = []
        for number, sample in enumerate(selected.asked.samples):
            if not sample.sound:
                made.append(NOTHING)
                continue
            content = self._codec.encode(rows[number], [layer[number] for layer in layers])
            length = selected.lengths[number]
            sums = Sums(num_tokens[number], length, 0, float(length))
            made.append((Record(content, selected.hashes[number], 0.0, 0.0), sums))
        return made


def hashes_and_lengths(samples: Sequence[Sample], labelled: Labelled) -> tuple[list[int], list[int]]:
    """For each sample the hash of what the teacher sees, and how many positions have a label."""
    input_ids, labels = labelled
    hashes, lengths, start = [], [], 0
    for sample in samples:
        part = slice(start, start + len(sample.token_ids))
        hashes.append(input_hash(sample.key, input_ids[part], labels[part], sample.document_tokens))
        lengths.append(int(np.count_nonzero(labels[part] != IGNORE)) if sample.sound else 0)
        start = part.stop
    return hashes, lengths


def build_recorder(section: CacheSection, ranks: np.ndarray, head: Head, num_ids: int) -> Recorder:
    """``ranks`` [V]: the number of each id by frequency; ``head`` lies where the teacher does."""
    if isinstance(section.codec, HiddenSection):
        layers = section.codec.layers
        return StatesRecorder(StatesCodec(section.codec.dtype, head.weight.shape[1], len(layers)), layers)
    codec = build_codec(section.codec, ranks)
    return DistributionRecorder(codec, head, num_ids, temperature=section.temperature, seed=section.seed)
