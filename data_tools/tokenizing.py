"""Texts to token ids in a pool of processes, in order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import chain
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from data_tools.processes import map_in_order, process_pool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_CHARACTERS = 1 << 18

Tag = TypeVar("Tag")


class TokenizerSpec(NamedTuple):
    """What a process needs to make the same tokenizer: the whole of a fast one, or the name of another."""

    content: str | None
    name: str

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> TokenizerSpec:
        if not tokenizer.is_fast:
            return TokenizerSpec(None, tokenizer.name_or_path)
        return TokenizerSpec(tokenizer.backend_tokenizer.to_str(), tokenizer.name_or_path)


class _Encoded(NamedTuple):
    """The ids of some texts: one array travels between processes faster than many."""

    ids: np.ndarray
    """uint32, of all texts end to end"""
    ends: np.ndarray
    """where each text ends"""


class Encoder:
    """Token ids of texts, without special tokens around them."""

    def __init__(self, spec: TokenizerSpec) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
        self._fast: Any = None
        if spec.content is None:
            from engine.tasks.tokenizer import load_tokenizer

            self._slow = load_tokenizer(spec.name)
        else:
            from tokenizers import Tokenizer

            self._fast = Tokenizer.from_str(spec.content)
            self._fast.no_padding()
            self._fast.no_truncation()

    def __call__(self, texts: list[str]) -> _Encoded:
        if self._fast is None:
            lists = self._slow(texts, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            lists = [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        ends = np.cumsum([len(ids) for ids in lists])
        return _Encoded(np.fromiter(chain.from_iterable(lists), np.uint32, int(ends[-1])), ends)


class _Batch(Generic[Tag]):
    def __init__(self) -> None:
        self.tags: list[Tag] = []
        self.texts: list[str] = []


def encode_in_order(
    texts: Iterable[tuple[Tag, str]], spec: TokenizerSpec, workers: int
) -> Iterator[tuple[Tag, np.ndarray]]:
    """Each text's tag and ids [tokens], in the order of the texts, whatever the number of ``workers``.

    Raises DataError when a process dies.
    """
    if workers == 1:
        encoder = Encoder(spec)
        for batch in _batches(texts):
            yield from _tagged(batch.tags, encoder(batch.texts))
        return
    batches = ((batch.tags, batch.texts) for batch in _batches(texts))
    with closing(map_in_order(batches, _encode, process_pool(workers, _make_encoder, spec), workers)) as made:
        for tags, encoded in made:
            yield from _tagged(tags, encoded)


def _tagged(tags: list[Tag], encoded: _Encoded) -> Iterator[tuple[Tag, np.ndarray]]:
    start = 0
    for tag, end in zip(tags, encoded.ends.tolist()):
        yield tag, encoded.ids[start:end]
        start = end


def _batches(texts: Iterable[tuple[Tag, str]]) -> Iterator[_Batch[Tag]]:
    batch: _Batch[Tag] = _Batch()
    characters = 0
    for tag, text in texts:
        batch.tags.append(tag)
        batch.texts.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = _Batch(), 0
    if batch.texts:
        yield batch


_encoder: Encoder


def _make_encoder(spec: TokenizerSpec) -> None:
    global _encoder
    _encoder = Encoder(spec)


def _encode(texts: list[str]) -> _Encoded:
    return _encoder(texts)
