"""The records of a cache decoded one at a time, whatever its codec."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.cache.codec import Codec, build_codec, read_codec
from engine.cache.folder import CacheFolder
from engine.cache.kept import Kept
from engine.cache.sidecar import REMEDY, Sidecar
from engine.cache.states import StatesCodec
from engine.config.cache import HiddenSection, SampledSection
from engine.errors import CacheError


class States(NamedTuple):
    """What the codec ``hidden`` keeps of one sample."""

    hidden: Tensor
    """[N, G] at the positions with a label"""
    layers: list[Tensor]
    """[T, G] of each kept layer"""


class RecordReader:
    """Knows how ``folder`` was written. Raises CacheError or DataError when ranks.npy or the head are damaged."""

    def __init__(self, folder: CacheFolder) -> None:
        self.section = read_codec(folder.identity.codec)
        ranks = folder.ranks()
        self.states: StatesCodec | None = None
        self.codec: Codec | None = None
        if isinstance(self.section, HiddenSection):
            width = folder.head().weight.shape[1]
            self.states = StatesCodec(self.section.dtype, width, len(self.section.layers))
        else:
            self.codec = build_codec(self.section, ranks)

    def decode(self, content: bytes) -> Kept | States:
        """Raises ValueError for a record that this cache's codec did not write."""
        try:
            if self.codec is not None:
                return self.codec.decode([content])
            assert self.states is not None
            return States(*self.states.decode([content]))
        except Exception as problem:  # past its checks, what a decoder raises depends on the damage
            raise ValueError(str(problem) or type(problem).__name__) from problem

    def parts(self, sidecar: Sidecar, number: int) -> dict[str, int]:
        """What the bytes of a record are for. Raises DataError or CacheError for a damaged one."""
        codec = self.codec or self.states
        assert codec is not None
        content = sidecar.read(number).content
        try:
            return codec.parts(content) if content else {}
        except ValueError as problem:
            raise CacheError(f"{sidecar.place(number)}: does not decode ({problem}); {REMEDY}") from problem

    def sound(self, sidecar: Sidecar, number: int) -> Kept | States:
        """A record decoded. Raises DataError or CacheError for a damaged one."""
        try:
            return self.decode(sidecar.read(number).content)
        except ValueError as problem:
            raise CacheError(f"{sidecar.place(number)}: does not decode ({problem}); {REMEDY}") from problem

    def fault(self, decoded: Kept | States, num_positions: int, num_tokens: int) -> str | None:
        """What is impossible in a record of a sample of ``num_positions`` labels; None when all is well."""
        if isinstance(decoded, States):
            expected = [num_positions] + [num_tokens] * len(decoded.layers)
            found = [len(part) for part in (decoded.hidden, *decoded.layers)]
            if found != expected:
                return f"has states at {found} positions, expected {expected}"
            finite = all(bool(torch.isfinite(part.float()).all()) for part in (decoded.hidden, *decoded.layers))
            return None if finite else "has states that are not finite"
        if decoded.num_positions != num_positions:
            return f"has targets at {decoded.num_positions} positions, expected {num_positions}: its sample's labels"
        if not np.isfinite(decoded.values).all() or decoded.values.min(initial=0.0) < 0.0:
            return "has probabilities that are negative or not finite"
        sums = np.bincount(decoded.positions, decoded.values, num_positions)
        if decoded.tail is not None:
            sums = sums + decoded.tail
        wrong = np.flatnonzero(np.abs(sums - 1.0) > 1e-3)
        if len(wrong) and not self._is_weighted():
            return f"has probabilities that sum to {sums[wrong[0]]:.4f} at position {wrong[0]}, expected 1"
        return None

    def _is_weighted(self) -> bool:
        """Whether the draws carry weights, so that they sum to 1 only in the mean."""
        return isinstance(self.section, SampledSection) and self.section.proposal_temperature != 1.0
