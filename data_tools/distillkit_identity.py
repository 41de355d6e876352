"""What cache.json says of a cache that was made from DistillKit's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from data_tools.distillkit_config import DistillKitConfig
from engine.cache.codec import describe_codec
from engine.cache.fitness import num_rounds, task_settings
from engine.cache.identity import CacheIdentity
from engine.config.cache import TopKSection
from engine.config.run import ModelSection, TaskSection
from engine.data.address import LocalFile, sha256_of
from engine.data.manifest import Manifest
from engine.log import Progress
from engine.teacher.fingerprint import fingerprint_teacher


class Teacher(NamedTuple):
    """Who was asked."""

    fingerprint: str
    name: str


def identify_teacher(model: str | None, source: Path, config: DistillKitConfig, files: Sequence[Path]) -> Teacher:
    """The model's own fingerprint where one is given; else the settings and all bytes of the files stand for it."""
    if model is not None:
        return Teacher(fingerprint_teacher(ModelSection(model=model)), model)
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    with Progress(len(files), "files hashed") as progress:
        for number, path in enumerate(files, 1):
            digest.update(bytes.fromhex(sha256_of(LocalFile(str(path)))))
            progress.update(number)
    return Teacher(digest.hexdigest(), str(source))


def cache_identity(data: Manifest, section: TopKSection, teacher: Teacher, ranks_sha256: str) -> CacheIdentity:
    """A capture does not say in which precision its teacher ran, nor how many sequences at once."""
    task = TaskSection(kind="causal_lm")
    return CacheIdentity(
        codec=describe_codec(section),
        temperature=1.0,
        teacher=teacher.fingerprint,
        teacher_name=teacher.name,
        teacher_precision="unknown",
        tokenizer=data.tokenizer,
        vocab_size=data.vocab_size,
        task=task_settings(task),
        num_rounds=num_rounds(task),
        seed=0,
        micro_sequences=1,
        ranks_sha256=ranks_sha256,
    )
