"""From the teacher's states to the records of a batch's samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.cache.codec import Codec
from engine.cache.distribution import Exponentiator
from engine.cache.kept import Kept, joined
from engine.cache.sidecar import Record, Sums, input_hash
from engine.data.collate import Labelled
from engine.data.stateless import fold, random_bits
from engine.losses.fused import CHUNK_BYTES
from engine.losses.head import head_logits
from engine.schema import IGNORE, Batch, Head, Sample


class Asked(NamedTuple):
    """A batch on the device, and what it was made of."""

    samples: list[Sample]
    rounds: list[int]
    """below the cache's ``num_rounds``"""
    labelled: Labelled
    batch: Batch


class Selected(NamedTuple):
    """What to keep of a batch, on the host."""

    asked: Asked
    hashes: list[int]
    """of each sample"""
    lengths: list[int]
    """positions of each sample"""
    kept: Kept
    nll: np.ndarray
    """[N] float64: -log p of the label"""
    entropy: np.ndarray
    """[N] float64"""
    mass: np.ndarray
    """[N] float64: of the kept ids"""


class Recorder:
    """Asks nobody: gets the states at the labelled rows and chooses, counts and encodes.

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

    def select(self, asked: Asked, hidden: Tensor) -> Selected:
        """What to keep of the batch; the work for the device. ``hidden`` [N, G] are the teacher's states."""
        hashes, lengths = hashes_and_lengths(asked.samples, asked.labelled)
        return Selected(asked, hashes, lengths, *self._keep(asked, hidden, self._offsets(asked, lengths)))

    def encode(self, selected: Selected) -> list[tuple[Record, Sums]]:
        """A record for each sample, in order; an empty one where it is not sound. Any thread may do it."""
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
                made.append((Record(b"", 0, 0.0, 0.0), Sums(0, 0, 0, 0.0)))
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
            part = self._codec.select(teacher, offsets[rows])
            kept.append(part)
            positions, ids = (torch.from_numpy(each).to(logits.device) for each in (part.positions, part.ids))
            mass = torch.zeros_like(teacher.total).index_add_(0, positions, teacher.mass[positions, ids].double())
            figures.append(torch.stack([teacher.nll if nll is None else nll, teacher.entropy, mass / teacher.total]))
        nothing = torch.zeros(3, 0, dtype=torch.float64)
        nll_all, entropy, mass_all = torch.cat([nothing, *(each.double().cpu() for each in figures)], dim=1).numpy()
        empty = np.empty(0, np.int64)
        return joined(kept or [Kept(empty, empty, np.empty(0, np.float32), empty)]), nll_all, entropy, mass_all


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
