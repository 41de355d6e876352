"""What each model would say about a few held-out texts, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.report import Prediction, Word
from engine.schema import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from engine.tasks.task import Task

POSITIONS_PER_TEXT, NUM_GUESSES = 2, 5
CONTEXT_TOKENS = 40


class Shower:
    """Puts what models predict into words."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], num_ids: int) -> None:
        self._task, self._tokenizer, self._labels, self._num_ids = task, tokenizer, labels, num_ids

    @torch.inference_mode()
    def predictions(self, models: dict[str, PreTrainedModel], batch: Batch) -> list[Prediction]:
        """The likeliest words, or labels, of each model at a few labelled positions of each text."""
        if self._task.kind == "question_answering":
            return []
        logits = {name: self._logits(model, batch) for name, model in models.items()}
        sequences = (batch.label_rows // batch.input_ids.shape[1]).tolist()
        found = []
        for text in range(batch.input_ids.shape[0]):
            rows = [row for row, sequence in enumerate(sequences) if sequence == text]
            for row in self._chosen(rows, batch):
                guesses = {name: self._guesses(scores[row]) for name, scores in logits.items()}
                found.append(self._shown(text, int(batch.label_rows[row]), batch, guesses))
        return found

    def _logits(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """[N, C] at the labelled rows."""
        output = model(**self._task.model_inputs(batch, model))
        if not self._task.over_vocabulary:
            return self._task.logits(output, batch)
        logits: Tensor = output.logits.flatten(0, 1)[batch.label_rows, : self._num_ids]
        return logits

    def _chosen(self, rows: list[int], batch: Batch) -> list[int]:
        """A few places of a text, within it; of labelled words those that bear a rarer label than most."""
        if self._task.kind == "token_classification":
            labels = batch.labels.flatten()[batch.label_rows].tolist()
            rows = [row for row in rows if labels[row] != 0] or rows
        last = len(rows) - 1
        places = {part * last // (POSITIONS_PER_TEXT + 1) for part in range(1, POSITIONS_PER_TEXT + 1)}
        return [rows[place] for place in sorted(places)] if rows else []

    def _guesses(self, scores: Tensor) -> tuple[Word, ...]:
        best = scores.float().softmax(0).topk(min(NUM_GUESSES, len(scores)))
        return tuple(Word(self._name(index), p) for p, index in zip(best.values.tolist(), best.indices.tolist()))

    def _name(self, index: int) -> str:
        return self._text([index]) if self._task.over_vocabulary else self._labels[index]

    def _shown(self, text: int, place: int, batch: Batch, guesses: dict[str, tuple[Word, ...]]) -> Prediction:
        position = place % batch.input_ids.shape[1]
        truth = self._name(int(batch.labels[text, position]))
        if self._task.kind == "sequence_classification":
            ids = batch.input_ids[text][batch.segment_ids[text] != 0].tolist()
            return Prediction(str(self._tokenizer.decode(ids, skip_special_tokens=True)) + " ", truth, "", guesses)
        before, after = self._context(batch, text, position)
        return Prediction(before, truth, after, guesses)

    def _context(self, batch: Batch, text: int, position: int) -> tuple[str, str]:
        """The words around a position, of its own document: those that the model sees, and of a masked word those after
        it. What a causal model predicts follows its position; a label stands behind its word."""
        same = batch.segment_ids[text] == batch.segment_ids[text, position]
        ids = batch.input_ids[text]
        masked = self._task.kind == "masked_lm"
        first, end, last = max(0, position - CONTEXT_TOKENS), position + (not masked), position + CONTEXT_TOKENS
        before = [int(i) for i, inside in zip(ids[first:end], same[first:end]) if inside]
        if self._task.kind == "causal_lm":
            return self._text(before), ""
        after = [int(i) for i, inside in zip(ids[position + 1 : last], same[position + 1 : last]) if inside]
        return self._text(before), self._text(after)

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))
