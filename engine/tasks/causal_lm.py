"""Causal language modelling: every token of a document but its first is predicted from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.collate import Labelled
from engine.schema import IGNORE, Batch, Sample
from engine.tasks.packing import causal_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class CausalLM:
    """Labels are the next token of the same document; the last position of a document has none."""

    kind = "causal_lm"
    over_vocabulary = True

    def label(self, samples: Sequence[Sample], rounds: Sequence[int]) -> Labelled:
        token_ids = np.concatenate([sample.token_ids for sample in samples])
        document_tokens = np.concatenate([sample.document_tokens for sample in samples])
        labels = np.full(len(token_ids), IGNORE, dtype=np.int64)
        labels[:-1] = token_ids[1:]
        labels[np.cumsum(document_tokens, dtype=np.int64) - 1] = IGNORE
        return token_ids, labels

    def model_inputs(self, batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
        return causal_inputs(batch)

    def logits(self, output: Any, batch: Batch) -> Tensor:
        raise AssertionError("the fused head forms them")

    def observe(self, logits: Tensor, batch: Batch) -> list[Any]:
        return []

    def score(self, observations: Sequence[Any]) -> None:
        return None
