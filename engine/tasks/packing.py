"""Packed documents that do not see each other: what to pass to a model, and a trial that it works."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.schema import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


@dataclass(frozen=True)
class _EncoderTraits:
    takes_position_ids: bool
    first_position: int
    """RoBERTa and its kin count positions from padding_idx + 1"""
    window: int | None
    """local layers attend to at most this many tokens on each side"""


_TRAITS: WeakKeyDictionary[nn.Module, _EncoderTraits] = WeakKeyDictionary()


def causal_inputs(batch: Batch) -> dict[str, Any]:
    """Arguments for a decoder. transformers finds the documents where position_ids do not rise by one.

    It does so only with no attention_mask and no cache. A position of padding is a document of its own.
    """
    return {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}


def encoder_inputs(batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
    """Arguments for an encoder: a float mask [B, 1, T, T] where the batch is packed, none where it is not.

    A bool mask would be silently wrong under eager attention. Models with local and global layers take one mask of
    each kind. Raises ConfigError for an attention implementation that takes no such mask.
    """
    if model not in _TRAITS:
        _TRAITS[model] = _find_traits(model)
    traits = _TRAITS[model]
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if traits.takes_position_ids:
        inputs["position_ids"] = batch.position_ids + traits.first_position
    if batch.packed:
        _refuse_other_attention(model)
        inputs["attention_mask"] = _segment_masks(batch.segment_ids, model.dtype, traits.window)
    return inputs


def position_table(model: nn.Module) -> nn.Embedding | None:
    """The table of absolute positions, for models that have one."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES:
            return module
    return None


def _find_traits(model: PreTrainedModel) -> _EncoderTraits:
    table = position_table(model)
    is_local = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
    return _EncoderTraits(
        takes_position_ids="position_ids" in inspect.signature(model.forward).parameters,
        first_position=0 if table is None or table.padding_idx is None else table.padding_idx + 1,
        window=model.config.sliding_window if is_local else None,
    )


def _refuse_other_attention(model: PreTrainedModel) -> None:
    implementation = model.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise ConfigError(
            f"{type(model).__name__} with attention: {implementation} cannot keep packed documents apart; "
            "expected sdpa or eager: set student.attention and teacher.attention to sdpa"
        )


def _segment_masks(segment_ids: Tensor, dtype: torch.dtype, window: int | None) -> Tensor | dict[str, Tensor]:
    """0 where a position may attend, else the lowest number of ``dtype``. Padding attends to padding."""
    apart = segment_ids[:, None, :, None] != segment_ids[:, None, None, :]
    everywhere = _float_mask(apart, dtype)
    if window is None:
        return everywhere
    places = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    far = (places[:, None] - places[None, :]).abs() > window
    return {"full_attention": everywhere, "sliding_attention": _float_mask(apart | far, dtype)}


def _float_mask(forbidden: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(forbidden.shape, dtype=dtype, device=forbidden.device)
    return mask.masked_fill_(forbidden, torch.finfo(dtype).min)
