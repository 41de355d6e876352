"""The teacher brought to where it shall run. One that several ranks have together is cut here, by all of them."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from engine.errors import ConfigError
from engine.losses.head import HeadTap, keep_head_whole
from engine.models import DTYPES, cast, move
from engine.parts import Parts, Place
from engine.tasks.packing_trial import toy_inputs
from engine.tasks.tokenizer import pair_ids
from engine.teacher.online import OnlineTeacher
from engine.teacher.tensor_parallel import GroupTeacher, cut_layers
from engine.zero import shard_teacher

log = logging.getLogger("stillhouse")

TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Of the states before the head, as the norm of the difference over their norm."""


def place_teacher(
    parts: Parts, place: Place, *, hidden_states: bool, attention_layers: tuple[int, ...]
) -> OnlineTeacher:
    """The teacher of ``parts`` where teacher.placement wants it. Collective.

    Raises ConfigError for a model that cannot be cut, or that says something else afterwards.
    """
    model, section = parts.teacher, parts.run.config.teacher
    assert model is not None
    wanted: dict[str, Any] = {"hidden_states": hidden_states, "attention_layers": attention_layers}
    if section.even_pairs:
        wanted["even_pairs"] = torch.tensor(pair_ids(parts.tokenizer, section.even_pairs))
    if section.placement == "replicated":
        return OnlineTeacher(model, parts.task, **wanted)
    dtype = DTYPES[parts.run.teacher_precision]
    before = _states(model, parts, torch.device("cpu"))
    keep_head_whole(model, place.device, dtype)
    if section.placement == "zero3":
        shard_teacher(model, dtype, offload=section.offload == "cpu")
        teacher = OnlineTeacher(model, parts.task, **wanted)
    else:
        assert section.tp_size is not None
        group = _neighbours(section.tp_size, place, parts.run.config.cluster.timeout_seconds)
        cut_layers(model, group)
        move(cast(model, dtype), place.device)
        teacher = GroupTeacher(model, parts.task, group=group, **wanted)
    _check_states(before, _states(model, parts, place.device, teacher.reader.tap), dtype, section.placement, model)
    log.info("teacher: %s over %d ranks", section.placement, section.tp_size or place.ranks.world_size)
    return teacher


def _neighbours(size: int, place: Place, timeout_seconds: float) -> dist.ProcessGroup:
    """This rank's group of ``size`` ranks that follow each other. All ranks make all groups."""
    world = range(place.ranks.world_size)
    starts, timeout = range(0, len(world), size), timedelta(seconds=timeout_seconds)
    groups = [dist.new_group(list(world[start : start + size]), timeout=timeout) for start in starts]
    own = groups[place.ranks.rank // size]
    assert own is not None
    return own


@torch.no_grad()
def _states(model: PreTrainedModel, parts: Parts, device: torch.device, tap: HeadTap | None = None) -> torch.Tensor:
    """What goes into the head for a few positions."""
    inputs = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in toy_inputs(model, parts.task).items()
    }
    own = tap or HeadTap(model)
    model(**inputs)
    states = own.take().float().cpu()
    if tap is None:
        own.remove()
    return states


def _check_states(
    before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype, placement: str, model: PreTrainedModel
) -> None:
    difference = ((after - before).norm() / before.norm().clamp_min(1e-12)).item()
    if not difference <= TOLERANCES[dtype]:
        raise ConfigError(
            f"teacher.placement: {placement}: {type(model).__name__} gives other states when it is cut, by "
            f"{difference:.3g} of their size (allowed {TOLERANCES[dtype]:.3g}); use another placement"
        )
