"""Labelled examples to samples: token ids, labels and pieces; one example may give several."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_tools.examples import OUTSIDE, Classified, Example, Question, Tagged
from data_tools.packing import frame_of
from engine.data.annotation import NONE, encode_labels
from engine.errors import ConfigError, DataError
from engine.schema import Annotation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_TOKENS = 8
NOWHERE = 0
"""Place of an answer that is not there: the token that the sequence begins with"""


@dataclass(frozen=True)
class EncodingSpec:
    """What a process needs to encode examples."""

    task: str
    tokenizer: str
    sequence_tokens: int
    labels: tuple[str, ...]
    overlap_tokens: int
    """that neighbouring windows of a context share"""
    question_tokens: int
    """of a question; the rest of a longer one is left out"""


class Encoded(NamedTuple):
    """One sample."""

    token_ids: np.ndarray
    annotation: Annotation
    is_cut: bool
    """text of the example was left out, or is in another sample"""


class ExampleEncoder:
    """Raises ConfigError for a tokenizer that cannot tell which token belongs to which word, or a sequence too short.

    Calling it raises DataError for a label that is not among those of the spec.
    """

    def __init__(self, spec: EncodingSpec) -> None:
        from engine.tasks.tokenizer import load_tokenizer

        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
        self._spec = spec
        self._tokenizer: Any = load_tokenizer(spec.tokenizer)
        if not self._tokenizer.is_fast:
            raise ConfigError(
                f"{spec.tokenizer}: {spec.task} needs a fast tokenizer (tokenizer.json), which tells words"
            )
        if spec.task == "token_classification":
            _separate_words(self._tokenizer)
        self._before, self._after = frame_of(self._tokenizer)
        least = MIN_TOKENS + len(self._before) + len(self._after)
        if spec.task == "question_answering":
            least += spec.question_tokens + spec.overlap_tokens
        if spec.sequence_tokens < least:
            raise ConfigError(
                f"--sequence-tokens {spec.sequence_tokens} is too short for {spec.task}, expected at least {least}"
                + ("; or give fewer --question-tokens and --overlap-tokens" if least > 2 * MIN_TOKENS else "")
            )
        self._index = {label: number for number, label in enumerate(spec.labels)}

    def __call__(self, examples: Sequence[Example]) -> list[list[Encoded]]:
        """The samples of each example."""
        encode: dict[type, Callable[[Any], Iterator[Encoded]]] = {
            Tagged: self._tagged,
            Classified: self._classified,
            Question: self._question,
        }
        return [list(encode[type(example)](example)) for example in examples]

    def _tagged(self, example: Tagged) -> Iterator[Encoded]:
        """Each word's label at its first token. A sentence that is too long is cut, between entities if it can be."""
        words = self._word_tokens(example)
        labels: list[int | None] = [None] * len(words)
        if example.tags is not None:
            labels = self._labels_of(example.where, example.tags)
        room = self._spec.sequence_tokens - len(self._before) - len(self._after)
        start = 0
        while start < len(words):
            end = self._window_end(words, example.tags, start, room)
            ids = [token for word in words[start:end] for token in word][:room]
            stored = np.full(len(self._before) + len(ids) + len(self._after), NONE, np.uint32)
            firsts = len(self._before) + np.cumsum([0] + [len(word) for word in words[start : end - 1]])
            stored[firsts] = encode_labels(labels[start:end])
            framed = np.array([*self._before, *ids, *self._after], np.uint32)
            annotation = Annotation(stored, np.array([len(framed)], np.uint32))
            yield Encoded(framed, annotation, is_cut=end - start < len(words))
            start = end

    def _word_tokens(self, example: Tagged) -> list[list[int]]:
        """Ids of each word; of one that the tokenizer drops, the unknown token: it has a label to be scored."""
        encoding = self._tokenizer(list(example.words), is_split_into_words=True, add_special_tokens=False)
        tokens: list[list[int]] = [[] for _ in example.words]
        for token, word in zip(encoding["input_ids"], encoding.word_ids()):
            tokens[word].append(token)
        unknown = self._tokenizer.unk_token_id
        if unknown is None and not all(tokens):
            raise DataError(f"{example.where}: the tokenizer has no token for a word of {example.words}")
        return [each or [unknown] for each in tokens]

    def _window_end(self, words: list[list[int]], tags: Sequence[str] | None, start: int, room: int) -> int:
        end, used = start + 1, len(words[start])
        while end < len(words) and used + len(words[end]) <= room:
            used += len(words[end])
            end += 1
        if end == len(words) or tags is None:
            return end
        outside = [place for place in range(start + 1, end + 1) if tags[place] == OUTSIDE or tags[place][:2] == "B-"]
        return outside[-1] if outside else end

    def _classified(self, example: Classified) -> Iterator[Encoded]:
        encoding = self._tokenizer(*example.texts)
        is_cut = len(encoding["input_ids"]) > self._spec.sequence_tokens
        if is_cut:
            encoding = self._tokenizer(*example.texts, truncation=True, max_length=self._spec.sequence_tokens)
        labels: list[int | None] = [None] if example.labels is None else self._labels_of(example.where, example.labels)
        ids = np.array(encoding["input_ids"], np.uint32)
        yield Encoded(ids, Annotation(encode_labels(labels), _pieces(encoding.sequence_ids())), is_cut)

    def _question(self, example: Question) -> Iterator[Encoded]:
        question = self._tokenizer(example.question, add_special_tokens=False)["input_ids"]
        if len(question) > self._spec.question_tokens:
            question = self._tokenizer.decode(question[: self._spec.question_tokens])
        else:
            question = example.question
        encoding = self._tokenizer(
            question,
            example.context,
            truncation="only_second",
            max_length=self._spec.sequence_tokens,
            stride=self._spec.overlap_tokens,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        num_windows = len(encoding["input_ids"])
        for window in range(num_windows):
            ids = encoding["input_ids"][window]
            sides = encoding.sequence_ids(window)
            first = sides.index(1)
            last = len(sides) - 1 - sides[::-1].index(1)
            spans = encoding["offset_mapping"][window][first : last + 1]
            labels = self._places(example, spans, first)
            content = {"id": example.id, "first": first, "starts": [s for s, _ in spans], "ends": [e for _, e in spans]}
            content |= {"context": example.context, "answers": [text for text, _ in example.answers or ()]}
            stored = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
            annotation = Annotation(encode_labels(labels), _pieces(sides), stored)
            yield Encoded(np.array(ids, np.uint32), annotation, is_cut=num_windows > 1)

    def _places(self, example: Question, spans: list[tuple[int, int]], first: int) -> list[int | None]:
        """Of the first and the last token of the first answer, or NOWHERE where the window lacks it."""
        if example.answers is None:
            return [None, None]
        if not example.answers:
            return [NOWHERE, NOWHERE]
        text, start = example.answers[0]
        end = start + len(text)
        begins = [place for place, (s, e) in enumerate(spans) if s <= start < e]
        ends = [place for place, (s, e) in enumerate(spans) if s < end <= e]
        return [first + begins[0], first + ends[-1]] if begins and ends else [NOWHERE, NOWHERE]

    def _labels_of(self, where: str, names: Sequence[str]) -> list[int | None]:
        found: list[int | None] = []
        for name in names:
            if name not in self._index:
                known = ", ".join(self._spec.labels[:16]) + (", ..." if len(self._spec.labels) > 16 else "")
                raise DataError(f"{where}: label {name!r} is not among the labels: {known}")
            found.append(self._index[name])
        return found


def _pieces(sides: Sequence[int | None]) -> np.ndarray:
    """Tokens up to the second text, and from it on."""
    second = next((place for place, side in enumerate(sides) if side == 1), None)
    return np.array([len(sides)] if second is None else [second, len(sides) - second], np.uint32)


def _separate_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Byte-level tokenizers write a word with the blank before it: words that come one by one need it too."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        backend.pre_tokenizer.add_prefix_space = True


_encoder: ExampleEncoder


def make_encoder(spec: EncodingSpec) -> None:
    """In a process of a pool."""
    global _encoder
    _encoder = ExampleEncoder(spec)


def encode_examples(examples: Sequence[Example]) -> list[list[Encoded]]:
    """In a process of a pool, after ``make_encoder``."""
    return _encoder(examples)
