"""Sequence classification: one label for a text, or for a pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.data.collate import Labelled
from engine.schema import Batch, Sample
from engine.tasks.labelled import labels_at_starts, single_inputs, token_ids
from engine.tasks.scores import Scores, class_scores

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


class SequenceClassification:
    """The label of a sequence stands at its first position."""

    kind = "sequence_classification"
    over_vocabulary = False

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = tuple(labels)

    def label(self, samples: Sequence[Sample], rounds: Sequence[int]) -> Labelled:
        return token_ids(samples), labels_at_starts(samples)

    def model_inputs(self, batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
        return single_inputs(batch, model)

    def logits(self, output: Any, batch: Batch) -> Tensor:
        sequences = batch.label_rows // batch.input_ids.shape[1]
        logits: Tensor = output.logits[sequences]
        return logits

    def observe(self, logits: Tensor, batch: Batch) -> list[Any]:
        """The label of the data and the one predicted, for each sequence."""
        return list(zip(batch.labels.flatten()[batch.label_rows].tolist(), logits.argmax(dim=1).tolist()))

    def score(self, observations: Sequence[Any]) -> Scores:
        gold, predicted = ([self._labels[each[side]] for each in observations] for side in (0, 1))
        return class_scores(gold, predicted, self._labels)
