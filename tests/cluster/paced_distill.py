"""``launch/distill.py`` at a steady pace: a pause after every step's weights, so that a fault can hit in mid-run.

PACE_SECONDS is the pause a micro-batch. The run itself is the user's: the same configuration, the same files.
"""

from __future__ import annotations

import os
import runpy
import time

from engine.zero import StudentEngine
from tests.cluster.hosts import ROOT

step = StudentEngine.step


def paced(self: StudentEngine, learning_rate: float) -> None:
    step(self, learning_rate)
    time.sleep(float(os.environ["PACE_SECONDS"]))


if __name__ == "__main__":
    StudentEngine.step = paced  # type: ignore[method-assign]
    runpy.run_path(str(ROOT / "launch" / "distill.py"), run_name="__main__")
