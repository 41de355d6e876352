"""The ways to keep a teacher's answers that cache_size.py compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import distillkit_scheme
import numpy as np
import torch
from torch import Tensor

from data_tools import distillkit_format
from data_tools.distillkit_config import DistillKitConfig, bits_per_position
from engine.cache.codec import build_codec
from engine.cache.distribution import Distributions
from engine.cache.drawing import counted
from engine.cache.kept import Kept
from engine.cache.sampled import SampledCodec
from engine.config.cache import TopKSection, TopPSection


class Way(NamedTuple):
    """How to keep what the teacher says of some rows, and what it costs."""

    name: str
    select: Callable[[Distributions, Tensor], Kept]
    store: Callable[[Kept, Sequence[int]], tuple[Kept, int]]
    """what is read back, and the bytes of its records, for samples of so many positions"""
    handling: str | None


def ways(draws: Sequence[int], ranks: np.ndarray) -> list[Way]:
    found = []
    for num_draws in draws:
        codec = SampledCodec(ranks, num_draws)
        found.append(Way(f"systematic, {num_draws} draws", codec.select, through(codec), None))
        found.append(Way(f"independent, {num_draws} draws", independent(num_draws), through(codec), None))
    top_k = build_codec(TopKSection(kind="top_k"), ranks)
    for handling in ("bucket", "renormalise", "residual_to_label"):
        found.append(Way(f"top_k 128, {handling}", top_k.select, through(top_k), handling))
    fewer = build_codec(TopKSection(kind="top_k", k=50), ranks)
    found.append(Way("top_k 50, bucket", fewer.select, through(fewer), "bucket"))
    top_p = build_codec(TopPSection(kind="top_p", p=0.95, max_k=100), ranks)
    found.append(Way("top_p 0.95, at most 100, bucket", top_p.select, through(top_p), "bucket"))
    for name, config in (("recommended", distillkit_scheme.recommended(len(ranks))),
                         ("budget", distillkit_scheme.budget(len(ranks)))):  # fmt: skip
        found.append(Way(f"DistillKit {name}, bucket", top_k.select, distillkit(config), "bucket"))
    return found


def through(codec: Any) -> Callable[[Kept, Sequence[int]], tuple[Kept, int]]:
    def store(kept: Kept, lengths: Sequence[int]) -> tuple[Kept, int]:
        records = [codec.encode(part) for part in kept.cut(lengths)]
        return codec.decode(records), sum(map(len, records))

    return store


def independent(num_draws: int) -> Callable[[Distributions, Tensor], Kept]:
    generator = torch.Generator().manual_seed(0)

    def select(teacher: Distributions, offsets: Tensor) -> Kept:
        drawn = torch.multinomial(teacher.mass, num_draws, replacement=True, generator=generator).sort(dim=1).values
        likeliest = teacher.mass.gather(1, drawn).argmax(dim=1, keepdim=True)
        return counted(drawn, drawn.gather(1, likeliest).squeeze(1))

    return select


def distillkit(config: DistillKitConfig) -> Callable[[Kept, Sequence[int]], tuple[Kept, int]]:
    """Their scheme on the ids that top_k 128 keeps, which are the likeliest; bytes by their size formula."""

    def store(kept: Kept, lengths: Sequence[int]) -> tuple[Kept, int]:
        num_positions = kept.num_positions
        log_p = torch.full((num_positions, config.d), -60.0)
        log_p[torch.from_numpy(kept.positions), torch.from_numpy(kept.ids)] = torch.from_numpy(kept.values).log()
        ids, values = distillkit_format.decode(config, *distillkit_scheme.encode(config, log_p))
        p = np.exp(values.astype(np.float64))
        p /= np.maximum(p.sum(axis=1, keepdims=True), 1.0)  # the curve may bring them above 1 in all
        tail = np.maximum(1.0 - p.sum(axis=1), 1e-9)
        positions = np.repeat(np.arange(num_positions), config.k)
        read = Kept(positions, ids.ravel(), p.ravel().astype(np.float32), ids[:, 0], tail.astype(np.float32))
        return read, num_positions * bits_per_position(config) // 8

    return store
