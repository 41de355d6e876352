"""Code of a user's own that is told what a run does, on rank 0: for notebooks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from engine.errors import StillhouseError, TrainingError

log = logging.getLogger("stillhouse")


class Callback:
    """Override what is wanted. Returning True asks for an orderly end of the run, with a checkpoint; an exception ends
    the run on all ranks with TrainingError."""

    def on_record(self, step: int, record: Mapping[str, float]) -> bool | None:
        """A record of the training, as metrics.jsonl has it; every tracking.every_steps."""

    def on_evaluation(self, step: int, record: Mapping[str, float]) -> bool | None:
        """What held-out data gave; every evaluation.every_steps."""

    def on_checkpoint(self, step: int) -> bool | None:
        """A checkpoint of this step has been begun."""


class Callbacks:
    """All of a run; asks each, and keeps what went wrong for the ranks to agree on."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = tuple(callbacks)
        self.problem: StillhouseError | None = None
        self.asked_to_stop: str | None = None
        """by whom"""

    def record(self, step: int, record: Mapping[str, float]) -> None:
        for callback in self._callbacks:
            self._call(callback, "on_record", step, record)

    def evaluation(self, step: int, record: Mapping[str, float]) -> None:
        for callback in self._callbacks:
            self._call(callback, "on_evaluation", step, record)

    def checkpoint(self, step: int) -> None:
        for callback in self._callbacks:
            self._call(callback, "on_checkpoint", step)

    def _call(self, callback: Callback, method: str, step: int, *record: Mapping[str, float]) -> None:
        name = f"{type(callback).__name__}.{method}"
        try:
            if getattr(callback, method)(step, *record):
                self.asked_to_stop = name
        except Exception as problem:  # whatever a user's code raises
            log.exception("%s failed after step %d", name, step)
            self.problem = TrainingError(f"{name} failed after step {step}: {type(problem).__name__}: {problem}")
            self.problem.__cause__ = problem
