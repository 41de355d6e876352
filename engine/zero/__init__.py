"""DeepSpeed, and the only package that imports it: the ranks' group, the student's engine, its checkpoints."""

import engine.zero.environment  # noqa: F401  - before deepspeed is imported anywhere
from engine.zero.group import build_ops, init_distributed
from engine.zero.snapshot import SnapshotWriter, consolidate
from engine.zero.student import StudentEngine

__all__ = ["SnapshotWriter", "StudentEngine", "build_ops", "consolidate", "init_distributed"]
