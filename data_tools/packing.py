"""Documents framed with special tokens and packed end to end into sequences of one length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from engine.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_PIECE_TOKENS = 8
"""A document is not cut to fill a gap smaller than this: the sequence ends short instead."""


class Framing(NamedTuple):
    """Special tokens around a document, or around every piece of one."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    each_piece: bool


class Position(NamedTuple):
    """How far a packer is: ``used`` tokens of document number ``document`` of the input are packed already."""

    document: int
    used: int
    num_documents: int
    """documents wholly packed"""


class Packed(NamedTuple):
    """One sequence, and where the packer goes on after it."""

    token_ids: np.ndarray
    """[T] uint32"""
    document_tokens: np.ndarray
    """[D] uint32"""
    position: Position


def framing_of(tokenizer: PreTrainedTokenizerBase, task: str) -> Framing:
    """masked_lm: what the tokenizer puts around a text ([CLS], [SEP]), around every piece. causal_lm: the end-of-text
    token after a document, and before it the begin-of-text token if the tokenizer adds one.

    Raises ConfigError for a tokenizer without a mask token, or without an end-of-text token.
    """
    name = tokenizer.name_or_path
    before, after = frame_of(tokenizer)
    if task == "masked_lm":
        if tokenizer.mask_token_id is None:
            raise ConfigError(
                f"--task masked_lm, but the tokenizer {name!r} has no mask token; give an encoder's tokenizer, or "
                "--task causal_lm"
            )
        return Framing(before, after, each_piece=True)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"--task causal_lm, but the tokenizer {name!r} has no end-of-text token (eos_token); set one and save it"
        )
    begins = before[:1] == (tokenizer.bos_token_id,)
    return Framing(before[:1] if begins else (), (tokenizer.eos_token_id,), each_piece=False)


def frame_of(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    return tuple(framed[:start]), tuple(framed[start + len(bare) :])


class Packer:
    """Fills sequences of ``sequence_tokens`` with documents, greedily and in order.

    A document that does not fit is cut and goes on in the next sequence, unless fewer than MIN_PIECE_TOKENS of it
    would fit: then the sequence ends short. With ``one_document`` no two documents share a sequence. Raises ConfigError
    when no piece fits into a sequence.
    """

    def __init__(self, framing: Framing, sequence_tokens: int, start: Position, *, one_document: bool = False) -> None:
        self.position = start
        self._framing, self._one_document = framing, one_document
        self._frame_tokens = len(framing.before) + len(framing.after) if framing.each_piece else 0
        if sequence_tokens < self._frame_tokens + MIN_PIECE_TOKENS:
            raise ConfigError(
                f"--sequence-tokens {sequence_tokens} is too short, expected at least "
                f"{self._frame_tokens + MIN_PIECE_TOKENS}"
            )
        self._sequence = np.empty(sequence_tokens, np.uint32)
        self._filled = 0
        self._pieces: list[int] = []

    def add(self, document: int, ids: np.ndarray) -> Iterator[Packed]:
        """The sequences that document number ``document`` of the input completes."""
        body = ids if self._framing.each_piece else self._frame(ids)
        used = self.position.used if document == self.position.document else 0
        while used < len(body):
            room = len(self._sequence) - self._filled - self._frame_tokens
            left = len(body) - used
            if left > room and room < MIN_PIECE_TOKENS:
                yield self._close()
                continue
            take = min(left, room)
            piece = body[used : used + take]
            self._place(self._frame(piece) if self._framing.each_piece else piece)
            used += take
            self._advance(document, used, is_whole=take == left)
            if self._filled == len(self._sequence) or (self._one_document and take == left):
                yield self._close()

    def last(self) -> Iterator[Packed]:
        """The sequence that the end of the input leaves unfinished, if any."""
        if self._filled:
            yield self._close()

    def _frame(self, ids: np.ndarray) -> np.ndarray:
        return np.concatenate([self._framing.before, ids, self._framing.after]).astype(np.uint32)

    def _place(self, piece: np.ndarray) -> None:
        self._sequence[self._filled : self._filled + len(piece)] = piece
        self._filled += len(piece)
        self._pieces.append(len(piece))

    def _advance(self, document: int, used: int, is_whole: bool) -> None:
        done = self.position.num_documents
        self.position = Position(document + 1, 0, done + 1) if is_whole else Position(document, used, done)

    def _close(self) -> Packed:
        packed = Packed(self._sequence[: self._filled].copy(), np.array(self._pieces, dtype=np.uint32), self.position)
        self._filled, self._pieces = 0, []
        return packed
