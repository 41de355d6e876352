"""Who answers what the teacher says of a batch. Online and cached runs differ in this one object."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.schema import Batch, Targets


class TargetSource(Protocol):
    """Gives the targets at the selected positions."""

    def targets_for(self, batch: Batch, rows: Tensor) -> Targets | None:
        """The targets of ``batch`` at the flat indices ``rows``, [N]."""
        ...


class NoTeacher:
    """Training on the labels alone."""

    def targets_for(self, batch: Batch, rows: Tensor) -> None:
        return None
