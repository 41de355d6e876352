"""Tiny caches for tests, made in this process by the real capture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from engine.cache.folder import CacheFolder
from engine.capture import Capture
from engine.config.load import parse_config
from engine.dist import StopSignal
from tests import tiny

CODECS: dict[str, dict[str, Any]] = {
    "sampled": {"kind": "sampled", "num_draws": 20},
    "proposal": {"kind": "sampled", "num_draws": 20, "proposal_temperature": 1.5},
    "top_k": {"kind": "top_k", "k": 12},
    "top_p": {"kind": "top_p", "p": 0.8, "max_k": 30},
    "hidden": {"kind": "hidden", "dtype": "fp32"},
}
FORWARD_KL = [{"kind": "forward_kl", "weight": 0.5}, {"kind": "cross_entropy", "weight": 0.5}]


def cached_run(root: Path, task: str = "causal_lm", codec: str = "sampled", **sections: Any) -> dict[str, Any]:
    """A run that trains from the cache called ``codec``; what to keep is in its cache section."""
    config = tiny.run_config(root, task, losses=FORWARD_KL, teacher={"kind": "cached", "cache": codec})
    config["cache"] = {"codec": CODECS[codec], "micro_sequences": 4}
    if task == "masked_lm":
        config["task"]["mask_rounds"] = 3
    for name, values in sections.items():
        config[name] = config.get(name, {}) | values if isinstance(values, dict) else values
    return config


def make_cache(config: dict[str, Any], shards: list[int] | None = None) -> CacheFolder:
    capture = Capture(parse_config(config), torch.device("cpu"))
    capture.run(range(3) if shards is None else shards, StopSignal(), lambda standing: None)
    return capture.folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
