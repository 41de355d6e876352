"""Settings of a run that would need less device memory, as overrides."""

from __future__ import annotations

from pathlib import Path

from engine.config.run import TeacherSection


def teacher_changes(teacher: TeacherSection, world_size: int) -> list[str]:
    """Other places for the teacher's weights."""
    if teacher.kind != "online" or teacher.quantize != "none":
        return []
    if teacher.placement == "replicated" and teacher.offload == "none":
        changes = ["teacher.quantize=int8", "teacher.offload=cpu"]
        together = ["teacher.placement=zero3", "teacher.placement=zero3 teacher.offload=cpu"]
        return [*changes, *together] if world_size > 1 and not teacher.overlap else changes
    return ["teacher.offload=cpu"] if teacher.placement == "zero3" and teacher.offload == "none" else []


def zero_changes(zero: object) -> list[str]:
    """Other settings that lie beside the run's DeepSpeed JSON and shard more."""
    if not isinstance(zero, str):
        return []
    path = Path(zero)
    beside = [path.with_name(path.name.replace("zero2", "zero3")), path.with_name("zero3_offload.json")]
    return [f"zero={other}" for other in beside if other.is_file() and other != path]
