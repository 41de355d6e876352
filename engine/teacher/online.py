"""A live teacher in inference mode. Over a vocabulary it stops before its head: the loss forms its logits by chunks."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.losses.hidden import select_rows
from engine.losses.reading import ModelReader, Reads
from engine.schema import Answer, Batch, DenseTargets, Head, LogitTargets, StepBatches


class OnlineTeacher:
    """Takes a model that already lies where it shall run. It runs before the student's forward, so none of the
    student's activations is alive then."""

    def __init__(
        self,
        model: PreTrainedModel,
        task: Reads,
        *,
        hidden_states: bool,
        attention_layers: tuple[int, ...] = (),
        even_pairs: Tensor | None = None,
    ) -> None:
        """``attention_layers``, from 0, are those whose attention terms ask for; ``even_pairs`` [P, 2] are ids whose
        probabilities are evened out before they are learned."""
        self.model = model.eval().requires_grad_(False)
        self.reader = ModelReader(
            model, task, hidden_states=hidden_states, attention_layers=attention_layers, name="teacher"
        )
        self._even_pairs = None if even_pairs is None else even_pairs.to(model.device)

    @property
    def head(self) -> Head:
        """Of a teacher over the vocabulary."""
        assert self.reader.head is not None
        return self.reader.head

    @torch.inference_mode()
    def targets_for(self, batch: Batch, rows: Tensor) -> DenseTargets | LogitTargets:
        """Hidden states [N, G] at ``rows`` with the head, or the logits [N, C] of few classes; beside them the states
        of all layers when a term asks for them."""
        return self._targets(self.reader.read(batch), rows)

    def states_for(self, batch: Batch, rows: Tensor) -> DenseTargets:
        """As ``targets_for``, of a teacher over the vocabulary."""
        targets = self.targets_for(batch, rows)
        assert isinstance(targets, DenseTargets)
        return targets

    def _targets(self, answer: Answer, rows: Tensor) -> DenseTargets | LogitTargets:
        if answer.head_input is None:
            assert answer.logits is not None
            return LogitTargets(answer.logits, answer.hidden_states, answer.attention)
        states = select_rows(answer.head_input, rows)
        return DenseTargets(states, self.head, answer.hidden_states, answer.attention, self._even_pairs)

    def complete(self, step: StepBatches) -> StepBatches:
        return step
