"""Stillhouse: a cluster-scale DeepSpeed engine for distilling language models.

``from engine import Callback, Distiller, RunConfig`` is the whole API for notebooks. The names are resolved on first
use, so that reading a config on a login node imports neither torch nor deepspeed.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Callback", "Distiller", "RunConfig"]

_HOMES = {"Callback": "engine.callbacks", "Distiller": "engine.distiller", "RunConfig": "engine.config.run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
