"""What tells two tokenizers apart, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.tasks.tokenizer import compare_tokenizers, fingerprint, load_tokenizer, vocab_size


def test_vocab_size_is_the_highest_id_and_one(decoder_tokenizer: Path) -> None:
    tokenizer = load_tokenizer(str(decoder_tokenizer))
    assert vocab_size(tokenizer) == 42
    tokenizer.add_tokens(["<more>"])
    assert vocab_size(tokenizer) == 43


def test_fingerprint_outlives_saving_and_padding(decoder_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(decoder_tokenizer))
    before = fingerprint(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = 7
    tokenizer.save_pretrained(tmp_path)
    assert fingerprint(load_tokenizer(str(tmp_path))) == before


def test_fingerprint_changes_with_what_ids_mean(decoder_tokenizer: Path, encoder_tokenizer: Path) -> None:
    found = {fingerprint(load_tokenizer(str(folder))) for folder in (decoder_tokenizer, encoder_tokenizer)}
    added = load_tokenizer(str(decoder_tokenizer))
    added.add_tokens(["<more>"])
    other_end = load_tokenizer(str(decoder_tokenizer))
    other_end.eos_token = "word7"
    found |= {fingerprint(added), fingerprint(other_end)}
    assert len(found) == 4


def test_comparison_shows_the_first_ids_that_differ(decoder_tokenizer: Path, encoder_tokenizer: Path) -> None:
    decoder, encoder = (load_tokenizer(str(folder)) for folder in (decoder_tokenizer, encoder_tokenizer))
    compare_tokenizers(decoder, load_tokenizer(str(decoder_tokenizer)), ("student", "teacher"))
    with pytest.raises(ConfigError) as caught:
        compare_tokenizers(decoder, encoder, ("student", "teacher"))
    told = str(caught.value)
    assert told.startswith("the tokenizers of student and teacher differ (42 / 45 ids): id 0 is '<unk>' / '[PAD]'; ")
    assert "and 40 more" in told


def test_comparison_lets_special_tokens_differ(decoder_tokenizer: Path) -> None:
    base, chat = load_tokenizer(str(decoder_tokenizer)), load_tokenizer(str(decoder_tokenizer))
    chat.eos_token = "word7"
    compare_tokenizers(base, chat, ("student", "teacher"))


def test_what_does_not_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot load a tokenizer from .*give a folder that save_pretrained wrote"):
        load_tokenizer(str(tmp_path))
