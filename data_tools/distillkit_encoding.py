"""DistillKit's bytes of a sample to the record that a cache keeps of it; by far the most work of an import."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple, TypeVar

import numpy as np

from data_tools.distillkit_config import DistillKitConfig
from data_tools.distillkit_format import decode
from data_tools.processes import map_in_order, process_pool
from engine.cache.kept import Kept
from engine.cache.top import TopCodec
from engine.errors import DataError

_BATCH_POSITIONS = 4096
_ABOVE_ONE = 1.01

Tag = TypeVar("Tag")


class Question(NamedTuple):
    """What DistillKit kept at consecutive positions, and at which of them there is a label."""

    place: str
    targets: tuple[Sequence[np.ndarray] | np.ndarray, ...]
    """ids and values, as ``decode`` takes them"""
    labelled: np.ndarray
    """[P] rising"""


class Answer(NamedTuple):
    """The record of one sample, and what the cache adds up of it."""

    content: bytes
    num_pairs: int
    kept_mass: float
    num_above: int
    """positions whose probabilities were more than 1 in all"""


class Encoder:
    """Keeps all ids that DistillKit kept, each log-probability to within ``max_error`` nats."""

    def __init__(self, config: DistillKitConfig, ranks: np.ndarray, max_error: float) -> None:
        """``ranks`` [V]: the number of each id by frequency."""
        self._config, self._num_ids = config, len(ranks)
        self._codec = TopCodec(ranks, max_k=config.k, min_k=config.k, p=1.0, max_error=max_error)

    def __call__(self, question: Question) -> Answer:
        """Raises DataError, naming the place, for what cannot be."""
        try:
            ids, log_p = decode(self._config, *question.targets)
            self._check(ids)
        except DataError as problem:
            raise DataError(f"{question.place}: {problem}; leave the row out, or capture it again") from problem
        ids, log_p = ids[question.labelled], log_p[question.labelled].astype(np.float64)
        total = _log_sum(log_p)
        # a curve may say more than 1 in all, which is no distribution
        p = np.exp(log_p - np.maximum(total, 0.0)[:, None])
        mass = p.sum(axis=1)
        kept = Kept(
            positions=np.repeat(np.arange(len(ids)), ids.shape[1]),
            ids=ids.ravel(),
            values=p.astype(np.float32).ravel(),
            top_ids=ids[np.arange(len(ids)), p.argmax(axis=1)],
            tail=np.maximum(1.0 - mass, 0.0).astype(np.float32),
        )
        above = int(np.count_nonzero(total > np.log(_ABOVE_ONE)))
        return Answer(self._codec.encode(kept), ids.size, float(mass.sum()), above)

    def _check(self, ids: np.ndarray) -> None:
        in_order = np.sort(ids, axis=1)
        wrong = ids >= self._num_ids
        if wrong.any():
            position, rank = np.argwhere(wrong)[0]
            raise DataError(
                f"position {position}, rank {rank}: id {ids[position, rank]}, but the tokenizer has {self._num_ids}"
            )
        twice = (np.diff(in_order, axis=1) == 0).any(axis=1)
        if twice.any():
            raise DataError(
                f"position {int(twice.argmax())}: an id is kept twice: damaged, or packed with other settings"
            )


def _log_sum(log_p: np.ndarray) -> np.ndarray:
    """[P, k] -> [P]: the logarithm of the sum of the probabilities."""
    peak = log_p.max(axis=1, keepdims=True)
    return (np.log(np.exp(log_p - peak).sum(axis=1, keepdims=True)) + peak)[:, 0]


def encode_in_order(
    questions: Iterable[tuple[Tag, Question]],
    config: DistillKitConfig,
    ranks: np.ndarray,
    max_error: float,
    workers: int,
) -> Generator[tuple[Tag, Answer], None, None]:
    """Each question's tag and answer, in their order, whatever the number of ``workers``.

    Raises DataError for what a question cannot hold, and when a process dies.
    """
    if workers == 1:
        encoder = Encoder(config, ranks, max_error)
        for tag, question in questions:
            yield tag, encoder(question)
        return
    batches = _batches(questions)
    pool = process_pool(workers, _make_encoder, config, ranks, max_error)
    with closing(map_in_order(batches, _encode, pool, workers)) as made:
        for tags, answers in made:
            yield from zip(tags, answers)


def _batches(questions: Iterable[tuple[Tag, Question]]) -> Iterator[tuple[list[Tag], list[Question]]]:
    tags: list[Tag] = []
    batch: list[Question] = []
    num_positions = 0
    for tag, question in questions:
        tags.append(tag)
        batch.append(question)
        num_positions += len(question.labelled)
        if num_positions >= _BATCH_POSITIONS:
            yield tags, batch
            tags, batch, num_positions = [], [], 0
    if batch:
        yield tags, batch


_encoder: Encoder


def _make_encoder(config: DistillKitConfig, ranks: np.ndarray, max_error: float) -> None:
    global _encoder
    _encoder = Encoder(config, ranks, max_error)


def _encode(questions: list[Question]) -> list[Answer]:
    return [_encoder(question) for question in questions]
