"""A trial at start-up of a model for a task with few classes: its logits, and what padding does to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from engine.data.annotation import encode_labels
from engine.data.collate import collate
from engine.errors import ConfigError
from engine.schema import Annotation, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engine.tasks.task import Task

_SHORT_TOKENS, _LONG_TOKENS = 6, 16
_FIRST_ID = 5


def check_few_classes(model: PreTrainedModel, task: Task, role: str, num_ids: int, num_labels: int) -> None:
    """Raises ConfigError for a model with fewer ids than the tokenizer or another number of classes than the data,
    with logits that are not finite, or whose logits for a text change with the padding behind it."""
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings.weight, Tensor)
    rows = embeddings.weight.shape[0]
    if rows < num_ids:
        raise ConfigError(f"{role}: its embeddings have {rows:,} rows, fewer than the tokenizer's {num_ids:,} ids")
    short, both = _logits(model, task, [_SHORT_TOKENS]), _logits(model, task, [_SHORT_TOKENS, _LONG_TOKENS])
    name = type(model).__name__
    if num_labels and short.shape[1] != num_labels:
        raise ConfigError(f"{role} ({name}): it tells {short.shape[1]} classes apart, the data has {num_labels}")
    if not both.isfinite().all():
        raise ConfigError(f"{role} ({name}): its logits are NaN or Inf, so its weights are damaged or overflow")
    padded = both[: len(short), : short.shape[1]]
    tolerance = 0.05 if torch.finfo(model.dtype).bits < 32 else 1e-3
    difference = float((padded - short).norm() / short.norm().clamp_min(1e-6))
    if difference > tolerance:
        raise ConfigError(
            f"{role} ({name}): its logits for a text change by {difference:.3g} of their size when the text is padded; "
            "set pad_token_id in the model's config.json to the tokenizer's, or choose another model"
        )


@torch.no_grad()
def _logits(model: PreTrainedModel, task: Task, lengths: list[int]) -> Tensor:
    """[N, C] of toy texts."""
    pad_id = model.config.pad_token_id or 0
    samples = []
    for number, length in enumerate(lengths):
        ids = _FIRST_ID + np.arange(length, dtype=np.int64) % max(1, model.config.vocab_size - _FIRST_ID)
        ids = np.where(ids == pad_id, 0 if pad_id else 1, ids)
        labels = {"token_classification": [0] * length, "question_answering": [1, 2]}.get(task.kind, [0])
        annotation = Annotation(encode_labels(list(labels)), np.array([length]))
        samples.append(Sample("toy", str(number), ids, np.array([length]), annotation=annotation))
    batch = collate(samples, task.label(samples, [0] * len(samples)), pad_id=pad_id, sequence_tokens=max(lengths))
    batch = batch.to(model.device)
    was_training = model.training
    model.eval()
    try:
        logits: Tensor = task.logits(model(**task.model_inputs(batch, model)), batch)
    finally:
        model.train(was_training)
    return logits.float()
