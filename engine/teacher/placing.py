"""Where a teacher's weights lie that one rank can place alone, and what must be known before they are loaded."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from engine.config.run import TeacherSection
from engine.errors import ConfigError
from engine.losses.head import keep_head_whole
from engine.models import DTYPES, cast, load_hf_config, load_model, move, shell
from engine.teacher.offload import stream_weights
from engine.teacher.quantized import check_torchao, quantize_int8
from engine.teacher.tensor_parallel import check_tensor_parallel, plan_cuts


def check_placement(section: TeacherSection, model_class: str) -> None:
    """What can be refused before weights are read. Raises ConfigError."""
    if section.quantize == "int8":
        check_torchao()
    if section.tp_size is not None and section.model is not None:
        config = load_hf_config(
            section.model, "teacher.model", revision=section.revision, remote_code=section.trust_remote_code
        )
        check_tensor_parallel(config, section.tp_size)
        plan_cuts(shell(config, model_class))


def load_teacher(section: TeacherSection, model_class: str) -> PreTrainedModel:
    """The teacher on the host. One that will be cut or streamed keeps the dtype of its files: safetensors are then
    mapped, not read, and the ranks of a host share one copy in the page cache. Else fp32. Raises ConfigError."""
    check_placement(section, model_class)
    mapped = section.placement != "replicated" or section.offload != "none"
    model = load_model(section, model_class, "auto" if mapped else torch.float32, "teacher")
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if mapped and not dtypes <= set(DTYPES.values()):
        raise ConfigError(f"teacher.model: {section.model!r} has weights in {', '.join(map(str, dtypes))}")
    return model


def place_alone(model: PreTrainedModel, section: TeacherSection, precision: str, device: torch.device) -> None:
    """Bring a replicated teacher to ``device``, quantised or streamed from the host, in place."""
    if section.offload == "cpu":
        keep_head_whole(model, device, DTYPES[precision])
        stream_weights(cast(model, DTYPES[precision]), device)
        return
    cast(model, DTYPES[precision])
    if section.quantize == "int8":
        quantize_int8(model)
    move(model, device)


def alone(section: TeacherSection) -> TeacherSection:
    """For one rank what was for many: a teacher that they had together stays on the host, for it may not fit."""
    if section.placement == "replicated":
        return section.model_copy(update={"overlap": False})
    return section.model_copy(update={"placement": "replicated", "tp_size": None, "offload": "cpu", "overlap": False})


def described_precision(section: TeacherSection, precision: str) -> str:
    """What a cache says of its teacher's precision."""
    return precision if section.quantize == "none" else f"{precision}, weights {section.quantize}"
