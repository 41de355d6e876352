"""Tokenizers: how they are loaded, what tells two of them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN_DIFFERENCES = 5


def load_tokenizer(path_or_id: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the hub. Raises ConfigError when there is none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path_or_id)
    except Exception as problem:  # transformers raises OSError, ValueError, ImportError and others by what is missing
        reason = " ".join(str(problem).split())[:300]
        raise ConfigError(
            f"cannot load a tokenizer from {path_or_id!r} ({type(problem).__name__}: {reason}); give a folder that "
            "save_pretrained wrote (tokenizer.json, tokenizer_config.json) or a hub id"
        ) from problem


def vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest id + 1: the rows that a model's embedding must have at least."""
    return max(tokenizer.get_vocab().values()) + 1


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what stored ids mean: every (token, id), added tokens too, and which of them are special.

    Versions, merges and normalisation are left out: they change how text is cut, not what an id stands for. So is the
    padding token: no shard holds it, and many tokenizers get one only when somebody batches with them.
    """
    vocabulary = tokenizer.get_vocab()
    special = {
        name: vocabulary[token]
        for name, token in tokenizer.special_tokens_map.items()
        if name != "pad_token" and token in vocabulary
    }
    digest = hashlib.sha256()
    for name, index in sorted(vocabulary.items()) + sorted(special.items()):
        digest.update(f"{name}\x00{index}\x00".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def pair_ids(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str | int, str | int]]) -> list[list[int]]:
    """The ids of pairs of tokens. Raises ConfigError for a text that is no single token, and for an id that is out of
    range or in two pairs."""
    vocabulary, num_ids = tokenizer.get_vocab(), vocab_size(tokenizer)
    found = [[_id_of(token, tokenizer, vocabulary, num_ids) for token in pair] for pair in pairs]
    flat = [each for pair in found for each in pair]
    if twice := sorted({each for each in flat if flat.count(each) > 1}):
        shown = tokenizer.convert_ids_to_tokens(twice[0])
        raise ConfigError(f"teacher.even_pairs: {shown!r} (id {twice[0]}) is given twice; a token can be in one pair")
    return found


def _id_of(token: str | int, tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int], num_ids: int) -> int:
    if isinstance(token, int):
        if not 0 <= token < num_ids:
            raise ConfigError(f"teacher.even_pairs: there is no id {token}; the tokenizer has {num_ids:,}")
        return token
    if token in vocabulary:
        return vocabulary[token]
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ConfigError(f"teacher.even_pairs: {token!r} is not one token of the tokenizer but {pieces}")
    return int(ids[0])


def compare_tokenizers(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase, names: tuple[str, str]) -> None:
    """Raises ConfigError, showing the first ids that differ, unless every id is the same token to both.

    Which tokens are special may differ: a base model and its chat model do not end a text with the same one.
    ``names`` say whose tokenizers they are, as in ("student", "teacher").
    """
    tokens_a, tokens_b = _tokens_by_id(a), _tokens_by_id(b)
    differing = [i for i in sorted(tokens_a.keys() | tokens_b.keys()) if tokens_a.get(i) != tokens_b.get(i)]
    if not differing:
        return
    shown = [f"id {i} is {tokens_a.get(i)!r} / {tokens_b.get(i)!r}" for i in differing[:_SHOWN_DIFFERENCES]]
    if len(differing) > len(shown):
        shown.append(f"and {len(differing) - len(shown):,} more")
    raise ConfigError(
        f"the tokenizers of {names[0]} and {names[1]} differ ({len(tokens_a):,} / {len(tokens_b):,} ids): "
        f"{'; '.join(shown)}; both must use the same tokenizer"
    )


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token for token, index in tokenizer.get_vocab().items()}
