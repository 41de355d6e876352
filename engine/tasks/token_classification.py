"""Token classification: each word has a label, at its first token. Named entities are labelled as IOB spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.collate import Labelled
from engine.losses.hidden import select_rows
from engine.schema import Batch, Sample
from engine.tasks.labelled import annotations_of, decode_labels, single_inputs, token_ids
from engine.tasks.scores import Scores, entity_scores

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class TokenClassification:
    """A label at the first token of each word; other tokens and special ones take no part."""

    kind = "token_classification"
    over_vocabulary = False

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)

    def label(self, samples: Sequence[Sample], rounds: Sequence[int]) -> Labelled:
        found = annotations_of(samples)
        stored = np.concatenate([each.labels for each in found]) if found else np.empty(0, np.uint16)
        return token_ids(samples), decode_labels(stored)

    def model_inputs(self, batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
        return single_inputs(batch, model)

    def logits(self, output: Any, batch: Batch) -> Tensor:
        return select_rows(output.logits, batch.label_rows)

    def observe(self, logits: Tensor, batch: Batch) -> list[Any]:
        """The labels of the data and those predicted, for each sequence."""
        sequences = (batch.label_rows // batch.input_ids.shape[1]).tolist()
        gold, predicted = batch.labels.flatten()[batch.label_rows].tolist(), logits.argmax(dim=1).tolist()
        found: dict[int, tuple[list[int], list[int]]] = {}
        for sequence, *pair in zip(sequences, gold, predicted):
            for side, label in zip(found.setdefault(sequence, ([], [])), pair):
                side.append(label)
        return list(found.values())

    def score(self, observations: Sequence[Any]) -> Scores:
        gold, predicted = ([[self._labels[label] for label in each[side]] for each in observations] for side in (0, 1))
        return entity_scores(gold, predicted)
