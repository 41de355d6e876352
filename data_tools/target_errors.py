"""How far kept targets are from the teacher's own, and how far they may be."""

from __future__ import annotations

import torch
from torch import Tensor

from data_tools.cache_records import States
from engine.cache.kept import Kept
from engine.cache.levels import FLOOR
from engine.cache.states import RELATIVE_ERROR
from engine.config.cache import CodecSection, HiddenSection, SampledSection

NOISE = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 3e-2}
"""How far a teacher's probabilities and states may move, of the largest, between two devices."""
LOG_NOISE = {"fp32": 1e-3, "fp16": 5e-2, "bf16": 0.3}
"""Likewise its log-probabilities, in nats: an unlikely id moves further."""


class TargetErrors:
    """Gathers the errors of samples of a cache with this codec, made of a teacher in this precision."""

    def __init__(self, section: CodecSection, precision: str) -> None:
        self._section, self._precision = section, precision
        self._largest = 0.0
        self._divergence = 0.0
        self._num_positions = 0

    def add(self, decoded: Kept | States, truth: Tensor | States) -> str | None:
        """One sample. Returns what is wrong when it is further from the teacher than the codec's own error."""
        if isinstance(decoded, States):
            assert isinstance(truth, States)
            return self._add_states(decoded, truth)
        assert isinstance(truth, Tensor)
        if decoded.num_positions != len(truth):
            return f"has targets at {decoded.num_positions} positions, the sample {len(truth)} labels"
        self._num_positions += len(truth)
        if isinstance(self._section, SampledSection):
            return self._add_draws(decoded, truth, self._section)
        return self._add_likeliest(decoded, truth, self._section.max_error)  # type: ignore[union-attr]

    def lines(self) -> list[str]:
        """For people."""
        if isinstance(self._section, SampledSection):
            return [
                f"largest distance of a share from the teacher's p: {self._largest:.3f} of {self._section.num_draws} "
                "draws (below 1)"
            ]
        if isinstance(self._section, HiddenSection):
            return [f"largest error of a state: {self._largest:.2e} of its row's largest (at most {self._limit():.2e})"]
        return [
            f"reconstruction KL: {self._divergence / max(1, self._num_positions):.2e} nats a position",
            f"largest error of a log-probability: {self._largest:.4f} nats (at most {self._limit():.4f})",
        ]

    def _limit(self) -> float:
        if isinstance(self._section, SampledSection):
            return 1.0 + self._section.num_draws * NOISE[self._precision]
        if isinstance(self._section, HiddenSection):
            return RELATIVE_ERROR[self._section.dtype] + NOISE[self._precision]
        # a position's probabilities are scaled to the sum of 1 when they are read, by no more than their own error
        return 2.0 * self._section.max_error + LOG_NOISE[self._precision]

    def _add_draws(self, kept: Kept, p: Tensor, section: SampledSection) -> str | None:
        if section.proposal_temperature != 1.0:
            return None  # weighted draws: their distance from p has no bound
        shares = torch.zeros_like(p)
        shares[torch.from_numpy(kept.positions).long(), torch.from_numpy(kept.ids).long()] = torch.from_numpy(
            kept.values
        ).double()
        distance = float((shares - p).abs().max() * section.num_draws) if p.numel() else 0.0
        self._largest = max(self._largest, distance)
        if distance < self._limit():
            return None
        return f"a share is {distance:.2f} draws from the teacher's p, expected less than 1"

    def _add_likeliest(self, kept: Kept, p: Tensor, max_error: float) -> str | None:
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
        if largest <= self._limit():
            return None
        return f"a log-probability is {largest:.3f} nats from the teacher's, expected at most {self._limit():.3f}"

    def _add_states(self, states: States, truth: States) -> str | None:
        for found, expected in zip([states.hidden, *states.layers], [truth.hidden, *truth.layers]):
            if found.shape != expected.shape:
                return f"has states of shape {tuple(found.shape)}, the teacher {tuple(expected.shape)}"
            if not len(found):
                continue
            wide = expected.float()
            rows = (found.float() - wide).abs().amax(dim=1) / wide.abs().amax(dim=1).clamp_min(1e-30)
            self._largest = max(self._largest, float(rows.max()))
            if not float(rows.max()) <= self._limit():
                return f"a state is {float(rows.max()):.3g} of its row's largest from the teacher's"
        return None
