"""How far a cache is from its teacher is told for every codec, and no wrong target passes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_tools.target_errors import Probabilities, TargetErrors
from engine.cache.codec import build_codec
from engine.cache.distribution import Exponentiator
from engine.config.cache import CodecSection, SampledSection, TopKSection

IDS, ROWS = 400, 40


@pytest.mark.parametrize(
    "section",
    [
        SampledSection(kind="sampled", num_draws=20),
        SampledSection(kind="sampled", num_draws=20, proposal_temperature=0.8),
        SampledSection(kind="sampled", num_draws=20, proposal_temperature=1.5),
        TopKSection(kind="top_k", k=20),
    ],
    ids=lambda section: f"{section.kind}-{getattr(section, 'proposal_temperature', '')}",
)
@pytest.mark.parametrize("shift", [0, 17])
def test_ids_that_are_not_the_teachers_are_found_out(section: CodecSection, shift: int) -> None:
    z = 2.5 * torch.randn(ROWS, IDS, generator=torch.Generator().manual_seed(2))
    codec = build_codec(section, np.arange(IDS))
    teacher = Exponentiator(ROWS, IDS, z.device)(z, torch.zeros(ROWS, dtype=torch.long))
    kept = codec.select(teacher, torch.rand(ROWS, dtype=torch.float64))
    read = codec.decode([codec.encode(kept)])
    wrong = replace(read, ids=(read.ids + shift) % IDS)
    lengths = [15, 25]
    truth = Probabilities(lengths, iter(torch.softmax(z.double(), dim=1).split(lengths)))
    errors = TargetErrors(section, "fp32")
    told = list(errors.add(wrong, truth, 0.0))
    assert bool(told) == bool(shift), told
    assert errors.lines()
