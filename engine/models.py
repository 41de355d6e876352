"""Hugging Face models in: loaded, made fresh, and asked for their one stack of layers. Never by a list of names."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from engine.config.run import ModelSection
from engine.errors import ConfigError

log = logging.getLogger("stillhouse")

transformers.utils.logging.disable_progress_bar()  # every rank would show one for every model it reads
MODEL_CLASSES = {
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
    "token_classification": "AutoModelForTokenClassification",
    "sequence_classification": "AutoModelForSequenceClassification",
    "question_answering": "AutoModelForQuestionAnswering",
}
"""The transformers Auto class of each task's models"""
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


def set_labels(config: PreTrainedConfig, labels: Sequence[str]) -> None:
    """Give a model the classes of the data; none for tasks that have none."""
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}


def load_model(
    section: ModelSection,
    model_class: str,
    dtype: torch.dtype | str,
    name: str,
    *,
    labels: Sequence[str] = (),
    fresh_head: bool = False,
) -> PreTrainedModel:
    """The pretrained model of ``section``, on the CPU, in evaluation mode. ``dtype`` ``auto``: as the files have it.

    ``labels`` are set in its config. ``fresh_head`` draws the weights of a head, or a pooler before it, that the file
    lacks or has for other labels.
    Raises ConfigError when there is no such model, when its weights are damaged, of another shape than its config
    says, or only in a pickle without ``allow_pickle``, or when the file lacks weights that the task's model needs.
    """
    assert section.model is not None
    remote_code = section.trust_remote_code
    config = load_hf_config(section.model, f"{name}.model", revision=section.revision, remote_code=remote_code)
    set_labels(config, labels)
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
    fresh = {key for key in model.state_dict() if _is_of_head(key, model)} if fresh_head else set()
    if mismatched := sorted(each for each in info["mismatched_keys"] if each[0] not in fresh):
        weight, found, wanted = mismatched[0]
        raise ConfigError(
            f"{name}.model: cannot load {section.model!r}: {len(mismatched)} weights have another shape "
            f"than its config.json says, first {weight}: {tuple(found)}, expected {tuple(wanted)}"
        )
    if missing := sorted(set(info["missing_keys"]) - fresh):
        raise ConfigError(
            f"{name}.model: {section.model!r} has no weights for {len(missing)} parameters of {type(model).__name__}, "
            f"first {missing[:3]}; it was not trained as a {model_class.removeprefix('AutoModelFor')} model"
        )
    drawn = sorted(fresh & ({key for key, *_ in info["mismatched_keys"]} | set(info["missing_keys"])))
    if drawn:
        log.info("%s: fresh weights for %s", name, ", ".join(drawn))
    model.config.use_cache = False
    return model.eval()


def _is_of_head(key: str, model: PreTrainedModel) -> bool:
    return not key.startswith(f"{model.base_model_prefix}.") or ".pooler." in key


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
