"""Calling a model and taking from its forward what the terms compare: student and teacher alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from engine.attention import noted_attention
from engine.losses.head import HeadTap, describe_head
from engine.schema import Answer, Batch, Head, LayerAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reads(Protocol):
    """What a task says of how its models are called and read."""

    @property
    def over_vocabulary(self) -> bool:
        """Whether the logits are over the vocabulary: then the fused head forms them, chunk by chunk."""

    def model_inputs(self, batch: Batch, model: PreTrainedModel) -> dict[str, Any]:
        """Keyword arguments for ``model``, such that packed documents do not see each other."""

    def logits(self, output: Any, batch: Batch) -> Tensor:
        """[N, C] at the labelled rows of ``batch``, from a model's output; for tasks of few classes."""


class ModelReader:
    """A model with what its task and the terms take from it."""

    def __init__(
        self,
        model: PreTrainedModel,
        task: Reads,
        *,
        hidden_states: bool,
        attention_layers: tuple[int, ...] = (),
        name: str = "student",
    ) -> None:
        """``attention_layers`` count from 0."""
        self.model = model
        self.tap: HeadTap | None = None
        self.head: Head | None = None
        if task.over_vocabulary:
            self.tap = HeadTap(model)
            self.head = describe_head(self.tap.module, model.config)
        self._task, self._hidden_states = task, hidden_states
        self._attention_layers, self._name = attention_layers, name

    def read(self, batch: Batch) -> Answer:
        """One forward of the model. Its caller decides about gradients."""
        inputs = self._task.model_inputs(batch, self.model)
        attention: list[LayerAttention] = []
        if self._attention_layers:
            with noted_attention(self.model, self._attention_layers, self._name) as attention:
                output = self.model(**inputs, output_hidden_states=self._hidden_states)
        else:
            output = self.model(**inputs, output_hidden_states=self._hidden_states)
        return Answer(
            head_input=self.tap.take() if self.tap is not None else None,
            logits=None if self.tap is not None else self._task.logits(output, batch),
            hidden_states=tuple(output.hidden_states) if self._hidden_states else (),
            attention=tuple(attention),
        )

    def release(self) -> None:
        """Leave the model as it was found."""
        if self.tap is not None:
            self.tap.remove()
