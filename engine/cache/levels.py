"""Log-probabilities as whole numbers, finest where the probability is large.

What an error e of a log-probability costs in KL is about p e^2 / 2, so equal cost for every id means errors in
proportion to 1 / sqrt(p): whole numbers in even steps of sqrt(p). Below the probability where those steps would
err by more than max_error nats, steps are even in log p instead. So the error is at most max_error, and about
FINE_STEP / sqrt(p) at most where that is less.
"""

from __future__ import annotations

import math

import numpy as np

FINE_STEP = 1.0 / 1024
"""Of sqrt(p)."""
FLOOR = 24.0
"""Probabilities below e^-24 are kept as that."""


class Levels:
    """Level 0 is the least likely."""

    def __init__(self, max_error: float) -> None:
        self._step = 2.0 * max_error
        # half a step of sqrt(p) downwards changes log p the most, by -2 log(1 - FINE_STEP / 2 / sqrt(p))
        self._turn = max(0.0, -2.0 * math.log(FINE_STEP / 2.0 / -math.expm1(-max_error / 2.0)))
        self._turn_level = (1.0 - math.exp(-self._turn / 2.0)) / FINE_STEP
        self.highest = math.ceil(self._turn_level + (FLOOR - self._turn) / self._step)

    def of(self, log_p: np.ndarray) -> np.ndarray:
        """The nearest level of each, int64."""
        x = np.clip(-log_p.astype(np.float64), 0.0, FLOOR)
        fine = (1.0 - np.exp(-x / 2.0)) / FINE_STEP
        from_top = np.where(x < self._turn, fine, self._turn_level + (x - self._turn) / self._step)
        return self.highest - np.rint(from_top).astype(np.int64)

    def log_p(self) -> np.ndarray:
        """[highest + 1] float64: the log-probability of each level."""
        from_top = np.arange(self.highest, -1, -1, dtype=np.float64)
        root = np.maximum(1.0 - from_top * FINE_STEP, 1e-300)
        return np.where(
            from_top < self._turn_level, 2.0 * np.log(root), -self._turn - (from_top - self._turn_level) * self._step
        )
