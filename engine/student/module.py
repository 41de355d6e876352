"""Student and objective as one module: what DeepSpeed wraps, so that projections train with the student."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.losses.objective import Objective, StepContext
from engine.losses.reading import ModelReader, Reads
from engine.schema import Batch, Targets


class StudentWithObjective(nn.Module):
    """``forward`` gives the micro-batch's part of the step's loss; vocabulary logits never leave the objective."""

    def __init__(self, model: PreTrainedModel, objective: Objective, task: Reads) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.reader = ModelReader(
            model,
            task,
            hidden_states=objective.needs_hidden_states,
            attention_layers=objective.comparisons.attention_layers(0),
        )
        self.head = self.reader.head

    def forward(
        self, batch: Batch, targets: Targets | None, context: StepContext
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scalar fp32 loss, the metric sums named by ``objective.metric_names``, and the logits of few classes."""
        answer = self.reader.read(batch)
        loss, metrics = self.objective(answer, self.head, batch, targets, context)
        return loss, metrics, None if answer.logits is None else answer.logits.detach()
