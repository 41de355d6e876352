"""A trial at start-up that a model keeps packed documents apart: some architectures silently do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from engine.data.collate import collate
from engine.data.stateless import fold, random_bits
from engine.errors import ConfigError
from engine.schema import IGNORE, Batch, Sample
from engine.tasks.packing import position_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from engine.tasks.task import Task

_FIRST_TOKENS, _SECOND_TOKENS = 9, 13
_LONGEST_WINDOW = 256
_REMEDY = (
    "expected an architecture that honours position_ids and a 4D mask; choose another model, or try attention: eager"
)


def check_packing(model: PreTrainedModel, task: Task) -> None:
    """Three forward passes of a toy batch, before the model is wrapped for training.

    Raises ConfigError when the last hidden states of a document change with the tokens of the one packed before it, or
    when they differ from those of the document alone.
    """
    ids = _toy_ids(model)
    first, other, second = ids[:_FIRST_TOKENS], ids[_FIRST_TOKENS : 2 * _FIRST_TOKENS], ids[2 * _FIRST_TOKENS :]
    was_training = model.training
    model.eval()
    try:
        packed = _states(model, task, [first, second])[_FIRST_TOKENS:]
        neighbour_changed = _states(model, task, [other, second])[_FIRST_TOKENS:]
        alone = _states_alone(model, second)
    except (TypeError, ValueError, IndexError, RuntimeError) as problem:
        raise ConfigError(f"{_describe(model)} fails on packed documents ({problem}); {_REMEDY}") from problem
    finally:
        model.train(was_training)
    # Same shapes and kernels, so an honest model repeats itself to the last bit or nearly; alone the shapes differ.
    half = torch.finfo(model.dtype).bits < 32
    if _distance(packed, neighbour_changed) > (0.02 if half else 1e-5):
        raise ConfigError(f"{_describe(model)} lets packed documents see each other; {_REMEDY}")
    if _distance(packed, alone) > (0.1 if half else 5e-3):
        raise ConfigError(
            f"{_describe(model)} gives a packed document other states than the same document alone; {_REMEDY}"
        )


def toy_inputs(model: PreTrainedModel, task: Task) -> dict[str, Any]:
    """Inputs for one forward pass over a few tokens."""
    return task.model_inputs(_toy_batch([_toy_ids(model)[:_FIRST_TOKENS]]).to(model.device), model)


def num_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence that the model's position table holds; None without one."""
    table = position_table(model)
    return None if table is None else table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def check_positions(model: PreTrainedModel, sequence_tokens: int) -> None:
    """Raises ConfigError when ``sequence_tokens`` exceed the model's position table."""
    limit = num_positions(model)
    if limit is not None and sequence_tokens > limit:
        raise ConfigError(
            f"{_describe(model)} has {limit} positions, but the shards hold sequences of {sequence_tokens} "
            f"tokens; build the shards with --sequence-tokens {limit} or less, or choose another model"
        )


def _toy_ids(model: PreTrainedModel) -> np.ndarray:
    """Two first documents and a second one that is longer than the window of local encoder layers.

    No padding token: RoBERTa and its kin do not count it when they number positions by themselves.
    """
    window = min(getattr(model.config, "sliding_window", None) or 0, _LONGEST_WINDOW)
    count = 2 * _FIRST_TOKENS + _SECOND_TOKENS + window
    num_ids = model.config.vocab_size
    ids = (random_bits(fold("packing trial"), count) % np.uint64(num_ids)).astype(np.int64)
    return np.where(ids == model.config.pad_token_id, (ids + 1) % num_ids, ids)


@torch.no_grad()
def _states(model: PreTrainedModel, task: Task, documents: list[np.ndarray]) -> Tensor:
    """[T, H] last hidden states of the documents packed into one sequence."""
    batch = _toy_batch(documents).to(model.device)
    states: Tensor = model.base_model(**task.model_inputs(batch, model))[0]
    return states[0, : sum(map(len, documents))].float()


@torch.no_grad()
def _states_alone(model: PreTrainedModel, document: np.ndarray) -> Tensor:
    """[T, H] by the model's own lights: nothing is passed but the ids, so no mistake of a task repeats itself here."""
    states: Tensor = model.base_model(input_ids=torch.from_numpy(document)[None].to(model.device))[0]
    return states[0].float()


def _toy_batch(documents: list[np.ndarray]) -> Batch:
    """One sequence, with padding at its end."""
    ids = np.concatenate(documents)
    sample = Sample("toy", "toy", ids, np.array([len(document) for document in documents]))
    return collate([sample], (ids, np.full(len(ids), IGNORE)), pad_id=0, sequence_tokens=2 * len(ids))


def _distance(a: Tensor, b: Tensor) -> float:
    """Root mean square of the difference, relative to that of ``a``."""
    return float((a - b).norm() / a.norm())


def _describe(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} (attention: {model.config._attn_implementation})"
