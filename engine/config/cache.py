"""What a cache of the teacher's targets keeps: the ``cache`` section of the run YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from engine.config.section import Count, Section

Step = Annotated[float, Field(ge=0.001, le=0.5)]


class SampledSection(Section):
    """Ids drawn from the teacher's distribution: unbiased for forward_kl, the smallest, and the default."""

    kind: Literal["sampled"]
    num_draws: Annotated[int, Field(ge=1, le=4096)] = 50
    """Draws a position. 50 keep about 15 different ids."""
    proposal_temperature: Annotated[float, Field(ge=0.8, le=2.0)] = 1.0
    """Draw from the teacher's distribution to the power of 1 / this, and weight the draws so that they stay unbiased.
    Above 1 the tail is seen more often, below 1 less; far below, a rare draw would weigh past all bounds."""


class TopKSection(Section):
    """The likeliest ids with their log-probabilities, and the mass of the rest."""

    kind: Literal["top_k"]
    k: Annotated[int, Field(ge=1, le=65536)] = 128
    """Ids a position."""
    max_error: Step = 0.05
    """Largest error of a log-probability, in nats."""


class TopPSection(Section):
    """As many of the likeliest ids as reach a share of the mass."""

    kind: Literal["top_p"]
    p: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.95
    """Mass to reach."""
    min_k: Count = 1
    """Ids a position at least."""
    max_k: Count = 128
    """Ids a position at most."""
    max_error: Step = 0.05
    """Largest error of a log-probability, in nats."""

    @model_validator(mode="after")
    def _min_below_max(self) -> TopPSection:
        if self.min_k > self.max_k:
            raise ValueError(f"min_k = {self.min_k} is more than max_k = {self.max_k}")
        return self


class HiddenSection(Section):
    """The states that go into the teacher's head, and the head once: exact for any term and temperature."""

    kind: Literal["hidden"]
    dtype: Literal["bf16", "fp16", "fp32", "fp8"] = "bf16"
    """fp8 is e4m3 with a scale a position."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Teacher layers whose states are kept at every token, for hidden terms: 0 is the embeddings, i layer i."""


CodecSection = Annotated[SampledSection | TopKSection | TopPSection | HiddenSection, Field(discriminator="kind")]


class CacheSection(Section):
    """How `launch/cache_teacher.py` makes the cache that `teacher.cache` names. Training reads it only with
    `teacher.on_missing: ask`."""

    codec: CodecSection = SampledSection(kind="sampled")
    """What is kept: `sampled`, `top_k`, `top_p` or `hidden`, with its settings."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Divides the teacher's logits before anything is kept. No part of `hidden`."""
    seed: int = 0
    """Seed of the draws."""
    micro_sequences: Count = 8
    """Sequences of one forward pass of the teacher. Part of the last digit of its numbers, so jobs must agree."""

    @model_validator(mode="after")
    def _hidden_has_no_temperature(self) -> CacheSection:
        if self.codec.kind == "hidden" and self.temperature != 1.0:
            raise ValueError("cache.temperature does not apply to codec hidden, which serves any temperature")
        return self
