"""Parts of a student by readable names, and keeping them from training."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import nn
from transformers import PreTrainedModel

from engine.config.checks import FROZEN_PARTS
from engine.errors import ConfigError
from engine.models import layer_stack

_LAYERS = re.compile(r"layers(?:\s+(\d+)(?:\s*-\s*(\d+))?)?")
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


def freeze(model: PreTrainedModel, parts: Sequence[str]) -> int:
    """Keep ``parts`` of the model as they are; all else is trained. Returns how many weights that leaves out.

    Raises ConfigError for a part that is unknown or that this model does not have.
    """
    frozen: dict[int, nn.Parameter] = {}
    for part in parts:
        found = parameters_of(model, part)
        if not found:
            raise ConfigError(f"freeze: {type(model).__name__} has no {part!r}; the parts are {FROZEN_PARTS}")
        frozen |= {id(parameter): parameter for parameter in found}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in frozen.values())


def freeze_fixed_positions(model: PreTrainedModel) -> None:
    """Positions that are sine waves stay so: DistilBERT loads them as weights like any other."""
    if getattr(model.config, "sinusoidal_pos_embds", False):
        for parameter in parameters_of(model, "position_embeddings"):
            parameter.requires_grad_(False)


def parameters_of(model: PreTrainedModel, part: str) -> list[nn.Parameter]:
    """The weights of a part. Raises ConfigError for a name that is no part's, or a layer that is not there."""
    if match := _LAYERS.fullmatch(part):
        return _layers(model, match[1], match[2])
    chosen = {
        "embeddings": lambda: _embeddings(model),
        "word_embeddings": lambda: list(model.get_input_embeddings().parameters()),
        "position_embeddings": lambda: _named(model, lambda name: name in _POSITIONS),
        "token_type_embeddings": lambda: _named(model, lambda name: name == "token_type_embeddings"),
        "encoder": lambda: [*_embeddings(model), *_layers(model, None, None)],
        "head": lambda: _head(model),
    }
    if part not in chosen:
        raise ConfigError(f"freeze: there is no part {part!r}; the parts are {FROZEN_PARTS}")
    return chosen[part]()


def _layers(model: PreTrainedModel, first: str | None, last: str | None) -> list[nn.Parameter]:
    num_layers = model.config.num_hidden_layers
    stack = model.get_submodule(layer_stack(model, num_layers, "student"))
    assert isinstance(stack, nn.ModuleList)
    start = 0 if first is None else int(first)
    end = num_layers - 1 if first is None else int(last or first)
    if not start <= end < num_layers:
        named = f"{start}-{end}" if last else f"{start}"
        raise ConfigError(f"freeze: layers {named}: the student's layers are 0 to {num_layers - 1}")
    return [parameter for layer in stack[start : end + 1] for parameter in layer.parameters()]


def _embeddings(model: PreTrainedModel) -> list[nn.Parameter]:
    """Of the module around each table of embeddings: with a table's norm and projection, where it has them."""
    layers = {id(parameter) for parameter in _layers(model, None, None)}
    around = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            outer = name.rpartition(".")[0]
            whole = model.get_submodule(outer) if outer else model
            is_block = not any(id(parameter) in layers for parameter in whole.parameters())
            around.add(outer if is_block else name)
    return [p for name in sorted(around) for p in model.get_submodule(name).parameters() if id(p) not in layers]


def _named(model: PreTrainedModel, is_wanted: Callable[[str], bool]) -> list[nn.Parameter]:
    return [
        parameter
        for name, module in model.named_modules()
        if is_wanted(name.rpartition(".")[2])
        for parameter in module.parameters()
    ]


def _head(model: PreTrainedModel) -> list[nn.Parameter]:
    """All that is neither embeddings nor layers: a tied output matrix belongs to the embeddings."""
    others = {id(parameter) for parameter in [*_embeddings(model), *_layers(model, None, None)]}
    return [parameter for parameter in model.parameters() if id(parameter) not in others]
