"""Bytes of a teacher's weights on a device and on the host, for each placement, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from engine.config.run import TeacherSection
from engine.teacher.tensor_parallel import check_tensor_parallel, plan_cuts

PREFETCH_VALUES = 50_000_000
"""Values gathered ahead of their turn under ZeRO-3, on a GPU while the layer before computes."""
LIVE_VALUES = 200_000_000
"""Gathered values kept at a time; a module larger than this is gathered all the same."""


@dataclass(frozen=True)
class TeacherBytes:
    """On one rank."""

    weights: int
    """on the device from step to step, with the whole head"""
    gathered: int
    """on the device while a layer computes"""
    host: int


def teacher_bytes(model: PreTrainedModel, section: TeacherSection, value_bytes: int, world_size: int) -> TeacherBytes:
    """With P values in all, V G of them the head's, b bytes each and W ranks:

    replicated b P, with int8 one byte for each value of a linear layer and b + 1 for each of its rows; with offload b
    V G and two modules, b P on the host; zero3 b (P' / W + V G) and what is gathered, where P' is P without an untied
    head; tensor_parallel b (C / tp_size + the rest), where C are the values of matrices that are cut. Raises
    ConfigError for a model that cannot be cut.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    head_values = 0 if head is None else sum(parameter.numel() for parameter in head.parameters(recurse=False))
    tied = any(
        head is not None and parameter is head.weight for m in model.modules() if m is not head for parameter in _own(m)
    )
    body = total if tied else total - head_values
    largest = max(sum(parameter.numel() for parameter in _own(m)) for m in model.modules() if m is not head)
    if section.placement == "zero3":
        share = -(-body // world_size) * value_bytes
        gathered = min(body, max(largest, LIVE_VALUES) + PREFETCH_VALUES) * value_bytes
        whole = head_values * value_bytes
        return (
            TeacherBytes(whole, gathered, share)
            if section.offload == "cpu"
            else TeacherBytes(whole + share, gathered, 0)
        )
    if section.placement == "tensor_parallel":
        assert section.tp_size is not None
        check_tensor_parallel(model.config, section.tp_size)
        cut = sum(module.weight.numel() for module, _ in plan_cuts(model))
        return TeacherBytes((head_values + body - cut + cut // section.tp_size) * value_bytes, 0, 0)
    if section.offload == "cpu":
        return TeacherBytes(head_values * value_bytes, 2 * largest * value_bytes, total * value_bytes)
    if section.quantize == "int8":
        linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        values, rows = sum(m.weight.numel() for m in linear), sum(m.out_features for m in linear)
        return TeacherBytes((total - values) * value_bytes + values + rows * (value_bytes + 1), 0, 0)
    return TeacherBytes(total * value_bytes, 0, 0)


def _own(module: nn.Module) -> list[nn.Parameter]:
    return list(module.parameters(recurse=False))
