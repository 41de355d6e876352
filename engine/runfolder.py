"""The folder of a run: who it belongs to, and what is written into it before the first step.

runs/<name>/  config.yaml  ds_config.json  environment.json  metrics.jsonl  log.txt  report.html
              student/ (config and tokenizer)  checkpoints/  export/
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from engine.config.load import load_config
from engine.config.run import RunConfig
from engine.data.atomic import write_atomically
from engine.errors import CheckpointError, ConfigError
from engine.redaction import MASK, redact_all, redact_words

CONFIG, DS_CONFIG, ENVIRONMENT = "config.yaml", "ds_config.json", "environment.json"
FREE_TO_CHANGE = (
    "run.output",
    "run.num_steps",
    "run.num_epochs",
    "run.gradient_checkpointing",
    "run.precision",
    "batch.micro_sequences",
    "data.reader_threads",
    "data.prefetch_steps",
    "data.max_bad_samples",
    "data.retry_seconds",
    "data.server_timeout_seconds",
    "data.manifest",
    "teacher.cache",
    "teacher.on_missing",
    "teacher.placement",
    "teacher.tp_size",
    "teacher.offload",
    "teacher.overlap",
    "cache.",
    "evaluation",
    "checkpoint",
    "tracking",
    "cluster",
    "zero",
)
"""Settings that a resumed run may change. The data and a cache are told by their hashes, not by their places; the
precision in use is compared with the checkpoint's."""
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "numpy", "webdataset", "pydantic", "stillhouse")


def check_owner(folder: Path, config: RunConfig) -> None:
    """Raises CheckpointError when ``folder`` belongs to a run with other settings, naming each difference."""
    path = folder / CONFIG
    if not path.is_file():
        return
    before = _flat(redact_all(yaml.safe_load(path.read_text())))
    now = _flat(redact_all(config.model_dump(mode="json")))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    changed = [key for key in changed if not key.startswith(FREE_TO_CHANGE)]
    if changed:
        shown = "\n".join(f"  {key}: was {before.get(key)!r}, is now {now.get(key)!r}" for key in changed[:8])
        raise CheckpointError(
            f"{folder} belongs to a run with other settings:\n{shown}\n"
            "give this run another run.name, or start it anew with --resume never (the old folder is kept, renamed)"
        )


def read_config(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that the run in ``folder`` was started with. Raises CheckpointError when it is no run's folder,
    ConfigError for a setting whose secret was masked there and that no override gives."""
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: not a run's folder (no {CONFIG} in it)")
    config = load_config(str(path), overrides)
    masked = sorted(key for key, value in _flat(config.model_dump(mode="json")).items() if MASK in str(value))
    if masked:
        raise ConfigError(
            f"{path}: {', '.join(masked)} held a secret, which is not kept; give it again, as {masked[0]}=VALUE"
        )
    return config


def set_aside(folder: Path, into: Path | None = None) -> Path | None:
    """Rename an existing run folder, so that a new run starts in an empty one. Returns where the old one is: beside it,
    or in ``into``."""
    if not folder.exists():
        return None
    into = into or folder.parent
    into.mkdir(exist_ok=True)
    number = 1
    while (target := into / f"{folder.name}.{number}").exists():
        number += 1
    return folder.rename(target)


def write_start(folder: Path, config: RunConfig, deepspeed: dict[str, Any], facts: dict[str, Any]) -> None:
    """The resolved config, the DeepSpeed JSON as used, and what the run was made with; secrets are masked."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        DS_CONFIG: json.dumps(redact_all(deepspeed), indent=2) + "\n",
        ENVIRONMENT: json.dumps(redact_all(environment() | facts), indent=2) + "\n",
        CONFIG: yaml.safe_dump(redact_all(config.model_dump(mode="json")), sort_keys=False, width=100),
    }
    for name, content in contents.items():  # a kill half-way must not leave a config that no run has
        write_atomically(folder / name, content.encode())


def environment() -> dict[str, Any]:
    """Versions, machine, command and git revision."""
    return {
        "versions": package_versions(),
        "python": platform.python_version(),
        "host": platform.node(),
        "system": platform.platform(),
        "command": redact_words(sys.argv),
        "git_revision": git("rev-parse", "HEAD"),
        "git_changes": git("status", "--porcelain") != "",
    }


def package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def git(*words: str) -> str:
    """What git answers about this checkout; nothing where it cannot answer."""
    root = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _flat(content: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings and lists as one mapping from key.path to value."""
    if not isinstance(content, (dict, list)) or not content:
        return {path: content}
    flat: dict[str, Any] = {}
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        flat |= _flat(value, f"{path}.{key}" if path else str(key))
    return flat
