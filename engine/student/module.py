"""Student and objective as one module: what DeepSpeed wraps, so that projections train with the student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.losses.head import HeadTap, describe_head
from engine.losses.objective import Objective, StepContext
from engine.schema import Batch, Targets

ModelInputs = Callable[[Batch, Any], dict[str, Any]]


class StudentWithObjective(nn.Module):
    """``forward`` gives the micro-batch's part of the step's loss; logits never leave the objective."""

    def __init__(self, model: PreTrainedModel, objective: Objective, model_inputs: ModelInputs) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.tap = HeadTap(model)
        self.head = describe_head(self.tap.module, model.config)
        self._model_inputs = model_inputs

    def forward(self, batch: Batch, targets: Targets | None, context: StepContext) -> tuple[Tensor, Tensor]:
        """Scalar fp32 loss, and the metric sums named by ``objective.metric_names``."""
        wanted = self.objective.needs_hidden_states
        output = self.model(**self._model_inputs(batch, self.model), output_hidden_states=wanted)
        states = output.hidden_states if wanted else ()
        return self.objective(self.tap.take(), states, self.head, batch, targets, context)
