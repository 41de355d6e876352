"""Which words a model's embeddings hold near a word: a quick look at what a student kept of its teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_NEAREST = 5


@torch.no_grad()
def nearest_words(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: Sequence[str], count: int = NUM_NEAREST
) -> list[list[tuple[str, float]]]:
    """For each word the ``count`` other tokens with the nearest input embeddings, and their cosines, best first.

    Raises ConfigError for a word that is not one token.
    """
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    ids = [single_id(tokenizer, word) for word in words]
    known = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    unit = torch.nn.functional.normalize(table.float(), dim=1)
    cosines = unit[ids] @ unit[known].t()
    found = []
    for own, row in zip(ids, cosines):
        best = row.topk(min(count + 1, len(known)))
        near = [(known[place], value) for value, place in zip(best.values.tolist(), best.indices.tolist())]
        found.append([(_word(tokenizer, index), value) for index, value in near if index != own][:count])
    return found


def single_id(tokenizer: PreTrainedTokenizerBase, word: str) -> int:
    """The id of a word that is one token, also where the tokenizer writes it with the blank before. Raises
    ConfigError."""
    vocabulary = tokenizer.get_vocab()
    for text in (word, f" {word}"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return int(ids[0])
    if word in vocabulary:
        return int(vocabulary[word])
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(word, add_special_tokens=False)["input_ids"])
    raise ConfigError(f"{word!r} is not one token of the tokenizer but {pieces}; choose a more common word")


def nearest_table(
    models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> list[str]:
    """A line for each word and model, as text."""
    found = {name: nearest_words(model, tokenizer, words) for name, model in models.items()}
    lines = []
    for place, word in enumerate(words):
        shared = set.intersection(*({near for near, _ in rows[place]} for rows in found.values()))
        lines.append(f"{word}: {len(shared)} of {NUM_NEAREST} in common")
        for name, rows in found.items():
            lines.append(f"  {name:<8} " + "  ".join(f"{near} {cosine:.2f}" for near, cosine in rows[place]))
    return lines


def _word(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    return str(tokenizer.decode([index])).strip() or repr(tokenizer.convert_ids_to_tokens(index))
