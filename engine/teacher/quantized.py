"""A teacher's weights in 8 bits, through torchao where it is installed."""

from __future__ import annotations

import importlib.util

from torch import nn
from transformers import PreTrainedModel

from engine.errors import ConfigError


def check_torchao() -> None:
    """Raises ConfigError where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "teacher.quantize: int8 needs torchao, which is not installed here: pip install --no-deps torchao (a "
            "version for this torch), or set teacher.quantize: none"
        )


def quantize_int8(model: PreTrainedModel) -> PreTrainedModel:
    """The model with the weights of its linear layers as int8 and a scale a row, in place; the head stays as it is,
    since the loss multiplies by it. Raises ConfigError for a model without linear layers."""
    check_torchao()
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    head = model.get_output_embeddings()
    chosen = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    if not chosen:
        raise ConfigError(
            f"teacher.quantize: int8: {type(model).__name__} has no linear layers of torch's own (nn.Linear); set "
            "teacher.quantize: none"
        )
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: module in chosen)
    return model
