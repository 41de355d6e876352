"""DeepSpeed, and the only package that imports it: the ranks' group, the student's engine, its checkpoints."""

import engine.zero.environment  # noqa: F401  - before deepspeed is imported anywhere
from engine.zero.group import build_ops, init_distributed
from engine.zero.loading import TAG, consolidate
from engine.zero.placement import shard_teacher
from engine.zero.snapshot import SnapshotWriter
from engine.zero.student import StudentEngine
from engine.zero.universal import UNIVERSAL, convert

__all__ = [
    "TAG",
    "UNIVERSAL",
    "SnapshotWriter",
    "StudentEngine",
    "build_ops",
    "consolidate",
    "convert",
    "init_distributed",
    "shard_teacher",
]
