"""What tasks with labels of their own have in common: one text or a pair of texts a sequence, few classes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.annotation import FIRST, NONE
from engine.schema import IGNORE, Annotation, Batch, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNKNOWN_LABEL = 0
"""Stands in for a label that is not known; terms that would look at it are refused for such data."""


def annotations_of(samples: Sequence[Sample]) -> list[Annotation]:
    """Of the sound samples."""
    return [sample.annotation for sample in samples if sample.annotation is not None]


def token_ids(samples: Sequence[Sample]) -> np.ndarray:
    """[N] of the samples end to end."""
    return np.concatenate([sample.token_ids for sample in samples]).astype(np.int64)


def decode_labels(stored: np.ndarray) -> np.ndarray:
    """Stored labels as indices of classes or places, IGNORE where there is none."""
    labels = np.maximum(stored.astype(np.int64) - FIRST, UNKNOWN_LABEL)
    labels[stored == NONE] = IGNORE
    return labels


def labels_at_starts(samples: Sequence[Sample]) -> np.ndarray:
    """[N] labels of whole sequences: they stand at the first positions of theirs."""
    found = annotations_of(samples)
    lengths = np.array([int(each.piece_tokens.sum()) for each in found])
    labels = np.full(int(lengths.sum()), IGNORE, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    for start, each in zip(starts.tolist(), found):
        labels[start : start + len(each.labels)] = decode_labels(each.labels)
    return labels


def single_inputs(batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
    """Arguments for a model whose sequences hold one sample each: transformers' own way with padding and pairs."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": (batch.segment_ids != 0).long()}
    if batch.piece_ids is not None and _takes_pairs(model):
        inputs["token_type_ids"] = batch.piece_ids
    return inputs


def _takes_pairs(model: PreTrainedModel) -> bool:
    """Whether the model has an embedding for the second text. RoBERTa and its kin have one type alone."""
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    return takes and getattr(model.config, "type_vocab_size", 1) > 1
