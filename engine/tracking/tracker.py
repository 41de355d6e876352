"""One place to hand a step's metrics to; it passes them to the files and services that were asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from engine.config.following import TrackingSection
from engine.tracking.records import EVENTS, METRICS, RecordFile, metrics_record
from engine.tracking.tensorboard import TensorBoardFiles
from engine.tracking.wandb_run import WandbRun

Status = Literal["completed", "stopped", "failed"]


class Sink(Protocol):
    """Takes records besides metrics.jsonl. Never raises, never waits for a network."""

    def record(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, status: str) -> None: ...


class Tracker:
    """Writes a run's records; on ranks other than 0 (``enabled`` false) it does nothing.

    ``first_step`` is the number of steps done before this start: records of later steps, from an attempt that was
    killed, are dropped, because this one makes them again. So write a step's record before its checkpoint.
    Raises CheckpointError when the run folder cannot be written.
    """

    def __init__(
        self,
        run_folder: Path,
        config: TrackingSection,
        run_name: str,
        resolved_config: Mapping[str, Any],
        first_step: int = 0,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self.last_step = first_step
        self._sinks: list[Sink] = []
        if not enabled:
            return
        self._metrics = RecordFile(run_folder / METRICS, keep=lambda record: 0 < first_step >= record["step"])
        self._events = RecordFile(run_folder / EVENTS)
        self._event("resumed" if first_step else "started")
        if config.tensorboard:
            self._sinks.append(TensorBoardFiles(run_folder, first_step))
        if config.wandb != "disabled":
            self._sinks.append(WandbRun(run_folder, config, run_name, resolved_config))

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """``step`` steps are done. Values are Python numbers: reading a tensor here would make the device wait."""
        if not self.enabled:
            return
        self.last_step = step
        self._metrics.append(metrics_record(step, metrics))
        for sink in self._sinks:
            sink.record(step, metrics)

    def close(self, status: Status) -> None:
        """Say how the run ended and let everything reach the disk. Harmless when called again."""
        if not self.enabled:
            return
        self.enabled = False
        self._event("closed", status=status)
        for sink in self._sinks:
            sink.close(status)
        self._events.close()
        self._metrics.close()

    def _event(self, event: str, **fields: str) -> None:
        self._events.append({"event": event, "step": self.last_step, "unix_seconds": round(time.time(), 3), **fields})
