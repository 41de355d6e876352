"""Hugging Face models in: loaded, made fresh, and asked for their one stack of layers. Never by a list of names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from engine.config.run import ModelSection
from engine.errors import ConfigError

transformers.utils.logging.disable_progress_bar()  # every rank would show one for every model it reads
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")


def load_hf_config(
    where: str | dict[str, Any], name: str, *, revision: str | None, remote_code: bool
) -> PreTrainedConfig:
    """A config from a folder, a hub id, a .json file or a mapping. Raises ConfigError naming the setting ``name``."""
    try:
        if isinstance(where, str) and where.endswith(".json") and Path(where).is_file():
            where = json.loads(Path(where).read_text())
        if isinstance(where, dict):
            if "model_type" not in where:
                raise ConfigError(f"{name}: a config needs model_type, for example model_type: llama")
            settings = {key: value for key, value in where.items() if key != "model_type"}
            return AutoConfig.for_model(where["model_type"], **settings)
        return AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=remote_code)
    except (OSError, ValueError, KeyError) as problem:
        raise ConfigError(f"{name}: no model config at {where!r}: {_first_line(problem)}") from problem


def load_model(section: ModelSection, model_class: str, dtype: torch.dtype | str, name: str) -> PreTrainedModel:
    """The pretrained model of ``section``, on the CPU, in evaluation mode. ``dtype`` ``auto``: as the files have it.

    Raises ConfigError when there is no such model, when its weights are damaged, of another shape than its config
    says, or only in a pickle without ``allow_pickle``, or when the file lacks weights that the task's model needs.
    """
    assert section.model is not None
    remote_code = section.trust_remote_code
    config = load_hf_config(section.model, f"{name}.model", revision=section.revision, remote_code=remote_code)
    _refuse_pickle(section, name)
    try:
        model, info = getattr(transformers, model_class).from_pretrained(
            section.model,
            config=config,
            dtype=dtype,
            revision=section.revision,
            use_safetensors=None if section.allow_pickle else True,
            trust_remote_code=remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with the shapes
            **_attention(section),
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as problem:
        raise ConfigError(f"{name}.model: cannot load {section.model!r}: {_first_line(problem)}") from problem
    if info["mismatched_keys"]:
        weight, found, wanted = min(info["mismatched_keys"])
        raise ConfigError(
            f"{name}.model: cannot load {section.model!r}: {len(info['mismatched_keys'])} weights have another shape "
            f"than its config.json says, first {weight}: {tuple(found)}, expected {tuple(wanted)}"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ConfigError(
            f"{name}.model: {section.model!r} has no weights for {len(missing)} parameters of {type(model).__name__}, "
            f"first {missing[:3]}; it was not trained as a {model_class.removeprefix('AutoModelFor')} model"
        )
    model.config.use_cache = False
    return model.eval()


def fresh_model(config: PreTrainedConfig, section: ModelSection, model_class: str, seed: int) -> PreTrainedModel:
    """A model with weights drawn from ``seed``: the same on every rank."""
    torch.manual_seed(seed)
    model = getattr(transformers, model_class).from_config(
        config, dtype=torch.float32, trust_remote_code=section.trust_remote_code, **_attention(section)
    )
    model.config.use_cache = False
    return model


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters in ``dtype``, in place. Buffers stay: rotary frequencies rounded to 16 bits turn
    distant positions by radians."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on ``device``; transformers' own ``to`` has lost its types."""
    nn.Module.to(model, device)
    return model


def shell(config: PreTrainedConfig, model_class: str) -> PreTrainedModel:
    """The model on the meta device: shapes without weights."""
    with torch.device("meta"):
        return getattr(transformers, model_class).from_config(config)


def layer_stack(model: nn.Module, num_layers: int, name: str) -> str:
    """Path of the one list of ``num_layers`` layers. Raises ConfigError when there is none, or more than one."""
    found = [path for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if len(found) != 1:
        raise ConfigError(
            f"{name}: {type(model).__name__} has {len(found) or 'no'} stacks of {num_layers} layers {found or ''}; "
            "copying layers needs exactly one"
        )
    return found[0]


def _attention(section: ModelSection) -> dict[str, str]:
    return {} if section.attention == "auto" else {"attn_implementation": section.attention}


def _refuse_pickle(section: ModelSection, name: str) -> None:
    folder = Path(section.model or "")
    if section.allow_pickle or not folder.is_dir():
        return
    files = sorted(path.name for path in folder.iterdir())
    pickles = [file for file in files if file.endswith(PICKLE_SUFFIXES) and "training_args" not in file]
    if pickles and not any(file.endswith(".safetensors") for file in files):
        raise ConfigError(
            f"{name}.model: {folder} holds its weights only as a pickle ({pickles[0]}), which can run any code when "
            f"loaded; convert it to safetensors, or set {name}.allow_pickle: true if you trust who made it"
        )


def _first_line(problem: BaseException) -> str:
    return str(problem).strip().splitlines()[0] if str(problem).strip() else repr(problem)
