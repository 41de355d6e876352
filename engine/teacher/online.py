"""A live teacher in inference mode. It stops before its head: the loss forms its logits chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine.losses.head import HeadTap, describe_head
from engine.losses.hidden import select_rows
from engine.schema import Batch, DenseTargets, StepBatches


class OnlineTeacher:
    """Takes a model that already lies where it shall run. It runs before the student's forward, so none of the
    student's activations is alive then."""

    def __init__(
        self, model: PreTrainedModel, model_inputs: Callable[[Batch, Any], dict[str, Any]], *, hidden_states: bool
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tap = HeadTap(model)
        self.head = describe_head(self.tap.module, model.config)
        self._model_inputs = model_inputs
        self._hidden_states = hidden_states

    @torch.inference_mode()
    def targets_for(self, batch: Batch, rows: Tensor) -> DenseTargets:
        """Hidden states [N, G] at ``rows``, with the head; the states of all layers when a term asks for them."""
        return self._ask(batch, rows)

    def _ask(self, batch: Batch, rows: Tensor) -> DenseTargets:
        states = self._run(batch)
        return DenseTargets(select_rows(self.tap.take(), rows), self.head, states)

    def _run(self, batch: Batch) -> tuple[Tensor, ...]:
        """One forward; the tap has what went into the head."""
        output = self.model(**self._model_inputs(batch, self.model), output_hidden_states=self._hidden_states)
        return tuple(output.hidden_states) if self._hidden_states else ()

    def complete(self, step: StepBatches) -> StepBatches:
        return step
