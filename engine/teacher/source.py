"""Who answers what the teacher says of a batch. Online and cached runs differ in this one object."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.schema import Batch, StepBatches, Targets


class TargetSource(Protocol):
    """Gives the targets at the selected positions."""

    def targets_for(self, batch: Batch, rows: Tensor) -> Targets | None:
        """The targets of ``batch`` at the flat indices ``rows``, [N]."""
        ...

    def complete(self, step: StepBatches) -> StepBatches:
        """What can fail on this rank alone is done here, before ranks agree that all of them go on. Raises
        DataError or CacheError."""
        ...


class NoTeacher:
    """Training on the labels alone."""

    def targets_for(self, batch: Batch, rows: Tensor) -> None:
        return None

    def complete(self, step: StepBatches) -> StepBatches:
        return step
