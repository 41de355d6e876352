"""Token classification: each word has a label, at its first token. Named entities are labelled as IOB spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.collate import Labelled
from engine.losses.hidden import select_rows
from engine.schema import Batch, Sample
from engine.tasks.labelled import annotations_of, decode_labels, single_inputs, token_ids

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class TokenClassification:
    """A label at the first token of each word; other tokens and special ones take no part."""

    kind = "token_classification"
    over_vocabulary = False

    def label(self, samples: Sequence[Sample], rounds: Sequence[int]) -> Labelled:
        found = annotations_of(samples)
        stored = np.concatenate([each.labels for each in found]) if found else np.empty(0, np.uint16)
        return token_ids(samples), decode_labels(stored)

    def model_inputs(self, batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
        return single_inputs(batch, model)

    def logits(self, output: Any, batch: Batch) -> Tensor:
        return select_rows(output.logits, batch.label_rows)
