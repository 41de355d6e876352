"""Numbers that follow from the step or from other numbers: pure functions, nothing to save or to replay at a resume."""

from __future__ import annotations

import math


def ramp(shape: str, progress: float) -> float:
    """0 at ``progress`` <= 0, 1 at >= 1; ``shape`` is linear or cosine (half a wave)."""
    progress = min(max(progress, 0.0), 1.0)
    return progress if shape == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))


def between(start: float, end: float, shape: str, step: int, from_step: int, to_step: int) -> float:
    """The value at ``step`` of a number that moves from ``start`` to ``end`` between two steps."""
    return start + (end - start) * ramp(shape, (step - from_step) / max(1, to_step - from_step))


def learning_rate_factor(
    kind: str,
    step: int,
    num_steps: int,
    *,
    warmup_steps: int,
    final_fraction: float,
    decay_steps: int | None,
    milestones: tuple[int, ...],
    factor: float,
) -> float:
    """Share of the peak learning rate at ``step`` (from 0). Plateau is constant here: its cuts come from evaluations.

    WSD (warm-up, stable, decay) is the schedule of MiniCPM, arXiv 2404.06395.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if kind in ("constant", "plateau"):
        return 1.0
    if kind == "multi_step":
        return factor ** sum(step >= milestone for milestone in milestones)
    start, shape = warmup_steps, kind
    if kind == "wsd":
        start, shape = num_steps - (decay_steps or max(1, num_steps // 10)), "linear"
    return between(1.0, final_fraction, shape, step, start, num_steps)


def samples_of_epoch(num_samples: int, lanes: int, epoch_samples: int | None) -> int:
    """Samples that an epoch has: a whole number for each lane, and at least one."""
    return max(1, min(num_samples, epoch_samples or num_samples) // lanes) * lanes
