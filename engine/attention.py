"""What attention computes with, layer by layer, taken out of a model's forward: queries, keys and values.

transformers' models call attention through a table of functions. For the time of a forward the entry is one that notes
what it is given, so that no model must be known by name, and maps of T x T are never asked of a model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.errors import ConfigError
from engine.schema import LayerAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IMPLEMENTATION = "sdpa"


@contextmanager
def noted_attention(model: PreTrainedModel, layers: Collection[int], name: str) -> Iterator[list[LayerAttention]]:
    """Inside, a forward of ``model`` fills the list with what its ``layers`` (from 0) attend with, in their order.

    Raises ConfigError for a model that does not call attention once a layer, or not through sdpa.
    """
    if model.config._attn_implementation != _IMPLEMENTATION:
        raise ConfigError(
            f"{name}: attention terms need {name}.attention: sdpa, found {model.config._attn_implementation} for "
            f"{type(model).__name__}"
        )
    own = ALL_ATTENTION_FUNCTIONS[_IMPLEMENTATION]
    noted: list[LayerAttention] = []
    num_calls = 0

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **settings: Any) -> Any:
        nonlocal num_calls
        if num_calls in layers:
            scale = settings.get("scaling") or query.shape[-1] ** -0.5
            noted.append(LayerAttention(query, key, value, float(scale), bool(getattr(module, "is_causal", False))))
        num_calls += 1
        return own(module, query, key, value, *mask, **settings)

    ALL_ATTENTION_FUNCTIONS[_IMPLEMENTATION] = note
    try:
        yield noted
    finally:
        ALL_ATTENTION_FUNCTIONS[_IMPLEMENTATION] = own
    if num_calls != model.config.num_hidden_layers:
        raise ConfigError(
            f"{name}: {type(model).__name__} calls attention {num_calls} times in {model.config.num_hidden_layers} "
            "layers, so attention terms cannot tell its layers apart; use hidden terms"
        )
