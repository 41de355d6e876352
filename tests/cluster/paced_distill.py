"""``launch/distill.py`` at a steady pace: a pause after every step's weights, so that a fault can hit in mid-run.

PACE_SECONDS is the pause a micro-batch, SAVE_SECONDS one before each checkpoint. The run itself is the user's: the same
configuration, the same files.
"""

from __future__ import annotations

import os
import runpy
import time
from typing import Any

from engine.checkpoint import CheckpointStore
from engine.zero import StudentEngine
from tests.cluster.hosts import ROOT

step, save = StudentEngine.step, CheckpointStore.save


def paced(self: StudentEngine, learning_rate: float) -> None:
    step(self, learning_rate)
    time.sleep(float(os.environ["PACE_SECONDS"]))


def paced_save(self: CheckpointStore, *arguments: Any) -> None:
    time.sleep(float(os.environ.get("SAVE_SECONDS", "0")))
    save(self, *arguments)


if __name__ == "__main__":
    StudentEngine.step = paced  # type: ignore[method-assign]
    CheckpointStore.save = paced_save  # type: ignore[method-assign]
    runpy.run_path(str(ROOT / "launch" / "distill.py"), run_name="__main__")
