"""What a task is, and the one that a run asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engine.config.run import TaskSection
from engine.data.collate import Labelled
from engine.data.manifest import TOKEN_COUNTS, Manifest
from engine.errors import DataError
from engine.losses.reading import Reads
from engine.schema import Batch, Sample
from engine.tasks.causal_lm import CausalLM
from engine.tasks.masked_lm import MaskedLM
from engine.tasks.question_answering import QuestionAnswering
from engine.tasks.scores import Scores
from engine.tasks.sequence_classification import SequenceClassification
from engine.tasks.token_classification import TokenClassification
from engine.tasks.tokenizer import fingerprint, vocab_size

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class Task(Reads, Protocol):
    """What is learned: how a sample is labelled, and how a model of the task is called and read."""

    @property
    def kind(self) -> str: ...

    def label(self, samples: Sequence[Sample], rounds: Sequence[int]) -> Labelled:
        """input_ids [N] and labels [N] (what to predict at each position, or IGNORE) of samples laid end to end.

        ``rounds`` say how often each sample was met before. A sample's labels do not depend on the others.
        """

    def observe(self, logits: Tensor, batch: Batch) -> list[Any]:
        """What scoring must know of each sequence of ``batch``, from the logits [N, C] of its labelled rows."""

    def score(self, observations: Sequence[Any]) -> Scores | None:
        """Of all sequences; None for a task over the vocabulary, which is judged by its loss."""


def check_heldout(heldout: Manifest, training: Manifest, where: str) -> None:
    """Raises DataError when held-out shards are not of the training's task, tokenizer and labels, or have no labels:
    their scores would mean nothing."""
    for name in ("task", "tokenizer", "vocab_size", "labels"):
        there, here = getattr(heldout, name), getattr(training, name)
        if there != here:
            raise DataError(
                f"{where}: its {name} is {there}, that of the training shards is {here}; build the held-out shards "
                "with the same tokenizer, and with --labels of the training shards' manifest.json"
            )
    if not heldout.has_labels:
        raise DataError(f"{where}: has no labels, so nothing can be scored on it; give labelled data")


def build_task(
    config: TaskSection, tokenizer: PreTrainedTokenizerBase, manifest: Manifest, token_counts: np.ndarray
) -> Task:
    """The task, after checking that the shards were made for it.

    ``token_counts`` [V] are those of the training shards, for mask smoothing. Raises DataError where the shards and
    the run disagree on the task, the tokenizer or the vocabulary, ConfigError for a tokenizer unfit for the task.
    """
    name = tokenizer.name_or_path
    sides = (
        ("task", manifest.task, "task.kind", config.kind),
        ("tokenizer fingerprint", manifest.tokenizer, f"tokenizer {name!r}, fingerprint", fingerprint(tokenizer)),
        ("vocabulary size", manifest.vocab_size, f"tokenizer {name!r}, vocabulary size", vocab_size(tokenizer)),
        (f"length of {TOKEN_COUNTS}", len(token_counts), "manifest's vocabulary size", manifest.vocab_size),
    )
    for data_has, data_value, run_has, run_value in sides:
        if data_value != run_value:
            raise DataError(
                f"the shards and the run do not fit together: shards' {data_has} is {data_value}, but {run_has} is "
                f"{run_value}; build the shards again with data_tools/build_shards.py, or change task in the run's YAML"
            )
    if config.kind == "masked_lm":
        return MaskedLM(config, tokenizer, token_counts)
    if config.kind == "causal_lm":
        return CausalLM()
    if config.kind == "question_answering":
        return QuestionAnswering()
    return (TokenClassification if config.kind == "token_classification" else SequenceClassification)(manifest.labels)
