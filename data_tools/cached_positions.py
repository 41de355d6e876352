"""A few positions of a cache as text: what the teacher saw, the label, and the likeliest words that were kept."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from data_tools.cache_records import RecordReader, States
from engine.cache.fitness import num_rounds
from engine.cache.folder import CacheFolder
from engine.cache.kept import Kept
from engine.cache.recording import hashes_and_lengths
from engine.config.run import TaskSection
from engine.data.shards import ShardSet
from engine.data.spread import spread
from engine.errors import CacheError, ConfigError
from engine.losses.head import head_logits
from engine.schema import IGNORE, Sample
from engine.tasks.task import build_task
from engine.tasks.tokenizer import fingerprint, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = 80
CONTEXT_TOKENS = 40
CONTEXT_CHARACTERS = 180
SHOWN_WORDS = 12
_UNBROKEN = "\u00a0"


class PositionViewer:
    """Shows positions of a cache with the data it was made for. Raises ConfigError, DataError or CacheError."""

    def __init__(self, folder: CacheFolder, reader: RecordReader, shards: ShardSet, tokenizer: str | None) -> None:
        self._folder, self._reader, self._shards = folder, reader, shards
        name = tokenizer or folder.identity.teacher_name
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(name)
        if (found := fingerprint(self._tokenizer)) != folder.identity.tokenizer:
            raise ConfigError(
                f"--tokenizer {name}: its fingerprint is {found}, the cache's is {folder.identity.tokenizer}; give the "
                "tokenizer that the cache was made with"
            )
        section = TaskSection.model_validate(folder.identity.task)
        self._num_rounds = num_rounds(section)
        self._task = build_task(section, self._tokenizer, shards.manifest, shards.token_counts())

    def spread(self, count: int) -> Iterator[list[str]]:
        """Lines for each of ``count`` positions, evenly over the shards that have targets."""
        manifest = self._shards.manifest
        missing = {entry.name for entry in self._folder.missing(manifest)}
        lengths = [0 if entry.name in missing else entry.num_samples for entry in manifest.shards]
        for turn, (shard, index) in enumerate(spread(lengths, count)):
            if lines := self._show(shard, index, turn % self._num_rounds, (turn + 1) / (count + 1)):
                yield lines

    def _show(self, shard: int, index: int, turn: int, how_far: float) -> list[str]:
        """The position ``how_far`` through those of the sample that have a label; nothing when none has."""
        sample = self._shards.read(shard, index)
        sidecar = self._folder.sidecar(self._shards.manifest.shards[shard])
        record = sidecar.read(index * self._num_rounds + turn)
        inputs, labels = self._task.label([sample], [turn])
        if record.input_hash != hashes_and_lengths([sample], (inputs, labels))[0][0]:
            raise CacheError(
                f"{sidecar.address}: its targets for {sample.name} are not for the data of {self._shards.address}; "
                "give the --manifest that the cache was made for"
            )
        at = np.flatnonzero(labels != IGNORE)
        if not len(at):
            return []
        number = int(how_far * len(at))
        position = int(at[number])
        kept, tail = self._probabilities(self._reader.sound(sidecar, index * self._num_rounds + turn), number)
        return [
            f"{sample.name}, position {position}" + (f", round {turn}" if self._num_rounds > 1 else ""),
            *_row("context", self._context(sample, inputs, position)),
            *_row("label", self._word(int(labels[position]), kept)),
            *_row("kept", self._words(kept, tail)),
        ]

    def _context(self, sample: Sample, inputs: np.ndarray, position: int) -> str:
        """What the teacher saw of the same document before the position, and after it where the task shows that."""
        ends = np.cumsum(sample.document_tokens)
        end = int(ends[np.searchsorted(ends, position, side="right")])
        start = max(position - CONTEXT_TOKENS, 0, *(int(each) for each in ends[ends <= position]))
        if self._task.kind == "causal_lm":
            return _tail(self._text(inputs[start : position + 1]))
        after = self._text(inputs[position + 1 : min(end, position + CONTEXT_TOKENS)])
        seen = self._text(inputs[position : position + 1])
        half = CONTEXT_CHARACTERS // 2
        return f"{_tail(self._text(inputs[start:position]), half)} >>{seen}<< {after[:half]}"

    def _probabilities(self, decoded: Kept | States, number: int) -> tuple[dict[int, float], float | None]:
        """Of each id that is known at a position, the likeliest first; and the mass of all others, where it is kept."""
        if isinstance(decoded, States):
            head = self._folder.head()
            states = decoded.hidden[number : number + 1].to(head.weight.dtype)
            logits = head_logits(states, head, self._folder.identity.vocab_size)
            p, ids = torch.softmax(logits[0], dim=0).sort(descending=True)
            return dict(zip(ids.tolist(), p.tolist())), None
        here = decoded.positions == number
        pairs = sorted(zip(decoded.ids[here].tolist(), decoded.values[here].tolist()), key=lambda pair: -pair[1])
        return dict(pairs), None if decoded.tail is None else float(decoded.tail[number])

    def _words(self, kept: dict[int, float], tail: float | None) -> str:
        words = [self._word(token, kept) for token in list(kept)[:SHOWN_WORDS]]
        more = f" and {len(kept) - SHOWN_WORDS:,} more" if len(kept) > SHOWN_WORDS else ""
        return ", ".join(words) + more + ("" if tail is None else f"; all others {tail:.3f}")

    def _word(self, token: int, kept: dict[int, float]) -> str:
        """In quotes, so that its spaces are seen, and never broken over two lines."""
        word = json.dumps(self._text(np.array([token])), ensure_ascii=False)
        return f"{word} {kept[token]:.3f}".replace(" ", _UNBROKEN) if token in kept else f"{word}, not kept"

    def _text(self, ids: np.ndarray) -> str:
        return str(self._tokenizer.decode(ids.tolist()))


def _tail(text: str, characters: int = CONTEXT_CHARACTERS) -> str:
    return text if len(text) <= characters else "... " + text[-characters:]


def _row(name: str, value: str) -> list[str]:
    lines = textwrap.wrap(f"  {name:<9}{value}", COLUMNS, subsequent_indent=" " * 11, break_on_hyphens=False)
    return [line.replace(_UNBROKEN, " ") for line in lines]
