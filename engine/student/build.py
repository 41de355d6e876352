"""The student's weights: from a model, a config or the teacher's own layers, with a report of their origin."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from engine.config.run import StudentSection
from engine.errors import ConfigError
from engine.models import MODEL_CLASSES, fresh_model, layer_stack, load_hf_config, load_model, set_labels
from engine.student.compress import svd_embeddings
from engine.student.distilbert import distilbert_config, fold_token_type, name_in_bert

NO_TEACHER = "student.init needs a teacher with weights; set teacher.kind: online and teacher.model"
Origin = tuple[str, str]
"""(part of the student, where its weights came from)"""


@dataclass(frozen=True)
class BuiltStudent:
    model: PreTrainedModel
    origins: tuple[Origin, ...]


def build_student(
    section: StudentSection, model_class: str, seed: int, teacher: PreTrainedModel | None, labels: Sequence[str] = ()
) -> BuiltStudent:
    """The student in fp32 on the CPU, in training mode. ``labels`` are the classes of the data, for tasks that have
    some; a pretrained student then gets a fresh head where it has none for them.

    Raises ConfigError when the model cannot be had, or a layer index is out of the teacher's range.
    """
    if section.model is not None:
        torch.manual_seed(seed)
        fresh_head = model_class not in (MODEL_CLASSES["masked_lm"], MODEL_CLASSES["causal_lm"])
        model = load_model(section, model_class, torch.float32, "student", labels=labels, fresh_head=fresh_head).train()
        return BuiltStudent(model, (("all", section.model), *_compressed(section, model, teacher)))
    if section.config is not None:
        config = student_config(section, None)
        set_labels(config, labels)
        model = fresh_model(config, section, model_class, seed)
        return BuiltStudent(model, (("all", f"drawn from seed {seed}"), *_compressed(section, model, teacher)))
    if teacher is None:
        raise ConfigError(NO_TEACHER)
    layers = chosen_layers(section.layers, teacher.config.num_hidden_layers)
    config = student_config(section, teacher.config)
    set_labels(config, labels)
    student = fresh_model(config, section, model_class, seed)
    return BuiltStudent(student, tuple(copy_layers(student, teacher, layers)))


def _compressed(section: StudentSection, model: PreTrainedModel, teacher: PreTrainedModel | None) -> list[Origin]:
    if section.init is None:
        return []
    if teacher is None:
        raise ConfigError(NO_TEACHER)
    kept = svd_embeddings(model, teacher)
    return [("word embeddings", f"teacher's, {kept:.1%} of their squared singular values")]


def student_config(section: StudentSection, teacher: PreTrainedConfig | None) -> PreTrainedConfig:
    """The student's config, without any weights."""
    if section.init != "teacher_layers":
        where = section.config if section.config is not None else section.model
        assert where is not None
        return load_hf_config(where, "student", revision=section.revision, remote_code=section.trust_remote_code)
    if teacher is None:
        raise ConfigError(NO_TEACHER)
    num_layers = teacher.num_hidden_layers
    layers = chosen_layers(section.layers, num_layers)
    if section.architecture is not None:
        return distilbert_config(teacher, len(layers), section.sinusoidal_positions)
    config = copy.deepcopy(teacher)
    for key, value in teacher.to_dict().items():
        if isinstance(value, list) and len(value) == num_layers:  # one entry a layer, as layer_types has
            setattr(config, key, [value[layer] for layer in layers])
    config.num_hidden_layers = len(layers)
    return config


def chosen_layers(layers: int | tuple[int, ...] | None, num_layers: int) -> tuple[int, ...]:
    """Indices of the teacher's layers to copy; a count is spread evenly from the first to the last.

    Six of twelve gives 0, 2, 4, 7, 9, 11, DistilBERT's choice. Raises ConfigError for an index out of range.
    """
    assert layers is not None
    if isinstance(layers, int):
        if layers > num_layers:
            raise ConfigError(f"student.layers: {layers} layers asked of a teacher that has {num_layers}")
        return tuple(round(i * (num_layers - 1) / max(1, layers - 1)) for i in range(layers))
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ConfigError(f"student.layers: the teacher has no layer {layer}; its layers are 0 to {num_layers - 1}")
    return layers


@torch.no_grad()
def copy_layers(student: PreTrainedModel, teacher: PreTrainedModel, layers: tuple[int, ...]) -> list[Origin]:
    """Copy ``layers`` and all that is outside the stack. Returns where each part of the student came from."""
    stack = layer_stack(teacher, teacher.config.num_hidden_layers, "teacher")
    source = dict(teacher.state_dict())
    is_renamed = student.config.model_type != teacher.config.model_type
    origins: dict[str, str] = {}
    for name, tensor in student.state_dict().items():
        if is_renamed:
            wanted = name_in_bert(name, layers)
            part, origin = name, f"teacher {wanted}"
        else:
            part, wanted, origin = _origin_of(name, stack, layers)
        found = source.get(wanted or "")
        if is_renamed and name.endswith("position_embeddings.weight") and student.config.sinusoidal_pos_embds:
            origins[name] = "sine waves"
        elif found is not None and found.shape == tensor.shape:
            tensor.copy_(found)
            origins.setdefault(part, origin)
        else:
            origins[name] = "fresh weights: the teacher has none of this name and shape"
    if is_renamed:
        fold_token_type(student, source)
    student.tie_weights()
    return list(origins.items())


def _origin_of(name: str, stack: str, layers: tuple[int, ...]) -> tuple[str, str, str]:
    """(part of the student, name of the weight in the teacher, words for the report)"""
    if not name.startswith(stack + "."):
        return name, name, f"teacher {name}"
    number, rest = name[len(stack) + 1 :].split(".", 1)
    layer = layers[int(number)]
    return f"{stack}.{number}", f"{stack}.{layer}.{rest}", f"teacher {stack}.{layer}"
