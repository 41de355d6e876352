"""Asking for something that must be refused, and looking at what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Distiller
from engine.checkpoint import complete_checkpoints
from engine.config.load import parse_config
from engine.dist import Control, Ranks
from engine.errors import StillhouseError
from engine.parts import Parts, Place, build_parts

Settings = dict[str, Any]


def parts_of(config: Settings, world_size: int = 1) -> Parts:
    place = Place(Ranks(0, world_size, 0), Control(Ranks(0, 1, 0)), torch.device("cpu"))
    return build_parts(parse_config(config), place)


def refused(config: Settings, error: type[StillhouseError], *words: str, world_size: int = 1) -> None:
    with pytest.raises(error) as caught:
        parts_of(config, world_size)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def fail(config: Settings, error: type[StillhouseError], *words: str, resume: str = "auto") -> str:
    with pytest.raises(error) as caught:
        Distiller(config, resume=resume).fit()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


def checkpoints(root: Path, name: str = "run") -> list[str]:
    return [path.name for path in complete_checkpoints(root / "runs" / name / "checkpoints")]
