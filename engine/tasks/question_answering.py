"""Extractive question answering: where in a context the answer to a question begins and ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from engine.data.collate import Labelled
from engine.schema import Batch, Sample
from engine.tasks.labelled import labels_at_starts, single_inputs, token_ids
from engine.tasks.scores import Scores
from engine.tasks.squad import answer_scores, best_answer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

IMPOSSIBLE = -1.0e4
"""Logit of a place in the padding: no probability, and finite at every temperature."""


class QuestionAnswering:
    """Two labels a sequence, the places of the answer's first and last token, at its first two positions; both are 0
    where the context holds no answer. The classes of a row are the places of its sequence."""

    kind = "question_answering"
    over_vocabulary = False

    def label(self, samples: Sequence[Sample], rounds: Sequence[int]) -> Labelled:
        return token_ids(samples), labels_at_starts(samples)

    def model_inputs(self, batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
        return single_inputs(batch, model)

    def logits(self, output: Any, batch: Batch) -> Tensor:
        width = batch.input_ids.shape[1]
        sequences, which = batch.label_rows // width, batch.label_rows % width
        logits = torch.stack([output.start_logits, output.end_logits], dim=1)[sequences, which]
        return logits.float().masked_fill(batch.segment_ids[sequences] == 0, IMPOSSIBLE)

    def observe(self, logits: Tensor, batch: Batch) -> list[Any]:
        """The best answer of each window."""
        sequences = (batch.label_rows[::2] // batch.input_ids.shape[1]).tolist()
        starts, ends = logits[::2].float().cpu().numpy(), logits[1::2].float().cpu().numpy()
        return [best_answer(batch.examples[sequence], *pair) for sequence, *pair in zip(sequences, starts, ends)]

    def score(self, observations: Sequence[Any]) -> Scores:
        return answer_scores(observations)
