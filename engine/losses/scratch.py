"""Memory for the temporaries of elementwise work on blocks of logits."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """[rows, ids] fp32 matrices that every block uses again.

    On a CPU each new one of this size would cost page faults and come cold into the caches, about as much as the work
    itself. A GPU's allocator does better on its own, and frees a matrix at its last use.
    """

    def __init__(self, max_rows: int, num_ids: int, device: torch.device) -> None:
        self.max_rows, self._num_ids, self._device = max_rows, num_ids, device
        self._pooled = device.type == "cpu"
        self._matrices: list[Tensor] = []
        self.begin(max_rows)

    def begin(self, num_rows: int) -> None:
        """A block of ``num_rows``; what the last one held may be overwritten."""
        self._num_rows, self._taken = num_rows, 0

    def new(self) -> Tensor:
        if not self._pooled:
            return torch.empty(self._num_rows, self._num_ids, device=self._device)
        if self._taken == len(self._matrices):
            self._matrices.append(torch.empty(self.max_rows, self._num_ids))
        self._taken += 1
        return self._matrices[self._taken - 1][: self._num_rows]
