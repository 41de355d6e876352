"""The end of a run, on one rank: the export, the scores of all models, the report."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.parts import Parts


def finish_run(parts: Parts, folder: Path, device: torch.device, finished: bool) -> None:
    return None
