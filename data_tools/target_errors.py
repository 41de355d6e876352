"""How far kept targets are from the teacher's own, and how far they may be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_tools.cache_records import States
from engine.cache.kept import Kept
from engine.cache.levels import FLOOR
from engine.cache.states import RELATIVE_ERROR
from engine.config.cache import CodecSection, HiddenSection, SampledSection


class Noise(NamedTuple):
    """How far a teacher's numbers may move from one device, library or batch to another."""

    p: float
    """of a probability"""
    log_p: float
    """of a log-probability, in nats: an unlikely id moves further"""
    state: float
    """of a state, of its row's largest"""


NOISE = {"fp32": Noise(1e-4, 1e-3, 1e-3), "fp16": Noise(5e-3, 0.05, 0.02), "bf16": Noise(3e-2, 0.3, 0.1)}


class Probabilities(NamedTuple):
    """The teacher's at the positions of one sample, in blocks: those of a long sample would fill the memory."""

    lengths: list[int]
    """positions of each block"""
    blocks: Iterator[Tensor]
    """[C, V] float64"""


class TargetErrors:
    """Gathers the errors of samples of a cache with this codec, made of a teacher in this precision.

    Of an imported cache the precision is not known; the noise is then taken to be that of bf16.
    """

    def __init__(self, section: CodecSection, precision: str) -> None:
        self._section, self._noise = section, NOISE.get(precision, NOISE["bf16"])
        self._largest = 0.0
        self._largest_of_figures: float | None = None
        self._divergence = 0.0
        self._num_positions = 0

    def add(self, decoded: Kept | States, truth: Probabilities | States, of_figures: float | None) -> Iterator[str]:
        """One sample; what is wrong where it is further from the teacher than the codec's own error.

        ``of_figures`` is how far its sums over the positions, of -log p of the labels or of entropies, are off.
        """
        if isinstance(decoded, States):
            assert isinstance(truth, States)
            yield from self._add_states(decoded, truth)
            return
        assert isinstance(truth, Probabilities)
        num_positions = sum(truth.lengths)
        if decoded.num_positions != num_positions:
            yield f"has targets at {decoded.num_positions} positions, but its sample {num_positions} labels"
            return
        if num_positions == 0:
            return
        self._num_positions += num_positions
        if of_figures is not None:
            self._largest_of_figures = max(self._largest_of_figures or 0.0, of_figures / num_positions)
            if not of_figures / num_positions <= self._noise.log_p:
                yield f"-log p of its labels, or its entropy, is {of_figures / num_positions:.3g} nats a position off"
        order = np.argsort(decoded.positions, kind="stable")
        fields = {name: getattr(decoded, name)[order] for name in ("positions", "ids", "values")}
        for part, p in zip(replace(decoded, **fields).cut(truth.lengths), truth.blocks):
            if isinstance(self._section, SampledSection):
                yield from self._add_draws(part, p, self._section)
            elif not isinstance(self._section, HiddenSection):
                yield from self._add_likeliest(part, p, self._section.max_error)

    def lines(self) -> list[str]:
        """For people."""
        if isinstance(self._section, HiddenSection):
            return [f"largest error of a state: {self._largest:.2e} of its row's largest (at most {self._limit():.2e})"]
        figures = []
        if (largest := self._largest_of_figures) is not None:
            figures = [f"largest error of -log p of labels and of entropy: {largest:.2e} nats a position"]
        if isinstance(self._section, SampledSection):
            return [
                f"largest distance of a share from the teacher's p: {self._largest:.3f} of {self._section.num_draws} "
                "draws (below 1)",
                *figures,
            ]
        return [
            f"reconstruction KL: {self._divergence / max(1, self._num_positions):.2e} nats a position",
            f"largest error of a log-probability: {self._largest:.4f} nats (at most {self._limit():.4f})",
            *figures,
        ]

    def _limit(self) -> float:
        if isinstance(self._section, SampledSection):
            of_weights = 0.0 if self._section.proposal_temperature == 1.0 else 0.01 + self._noise.log_p
            return 1.0 + self._section.num_draws * (self._noise.p + of_weights)
        if isinstance(self._section, HiddenSection):
            return RELATIVE_ERROR[self._section.dtype] + self._noise.state
        # a position's probabilities are scaled to the sum of 1 when they are read, by no more than their own error
        return 2.0 * self._section.max_error + self._noise.log_p

    def _add_draws(self, kept: Kept, p: Tensor, section: SampledSection) -> Iterator[str]:
        """Weights of a proposal r are shares of the draws times p / r, so r is what the shares are near."""
        at = torch.from_numpy(kept.positions).long(), torch.from_numpy(kept.ids).long()
        shares, drawn_from = torch.zeros_like(p), p
        shares[at] = torch.from_numpy(kept.values).double()
        if section.proposal_temperature != 1.0:
            drawn_from = torch.softmax(p.log() / section.proposal_temperature, dim=1)
            shares[at] *= drawn_from[at] / p[at].clamp_min(1e-300)
        p = drawn_from
        distance = float((shares - p).abs().max() * section.num_draws) if p.numel() else 0.0
        self._largest = max(self._largest, distance)
        if not distance < self._limit():
            yield f"a share is {distance:.2f} draws from the teacher's p, expected less than 1"

    def _add_likeliest(self, kept: Kept, p: Tensor, max_error: float) -> Iterator[str]:
        assert kept.tail is not None
        positions = torch.from_numpy(kept.positions).long()
        true_p = p[positions, torch.from_numpy(kept.ids).long()]
        read_p = torch.from_numpy(kept.values).double()
        errors = true_p.clamp_min(1e-300).log() - read_p.clamp_min(1e-300).log()
        is_above = true_p.log() > max_error - FLOOR  # those below are all kept as the floor
        largest = float(errors[is_above].abs().max()) if is_above.any() else 0.0
        self._largest = max(self._largest, largest)
        true_tail = (1.0 - torch.zeros(len(p), dtype=p.dtype).index_add_(0, positions, true_p)).clamp_min(0.0)
        of_tail = torch.special.xlogy(true_tail, true_tail / torch.from_numpy(kept.tail).double().clamp_min(1e-30))
        self._divergence += float((true_p * errors).sum() + of_tail.sum())
        if not largest <= self._limit():
            yield f"a log-probability is {largest:.3f} nats from the teacher's, expected at most {self._limit():.3f}"

    def _add_states(self, states: States, truth: States) -> Iterator[str]:
        for found, expected in zip([states.hidden, *states.layers], [truth.hidden, *truth.layers]):
            if found.shape != expected.shape:
                yield f"has states of shape {tuple(found.shape)}, the teacher {tuple(expected.shape)}"
                continue
            wide = expected.float()
            rows = (found.float() - wide).abs().amax(dim=1) / wide.abs().amax(dim=1).clamp_min(1e-30)
            largest = float(torch.cat([rows, rows.new_zeros(1)]).max())
            self._largest = max(self._largest, largest)
            if not largest <= self._limit():
                yield f"a state is {largest:.3g} of its row's largest from the teacher's, at most {self._limit():.3g}"
