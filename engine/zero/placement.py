"""The frozen teacher under ZeRO-3: its weights cut over all ranks, a layer gathered when it is its turn."""

from __future__ import annotations

import os
from contextlib import redirect_stdout
from typing import Any

import deepspeed
import torch
from torch import nn

from engine.teacher.footprint import LIVE_VALUES, PREFETCH_VALUES


def shard_teacher(model: nn.Module, dtype: torch.dtype, *, offload: bool) -> None:
    """Cut the parameters of ``model`` over all ranks, in ``dtype``, in place; with ``offload`` this rank's share stays
    in host memory. Collective.

    One module after another is cast, sent by rank 0 and cut, so no rank holds a whole copy. The model then runs as
    before, but all ranks must run it at the same time. No optimizer, no gradients.
    """
    model.requires_grad_(False)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    host = {"remote_device": "cpu", "pin_memory": torch.cuda.is_available()} if offload else {}
    for module in model.modules():
        own = [parameter for parameter in module.parameters(recurse=False) if not hasattr(parameter, "ds_id")]
        if not own:
            continue
        for parameter in own:
            parameter.data = parameter.data.to(dtype)
        deepspeed.zero.Init(module=_Alone(own), mem_efficient_linear=False, dtype=dtype, **host)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        engine, *_ = deepspeed.initialize(model=model, config=_settings(dtype, offload))
    model.__dict__["zero3_engine"] = engine  # its end would take the model's hooks away; no submodule: it has the model
    model.eval()
    for name, buffer in model.named_buffers():  # DeepSpeed rounds rotary frequencies
        buffer.data = buffers[name].to(buffer.device)


class _Alone(nn.Module):
    """Parameters of a module without those of the modules inside it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.own = nn.ParameterList(parameters)


def _settings(dtype: torch.dtype, offload: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": 3,
        "memory_efficient_linear": False,
        "stage3_prefetch_bucket_size": PREFETCH_VALUES,
        "stage3_max_live_parameters": LIVE_VALUES,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
    }
    if offload:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": 2**31,
    }
