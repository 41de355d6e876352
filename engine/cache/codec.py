"""What a codec of distributions does, and the one that a cache was made with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from engine.cache.distribution import Distributions
from engine.cache.importance import ImportanceCodec
from engine.cache.kept import Kept
from engine.cache.sampled import SampledCodec
from engine.cache.top import TopCodec
from engine.config.cache import CodecSection, HiddenSection, SampledSection, TopKSection
from engine.errors import CacheError

VERSIONS = {"sampled": 1, "top_k": 1, "top_p": 1, "hidden": 1}


class Codec(Protocol):
    """Chooses what to keep of a distribution, and writes it to bytes. ``hidden`` keeps states and is not one."""

    def select(self, teacher: Distributions, offsets: Tensor) -> Kept:
        """What to keep of C rows. ``offsets`` [C] float64 are uniform in [0, 1), for codecs that draw."""

    def encode(self, kept: Kept) -> bytes:
        """The record of one sample."""

    def decode(self, records: Sequence[bytes]) -> Kept:
        """Several records laid end to end. Raises ValueError when one is cut short."""

    def parts(self, record: bytes) -> dict[str, int]:
        """What the bytes of a record are for: ``header``, ``ids`` and ``values``, which add up to all of them."""


def describe_codec(section: CodecSection) -> dict[str, Any]:
    """What cache.json says of the codec."""
    return {**section.model_dump(mode="json"), "version": VERSIONS[section.kind]}


def read_codec(description: dict[str, Any]) -> CodecSection:
    """The settings in cache.json. Raises CacheError for a codec that this version does not know."""
    kind, version = description.get("kind"), description.get("version")
    if kind not in VERSIONS or version != VERSIONS[kind]:
        raise CacheError(
            f"the cache was made with codec {kind}, version {version}; this Stillhouse reads "
            f"{', '.join(f'{name} {number}' for name, number in VERSIONS.items())}: update it, or make the cache anew"
        )
    settings = {key: value for key, value in description.items() if key != "version"}
    try:
        section: CodecSection = TypeAdapter(CodecSection).validate_python(settings)
    except ValidationError as problem:
        raise CacheError(f"the settings of codec {kind} in the cache do not hold: {problem}") from problem
    return section


def build_codec(section: CodecSection, ranks: np.ndarray) -> Codec:
    """``ranks`` [V]: the number of each id by frequency."""
    assert not isinstance(section, HiddenSection)
    if isinstance(section, SampledSection):
        if section.proposal_temperature != 1.0:
            return ImportanceCodec(ranks, section.num_draws, section.proposal_temperature)
        return SampledCodec(ranks, section.num_draws)
    if isinstance(section, TopKSection):
        return TopCodec(ranks, max_k=section.k, min_k=section.k, p=1.0, max_error=section.max_error)
    return TopCodec(ranks, max_k=section.max_k, min_k=section.min_k, p=section.p, max_error=section.max_error)
