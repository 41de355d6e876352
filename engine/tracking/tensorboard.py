"""TensorBoard event files below the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.log import logger

FOLDER = "tensorboard"


class TensorBoardFiles:
    """Events of steps after ``first_step`` from an earlier attempt are hidden by TensorBoard itself (purge_step)."""

    def __init__(self, run_folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_folder / FOLDER), purge_step=first_step + 1 if first_step else 0)
        self._warned = False

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        try:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except Exception as error:
            self._warn(error)

    def close(self, status: str) -> None:
        try:
            self._writer.close()
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            logger.warning("TensorBoard files: %s; training goes on, metrics.jsonl is whole", error)
        self._warned = True
